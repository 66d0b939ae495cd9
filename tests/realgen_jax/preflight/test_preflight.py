"""scripts/preflight.py as it is run: its figures by hand, its errors, and advice that is followed."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest

from tests.helpers.goldens import ROOT

GIB = 2**30


def preflight(*options, preset="flux_dev_8xh200"):
    program, config = ROOT / "scripts" / "preflight.py", f"{ROOT}/configs/flux_grpo.py:{preset}"
    env = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, program, "--config", config, *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=env,
    )


def test_flux_dev_by_hand(tmp_path):
    file = tmp_path / "figures.json"
    done = preflight("--config.pretrained.model=models/none", f"--json={file}")
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 6e6  # KiB
    figures = json.loads(file.read_text())
    d, layers, single = 3072, 19, 38
    block = (
        12 * d * d + 9 * d + 2 * 128
    )  # weights and biases of a stream (qkv, proj, fc1, fc2) and its norms' scales
    one = 12 * d * d + 8 * d + 2 * 128
    weights = layers * 2 * (block + 6 * d * d + 6 * d) + single * (one + 3 * d * d + 3 * d)
    weights += (
        (64 + 4096) * d + 2 * d + 2 * (256 * d + d * d + 2 * d) + 768 * d + d * d + 2 * d
    )  # img, txt; embedders
    weights += 2 * d * d + 2 * d + 64 * d + 64
    assert figures["bytes"]["held"]["transformer"] == 2 * weights
    adapters = (layers * 36 + single * 6) * d * 64
    assert figures["bytes"]["held"]["trained"] == 4 * adapters
    assert figures["bytes"]["held"]["optimizer"] == 8 * adapters + 4  # and the count of steps
    assert (figures["images"], figures["prompts"], figures["mean_prefix"]) == (504, 24, 7)
    forward = figures["flops"]["forward"]
    assert sum(forward.values()) - forward["lora"] == pytest.approx(74.4e12, rel=2e-3)
    # 24 calls: 7 slots for 7 steps, 21 images for the other 21
    assert figures["flops"]["rollout"] == pytest.approx(
        24 * (7 * 7 + 21 * 21) * sum(forward.values())
    )
    h200 = figures["accelerators"]["H200 SXM"]
    assert h200["seconds"] == pytest.approx(figures["flops"]["total"] / (7 * 989e12 * 0.4))
    assert h200["fits"]
    latents = 3 * 4096 * 64 * 4
    assert figures["bytes"]["sample"]["trajectories"] == 24 * 15 * latents
    # what the update reads: weights, the state and its step, 12 calls without their log-probabilities
    held = sum(figures["bytes"]["held"].values()) - figures["bytes"]["held"]["autoencoder"] + 4
    calls = 12 * (15 * latents + 512 * 4096 * 2 + 768 * 2 + 4 + 3 * 4 + 5 * 7 * 4)
    assert figures["bytes"]["arguments_by_xla"]["update"] == held + calls
    assert "models/none: no such folder; the sizes are those of FLUX.1-dev" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--config.mesh.fsdp=7",), "does not divide by mesh axis fsdp=7"),
        (("--config.sample.train_batch_size=20",), "cannot be divided into groups"),
        (("--devices=6",), "train_batch_size 21 must be a multiple of branches x 6"),
        (("--config.sample.sde_window_size=30",), "a window of 30 steps does not fit"),
        (("--config.pretrained.vae_dtype=int8",), "config.pretrained.vae_dtype is 'int8'"),
    ],
)
def test_what_does_not_fit_together_is_told_in_one_line(options, said):
    done = preflight("--nocompile", *options)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_advice_fits_when_it_is_followed(tmp_path):
    """A TPU v6e holds 31 GiB: too little for the weights whole."""
    options = [
        "--nocompile",
        "--devices=8",
        "--config.mesh.fsdp=1",
        f"--json={tmp_path / 'figures.json'}",
    ]
    before = preflight(*options, preset="flux_dev_8xh200_remote")
    assert before.returncode == 0, before.stderr
    assert not json.loads((tmp_path / "figures.json").read_text())["accelerators"]["TPU v6e"][
        "fits"
    ]
    change, promised = re.search(
        r"TPU v6e.*?fits with (.*?)\n.*?in all [\d.]+ -> ([\d.]+)\)", before.stdout, re.DOTALL
    ).groups()
    after = preflight(*options, *change.split(), preset="flux_dev_8xh200_remote")
    assert after.returncode == 0, after.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["accelerators"]["TPU v6e"]["fits"]
    assert figures["bytes"]["peak"] / GIB == pytest.approx(float(promised), abs=0.05)
    assert "fits with" not in after.stdout


def test_nothing_of_torch_is_loaded():
    code = (
        "import sys; from realgen_jax.preflight import report, tables, advice; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "said"),
    [
        # 504 pairs in steps of 16, at most 20 times over; 1000 pairs of 518 x 518 x 3 bytes
        (
            "flux_adv_8xh200",
            ["omniaid learns: up to 640 steps", "omniaid_dino learns", "16 + 16 pairs", "1.5 GiB"],
        ),
        (
            "flux_dino_adv",
            ["up to 1 steps in such an epoch, of 672 + 0 pairs", "rests in 9 of 10 epochs"],
        ),
    ],
)
def test_rewards_that_learn_are_counted(preset, said):
    done = preflight("--config.pretrained.model=models/none", "--nocompile", preset=preset)
    assert done.returncode == 0, done.stderr
    for text in said:
        assert text in done.stdout
