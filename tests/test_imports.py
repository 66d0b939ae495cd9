"""Imports point one way: sde, flux, sharding <- rollout <- grpo <- scripts; the JAX and the torch side never meet."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
    return [name for name in imports(file) if any(name == f or name.startswith(f + ".") for f in forbidden)]


FORBIDDEN = {
    "realgen_jax": ("torch", "transformers", "diffusers", "peft", "reward_bridge", "scripts", "configs"),
    "reward_bridge": ("realgen_jax", "scripts", "configs"),
}
NO_MODEL = ("realgen_jax.flux", "realgen_jax.checkpoint", "realgen_jax.data")
FILE_FORBIDDEN = {
    "sde.py": ("realgen_jax",),
    "sharding.py": ("realgen_jax",),
    "rollout.py": (*NO_MODEL, "realgen_jax.grpo"),
    "grpo.py": NO_MODEL,
    "data.py": ("realgen_jax.grpo", "realgen_jax.rollout"),
}


@pytest.mark.parametrize("package", list(FORBIDDEN))
def test_packages_do_not_reach_across(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert not breaks(file, FORBIDDEN[package]), file
        if package == "reward_bridge" and file.name != "dlpack.py":
            assert not breaks(file, ("jax",)), file


def test_arrows_do_not_point_back():
    for name, forbidden in FILE_FORBIDDEN.items():
        file = ROOT / "realgen_jax" / name
        if file.exists():
            assert not breaks(file, forbidden), file
    for file in (ROOT / "realgen_jax" / "flux").glob("*.py"):
        assert not breaks(file, ("realgen_jax.grpo", "realgen_jax.checkpoint", "realgen_jax.data")), file


def test_the_check_finds_what_it_looks_for(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from torch.nn import Module\n")
    assert set(breaks(file, ("torch",))) == {"torch.nn", "torch.nn.Module"}
    assert not breaks(file, ("torchvision",))
