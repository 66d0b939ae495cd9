"""Imports point one way, nothing imports scripts/, and the JAX and the torch side never meet in a
package.
"""

import ast
from pathlib import Path

import pytest

import realgen_jax
from tests.helpers.goldens import ROOT


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import; write it out"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def breaks(file: Path, forbidden: tuple[str, ...]) -> list[str]:
    return [
        name
        for name in imports(file)
        if any(name == f or name.startswith(f + ".") for f in forbidden)
    ]


FORBIDDEN = {
    "realgen_jax": (
        "torch",
        "transformers",
        "diffusers",
        "peft",
        "reward_bridge",
        "realgen_scripts",
        "realgen_configs",
    ),
    "reward_bridge": ("realgen_jax", "realgen_scripts", "realgen_configs"),
}
# What a module or package of realgen_jax must not import, of realgen_jax
ARROWS = {
    "sde": ("",),
    "sharding": ("",),
    "nn": ("models", "rollout", "objectives", "training", "checkpoint", "data"),
    "rollout": ("nn", "models", "objectives", "training", "checkpoint", "data"),
    "windows": ("",),
    "data": ("rollout", "objectives", "models", "training"),
    "models": ("objectives", "training", "checkpoint", "data"),
    "objectives": ("nn", "models", "training", "checkpoint", "data"),
    "rewriter": ("models", "objectives", "training", "checkpoint"),
    "training": ("preflight", "realbench"),
}


@pytest.mark.parametrize("package", list(FORBIDDEN))
def test_packages_do_not_reach_across(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert not breaks(file, FORBIDDEN[package]), file
        if package == "reward_bridge" and file.name != "dlpack.py":
            assert not breaks(file, ("jax",)), file


@pytest.mark.parametrize("name", list(ARROWS))
def test_arrows_do_not_point_back(name):
    package = ROOT / "realgen_jax"
    files = (
        [package / f"{name}.py"]
        if (package / f"{name}.py").exists()
        else sorted((package / name).rglob("*.py"))
    )
    assert files
    forbidden = tuple(f"realgen_jax.{other}".rstrip(".") for other in ARROWS[name])
    for file in files:
        assert not breaks(file, forbidden), file


def test_the_check_finds_what_it_looks_for(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from torch.nn import Module\n")
    assert set(breaks(file, ("torch",))) == {"torch.nn", "torch.nn.Module"}
    assert not breaks(file, ("torchvision",))


def test_the_public_names_exist():
    for name in realgen_jax.__all__:
        assert getattr(realgen_jax, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = realgen_jax.nothing


def test_nothing_imports_a_script():
    """Not even another script: what two of them need is in a package."""
    scripts = {file.stem for file in (ROOT / "scripts").glob("*.py")}
    files = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    for package in ("realgen_jax", "reward_bridge", "configs"):
        files += (ROOT / package).rglob("*.py")
    assert len(files) > 100
    for file in files:
        assert not breaks(file, ("realgen_scripts", "scripts", *scripts)), file


def module_graph(package: str) -> dict[str, set[str]]:
    """{module: the modules of the package that it imports}, wherever in its file."""
    names = {}
    for file in (ROOT / package).rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = file
    graph = {}
    for name, file in names.items():
        graph[name] = {found for found in imports(file) if found in names and found != name}
    return graph


@pytest.mark.parametrize("package", ["realgen_jax", "reward_bridge"])
def test_no_circles(package):
    """Modules without what they import, taken away again and again, leave nothing."""
    graph = module_graph(package)
    assert len(graph) > 30
    while graph:
        leaves = [name for name, found in graph.items() if not found & graph.keys()]
        assert leaves, f"these import one another in a circle: {sorted(graph)}"
        for name in leaves:
            del graph[name]


def test_private_imports_of_jax_are_these():
    """Slurm's and other clusters' detection, and jax's check that cuDNN is installed."""
    private = []
    for package in ("realgen_jax", "reward_bridge", "scripts"):
        for file in (ROOT / package).rglob("*.py"):
            if breaks(file, ("jax._src",)):
                private.append(file.name)
    assert sorted(private) == ["hosts.py", "targets.py"]
