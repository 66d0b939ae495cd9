"""The programs of benchmarks/ at toy size: that they run where little is installed, and what does not hang on time."""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from realgen_configs.flux_grpo import get_config
from tests.helpers.goldens import ROOT

BENCHMARKS = ROOT / "benchmarks"
# What a GPU machine may lack. optax itself imports absl.
ABSENT = (
    "diffusers",
    "grain",
    "clu",
    "ml_collections",
    "orbax",
    "tensorstore",
    "torch",
    "transformers",
    "peft",
    "PIL",
)
PROGRAM = """
import runpy, sys

class Bare:
    "A finder of modules that knows nothing of some."
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *where):
        return None if name.split(".")[0] in {absent} else self.finder.find_spec(name, *where)

sys.meta_path[:] = map(Bare, sys.meta_path)
sys.argv = [{program!r}, "--size", "tiny", "--out", {out!r}]
runpy.run_path({program!r}, run_name="__main__")
"""


def run(name, out):
    """What the program printed, and its JSON."""
    where = {
        "absent": ABSENT,
        "folder": str(BENCHMARKS),
        "program": str(BENCHMARKS / name),
        "out": str(out),
    }
    env = os.environ | {
        "PYTHONPATH": str(BENCHMARKS.parent),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    code = PROGRAM.format(**where)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    return done.stdout, json.loads(file.read_text())


def numbers(found):
    if isinstance(found, dict | list):
        return [
            n
            for one in (found.values() if isinstance(found, dict) else found)
            for n in numbers(one)
        ]
    return [found] if isinstance(found, int | float) else []


@pytest.mark.slow
def test_flux_gpu(tmp_path):
    """Every part, on a CPU, without what a bare GPU machine lacks."""
    printed, found = run("flux_gpu.py", tmp_path)
    assert "failed" not in json.dumps(found), found
    assert list(found)[2:] == [
        "size",
        "torch",
        "product",
        "sampling",
        "rollout",
        "update",
        "iteration",
    ]
    assert "skipped" in found["torch"]
    assert set(found["sampling"]) == {"1", "4", "decode"}
    assert set(found["rollout"]) == {"3"}
    assert {"full 3", "dots 3", "none 3"} <= set(found["update"])
    assert set(found["iteration"]["parts"]) == {"rollout", "decode", "update"}
    assert all(math.isfinite(n) and n > 0 for n in numbers(found))
    expected = {"seconds", "flops", "tflops", "planned_bytes", "lower_seconds", "compile_seconds"}
    for one in (*found["sampling"].values(), *found["rollout"].values(), *found["update"].values()):
        assert expected <= set(one)
    assert all(
        "cached_compile_seconds" in next(iter(found[p].values()))
        for p in ("sampling", "rollout", "update")
    )
    assert "RealGen's iteration, 504 images on 7 GPUs" in printed


@pytest.mark.slow
def test_scaling(tmp_path):
    """A deeper model is no longer program, and a run compiles nothing after its first iteration."""
    _, found = run("scaling.py", tmp_path)
    for name in ("sampling", "update"):
        shallow, deep = (row["instructions"] for row in found["compile"][name]["depths"])
        assert deep == pytest.approx(shallow, rel=0.01)
    once = found["run"]
    assert (once["iterations"], once["later_traces"], once["later_compilations"]) == (20, 0, 0)
    assert once["window_starts"] > 1
    assert once["compilations"] > 1
    assert {"batch": 1} | found["sweeps"]["batch"][0] == found["sweeps"]["batch"][0]
    assert all(
        math.isfinite(n) and n > 0 for n in numbers(found["sweeps"]) + numbers(found["compile"])
    )


def test_sizes_are_the_recipes(monkeypatch):
    """flux_gpu.py cannot read the config where ml_collections is missing, and so has its numbers by hand."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import flux_gpu

    size, c = flux_gpu.SUITES["full"].size, get_config("flux_dev_8xh200")
    assert (16 * size.side, size.text, size.steps) == (
        c.sample.resolution,
        c.prompts.max_tokens,
        c.sample.num_steps,
    )
    assert (size.window, size.bounds) == (
        c.sample.sde_window_size,
        tuple(c.sample.sde_window_range),
    )
    assert (size.branches, size.rank) == (c.sample.branches, c.train.lora_rank)
    assert c.sample.train_batch_size * c.sample.num_batches_per_epoch == flux_gpu.IMAGES
    assert c.preflight.devices == flux_gpu.GPUS
    assert jnp.dtype(c.pretrained.dtype) == size.model.dtype


def test_flux_gpu_lowers_at_full_size(monkeypatch):
    """The very programs, for CUDA, with nothing in memory; cuDNN is not here, so attention is XLA's."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import workload

    size = workload.Size()
    assert sum(a.size for a in jax.tree.leaves(workload.weights(size))) > 11e9
    for program, flops in (
        (workload.sampling(size, 4), 4 * 28 * 74.4e12),
        (workload.rollouts(size, 1), (7 + 3 * 21) * 76e12),
        (workload.updating(size, 1), 3 * 7 * 244e12),
    ):
        program.call.trace(*program.arguments).lower(lowering_platforms=("cuda",))
        assert program.flops == pytest.approx(flops, rel=0.03)


@pytest.mark.slow
def test_peers_agree():
    """peers.py compares before it times: pictures, trajectories, gradients and adapters are those of the peers."""
    words = "--sizes", "tiny", "--peers", "eager", "--repeats", "1", "--no_save"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "peers.py", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()[-4:]] == [
        ["tiny", part] for part in ("sampling", "rollout", "update", "iteration")
    ]
