"""The benchmarks at toy size: they run with few packages, and what does not depend on time."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from realgen_configs import flux_grpo
from realgen_jax.nn.tokens import unpack
from tests.helpers.goldens import GOLDENS, ROOT, golden

SD3_PIPELINE = GOLDENS / "12_sd3" / "pipeline"

BENCHMARKS = ROOT / "benchmarks"
# Packages that a GPU machine may lack. optax itself imports absl.
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
# Rematerialisation policies, each of which keeps more than the one before.
KEEPS_MORE = ("full", "dots", "none")
PROGRAM = """
import runpy, sys

class Bare:
    "A finder of modules that does not find some."
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
    """Run a program without the absent packages; returns what it printed, and its JSON."""
    code = PROGRAM.format(absent=ABSENT, program=str(BENCHMARKS / name), out=str(out))
    env = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{BENCHMARKS}",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = out.iterdir()
    return done.stdout, json.loads(file.read_text())


def numbers(results):
    """All numbers in nested dictionaries and lists."""
    if isinstance(results, dict):
        results = list(results.values())
    if isinstance(results, list):
        found = []
        for value in results:
            found += numbers(value)
        return found
    return [results] if isinstance(results, int | float) else []


@pytest.mark.slow
def test_flux_gpu(tmp_path):
    """All parts run on a CPU, without the packages that a bare GPU machine lacks."""
    printed, results = run("flux_gpu.py", tmp_path)
    assert "failed" not in json.dumps(results), results
    parts = ["torch", "product", "sampling", "rollout", "update", "iteration"]
    assert list(results)[2:] == ["size", *parts]
    assert "skipped" in results["torch"]
    assert set(results["sampling"]) == {"1", "4", "decode"}
    assert set(results["rollout"]) == {"3"}
    assert {"full 3", "dots 3", "none 3"} <= set(results["update"])
    assert set(results["iteration"]["parts"]) == {"rollout", "decode", "update"}
    assert all(math.isfinite(n) and n > 0 for n in numbers(results))

    # Every program has its figures; the first of each part was also compiled from the cache.
    expected = {"seconds", "flops", "tflops", "planned_bytes", "lower_seconds", "compile_seconds"}
    for part in ("sampling", "rollout", "update"):
        programs = list(results[part].values())
        assert "cached_compile_seconds" in programs[0]
        for program in programs:
            assert expected <= set(program)

    # Every update has its own rematerialisation policy: the more is kept, the more memory.
    planned = [results["update"][f"{policy} 3"]["planned_bytes"] for policy in KEEPS_MORE]
    assert planned == sorted(set(planned))
    assert "RealGen's iteration, 504 images on 7 GPUs" in printed


@pytest.mark.slow
def test_scaling(tmp_path):
    """A deeper model has no longer program, and nothing is compiled after the first iteration."""
    _, results = run("scaling.py", tmp_path)
    for name in ("sampling", "update"):
        shallow, deep = (row["instructions"] for row in results["compile"][name]["depths"])
        assert deep == pytest.approx(shallow, rel=0.01)

    counts = results["run"]
    assert counts["iterations"] == 20
    assert (counts["later_traces"], counts["later_compilations"]) == (0, 0)
    assert counts["window_starts"] > 1
    assert counts["compilations"] > 1

    assert results["sweeps"]["batch"][0]["batch"] == 1
    measured = numbers(results["sweeps"]) + numbers(results["compile"])
    assert all(math.isfinite(n) and n > 0 for n in measured)


def test_sizes_are_the_recipes(monkeypatch):
    """flux_gpu.py repeats the config's numbers, because ml_collections may not be installed."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import flux_gpu

    size = flux_gpu.SUITES["full"].size
    config = flux_grpo.flux_dev_8xh200()
    sample = config.sample
    assert 16 * size.side == sample.width == sample.height
    assert size.text == config.prompts.max_tokens
    assert size.steps == sample.num_steps
    assert size.window == sample.sde_window_size
    assert size.bounds == tuple(sample.sde_window_range)
    assert size.branches == sample.branches
    assert size.rank == config.train.lora_rank
    assert sample.train_batch_size * sample.num_batches_per_epoch == flux_gpu.IMAGES
    assert config.preflight.devices == flux_gpu.GPUS
    assert jnp.dtype(config.pretrained.dtype) == size.model.dtype


@pytest.mark.slow
def test_flux_gpu_lowers_at_full_size(monkeypatch):
    """The programs lower for CUDA without any array; attention is XLA's, as cuDNN is missing."""
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


def test_guidance_in_torch_is_the_recorded(monkeypatch):
    """The PyTorch side of peers.py: a guided rollout with cps, and both forms of its gradient."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    torch = pytest.importorskip("torch")
    import torch_peer
    from torch_families import TORCH_FAMILIES

    # The model, and the conditioning with the negative prompt's rows first.
    family = TORCH_FAMILIES["StableDiffusion3Pipeline"]
    adapted = {"transformer_blocks.0.attn.to_q.lora_A": np.zeros(())}
    model = torch_peer.load(family, SD3_PIPELINE, adapted, 2, 4.0, 4, compiled=False)
    arrays = {name: torch.from_numpy(a) for name, a in golden("12_sd3/rollout_cps.npz").items()}
    n = len(arrays["init_latents"])
    rows = []
    for name in ("prompt_embeds", "pooled_prompt_embeds"):
        negative = arrays[f"negative_{name}"].repeat_interleave(n, dim=0)
        rows.append(torch.cat([negative, arrays[name]]))
    cond = torch_peer.TorchCond(tuple(rows), 4.5)

    # The rollout.
    sample = SimpleNamespace(branches=1, sde_type="cps", noise_level=0.8)
    sigmas = arrays["sigmas"]
    inputs = (arrays["init_latents"], arrays["window_noise"], sigmas, cond)
    _, record = torch_peer.rollout(model, *inputs, 0, sample)
    latents = arrays["latents"].transpose(0, 1)
    torch.testing.assert_close(record["x_next"], latents[1:], rtol=1e-4, atol=2e-4)
    means = arrays["prev_sample_mean"].transpose(0, 1)
    torch.testing.assert_close(record["mean"], means, rtol=1e-4, atol=2e-4)

    # The gradients. The recorded log-probabilities leave out the variance.
    weights = dict(model.transformer.base_model.model.named_parameters())
    for form, detached in (("grad", False), ("grad_detached", True)):
        total = 0.0
        prefix = f"replay/{form}/"
        names = [name.removeprefix(prefix) for name in arrays if name.startswith(prefix)]
        trained = []
        for name in names:
            adapted_name = name.replace(".weight", ".base_layer.weight")
            trained.append(weights[name if name in weights else adapted_name])
            trained[-1].requires_grad_(True)
        for j in range(2):
            half = replace(cond, detached=detached)
            v = torch_peer.velocity(model, latents[j], sigmas[j], half)
            mean, _ = torch_peer.cps(v, latents[j], sigmas, j, 0.8)
            logp = -((latents[j + 1] - mean) ** 2).flatten(1).mean(dim=1)
            total = total + (arrays["cotangent"] * logp).sum() / 2
        for name, gradient in zip(names, torch.autograd.grad(total, trained), strict=True):
            expected = arrays[prefix + name]
            largest = float(expected.abs().max())
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * largest)


def test_both_forms_of_latents_are_inverse(monkeypatch):
    """Tokens -> diffusers' latents -> tokens, in our own order of channels."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    torch = pytest.importorskip("torch")
    import torch_peer
    from torch_families import TORCH_FAMILIES

    tokens = np.random.default_rng(0).standard_normal((2, 3, 16, 64)).astype(np.float32)
    model = torch_peer.TorchModel(TORCH_FAMILIES["StableDiffusion3Pipeline"], None, None, 4)
    latents = torch_peer.from_tokens(model, torch.from_numpy(tokens))
    expected = np.moveaxis(unpack(tokens.reshape(6, 16, 64), 4, 4), -1, 1)
    np.testing.assert_array_equal(latents.numpy().reshape(6, 16, 8, 8), expected)
    np.testing.assert_array_equal(torch_peer.to_tokens(model, latents).numpy(), tokens)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_peers_agree(family):
    """peers.py compares pictures, trajectories, gradients and adapters before it times."""
    options = ("--families", family, "--sizes", "tiny", "--peers", "eager", "--repeats", "1")
    command = [sys.executable, BENCHMARKS / "peers.py", *options, "--no_save"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = ["sampling", "rollout", "update", "iteration"]
    if family == "sd3":
        parts.append("update_bound")
    rows = [line.split()[:3] for line in done.stdout.splitlines()[-len(parts) :]]
    assert rows == [[family, "tiny", part] for part in parts]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "packages"), [("cpu", ("transformers", "peft")), ("gpu", ())])
def test_rewriter(tmp_path, part, packages):
    """Both parts at toy size; on a CPU the two sides compute the same."""
    for package in packages:
        pytest.importorskip(package)
    program = str(BENCHMARKS / "rewriter.py")
    options = ["--part", part, "--size", "tiny", "--repeats", "1", "--out", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{BENCHMARKS}"}
    done = subprocess.run(
        [sys.executable, program, *options], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.iterdir()
    results = json.loads(file.read_text())
    assert all(math.isfinite(n) and n >= 0 for n in numbers(results))
    for name in ("decode", "update"):
        assert "goal" in results[name]
    if part == "cpu":
        assert results["differences"]["log_probs"] < 1e-4
        assert results["differences"]["gradient"] < 1e-3


def test_rewriter_formulas(monkeypatch):
    """Of Qwen3-4B, by hand: 8.04 GB of weights and a cache of 147 kB a place; 2 x 36 blocks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import rewriter_case

    size = rewriter_case.SIZES["gpu"]
    assert rewriter_case.decode_bytes(size) / 384 == pytest.approx(8.04e9 + 2.42e9, rel=0.01)
    tokens = 32 * 704
    blocks = 2 * 2 * tokens * 3.633e9
    head = 2 * 2 * 32 * 384 * 0.389e9
    assert rewriter_case.update_flops(size) == pytest.approx(blocks + head, rel=0.1)


@pytest.mark.slow
def test_rewriter_lowers_at_full_size(monkeypatch):
    """Both programs lower for CUDA without any array; attention is XLA's, as cuDNN is missing."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import rewriter_case

    size = rewriter_case.SIZES["gpu"]
    generate, update, arguments = rewriter_case.abstract_programs(size)
    for call, given in zip((generate, update), arguments, strict=True):
        text = call.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
        assert "stablehlo.while" in text
