"""The formulas of cost.py against XLA's own figures, on small float32 models of many shapes."""

from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from realgen_configs.flux_grpo import PRESETS, get_config
from realgen_jax.models import cost
from realgen_jax.models.flux import cost as flux_cost
from realgen_jax.models.flux.family import FluxSchedule
from realgen_jax.models.loading import abstract_model, load_model
from realgen_jax.nn.convert import abstract
from realgen_jax.nn.tiles import decode_tiled
from realgen_jax.nn.vae import Autoencoder, VaeConfig, to_uint8
from realgen_jax.preflight.report import (
    QUICK,
    device_bytes,
    make_report,
    sample_arguments,
    update_arguments,
)
from realgen_jax.sharding import make_mesh
from realgen_jax.training.programs import make_programs, make_recipe
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

# Double and single blocks.
CASES = {
    "small": Case((2, 2), 4, 32, 64, 2, (8, 16), 8),
    "wide": Case((2, 2), 8, 96, 32, 4, (32, 64), 32),
    "long": Case((3, 6), 4, 64, 128, 4, (16, 32, 32), 8),
    "broad": Case((3, 6), 8, 64, 64, 12, (8, 16, 16), 8),
    "text": Case((6, 3), 4, 128, 128, 2, (16, 16, 16), 8),
    "scores": Case((2, 3), 2, 32, 128, 2, (16, 16), 4),
    "mid": Case((3, 8), 8, 64, 256, 3, (32, 64, 128, 128), 16),
    "deep": Case((2, 30), 4, 32, 64, 8, (8, 16), 4),
}


def case_report(folder, case, **options):
    """The report of a run of `case`, as in tests/helpers/costs.py."""
    transformer = {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": 64,
        "num_layers": case.blocks[0],
        "num_single_layers": case.blocks[1],
        "attention_head_dim": 64,
        "num_attention_heads": case.heads,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 32,
        "axes_dims_rope": [8, 28, 28],
    }
    write_model(folder, "FluxPipeline", transformer, asdict(FluxSchedule()), case.vae)
    return report_of(folder, case, **options)


compiled = compiled_cases(case_report, CASES)


def test_flux_dev_by_hand():
    """57 blocks of 24 D^2 T and 4 T^2 D operations: 59.5 and 14.9 TFLOP at 4096 + 512 tokens."""
    work = make_report(get_config("flux_dev_8xh200"), 7).work
    flops = flux_cost.forward_flops(work)
    ends = 2 * 3072 * (4096 * 2 * 64 + 512 * 4096)
    assert flops["matmul"] == pytest.approx(57 * 24 * 3072**2 * 4608 + ends)
    assert flops["attention"] == 57 * 4 * 4608**2 * 3072
    assert sum(flops.values()) - flops["lora"] == pytest.approx(74.4e12, rel=2e-3)
    assert work.prefix == 7  # windows start at 0 to 14


@pytest.mark.parametrize(
    ("case", "options"),
    [
        slow("long", {}),
        slow("small", {}),
        slow("wide", {"beta": 0.1}),
        slow("wide", {"remat": "dots"}),
        slow("wide", {"remat": "attention"}),
        slow("small", {"remat": "none"}),
        slow("wide", {"remat": "full", "lora": False}),
        slow("small", {"remat": "dots", "lora": False, "beta": 0.1}),
    ],
)
def test_operations_are_xlas(compiled, case, options):
    """XLA counts the body of a loop once, so the formula is asked for one block of each kind.

    Each loop has at least two trips: XLA would unroll a single one, and then merge what is to be
    computed twice.
    """
    programs = compiled(case, **options)
    work = programs.report.work
    work = replace(work, model=replace(work.model, num_layers=1, num_single_layers=1))

    update = work.images * sum(flux_cost.update_flops(work).values())
    assert_near(update, programs.update.cost_analysis()["flops"], 0.06)

    # Prefix, window and suffix, each once.
    images = work.slots + 2 * work.images
    forward = images * sum(flux_cost.forward_flops(work).values())
    sample = forward + work.images * cost.decode_flops(work)
    assert_near(sample, programs.sample.cost_analysis()["flops"], 0.06)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("long", {}),
        slow("text", {"lora": False, "calls": 2}),
        slow("broad", {"remat": "dots"}),
        slow("text", {"beta": 0.1}),
        slow("scores", {}),
        slow("deep", {}),
        slow("broad", {"calls": 2}),
        slow("deep", {"remat": "dots"}),
        slow("deep", {"remat": "attention"}),
        # Not fp8: XLA's CPU compiler holds all of it in a wider dtype.
        slow("broad", {"quantization": "nf4"}),
        slow("broad", {"quantization": "int8", "remat": "dots"}),
        slow("scores", {"remat": "dots"}),
        slow("long", {"remat": "none"}),
        slow("broad", {"remat": "none"}),
        slow("scores", {"remat": "none"}),
        slow("broad", {"lora": False, "calls": 2}),
        slow("long", {"lora": False, "calls": 2, "remat": "dots"}),
    ],
)
def test_peak_activations_are_xlas(compiled, case, options):
    programs = compiled(case, **options)
    work = programs.report.work
    phases = cost.phase_bytes(work, 1, programs.report.held["trained"])

    sample = phases["sample"]["activations"]
    assert_near(sample, programs.sample.memory_analysis().temp_size_in_bytes, 0.15)
    update = flux_cost.update_bytes(work, work.images) + phases["update"]["gradients"]
    assert_near(update, programs.update.memory_analysis().temp_size_in_bytes, 0.15)


@pytest.mark.parametrize(
    ("case", "images", "options"),
    [
        slow("long", 4, {}),
        slow("long", 8, {"lora": False}),
        slow("deep", 8, {}),
        slow("deep", 8, {"lora": False}),
    ],
)
def test_peak_activations_where_weights_are_split(tmp_path, case, images, options):
    """Over four devices.

    Sampling peaks in the velocity, with gathered weights, for "long", and in the autoencoder for
    "deep".
    """
    case = replace(CASES[case], images=images)
    programs = compile_programs(case_report(tmp_path, case, mesh=(1, 4, 1), calls=2, **options))
    assert_peaks_are_xlas(programs, devices=4)


@pytest.mark.parametrize(
    ("widths", "layers", "side", "n", "tile"),
    [
        ((32, 64, 128, 128), 2, 16, 2, 0),
        ((32, 32, 64), 1, 16, 3, 0),
        ((16, 32), 2, 64, 2, 0),
        slow((32, 64, 128, 128), 2, 40, 1, 128),
    ],
    ids=["feature maps", "equal widths", "attention", "tiles"],
)
def test_the_decoder_is_xlas(widths, layers, side, n, tile):
    """The ids say what needs most memory, or what is special."""
    config = VaeConfig(widths, layers, 16, 8, tile=tile)
    graph, state = abstract(Autoencoder, config)
    latents = jax.ShapeDtypeStruct((n, side, side, 16), jnp.float32)

    @jax.jit
    def decode(state, latents):
        vae = nnx.merge(graph, state)
        if tile:
            return to_uint8(decode_tiled(vae.decode, latents, tile, config.factor))
        return to_uint8(vae.decode(latents))

    program = decode.lower(state, latents).compile(QUICK)

    work = make_report(get_config(), 1).work
    work = replace(work, vae=config, image_tokens=side**2 // 4, flash=False, fused=False)
    if not tile:  # XLA counts the body of a loop over tiles once
        assert_near(n * cost.decode_flops(work), program.cost_analysis()["flops"], 0.06)
    memory = program.memory_analysis().temp_size_in_bytes
    assert_near(cost.decode_bytes(work, n), memory, 0.15)


@pytest.mark.parametrize(("mesh", "lora"), [slow((2, 2, 2), True), slow((1, 4, 2), False)])
def test_argument_bytes_are_xlas(tmp_path, mesh, lora):
    """On eight devices, to the byte. XLA drops what a program does not read: logp, the encoder."""
    case = replace(CASES["small"], images=8)
    programs = compile_programs(case_report(tmp_path, case, mesh=mesh, lora=lora, beta=0.1))
    report = programs.report
    held = report.held

    # The update reads everything but the autoencoder, and counts steps.
    arguments = update_arguments(
        report.recipe, report.model, make_programs(report.recipe, report.model)
    )
    _, state, batch = arguments
    batch = replace(batch, record=replace(batch.record, logp=None))
    update = sum(held.values()) - held["autoencoder"] + state.step.dtype.itemsize
    update += device_bytes(batch)
    assert programs.update.memory_analysis().argument_size_in_bytes == update

    # Sampling reads the decoder, the conditions, two keys and the plan. Without LoRA, the
    # transformer's frozen weights are the reference's, which only the update reads.
    _, _, cond, _, _ = sample_arguments(report.recipe, report.model)
    sample = held["trained"] + device_bytes(report.model.vae_params["decoder"]) + device_bytes(cond)
    if lora:
        sample += held["transformer"]
    keys = 2 * 8
    plan = (5 + 5) * report.work.steps * 4 + 4
    assert programs.sample.memory_analysis().argument_size_in_bytes == sample + keys + plan


def test_trajectories_of_an_epoch_are_the_rollouts(tmp_path):
    case = replace(CASES["small"], images=4)
    report = case_report(tmp_path, case, mesh=(2, 1, 1), calls=2, branches=2)
    programs = make_programs(report.recipe, report.model)
    arguments = sample_arguments(report.recipe, report.model)
    images, trajectory, _ = jax.eval_shape(programs.sample, *arguments)
    cond = arguments[2]

    # Two devices, float32.
    call = cost.rollout_bytes(report.work, report.parts)
    assert call["trajectory"] == (trajectory.latents.size + trajectory.mean.size) * 4 / 2
    assert call["pictures"] == images.size / 2
    assert call["embeddings"] == cost.row_bytes(cond) / 2

    # Two calls, kept once as they are and once stacked for the steps.
    assert report.phases["update"]["trajectories"] == 2 * 2 * call["trajectory"]


def test_the_abstract_model_is_the_loaded_one():
    """Shape, dtype and sharding of every array, and what the files say: schedule, sizes."""
    config = get_config()
    mesh = make_mesh(2, 2, 2, jax.devices())
    loaded = load_model(config.pretrained, (64, 64), mesh)
    abstract_one = abstract_model(config.pretrained, (64, 64), mesh)

    for name in ("params", "vae_params"):
        arrays = getattr(loaded, name)
        shapes = getattr(abstract_one, name)
        assert jax.tree.structure(arrays) == jax.tree.structure(shapes)
        for a, b in zip(jax.tree.leaves(arrays), jax.tree.leaves(shapes), strict=True):
            assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)
    for name in ("family", "config", "vae", "schedule", "trainable", "height", "width", "mesh"):
        assert getattr(loaded, name) == getattr(abstract_one, name)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fit_together(preset):
    """Names, layout, mesh and an H200's memory; an epoch of a FLUX preset is about RealGen's."""
    config = get_config(preset)
    recipe = make_recipe(config)
    layout = recipe.layout
    devices = config.preflight.devices

    # data and fsdp split the batch, and no preset splits over tensor.
    layout.check(devices)
    assert config.sample.test_batch_size % devices == 0
    if devices <= len(jax.devices()):
        assert make_report(config, devices).peak < 0.95 * 139 * 2**30

    if preset.startswith("flux_dev") or preset == "flux_adv_8xh200":
        assert 500 <= layout.calls * layout.images <= 530
        assert layout.calls / config.train.gradient_accumulation_steps == 2
        assert layout.images / devices == 3


@pytest.mark.slow
@pytest.mark.parametrize(("case", "sample", "update"), [("demo", 28, 48), ("mid", 54, 120)])
def test_no_program_needs_more_memory_than_it_did(compiled, case, sample, update):
    """XLA's temporaries, MiB, of the demo and of the larger model of benchmarks/peers.py.

    The limits are 5 % above what they were when the blocks were last made faster. They hold for one
    version of XLA.
    """
    if case == "demo":
        programs = compile_programs(make_report(get_config(), 1))
    else:
        programs = compiled(case, beta=0.01, branches=3)
    assert programs.sample.memory_analysis().temp_size_in_bytes / 2**20 <= sample
    assert programs.update.memory_analysis().temp_size_in_bytes / 2**20 <= update
