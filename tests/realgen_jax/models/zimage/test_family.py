"""Z-Image as a family: files, adapters, schedule, sharding."""

import json
import re
import shutil
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from realgen_jax.models.guidance import Guided
from realgen_jax.models.loading import abstract_model
from realgen_jax.models.sources import load_transformer
from realgen_jax.models.trainable import AllWeights, Lora
from realgen_jax.models.zimage.family import Z_IMAGE, ZImageSchedule
from realgen_jax.models.zimage.tables import LORA_TARGETS, RULES
from realgen_jax.models.zimage.transformer import ZImageConfig, ZImageTransformer
from realgen_jax.nn.convert import abstract, leaves
from realgen_jax.nn.lora import LoraConfig
from realgen_jax.rollout import sample
from realgen_jax.sde import ode_steps
from realgen_jax.sharding import batch_sharding, make_mesh, param_sharding
from tests.helpers.comfyui_names import comfyui_zimage
from tests.helpers.compiling import QUICK
from tests.helpers.goldens import GOLDENS, golden
from tests.helpers.models import EXACT, load_adapters, one_device, pretrained
from tests.helpers.zimage import (
    ZIMAGE,
    captions,
    diffusers_velocity,
    latents,
    load_zimage,
    tokens,
    zimage_model,
)
from tests.realgen_jax.test_mesh import collectives

PEFT = GOLDENS / "13_zimage" / "lora"
PEFT_CONFIG = LoraConfig(rank=2, alpha=5.0)
SHAPES = leaves(abstract(ZImageTransformer, ZImageConfig())[1])


def velocity(model, trainable, x, sigma, cond):
    """On 3 x 5 tokens."""

    def run(trainable, x, sigma, cond):
        return model.trainable.bind(model, trainable)(x, sigma, cond, 3, 5)

    return jax.jit(run, compiler_options=QUICK)(trainable, x, sigma, cond)


def test_the_schedule_is_diffusers_and_realgens_with_one_step_less():
    arrays = golden("13_zimage/schedule.npz")
    assert len(arrays) == 16
    for name, expected in arrays.items():
        grid, shift, steps = re.fullmatch(r"(\w+)/shift(\d)_(\d+)/sigmas", name).groups()
        steps = int(steps)

        # RealGen's last step goes from 0 to 0.
        if grid == "sigma_min0":
            assert expected[-2:].tolist() == [0, 0]
            expected = expected[:-1]
            steps -= 1
        sigmas = ZImageSchedule(float(shift)).sigmas(steps, 4096)
        assert sigmas.dtype == np.float32
        np.testing.assert_allclose(sigmas, expected, rtol=2e-7)


def test_the_sizes_are_those_of_the_published_model():
    assert sum(prod(leaf.shape) for leaf in SHAPES.values()) == 6_154_908_736
    model = abstract_model(pretrained("", family="ZImagePipeline"), (1024, 1024), one_device())
    adapters = Lora(LoraConfig(1, 1.0)).abstract(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == 2_480_640
    table = Z_IMAGE.table(model.config)
    modules = sum(
        len(table.rows[path]) * SHAPES[f"{path}.kernel"].shape[0] for path in LORA_TARGETS
    )
    assert modules == 238


def test_every_parameter_has_a_rule_and_every_rule_a_parameter():
    sharding = param_sharding(make_mesh(1, 4, 2, jax.devices()), RULES)
    whole = 0
    split = 0
    for path, leaf in SHAPES.items():
        whole += prod(leaf.shape)
        split += prod(sharding(path, leaf.shape).shard_shape(leaf.shape))
    assert split < 0.126 * whole
    for pattern, _ in RULES:
        assert any(re.fullmatch(pattern, path) for path in SHAPES), pattern


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(1, 8, 1), (2, 2, 2)])
def test_inside_the_blocks_only_weights_are_gathered(layout):
    """Of the gradient of all weights. No activation is, and no row of an image moves."""
    config = ZImageConfig(
        dim=96, n_layers=3, n_heads=4, n_kv_heads=4, cap_feat_dim=24, axes_dims=(8, 8, 8)
    )
    mesh = make_mesh(*layout, jax.devices())
    rows = batch_sharding(mesh)
    sharding = param_sharding(mesh, RULES)
    graph, state = abstract(ZImageTransformer, config)
    placed = []
    for path, variable in nnx.to_flat_state(state):
        where = sharding(".".join(map(str, path)), variable.shape)
        struct = jax.ShapeDtypeStruct(variable.shape, jnp.float32, sharding=where)
        placed.append((path, variable.replace(struct)))
    inputs = (
        jax.ShapeDtypeStruct((8, 15, 64), jnp.float32),
        jax.ShapeDtypeStruct((8,), jnp.float32),
        Z_IMAGE.cond_shapes(config, 8, 64, jnp.float32),
    )
    inputs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows), inputs)

    def loss(params, x, sigma, cond):
        return (nnx.merge(graph, params)(x, sigma, cond, 3, 5, mesh) ** 2).sum()

    gradient = jax.jit(jax.grad(loss)).lower(nnx.from_flat_state(placed), *inputs)
    # The scans over the blocks are the outermost loops here.
    moved = collectives(gradient.compile(QUICK).as_text())
    moved = [(kind, shape) for loop, kind, shape in moved if loop != "step"]

    tensor = layout[2]
    dim, hidden = config.dim, config.mlp_dim
    kernels = {(dim // tensor, dim), (hidden // tensor, dim)}
    for shape in ((dim, 3, dim // tensor), (dim, 2, hidden // tensor)):
        kernels |= {shape, (shape[0], prod(shape[1:]))}
    gathered = [shape for kind, shape in moved if kind == "all-gather"]
    # Four kernels in each of three stacks, forward and backward; XLA may fetch a few once more.
    assert 24 <= len(gathered) <= 36
    assert set(gathered) <= kernels
    assert {kind for kind, _ in moved} == {"all-gather", "all-reduce"}


def test_the_conditioning_has_the_shapes_that_are_announced():
    config = ZImageConfig(cap_feat_dim=24)
    arrays = {
        "caption": np.zeros((2, 96, 24), jnp.bfloat16),
        "length": np.array([5, 70], np.int32),
    }
    cond = Z_IMAGE.cond(arrays, np.ones(2, np.float32))
    announced = Z_IMAGE.cond_shapes(config, 2, 90, jnp.bfloat16)
    for actual, shape in zip(jax.tree.leaves(cond), jax.tree.leaves(announced), strict=True):
        assert (actual.shape, actual.dtype) == (shape.shape, shape.dtype)
    assert Z_IMAGE.text_tokens(90) == 96


def test_adapters_match_the_golden():
    """peft's adapters, on the refiners too."""
    arrays = golden("13_zimage/io_padded.npz")
    model, adapters = load_adapters(zimage_model(), PEFT, PEFT_CONFIG)
    cond = captions(arrays["cap_feats"], arrays["cap_lens"])
    ours = velocity(model, adapters, tokens(arrays["x"]), 1 - arrays["t"], cond)
    expected = golden("13_zimage/lora.npz")["output"]
    np.testing.assert_allclose(-latents(ours, 3, 5), expected, rtol=0, atol=2e-5)
    assert np.abs(expected - arrays["output"]).max() > 1


@pytest.mark.slow
def test_the_pipeline_of_diffusers_makes_the_same_pictures_with_our_adapters(tmp_path):
    """From the same noise, guided, without its text encoder."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    case = golden("13_zimage/ode.npz")
    model, adapters = load_adapters(zimage_model(), PEFT, PEFT_CONFIG)
    # As recorded, the sampling enlarges a rounding error several hundred times.
    adapters = jax.tree.map(lambda factor: 0.3 * factor, adapters)
    model.trainable.save(model, tmp_path, adapters)

    pipeline = diffusers.ZImagePipeline.from_pretrained(ZIMAGE)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path)
    rows = zip(case["cap_feats"], case["cap_lens"], strict=True)
    negative = case["negative_cap_feats"]
    theirs = pipeline(
        prompt_embeds=[torch.tensor(row[:end]) for row, end in rows],
        negative_prompt_embeds=[torch.tensor(negative)] * 2,
        latents=torch.tensor(case["init_latents"]),
        height=64,
        width=64,
        guidance_scale=4.0,
        num_inference_steps=6,
        output_type="latent",
    ).images.numpy()

    # Both captions are arrays of one length.
    padding = [(0, case["cap_feats"].shape[1] - len(negative)), (0, 0)]
    cond = Guided(
        captions(case["cap_feats"], case["cap_lens"]),
        captions(np.stack([np.pad(negative, padding)] * 2), [len(negative)] * 2),
        jnp.full(2, 4.0 + Z_IMAGE.guidance_offset),
        "both",
    )
    steps = ode_steps(model.sigmas(6))
    ours = sample(partial(model.velocity, adapters), cond, tokens(case["init_latents"]), steps)
    np.testing.assert_allclose(latents(ours, 4, 4), theirs, rtol=1e-4, atol=2e-4)
    assert np.abs(theirs - case["final_latents"]).max() > 0.5


def test_diffusers_loads_the_weights_that_we_write(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    arrays = golden("13_zimage/io_padded.npz")
    model = zimage_model(AllWeights())

    # Every weight differs from the file's.
    numbers = iter(range(1000))
    state = jax.tree.map(lambda a: a * (1 + next(numbers) / 200) + 0.005, model.params)
    cond = captions(arrays["cap_feats"], arrays["cap_lens"])
    sigma = 1 - arrays["t"]
    ours = latents(velocity(model, state, tokens(arrays["x"]), sigma, cond), 3, 5)

    model.trainable.save(model, tmp_path, state)
    network = diffusers.ZImageTransformer2DModel.from_pretrained(tmp_path / "transformer")
    theirs = diffusers_velocity(network, arrays["x"], sigma, cond.caption, cond.length)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    assert np.abs(-theirs - arrays["output"]).max() > 1

    written = json.loads((tmp_path / "transformer" / "config.json").read_text())
    source = json.loads((ZIMAGE / "transformer" / "config.json").read_text())
    assert {**source, **written} == source


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_reads_comfyuis_file(prefix, tmp_path):
    """Its sizes are those of the folder that the config names."""
    weights = load_file(ZIMAGE / "transformer" / "diffusion_pytorch_model.safetensors")
    content = comfyui_zimage(weights) | {"norm_final.weight": np.ones(48, np.float32)}
    content = {prefix + key: array for key, array in content.items()}
    save_file(content, tmp_path / "z_image.safetensors")
    base = ZIMAGE / "transformer"
    config, params = load_transformer(Z_IMAGE, tmp_path / "z_image.safetensors", base, **EXACT)
    expected_config, expected = load_zimage()
    assert config == expected_config
    for path, array in leaves(expected).items():
        np.testing.assert_array_equal(leaves(params)[path], array, err_msg=path)


@pytest.mark.parametrize(
    ("file", "entry", "message"),
    [
        ("transformer/config.json", {"siglip_feat_dim": 1152}, "siglip_feat_dim 1152; expected"),
        ("transformer/config.json", {"all_patch_size": [2, 4]}, r"\[2, 4\]; expected \[2\]"),
        ("transformer/config.json", {"all_f_patch_size": [2]}, r"\[2\]; expected \[1\]"),
        ("transformer/config.json", {"qk_norm": False}, "qk_norm False; expected True"),
        ("transformer/config.json", {"n_kv_heads": 1}, "n_kv_heads is 1; expected n_heads, 2"),
        (
            "scheduler/scheduler_config.json",
            {"use_dynamic_shifting": True},
            "use_dynamic_shifting True; expected False",
        ),
        ("model_index.json", {"_class_name": "ZImageOmniPipeline"}, "ZImageOmniPipeline.*expected"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, file, entry, message):
    for source in ZIMAGE.rglob("*.json"):
        copy = tmp_path / source.relative_to(ZIMAGE)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, copy)
    changed = tmp_path / file
    changed.write_text(json.dumps(json.loads(changed.read_text()) | entry))
    with pytest.raises(ValueError, match=message) as error:
        abstract_model(pretrained(tmp_path), (64, 64), one_device())
    assert "\n" not in str(error.value)
