"""SD3 as a family: files, positions, adapters, schedule, sharding."""

import json
import re
import shutil
from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from realgen_jax.models.formats import file_config
from realgen_jax.models.guidance import Guided
from realgen_jax.models.loading import abstract_model
from realgen_jax.models.sd3.family import SD3, SD3Schedule
from realgen_jax.models.sd3.tables import RULES, diffusers_table, lora_targets
from realgen_jax.models.sd3.transformer import Cond, SD3Config, SD3Transformer
from realgen_jax.models.sources import load_transformer, transformer_config
from realgen_jax.models.trainable import AllWeights, Lora
from realgen_jax.nn.convert import abstract, leaves
from realgen_jax.nn.export import save_folder, to_torch
from realgen_jax.nn.lora import DIFFUSERS_FILE, LoraConfig
from realgen_jax.nn.lora_files import open_lora
from realgen_jax.rollout import sample
from realgen_jax.sde import ode_steps
from realgen_jax.sharding import make_mesh, param_sharding
from tests.helpers.compiling import QUICK
from tests.helpers.goldens import GOLDENS, golden
from tests.helpers.models import EXACT, one_device, pretrained
from tests.helpers.sd3 import SD3_PIPELINE, diffusers_velocity, load_sd3, sd3_model
from tests.helpers.stability_names import stability_transformer
from tests.helpers.zimage import latents, tokens

PEFT = GOLDENS / "12_sd3" / "lora"
PEFT_CONFIG = LoraConfig(rank=2, alpha=5.0)
TRANSFORMER = SD3_PIPELINE / "transformer"
FILE = "diffusion_pytorch_model.safetensors"
MEDIUM = SD3Config(
    pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"
)
LARGE = SD3Config(
    num_layers=38, num_attention_heads=38, caption_projection_dim=2432, qk_norm="rms_norm"
)
SHAPES = leaves(abstract(SD3Transformer, MEDIUM)[1])


@pytest.fixture(scope="module")
def recording():
    return golden("12_sd3/transformer/sd35_m_L4_dual2/io.npz")


def resized(model, height, width):
    """The golden pipeline for pictures that are not square."""
    config, params = load_sd3(TRANSFORMER, height, width)
    return replace(model, config=config, params=params, height=height, width=width)


def velocity(model, trainable, arrays):
    """NCHW, of a recording's inputs."""

    def run(model, trainable, x, sigma, cond):
        return model.velocity(trainable, x, sigma, cond)

    sigma = jnp.asarray(arrays["timestep"] / np.float32(1000))
    cond = Cond(arrays["encoder_hidden_states"], arrays["pooled_projections"])
    run = jax.jit(run, compiler_options=QUICK)
    v = run(model, trainable, tokens(arrays["hidden_states"]), sigma, cond)
    return np.asarray(latents(v, model.height, model.width))


def theirs(network, arrays):
    sigma = arrays["timestep"] / np.float32(1000)
    text, pooled = arrays["encoder_hidden_states"], arrays["pooled_projections"]
    return diffusers_velocity(network, arrays["hidden_states"], sigma, text, pooled)


# -- Schedule, conditioning, sizes


def test_the_schedule_is_that_of_the_pipeline():
    recorded = {"ode": golden("12_sd3/ode.npz")["sigmas"]}
    for name, array in golden("03_schedule/static_shift.npz").items():
        if name.startswith("sd3_shift3") and name.endswith("/sigmas"):
            recorded[name] = array
    assert len(recorded) == 5
    for expected in recorded.values():
        sigmas = SD3Schedule().sigmas(len(expected) - 1, 4096)
        assert sigmas.dtype == np.float32
        np.testing.assert_allclose(sigmas, expected, rtol=2e-6, atol=1e-7)
        assert np.all(np.diff(sigmas) < 0)


def test_the_encoders_states_join_as_in_the_pipeline():
    arrays = golden("12_sd3/text.npz")
    pooled = arrays["pooled_prompt_embeds"]
    cached = {
        "clip_l": arrays["clip_l_hidden"][:2],
        "clip_g": arrays["clip_g_hidden"][:2],
        "t5": arrays["t5_hidden"][:2],
        "pooled_l": pooled[:, :16],
        "pooled_g": pooled[:, 16:],
    }
    written = [name for encoder in SD3.encoders for name in encoder.arrays]
    assert sorted(written) == sorted(cached)

    cond = SD3.cond(cached, np.ones(2, np.float32))
    np.testing.assert_array_equal(cond.text, arrays["prompt_embeds"])
    np.testing.assert_array_equal(cond.pooled, pooled)
    assert SD3.text_tokens(16) == 93

    config, _ = load_sd3(TRANSFORMER, 4, 4)
    announced = SD3.cond_shapes(config, 2, 16, jnp.float32)
    for actual, shape in zip(jax.tree.leaves(cond), jax.tree.leaves(announced), strict=True):
        assert (actual.shape, actual.dtype) == (shape.shape, shape.dtype)


@pytest.mark.parametrize(
    ("config", "parameters", "modules", "adapters"),
    [
        (SD3Config(), 2_028_328_000, 191, 586_752),
        (MEDIUM, 2_243_171_520, 191, 586_752),
        (LARGE, 8_056_627_520, 303, 1_473_792),
    ],
)
def test_the_sizes_are_those_of_the_published_models(config, parameters, modules, adapters):
    state = abstract(SD3Transformer, config)[1]
    shapes = leaves(state)
    weights = leaves(nnx.filter_state(state, nnx.Param))
    assert sum(prod(leaf.shape) for leaf in weights.values()) == parameters
    assert set(shapes) - set(weights) == {"pos"}

    rows = diffusers_table(config).rows
    targets = lora_targets(config)
    assert sum(len(rows[path]) * shapes[f"{path}.kernel"].shape[0] for path in targets) == modules
    model = abstract_model(pretrained("", family=SD3.pipeline), (1024, 1024), one_device())
    state = Lora(LoraConfig(1, 1.0)).abstract(replace(model, config=config))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == adapters


def test_every_parameter_has_a_rule_and_every_rule_a_parameter():
    sharding = param_sharding(make_mesh(1, 4, 2, jax.devices()), RULES)
    whole = 0
    split = 0
    for path, leaf in SHAPES.items():
        if path != "pos":
            whole += prod(leaf.shape)
            split += prod(sharding(path, leaf.shape).shard_shape(leaf.shape))
    assert split < 0.126 * whole
    assert sharding("pos", SHAPES["pos"].shape).is_fully_replicated
    for pattern, _ in RULES:
        assert any(re.fullmatch(pattern, path) for path in SHAPES), pattern


# -- Positions


@pytest.mark.parametrize(("height", "width"), [(5, 3), (2, 6), (1, 5)])
def test_the_centre_of_the_table_is_read_and_written_back(height, width):
    """Of 6 x 6 positions, odd and even margins."""
    source = load_file(TRANSFORMER / FILE)["pos_embed.pos_embed"].astype(np.float32)
    config, params = load_sd3(TRANSFORMER, height, width)
    top = (6 - height) // 2
    left = (6 - width) // 2
    centre = (slice(top, top + height), slice(left, left + width))
    ours = np.asarray(params["pos"][...])
    np.testing.assert_array_equal(ours, source.reshape(6, 6, -1)[centre].reshape(len(ours), -1))

    # What the file does not say is told by the formula; the file's numbers are rounded.
    changed = ours + 100
    params["pos"][...] = jnp.asarray(changed)
    written = dict(to_torch(params, diffusers_table(config)))["pos_embed.pos_embed"]
    assert written.shape == source.shape
    table = written.reshape(6, 6, -1)
    np.testing.assert_array_equal(table[centre].reshape(len(ours), -1), changed)
    table[centre] -= 100
    np.testing.assert_allclose(table.reshape(source.shape), source, rtol=0, atol=2e-3)


def test_a_table_of_another_size_is_refused(tmp_path):
    content = load_file(TRANSFORMER / FILE)
    content["pos_embed.pos_embed"] = content["pos_embed.pos_embed"][:, :25]
    save_file(content, tmp_path / FILE)
    shutil.copyfile(TRANSFORMER / "config.json", tmp_path / "config.json")
    message = r"pos_embed.pos_embed in .* has shape \(1, 25, 32\); pos \(4, 32\) .*\(1, 36, 32\)"
    with pytest.raises(ValueError, match=message):
        load_sd3(tmp_path, 2, 2)


def test_positions_are_not_trained():
    model = sd3_model(AllWeights())
    state = model.trainable.init(model, jax.random.key(0))
    assert "pos" in leaves(model.params)
    assert set(leaves(model.params)) - set(leaves(state)) == {"pos"}
    assert leaves(model.trainable.abstract(model)).keys() == leaves(state).keys()
    network = model.trainable.bind(model, state)
    np.testing.assert_array_equal(network.pos[...], model.params["pos"][...])


# -- Files


def test_diffusers_loads_the_weights_that_we_write(tmp_path, recording):
    diffusers = pytest.importorskip("diffusers")
    model = resized(sd3_model(AllWeights()), 5, 3)

    # Every weight differs from the file's.
    numbers = iter(range(1000))
    state = model.trainable.init(model, jax.random.key(0))
    state = jax.tree.map(lambda a: a * (1 + next(numbers) / 500) + 0.005, state)
    ours = velocity(model, state, recording)
    model.trainable.save(model, tmp_path, state)
    network = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    expected = theirs(network, recording)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected - recording["output"]).max() > 0.3

    written = json.loads((tmp_path / "transformer" / "config.json").read_text())
    source = json.loads((TRANSFORMER / "config.json").read_text())
    del source["_diffusers_version"]
    assert written == source


def random_file(folder, config):
    """Random weights under diffusers' names, saved in `folder`; return them."""
    random = np.random.default_rng(0)
    state = abstract(SD3Transformer, config)[1]
    state = jax.tree.map(lambda a: random.normal(0, 0.2, a.shape).astype(a.dtype), state)
    save_folder(folder, to_torch(state, diffusers_table(config)), file_config(SD3, config))
    return load_file(folder / FILE)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_layers": 3, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        {"num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 1},
    ],
)
def test_reads_stabilitys_file(tmp_path, prefix, sizes):
    sizes = {"attention_head_dim": 8, "num_attention_heads": 3, **sizes}
    config = SD3Config(
        joint_attention_dim=20,
        caption_projection_dim=sizes["attention_head_dim"] * sizes["num_attention_heads"],
        pooled_projection_dim=12,
        pos_embed_max_size=6,
        image_size=(3, 4),
        **sizes,
        **EXACT,
    )
    weights = random_file(tmp_path / "diffusers", config)
    content = {prefix + key: a for key, a in stability_transformer(weights, config).items()}
    if prefix:
        content["first_stage_model.decoder.conv_in.bias"] = np.zeros(3, np.float32)
    save_file(content, tmp_path / "file.safetensors")

    overrides = {"image_size": (3, 4), **EXACT}
    file = tmp_path / "file.safetensors"
    ours_config, ours = load_transformer(SD3, file, tmp_path / "diffusers", **overrides)
    assert ours_config == config
    _, expected = load_transformer(SD3, tmp_path / "diffusers", tmp_path, **overrides)
    for path, array in leaves(expected).items():
        np.testing.assert_array_equal(leaves(ours)[path], array, err_msg=path)


@pytest.mark.slow
def test_the_file_under_stabilitys_names_is_the_one_that_diffusers_reads(tmp_path):
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    torch = pytest.importorskip("torch")
    config = replace(load_sd3(TRANSFORMER, 2, 2)[0], caption_projection_dim=32)
    weights = random_file(tmp_path, config)
    content = stability_transformer(weights, config)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(
        {key: torch.tensor(array) for key, array in content.items()}
    )
    assert converted.keys() == weights.keys()
    for key, array in weights.items():
        np.testing.assert_array_equal(converted[key].numpy(), array, err_msg=key)


def test_another_file_is_refused(tmp_path):
    save_file({"double_blocks.0.x": np.zeros(3, np.float32)}, tmp_path / "flux.safetensors")
    with pytest.raises(ValueError, match=r"has no key .*x_embedder.* expected Stability's file"):
        transformer_config(SD3, tmp_path / "flux.safetensors", TRANSFORMER)


@pytest.mark.parametrize(
    ("file", "entry", "message"),
    [
        ("transformer/config.json", {"patch_size": 1}, "patch_size 1; expected 2"),
        ("transformer/config.json", {"in_channels": 32}, "config.json: .* in_channels 32 and"),
        ("transformer/config.json", {"out_channels": 8}, "config.json: .* out_channels 8"),
        ("transformer/config.json", {"dual_attention_layers": [1]}, "expected the first layers"),
        ("transformer/config.json", {"pos_embed_max_size": 3}, "pos_embed_max_size 3"),
        ("transformer/config.json", {"extra_conditioning_channels": 1}, "is not known here"),
        (
            "transformer/config.json",
            {"_class_name": "SD3ControlNetModel"},
            "SD3ControlNetModel; expected a SD3Transformer2DModel",
        ),
        (
            "scheduler/scheduler_config.json",
            {"use_dynamic_shifting": True},
            "use_dynamic_shifting True; expected False",
        ),
        (
            "model_index.json",
            {"_class_name": "StableDiffusion3ControlNetPipeline"},
            "StableDiffusion3ControlNetPipeline.*expected",
        ),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, file, entry, message):
    for source in SD3_PIPELINE.rglob("*.json"):
        copy = tmp_path / source.relative_to(SD3_PIPELINE)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, copy)
    changed = tmp_path / file
    changed.write_text(json.dumps(json.loads(changed.read_text()) | entry))
    with pytest.raises(ValueError, match=message) as error:
        abstract_model(pretrained(tmp_path), (64, 64), one_device())
    assert "\n" not in str(error.value)


def test_entries_that_a_file_lacks_are_those_of_sd3_medium(tmp_path):
    """SD3-Medium's config.json has neither of them."""
    values = json.loads((TRANSFORMER / "config.json").read_text())
    del values["dual_attention_layers"], values["qk_norm"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    config, _ = transformer_config(SD3, tmp_path, tmp_path, image_size=(4, 4))
    assert config.dual_attention_layers == ()
    assert config.qk_norm is None


# -- Adapters and sampling


@pytest.fixture(scope="module")
def adapted():
    """The golden pipeline for 5 x 3 tokens with peft's adapters."""
    model = resized(sd3_model(Lora(PEFT_CONFIG)), 5, 3)
    return model, model.trainable.load(model, PEFT, jax.random.key(0))


def test_adapters_match_the_golden(adapted, recording):
    expected = golden("12_sd3/lora.npz")["output"]
    ours = velocity(*adapted, recording)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    assert np.abs(expected - recording["output"]).max() > 1


def test_diffusers_loads_the_adapters_that_we_write(tmp_path, adapted, recording):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    model, adapters = adapted
    model.trainable.save(model, tmp_path, adapters)
    assert len(open_lora(tmp_path).pairs) == 31
    network = diffusers.SD3Transformer2DModel.from_pretrained(TRANSFORMER)
    network.load_lora_adapter(tmp_path, weight_name=DIFFUSERS_FILE, prefix="transformer")
    expected = golden("12_sd3/lora.npz")["output"]
    np.testing.assert_allclose(theirs(network, recording), expected, rtol=0, atol=2e-5)


@pytest.mark.slow
def test_samples_are_those_of_the_pipeline():
    """With guidance, 8 steps."""
    case = golden("12_sd3/ode.npz")
    model = sd3_model()
    negative = Cond(
        np.repeat(case["negative_prompt_embeds"], 2, axis=0),
        np.repeat(case["negative_pooled_prompt_embeds"], 2, axis=0),
    )
    bound = Cond(case["prompt_embeds"], case["pooled_prompt_embeds"])
    cond = Guided(bound, negative, jnp.full(2, 4.5), "both")
    steps = ode_steps(model.sigmas(8))

    def run(model, cond, x):
        return sample(lambda *inputs: model.velocity(None, *inputs), cond, x, steps)

    run = jax.jit(run, compiler_options=QUICK)
    ours = run(model, cond, tokens(case["init_latents"]))
    np.testing.assert_allclose(latents(ours, 4, 4), case["final_latents"], rtol=0, atol=5e-5)
    pictures = np.asarray(model.decode(ours))
    expected = np.round(case["image"] * 255)
    assert np.abs(pictures.astype(np.float32) - expected).max() <= 1
