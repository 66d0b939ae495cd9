"""Preflight: its figures by hand, its errors, and its advice followed."""

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace

import pytest

from realgen_configs import flux_objectives, sd3_grpo, small_cards, zimage_grpo
from realgen_configs.flux_grpo import get_config
from realgen_jax.models.cost import decode_flops, velocity_flops
from realgen_jax.preflight.advice import changes, endpoints, learners
from realgen_jax.preflight.report import make_report
from realgen_jax.preflight.tables import show
from realgen_jax.training.programs import make_recipe
from tests.helpers.goldens import ROOT

GIB = 2**30

# FLUX.1-dev: width, double and single blocks, image and text tokens.
D = 3072
DOUBLE = 19
SINGLE = 38
IMAGE_TOKENS = 4096
TEXT_TOKENS = 512
LATENTS = 3 * IMAGE_TOKENS * 64 * 4  # bytes, of the three images of a device


def preflight(*options, preset="flux_dev_8xh200", file="flux_grpo"):
    """Run the program."""
    config = f"{ROOT}/configs/{file}.py:{preset}"
    command = [sys.executable, ROOT / "scripts" / "preflight.py", "--config", config, *options]
    env = os.environ | {"COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


def flux_weights():
    """The number of FLUX.1-dev's weights."""
    # Weights and biases of qkv, proj, fc1 and fc2, the scales of the norms, and the modulation.
    stream = 12 * D * D + 9 * D + 2 * 128 + 6 * D * D + 6 * D
    single = 12 * D * D + 8 * D + 2 * 128 + 3 * D * D + 3 * D
    # The projections of images and text, the embedders of time, guidance and CLIP, and the output.
    ends = (64 + 4096) * D + 2 * D
    embedders = 2 * (256 * D + D * D + 2 * D) + 768 * D + D * D + 2 * D
    output = 2 * D * D + 2 * D + 64 * D + 64
    return DOUBLE * 2 * stream + SINGLE * single + ends + embedders + output


def test_flux_dev_by_hand(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    config = get_config("flux_dev_8xh200")
    config.pretrained.model = "models/none"
    report = make_report(config, 7)
    figures = show(report, {}, 0.4, False, lambda report, room: ([], []))
    printed = capsys.readouterr().out
    assert "models/none: no such folder; using the sizes of FLUX.1-dev" in printed
    assert "7 devices cannot split the weights' width of 3072 (mesh.fsdp); 6 or 8 can." in printed
    assert (figures["images"], figures["prompts"], figures["mean_prefix"]) == (504, 24, 7)

    # Memory: bfloat16 weights, float32 adapters with two moments each and the count of steps.
    adapters = (DOUBLE * 36 + SINGLE * 6) * D * 64
    held = figures["bytes"]["held"]
    assert held["transformer"] == 2 * flux_weights()
    assert held["trained"] == 4 * adapters
    assert held["optimizer"] == 8 * adapters + 4
    assert figures["bytes"]["sample"]["trajectories"] == 24 * 15 * LATENTS

    # Operations of a forward pass: 24 D^2 T and 4 T^2 D a block, and the ends.
    forward = figures["flops"]["forward"]
    blocks = DOUBLE + SINGLE
    tokens = IMAGE_TOKENS + TEXT_TOKENS
    ends = 2 * D * (IMAGE_TOKENS * 2 * 64 + TEXT_TOKENS * 4096)
    assert forward["matmul"] == pytest.approx(blocks * 24 * D**2 * tokens + ends)
    assert forward["attention"] == blocks * 4 * tokens**2 * D
    assert sum(forward.values()) - forward["lora"] == pytest.approx(74.4e12, rel=2e-3)

    # 24 calls: 7 slots for 7 steps, then 21 images for the other 21.
    rollout = 24 * (7 * 7 + 21 * 21) * sum(forward.values())
    assert figures["flops"]["rollout"] == pytest.approx(rollout)

    # Time on 7 devices at 40 % of the peak.
    h200 = figures["accelerators"]["H200 SXM"]
    assert h200["seconds"] == pytest.approx(figures["flops"]["total"] / (7 * 989e12 * 0.4))
    assert h200["fits"]


def test_host_memory_by_hand(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    config = small_cards.get_config("flux_dev_1x24gb_offload")
    report = make_report(config, 1)
    kernels = 2 * (DOUBLE * 24 + SINGLE * 12) * D * D
    adapters = (DOUBLE * 36 + SINGLE * 6) * D * 64
    decoder = report.host["autoencoder"]
    assert report.host == {
        "transformer": kernels,
        "autoencoder": decoder,
        "EMA": 4 * adapters,
        "optimizer": 8 * adapters,
    }
    assert report.held["transformer"] == 2 * flux_weights() - kernels
    assert [report.held[name] for name in ("autoencoder", "EMA", "optimizer")] == [0, 0, 4]

    figures = show(report, {}, 0.4, False, lambda report, room: ([], []))
    assert figures["bytes"]["host"] == report.host
    printed = capsys.readouterr().out
    assert "device: transformer 16.03, autoencoder 0.31, EMA 0.67, optimizer 1.34." in printed
    assert f"copies 16.0 GiB of weights to the device: {kernels / 25e9:.3g} s at 25" in printed

    # Three images at 40 % of 165 TFLOP/s.
    seconds = 3 * sum(figures["flops"]["forward"].values()) / 66e12
    assert f"forward for one call: RTX 4090 {seconds:.3g} s, L40S" in printed
    assert "HOST_MEMORY_LIMIT" not in printed


def test_guidance_and_attention_on_tpus_are_reported(capsys, monkeypatch):
    """SD3's heads have 64 channels, half of what the TPU's kernel takes."""
    monkeypatch.setenv("COLUMNS", "400")
    report = make_report(sd3_grpo.get_config("adv_dino_8xh200"), 8)
    figures = show(report, {}, 0.4, False, lambda report, room: ([], []))
    printed = capsys.readouterr().out
    assert "models/SD3.5-M: no such folder; using the sizes of SD3.5-M" in printed
    assert "Guidance of 4.5: each velocity takes two passes of the transformer" in printed
    assert "the gradient goes through both." in printed
    assert (figures["passes"], figures["cfg_gradient"]) == (2, "both")

    # 16 rows of 24 heads on a device: 77 + 128 tokens of text and 32 x 32 of the image.
    scores = 16 * 24 * (77 + 128 + 32 * 32) ** 2 * 4
    assert "here 1229 and 64" in printed
    assert f"{scores / GIB:.1f} GiB for one block" in printed
    on_gpu = figures["accelerators"]["H200 SXM"]["peak"]
    assert on_gpu == figures["bytes"]["peak"]
    assert figures["accelerators"]["TPU v5p"]["peak"] > on_gpu + scores


def test_nothing_is_said_of_guidance_and_kernels_without_need(capsys):
    """Z-Image-Turbo has one pass, and heads of 128 channels."""
    report = make_report(zimage_grpo.get_config("realgen_v2_turbo_8xh200"), 8)
    figures = show(report, {}, 0.4, False, lambda report, room: ([], []))
    printed = capsys.readouterr().out
    assert "Guidance" not in printed
    assert "On a TPU" not in printed
    assert (figures["passes"], figures["cfg_gradient"]) == (1, "")

    # On a TPU, XLA turns the kernels before heads and norms: 30 layers, and 4 of the refiners.
    h200, tpu = (figures["accelerators"][name]["peak"] for name in ("H200 SXM", "TPU v5p"))
    assert h200 == figures["bytes"]["peak"]
    turned = 30 * 3840 * (4 * 3840 + 10240) + 4 * 3840 * 3 * 3840
    assert tpu - h200 == 2 * turned


def test_evaluations_have_costs_of_their_own():
    """At 1024 pixels and 28 steps, while rollouts have 512 pixels and 10 steps."""
    config = flux_objectives.get_config("flux_nft_8xh200")
    report = make_report(config, 7)
    assert (report.evaluation.image_tokens, report.work.image_tokens) == (64**2, 32**2)
    flops = velocity_flops(report.evaluation)
    forward = sum(flops.values())
    assert forward - flops["lora"] == pytest.approx(74.4e12, rel=2e-3)
    sampled = 56 * (28 * forward + decode_flops(report.evaluation))
    assert report.flops["evaluation"] == pytest.approx(sampled)
    iteration = report.flops["rollout"] + report.flops["decode"] + report.flops["update"]
    assert report.flops["total"] == pytest.approx(iteration)

    # 8 pictures on a device, of which 3 bytes a pixel wait for scores.
    phase = report.phases["evaluation"]
    assert phase["pictures"] == 8 * 3 * 1024**2
    with config.unlocked():
        config.sample.test_batch_size = 560
    more = make_report(config, 7)
    assert more.phases["evaluation"]["pictures"] == 10 * phase["pictures"]
    assert more.peak == sum(more.held.values()) + max(
        sum(phase.values()) for phase in more.phases.values()
    )


def test_previews_and_cached_steps_are_counted():
    config = flux_objectives.get_config("flux_nft_8xh200")
    plain = make_report(config, 7)
    with config.unlocked():
        config.sample.scout.update(previews=56, num_steps=3)
        config.sample.cached_steps = 1
    report = make_report(config, 7)

    # Of the 10 steps of a rollout, 0, 1, 3, 5, 7 and 9 compute a velocity.
    assert report.flops["rollout"] == pytest.approx(0.6 * plain.flops["rollout"])
    forward = sum(velocity_flops(report.work).values())
    previews = report.recipe.layout.groups * 56
    one = 3 * forward + decode_flops(report.work)
    assert report.flops["previews"] == pytest.approx(previews * one)
    rest = report.flops["rollout"] + report.flops["decode"] + report.flops["update"]
    assert report.flops["total"] == pytest.approx(rest + previews * one)

    # 3 bytes a pixel of every preview wait for scores.
    assert report.phases["previews"]["pictures"] == previews / 7 * 3 * 512**2
    assert "previews" not in plain.phases


def test_of_several_sizes_the_largest_counts(capsys):
    config = get_config("tiny")
    with config.unlocked():
        config.sample.buckets = ((64, 64), (64, 96), (80, 64))
    report = make_report(config, 1)
    assert (report.model.width, report.model.height) == (4, 6)
    assert report.work.image_tokens == 24
    assert report.evaluation.image_tokens == 16
    show(report, {}, 0.4, True, lambda report, room: ([], []))
    assert "64 x 96 pixels, its largest size" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "preset"),
    [("sd3_grpo", name) for name in sd3_grpo.PRESETS if "tiny" not in name]
    + [("zimage_grpo", name) for name in zimage_grpo.PRESETS]
    + [("flux_objectives", name) for name in flux_objectives.PRESETS]
    + [("small_cards", name) for name in small_cards.PRESETS],
)
def test_other_families_and_objectives_compile_on_paper(file, preset):
    done = preflight("--config.pretrained.model=models/none", preset=preset, file=file)
    assert done.returncode == 0, done.stderr
    assert "Both programs compile for this mesh." in done.stdout


@pytest.mark.slow
def test_flux_dev_compiles_on_paper(tmp_path):
    """At full size, within 6 GB of memory; XLA's arguments are those of the formulas."""
    file = tmp_path / "figures.json"
    done = preflight("--config.pretrained.model=models/none", f"--json={file}")
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert "models/none: no such folder; using the sizes of FLUX.1-dev" in done.stdout
    assert "Both programs compile for this mesh." in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 6e6  # KiB

    # What the update reads: weights, the state and its step, 12 calls without log-probabilities.
    held = figures["bytes"]["held"]
    state = sum(held.values()) - held["autoencoder"] + 4
    embeddings = TEXT_TOKENS * 4096 * 2 + 768 * 2 + 4
    advantages = 3 * 4
    steps = 5 * 7 * 4
    calls = 12 * (15 * LATENTS + embeddings + advantages + steps)
    assert figures["bytes"]["arguments_by_xla"]["update"] == state + calls


@pytest.mark.parametrize(
    ("change", "devices", "message"),
    [
        ({"mesh.fsdp": 7}, 7, "is not divisible by mesh axis fsdp=7"),
        ({"sample.train_batch_size": 20}, 7, "cannot be divided into groups"),
        ({}, 6, "train_batch_size 21 must be a multiple of branches x 6"),
        ({"sample.sde_window_size": 30}, 7, "sde_window_size 30 does not fit"),
    ],
)
def test_sizes_that_do_not_fit_together_are_an_error(change, devices, message):
    config = get_config("flux_dev_8xh200")
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message) as raised:
        make_report(config, devices)
    assert "\n" not in str(raised.value)


def test_an_error_is_one_line():
    done = preflight("--nocompile", "--devices=6")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "train_batch_size 21 must be a multiple of branches x 6" in line


def test_two_changes_are_combined_if_no_single_one_fits():
    config = get_config("tiny")
    config.pretrained.remat = "none"
    report = make_report(config, 1)

    def fake_report(config, devices):
        """100 bytes, and 30 less for each of two changes."""
        size = 100
        size -= 30 * (config.pretrained.remat == "full")
        size -= 30 * (config.pretrained.vae_dtype == "bfloat16")
        return replace(report, held={"transformer": size}, phases={"sample": {}, "update": {}})

    full = {"pretrained.remat": "full"}
    decode = {"pretrained.vae_dtype": "bfloat16"}
    start = fake_report(config, 1)
    for room, expected in ((70, [full, decode]), (40, [{**full, **decode}]), (39, [])):
        fitting, tried = changes(start, room, fake_report)
        assert [change for change, _ in fitting] == expected
        assert {"sample.train_batch_size": 32}.items() <= tried[2][0].items()
        assert all(result.peak <= room for _, result in fitting)


@pytest.mark.slow
def test_advice_fits_when_it_is_followed(tmp_path):
    """A TPU v6e has 31 GiB: too little for all weights on one device."""
    file = tmp_path / "figures.json"
    options = ["--nocompile", "--devices=8", "--config.mesh.fsdp=1", f"--json={file}"]
    before = preflight(*options, preset="flux_dev_8xh200_remote")
    assert before.returncode == 0, before.stderr
    assert not json.loads(file.read_text())["accelerators"]["TPU v6e"]["fits"]

    advice = r"TPU v6e.*?fits with (.*?)\n.*?total [\d.]+ -> ([\d.]+) GiB\)"
    change, promised = re.search(advice, before.stdout, re.DOTALL).groups()
    after = preflight(*options, *change.split(), preset="flux_dev_8xh200_remote")
    assert after.returncode == 0, after.stderr
    figures = json.loads(file.read_text())
    assert figures["accelerators"]["TPU v6e"]["fits"]
    assert figures["bytes"]["peak"] / GIB == pytest.approx(float(promised), abs=0.05)
    assert "fits with" not in after.stdout


def test_nothing_of_torch_is_loaded():
    code = (
        "import sys; from realgen_jax.preflight import report, tables, advice; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_rewards_that_learn_are_counted():
    # 504 pairs in steps of 16, at most 20 times over; 1000 pairs of 518 x 518 x 3 bytes
    first, second = learners(make_recipe(get_config("flux_adv_8xh200")))
    for name, line in (("omniaid", first), ("omniaid_dino", second)):
        assert line == (
            f"{name} learns: up to 640 steps per epoch, on 16 + 16 pairs each, over all processes. "
            "Its history takes up to 1.5 GiB per process, in host memory and in every checkpoint."
        )


def test_rewards_of_other_programs_are_named():
    (line,) = endpoints(make_recipe(get_config("flux_adv_8xh200")))
    assert line.startswith(
        "visualquality_r1 asks VisualQuality-R1-7B at http://localhost:8000/v1 about each of an "
        "epoch's 504 pictures."
    )
    assert endpoints(make_recipe(get_config("flux_dev_8xh200_remote"))) == []


def test_epochs_in_which_the_generator_rests_are_counted():
    (line,) = learners(make_recipe(get_config("flux_dino_adv")))
    assert "up to 1 steps per epoch, on 672 + 0 pairs each" in line
    assert "The generator rests in 9 of 10 epochs" in line

    (line,) = learners(make_recipe(sd3_grpo.get_config("adv_pickscore_8xh200")))
    assert "The generator rests in the epochs in which pickscore learns." in line
