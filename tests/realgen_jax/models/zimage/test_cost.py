"""The formulas of Z-Image's cost.py, by hand and against XLA's own figures on small models."""

from dataclasses import replace

import pytest

from realgen_configs.zimage_grpo import PRESETS, get_config
from realgen_jax.models import cost
from realgen_jax.models.zimage import cost as zimage_cost
from realgen_jax.preflight.report import make_report
from tests.helpers.costs import (
    Case,
    assert_near,
    assert_peaks_are_xlas,
    compile_programs,
    compiled_cases,
    report_of,
    slow,
    write_model,
)

# Blocks of a refiner, and on the joint sequence.
CASES = {
    "small": Case((2, 4), 4, 32, 32, 16, (8, 16), 4),
    "long": Case((2, 4), 4, 64, 64, 8, (8, 16), 4),
    "wide": Case((3, 4), 8, 64, 64, 4, (8, 16), 8),
    "text": Case((2, 6), 4, 160, 32, 8, (8, 16), 8),
    "deep": Case((2, 12), 4, 32, 64, 8, (8, 16), 4),
}
BOTH = {"guidance": 4.0, "gradient": "both"}
BOUND = {"guidance": 4.0, "gradient": "bound"}


def case_report(folder, case, **options):
    """The report of a run of `case`, as in tests/helpers/costs.py."""
    refiners, layers = case.blocks
    transformer = {
        "_class_name": "ZImageTransformer2DModel",
        "in_channels": 16,
        "dim": 64 * case.heads,
        "n_layers": layers,
        "n_refiner_layers": refiners,
        "n_heads": case.heads,
        "n_kv_heads": case.heads,
        "cap_feat_dim": 64,
        "axes_dims": [16, 24, 24],
        "axes_lens": [1024, 512, 512],
    }
    write_model(folder, "ZImagePipeline", transformer, {"shift": 3.0}, case.vae)
    return report_of(folder, case, **{"guidance": 0.0, **options})


compiled = compiled_cases(case_report, CASES)


@pytest.mark.parametrize(
    ("side", "expected"), [(64, (55.6, 56.6, 62.5)), (32, (12.9, 13.7, 18.5))], ids=["1024", "512"]
)
def test_z_image_by_hand(side, expected):
    """TFLOP of the blocks in a pass, at 64, 128 and 512 caption tokens."""
    work = make_report(get_config("realgen_v2_turbo_8xh200"), 8).work
    counted = []
    for text in (64, 128, 512):
        flops = zimage_cost.forward_flops(replace(work, image_tokens=side**2, text_tokens=text))
        counted.append((flops["matmul"] + flops["attention"]) / 1e12)
    assert counted == pytest.approx(expected, abs=0.06)


def caption_flops(work):
    """Operations on the caption before it joins the image, with one refiner block."""
    without = replace(work, text_tokens=0)
    joint = replace(work.model, n_refiner_layers=0)
    flops = sum(zimage_cost.forward_flops(work).values())
    flops -= sum(zimage_cost.forward_flops(replace(work, model=joint)).values())
    image = sum(zimage_cost.forward_flops(without).values())
    image -= sum(zimage_cost.forward_flops(replace(without, model=joint)).values())
    return flops - image


@pytest.mark.parametrize(
    ("case", "options"),
    [
        slow("long", {}),
        slow("small", {"beta": 0.1}),
        slow("wide", {"remat": "dots"}),
        slow("small", {"remat": "none"}),
        slow("text", {"lora": False}),
        slow("long", BOTH),
        slow("long", BOUND),
    ],
)
def test_operations_are_xlas(compiled, case, options):
    """XLA counts the body of a loop once, so the formula is asked for one block of each kind."""
    programs = compiled(case, **options)
    work = programs.report.work
    work = replace(work, model=replace(work.model, n_layers=1, n_refiner_layers=1))

    update = work.images * sum(cost.update_flops(work).values())
    assert_near(update, programs.update.cost_analysis()["flops"], 0.06)

    # Prefix, window and suffix, each once; but XLA refines the caption once for all of them.
    images = work.slots + 2 * work.images
    sample = images * sum(cost.velocity_flops(work).values())
    sample -= 2 * work.images * (1 + work.guided) * caption_flops(work)
    sample += work.images * cost.decode_flops(work)
    assert_near(sample, programs.sample.cost_analysis()["flops"], 0.06)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        slow("long", {}),
        slow("small", {"beta": 0.1}),
        slow("wide", {}),
        slow("text", {}),
        slow("deep", {}),
        slow("deep", {"remat": "dots"}),
        slow("small", {"remat": "none"}),
        slow("wide", {"lora": False, "calls": 2}),
        slow("long", BOTH),
        slow("long", BOUND),
    ],
)
def test_peak_activations_are_xlas(compiled, case, options):
    assert_peaks_are_xlas(compiled(case, **options))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "options"), [("long", {}), ("long", {"lora": False})])
def test_peak_activations_where_weights_are_split(tmp_path, case, options):
    """Over four devices."""
    case = replace(CASES[case], images=16)
    programs = compile_programs(case_report(tmp_path, case, mesh=(1, 4, 1), calls=2, **options))
    assert_peaks_are_xlas(programs, devices=4, sampling=False)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_together(preset):
    """Names, layout, mesh, guidance and an H200's memory, of which the rewards need a part."""
    config = get_config(preset)
    devices = config.preflight.devices
    report = make_report(config, devices)
    report.recipe.layout.check(devices)
    assert config.sample.test_batch_size % devices == 0
    assert report.work.guided == (preset == "realgen_v2_base_8xh200")
    assert report.peak < 0.5 * 139 * 2**30
