"""The real CUDA compiler's programs for GPUs that are not here: the extra aot-cuda, no driver."""

import math
from collections import Counter

import pytest

from realgen_configs import flux_grpo, rewriter_grpo, sd3_grpo, small_cards, zimage_grpo
from realgen_jax.preflight.compiled import compile_programs, with_compiler
from realgen_jax.preflight.figures import USABLE
from realgen_jax.preflight.hlo import FREE, arrays, read_module, signatures
from realgen_jax.preflight.report import lowered, make_report
from realgen_jax.preflight.rewriter import lowered_rewriter, make_rewriter_report
from realgen_jax.preflight.targets import CARDS, target_devices
from realgen_jax.profiling.programs import scope_of
from tests.helpers.costs import write_model

slow = pytest.mark.slow

# Operations that do no arithmetic: their results do not depend on the kernel that they are in.
EXACT = {
    *FREE, "broadcast", "concatenate", "convert", "copy", "dynamic-slice", "dynamic-update-slice",
    "gather", "iota", "negate", "pad", "reshape", "select", "slice", "transpose",
    "all-gather", "all-gather-start", "all-gather-done",
}  # fmt: skip
FLUX = {"_class_name": "FluxTransformer2DModel", "num_layers": 7, "num_single_layers": 11}
SCHEDULE = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


def report_of(folder, target, data, fsdp):
    """FLUX of 7 and 11 blocks at full width, with 3 images of 1024 pixels on each device."""
    write_model(folder, "FluxPipeline", FLUX, SCHEDULE, (8, 8, 8, 8))
    config = flux_grpo.get_config("flux_dev_8xh200_remote").unlock()
    config.pretrained.model = str(folder)
    config.mesh.data, config.mesh.fsdp = data, fsdp
    devices = data * fsdp
    config.sample.train_batch_size = config.sample.num_image_per_prompt = 3 * devices
    config.sample.test_batch_size = devices
    config.sample.num_batches_per_epoch = config.train.gradient_accumulation_steps = 4
    config.prompts.max_tokens = 512
    return make_report(config, devices, target_devices(target, devices))


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Both programs, split over 2 H200s."""
    report = report_of(tmp_path_factory.mktemp("model"), "h200", 1, 2)
    return report, compile_programs(report, lowered(report))


@pytest.fixture(scope="module")
def tpu(tmp_path_factory):
    """The update on 4 chips of a TPU v5p, each with all weights, and its kernels."""
    report = report_of(tmp_path_factory.mktemp("model"), "v5p", 4, 1)
    program = compile_programs(report, {"update": lowered(report)["update"]})["update"]
    return program, read_module(program.text)


def kernels(program, belongs):
    """The kernels of a part of a program that do arithmetic: {what one computes: how often}.

    belongs: whether a kernel is of the part that is meant, by its path. XLA's own kernels have no
    path; they count where others of the part stand.
    """
    module = read_module(program.text)
    part = {where for where, each in module.kernels() if belongs(module.path(each))}
    result = Counter()
    for where, instruction in module.kernels():
        if does_arithmetic(module, instruction):
            for path, signature in signatures(module, instruction):
                if belongs(path) if path else where in part:
                    result[signature] += 1
    return result


def does_arithmetic(module, instruction):
    """Whether a kernel computes floating-point numbers, and not only moves or converts them."""
    inside = [instruction]
    if instruction.opcode == "fusion":
        inside = module.computations[instruction.called[0]].values()
    return any("f" in each.shape.partition("[")[0] and each.opcode not in EXACT for each in inside)


def assert_equal_kernels(compiled):
    """The update's policy runs all kernels of the rollout's window, from the latents to the mean.

    The update also stores what the backward pass needs, and the rollout its log-probabilities. How
    often a kernel stands in the text is not compared: XLA may write a loop of the rollout twice.
    """

    def in_window(path):
        return "window/while/body/closed_call" in path and "log_prob" not in path

    def in_policy(path):
        return scope_of(path)[:2] == ("update", "policy")

    window = kernels(compiled["sample"], in_window)
    policy = kernels(compiled["update"], in_policy)
    assert sum(window.values()) > 60
    assert not window.keys() - policy.keys()


def test_rollout_and_update_run_the_same_kernels(split):
    """By canonicalised HLO; which tiles a GPU's autotuner takes is not seen."""
    _, compiled = split
    assert_equal_kernels(compiled)


def test_cudnn_attends_once_forward_and_once_backward(split):
    """Prefix, window and suffix of two kinds of blocks; policy and reference, backward."""
    _, compiled = split
    assert compiled["sample"].attention == {"cuDNN forward": 6}
    assert compiled["update"].attention == {"cuDNN forward": 4, "cuDNN backward": 2}


def test_split_weights_have_no_second_copy(split):
    """Outside of the loops over blocks, no array holds the kernels of all layers of a kind."""
    report, compiled = split
    model = report.model.config
    layers = {model.num_layers, model.num_single_layers}
    for program in compiled.values():
        module = read_module(program.text)
        copies = []
        for computation, instruction in module.kernels():
            for kind, sizes in arrays(instruction.shape):
                of_all_layers = kind == "bf16" and layers & set(sizes) and 3072 in sizes
                if of_all_layers and module.runs[computation] == 1:
                    copies.append(f"{instruction.name} {kind}{sizes}")
        assert not copies


def assert_bytes_are_the_formulas(compiled):
    """Of an update within 5 %, of sampling within a fifth of a GiB."""
    update = compiled["update"]
    assert update.formula == pytest.approx(update.memory["temporaries"], rel=0.05)
    sample = compiled["sample"]
    assert sample.formula == pytest.approx(sample.memory["temporaries"], abs=0.2 * 2**30)


def test_bytes_are_the_formulas(split):
    report, compiled = split
    assert_bytes_are_the_formulas(compiled)
    held = report.held["transformer"] + report.held["autoencoder"] + report.held["trained"]
    assert compiled["sample"].memory["arguments"] == pytest.approx(held, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "preset", "devices"),
    [
        (flux_grpo, "flux_dev_1xh200", 1),
        (sd3_grpo, "adv_dino_1xh200", 1),
        (zimage_grpo, "realgen_v2_base_8xh200", 8),
    ],
)
def test_every_family_at_full_size(config, preset, devices):
    """Equal kernels and the formulas' bytes, with guidance in SD3 and Z-Image."""
    report = make_report(config.get_config(preset), devices, target_devices("h200", devices))
    compiled = compile_programs(report, lowered(report))
    assert_equal_kernels(compiled)
    assert_bytes_are_the_formulas(compiled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "target", "rewards"),
    [
        ("flux_dev_1x24gb", "rtx4090", 0),  # on the CPU
        ("flux_dev_1x24gb_offload", "rtx4090", 0),
        ("flux_dev_1x40gb", "l40s", 4),
        ("flux_dev_1x40gb", "a100-40gb", 4),
        ("flux_dev_1x80gb", "h100", 20),
        ("flux_dev_1x80gb", "a100-80gb", 20),
        ("adv_dino_1x24gb", "rtx4090", 8),
    ],
)
def test_small_cards_hold_their_presets(preset, target, rewards):
    """By XLA's compiler for the card. Kernels are equal with quantised weights and offload too.

    rewards: GiB that they take of the card, as configs/serve_rewards.py and small_cards.py have it.
    """
    report = make_report(small_cards.get_config(preset), 1, target_devices(target, 1))
    compiled = compile_programs(report, lowered(report))
    needed = max(with_compiler(report, compiled).values()) + rewards * 2**30
    assert needed < USABLE * CARDS[target].memory
    assert_equal_kernels(compiled)


@pytest.mark.slow
def test_all_weights_train_on_80_gb_with_the_optimizer_in_host_memory():
    """On 8 GPUs; the optimizer's state is not even copied while activations are there."""
    config = flux_grpo.get_config("flux_dev_full_8xh200").unlock()
    config.train.offload = True
    report = make_report(config, 8, target_devices("h100", 8))
    compiled = compile_programs(report, {"update": lowered(report)["update"]})
    (needed,) = with_compiler(report, compiled).values()
    assert needed < USABLE * CARDS["h100"].memory
    assert compiled["update"].memory["host"] == sum(report.host.values()) > 16 * 2**30


@pytest.mark.slow
def test_a_tpu_attends_once_forward_and_once_backward(tpu):
    """Policy and reference of two kinds of blocks; the backward pass does not attend again."""
    program, _ = tpu
    assert program.attention == {"splash forward": 4, "splash backward (dk, dv)": 2}


@pytest.mark.slow
def test_a_tpu_turns_only_the_kernels_of_queries_keys_and_values(tpu):
    """And those of the images' output projections; all others are multiplied as they were put."""
    _, module = tpu
    layers = {FLUX["num_layers"], FLUX["num_single_layers"]}
    turned = set()
    for _, instruction in module.kernels():
        for kind, sizes in arrays(instruction.shape):
            stacked = kind == "bf16" and sizes and sizes[0] in layers and sizes.count(3072) >= 2
            if stacked and instruction.opcode == "copy":
                turned.add(sizes[1:])
    assert turned <= {(3072, 3, 3072), (3072, 3072)}


@pytest.mark.slow
def test_a_tpu_normalises_and_rotates_without_float32_in_memory(tpu):
    """In the blocks of the reference, which keep nothing for a backward pass."""
    _, module = tpu
    blocks = {
        computation
        for computation, instruction in module.kernels()
        if instruction.name.startswith("splash_mha_fwd_no_residuals")
    }
    assert len(blocks) == 2
    for block in blocks:
        written = 0
        for instruction in module.computations[block].values():
            if instruction.opcode not in FREE:
                for kind, sizes in arrays(instruction.shape):
                    written += 4 * math.prod(sizes) if kind == "f32" else 0
        assert written < 50e6


@pytest.mark.slow
def test_the_rewriter_at_full_size():
    """cuDNN attends to prompts and in the update, and a token's step copies no weights."""
    config = rewriter_grpo.get_config("flux_rewriter_1xh200")
    report = make_rewriter_report(config, 1, target_devices("h200", 1))
    compiled = compile_programs(report, lowered_rewriter(report))
    rewrite, draw, update = compiled.values()
    assert rewrite.attention == {"cuDNN forward": 1}
    assert draw.attention == {"cuDNN forward": 2}
    assert update.attention == {"cuDNN forward": 2, "cuDNN backward": 1}
    assert rewrite.formula == pytest.approx(rewrite.in_use, rel=0.02)
    assert update.formula == pytest.approx(update.in_use, rel=0.05)
    assert draw.formula == pytest.approx(draw.in_use, abs=0.2 * 2**30)

    # In the loop over tokens, nothing but the cache is larger than the logits.
    module = read_module(rewrite.text)
    (loop,) = {
        computation
        for computation, instruction in module.kernels()
        if "/while/body/block" in module.path(instruction)
    }
    sizes = [
        instruction.bytes
        for instruction in module.computations[loop].values()
        if instruction.opcode == "fusion" and "dynamic_update_slice" not in instruction.name
    ]
    assert max(sizes) <= report.work.rows * report.work.model.vocab_size * 4


@pytest.mark.slow
def test_the_rewriters_split_weights_are_gathered_in_bfloat16():
    """To sample from a trained language model: not one matrix is anywhere whole in float32."""
    config = rewriter_grpo.get_config("flux_rewriter_full_8xh200")
    report = make_rewriter_report(config, 8, target_devices("h200", 8))
    programs = {"rewrite": lowered_rewriter(report)["rewrite"]}
    rewrite = compile_programs(report, programs)["rewrite"]
    assert rewrite.formula == pytest.approx(rewrite.in_use, rel=0.02)
    model = report.language.config
    for _, instruction in read_module(rewrite.text).kernels():
        for kind, sizes in arrays(instruction.shape):
            widths = {model.intermediate_size, model.vocab_size} & set(sizes)
            assert kind != "f32" or model.hidden_size not in sizes or not widths
