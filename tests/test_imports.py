"""Imports point one way, nothing imports scripts/, and the JAX and the torch side never meet in a package."""

import ast
from pathlib import Path

import pytest

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
# Files that still point the wrong way, until they are handed rewards and judges, or a model family
REACHES_ACROSS = {
    f"realgen_jax/{name}.py"
    for name in (
        "nn/convert", "nn/lora", "realbench/arena", "realbench/benchmark", "realbench/scores",
        "training/evaluation", "training/learning", "training/run", "training/scoring",
    )
} | {"reward_bridge/judges/human.py"}  # fmt: skip
# What a module or package of realgen_jax must not import, of realgen_jax
ARROWS = {
    "sde": ("",),
    "sharding": ("",),
    "nn": ("models", "rollout", "objectives", "training", "checkpoint", "data"),
    "rollout": ("nn", "models", "objectives", "training", "checkpoint", "data"),
    "data": ("rollout", "objectives", "models", "training"),
    "models": ("objectives", "training", "checkpoint", "data"),
    "objectives": ("nn", "models", "training", "checkpoint", "data"),
    "training": ("preflight", "realbench"),
}


@pytest.mark.parametrize("package", list(FORBIDDEN))
def test_packages_do_not_reach_across(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        if file.relative_to(ROOT).as_posix() in REACHES_ACROSS:
            continue
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
        if file.relative_to(ROOT).as_posix() not in REACHES_ACROSS:
            assert not breaks(file, forbidden), file


def test_the_check_finds_what_it_looks_for(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from torch.nn import Module\n")
    assert set(breaks(file, ("torch",))) == {"torch.nn", "torch.nn.Module"}
    assert not breaks(file, ("torchvision",))
