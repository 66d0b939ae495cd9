"""The formulas of SD3's cost.py, against counts by hand and XLA's own figures on small models."""

from dataclasses import dataclass, replace

import pytest

from realgen_configs.sd3_grpo import PRESETS, get_config
from realgen_jax.models import cost
from realgen_jax.models.sd3 import cost as sd3_cost
from realgen_jax.models.sd3.family import LARGE, MEDIUM
from realgen_jax.models.sd3.transformer import SD3Config
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


@dataclass(frozen=True)
class Sd3Case(Case):
    """text: T5 tokens, besides 77 of the CLIPs. blocks: all, those with a second attention."""

    qk_norm: str | None = "rms_norm"


CASES = {
    "medium": Sd3Case((5, 2), 4, 16, 32, 8, (8, 16), 8),
    "large": Sd3Case((5, 0), 4, 40, 64, 8, (8, 16), 8),
    "first": Sd3Case((6, 0), 4, 16, 32, 16, (8, 16), 4, None),
    "wide": Sd3Case((7, 3), 8, 16, 32, 4, (8, 16), 4),
    "text": Sd3Case((6, 2), 4, 200, 32, 8, (8, 16), 8),
    "deep": Sd3Case((12, 5), 4, 30, 64, 8, (8, 16), 4),
}
BOTH = {"guidance": 4.5, "gradient": "both"}
BOUND = {"guidance": 4.5, "gradient": "bound"}


def case_report(folder, case, **options):
    """The report of a run of `case`, as in tests/helpers/costs.py."""
    blocks, dual = case.blocks
    transformer = {
        "_class_name": "SD3Transformer2DModel",
        "sample_size": 32,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": blocks,
        "attention_head_dim": 64,
        "num_attention_heads": case.heads,
        "joint_attention_dim": 64,
        "caption_projection_dim": 64 * case.heads,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 32,
        "dual_attention_layers": list(range(dual)),
        "qk_norm": case.qk_norm,
    }
    write_model(folder, "StableDiffusion3Pipeline", transformer, {"shift": 3.0}, case.vae)
    return report_of(folder, case, **options)


compiled = compiled_cases(case_report, CASES)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, "1.89 2.56 8.57 9.59"),
        (MEDIUM, "2.22 2.89 10.91 11.93"),
        (LARGE, "7.18 9.62 30.03 33.34"),
    ],
    ids=["SD3-M", "SD3.5-M", "SD3.5-L"],
)
def test_published_models_by_hand(sizes, expected):
    """TFLOP of a pass, counted by torch, which also computes the last block's text queries."""
    config = SD3Config(**sizes)
    work = make_report(get_config("adv_dino_1xh200"), 1).work
    counted = []
    for image in (1024, 4096):
        for text in (205, 589):
            here = replace(work, model=config, image_tokens=image, text_tokens=text)
            flops = sd3_cost.forward_flops(here)
            queries = 4 * text * (image + text) * config.hidden_dim
            counted.append(sum(flops.values()) - flops["lora"] + queries)
    assert [flops / 1e12 for flops in counted] == pytest.approx(
        [float(number) for number in expected.split()], abs=0.006
    )


def test_guidance_by_hand():
    """Two passes; the second one has a backward pass only if the gradient goes through it."""
    both = make_report(get_config("adv_dino_1xh200"), 1).work
    assert (both.guided, both.free_gradient, both.text_tokens) == (True, True, 205)
    bound = replace(both, free_gradient=False)
    one = replace(both, guided=False)

    # Operations.
    plain = cost.update_flops(one)
    for work, backward_passes in ((both, 2), (bound, 1)):
        assert sum(cost.velocity_flops(work).values()) == 2 * sum(cost.velocity_flops(one).values())
        flops = cost.update_flops(work)
        assert flops["forward"] == 2 * plain["forward"]
        assert flops["backward"] == backward_passes * plain["backward"]
        assert flops["remat"] == backward_passes * plain["remat"]

    # Bytes: one pass over two rows per image, or two over one.
    assert cost.update_bytes(bound, 8) == cost.update_bytes(one, 8)
    assert cost.update_bytes(both, 8) == cost.update_bytes(one, 16)
    assert sum(sd3_cost.saved_bytes(both, 16)) == 2 * sum(sd3_cost.saved_bytes(bound, 8))


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("large", {}),
        slow("medium", {}),
        slow("first", {"beta": 0.1}),
        slow("medium", {"remat": "dots"}),
        slow("large", {"remat": "none"}),
        slow("large", {"lora": False}),
        slow("large", BOTH),
        slow("large", BOUND),
    ],
)
def test_operations_are_xlas(compiled, case, options):
    """XLA counts the body of a loop once, so the formula is asked for one block of each kind."""
    programs = compiled(case, **options)
    work = programs.report.work
    dual = work.model.dual_attention_layers[:1]
    model = replace(work.model, num_layers=2 + len(dual), dual_attention_layers=dual)
    work = replace(work, model=model)

    update = work.images * sum(cost.update_flops(work).values())
    assert_near(update, programs.update.cost_analysis()["flops"], 0.06)

    # Prefix, window and suffix, each once.
    images = work.slots + 2 * work.images
    sample = images * sum(cost.velocity_flops(work).values())
    sample += work.images * cost.decode_flops(work)
    assert_near(sample, programs.sample.cost_analysis()["flops"], 0.06)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("large", {}),
        slow("medium", {"beta": 0.1}),
        slow("first", {}),
        slow("wide", {}),
        slow("deep", {}),
        slow("deep", {"remat": "dots"}),
        slow("large", {"remat": "dots"}),
        slow("first", {"remat": "none"}),
        slow("wide", {"remat": "none"}),
        slow("medium", {"lora": False, "calls": 2}),
        slow("large", {"lora": False, "calls": 2}),
        slow("medium", BOTH),
        slow("medium", BOUND),
    ],
)
def test_peak_activations_are_xlas(compiled, case, options):
    assert_peaks_are_xlas(compiled(case, **options))


@pytest.mark.slow
def test_peak_activations_of_long_texts_are_xlas(compiled):
    """Of the update. When sampling, XLA writes no scores on a CPU, and the formula counts them."""
    assert_peaks_are_xlas(compiled("text"), sampling=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "options"), [("medium", {}), ("medium", {"lora": False}), ("large", BOTH)]
)
def test_peak_activations_where_weights_are_split(tmp_path, case, options):
    """Over four devices."""
    case = replace(CASES[case], images=16)
    programs = compile_programs(case_report(tmp_path, case, mesh=(1, 4, 1), calls=2, **options))
    assert_peaks_are_xlas(programs, devices=4, sampling=False)


@pytest.mark.parametrize("preset", [name for name in PRESETS if "tiny" not in name])
def test_presets_fit_together(preset):
    """Names, layout, mesh and an H200's memory, of which rewards that share a GPU need a part."""
    config = get_config(preset)
    devices = config.preflight.devices
    report = make_report(config, devices)
    report.recipe.layout.check(devices)
    assert config.sample.test_batch_size % devices == 0
    assert report.peak < (0.3 if config.reward.share_gpu else 0.95) * 139 * 2**30
