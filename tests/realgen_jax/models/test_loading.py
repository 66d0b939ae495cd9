"""Transformers, autoencoders and schedules in the forms that they are published in.

What is read is read right, and anything else is refused by name.
"""

import json
import shutil
import struct
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from realgen_jax.models import FAMILIES
from realgen_jax.models.flux.family import FLUX
from realgen_jax.models.loading import abstract_model, load_model
from realgen_jax.models.sources import load_transformer, pipeline_class
from realgen_jax.nn.convert import leaves
from realgen_jax.nn.vae_files import load_vae, vae_config
from tests.helpers.bfl_names import bfl_transformer
from tests.helpers.goldens import PIPELINE
from tests.helpers.models import EXACT, load_flux, one_device, pretrained

NAME = "diffusion_pytorch_model.safetensors"
MODEL = PIPELINE / "transformer"
CONFIG, PARAMS = load_flux(MODEL)
WEIGHTS = load_file(MODEL / NAME)
BFL = bfl_transformer(WEIGHTS, CONFIG)


def write_float8(file, weights):
    """Weights cast to float8_e4m3fn; numpy's safetensors does not know that dtype."""
    header = {}
    content = b""
    for key, value in weights.items():
        bits = value.astype(ml_dtypes.float8_e4m3fn).tobytes()
        span = [len(content), len(content) + len(bits)]
        header[key] = {"dtype": "F8_E4M3", "shape": value.shape, "data_offsets": span}
        content += bits
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content)


def folder(path, weights=WEIGHTS, **entries):
    """A transformer folder of diffusers with other entries of config.json."""
    path.mkdir()
    config = json.loads((MODEL / "config.json").read_text()) | entries
    (path / "config.json").write_text(json.dumps(config))
    if weights:
        save_file(weights, path / NAME)
    return path


def single(tmp_path, weights, name="model.safetensors"):
    save_file(weights, tmp_path / name)
    return tmp_path / name


def shards_beside_an_old_file(tmp_path):
    path = folder(tmp_path / "t", {key: 0 * value for key, value in WEIGHTS.items()})
    weight_map = {}
    for number, keys in enumerate((sorted(WEIGHTS)[:9], sorted(WEIGHTS)[9:])):
        save_file({key: WEIGHTS[key] for key in keys}, path / f"part{number}.safetensors")
        weight_map |= dict.fromkeys(keys, f"part{number}.safetensors")
    (path / f"{NAME}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def whole_pipeline_of_comfyui(tmp_path):
    weights = {f"model.diffusion_model.{key}": value for key, value in BFL.items()}
    return single(tmp_path, weights | {"vae.decoder.conv_in.bias": np.zeros(3, np.float32)})


def named_file_of_a_folder(tmp_path):
    """Its config.json describes it, whatever model the config names."""
    return folder(tmp_path / "t") / NAME


@pytest.mark.parametrize(
    "make",
    [
        lambda path: single(path, {f"model.diffusion_model.{k}": v for k, v in BFL.items()}),
        whole_pipeline_of_comfyui,
        lambda path: single(path, {f"_orig_mod.{k}": v for k, v in BFL.items()}),
        lambda path: single(path, WEIGHTS),
        named_file_of_a_folder,
        shards_beside_an_old_file,
    ],
)
def test_the_same_weights_in_other_forms(make, tmp_path):
    config, params = load_flux(make(tmp_path))
    assert config == CONFIG
    want = leaves(PARAMS)
    for name, value in leaves(params).items():
        np.testing.assert_array_equal(value, want[name], err_msg=name)


@pytest.mark.parametrize("names", [BFL, WEIGHTS])
def test_float8_is_read_as_it_was_cast(names, tmp_path):
    write_float8(tmp_path / "low.safetensors", names)
    _, params = load_flux(tmp_path / "low.safetensors")
    for name, want in leaves(PARAMS).items():
        low = np.asarray(want).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_array_equal(leaves(params)[name], low, err_msg=name)


def test_axes_that_no_shape_says_are_those_of_the_model(tmp_path):
    """If they fit the heads, else by the rule of the published models."""
    file = single(tmp_path, BFL)
    base = folder(tmp_path / "base", None, axes_dims_rope=[8, 12, 12])
    config, _ = load_transformer(FLUX, file, base, **EXACT)
    assert config == replace(CONFIG, axes_dims_rope=(8, 12, 12))
    other = folder(tmp_path / "other", None, axes_dims_rope=[16, 56, 56])
    config, _ = load_transformer(FLUX, file, other, **EXACT)
    assert config == CONFIG


def test_a_file_of_schnell_has_no_guidance(tmp_path):
    weights = {key: array for key, array in BFL.items() if not key.startswith("guidance_in.")}
    config, params = load_flux(single(tmp_path, weights))
    assert config == replace(CONFIG, guidance_embeds=False)
    assert leaves(PARAMS).keys() - leaves(params).keys() == {
        f"guidance_in.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("kernel", "bias")
    }


def test_another_autoencoder_is_checked_before_weights_are_read(tmp_path):
    weights = load_file(PIPELINE / "vae" / NAME)
    good = single(tmp_path, {f"vae.{key}": array for key, array in weights.items()})
    model = load_model(pretrained(vae=str(good)), (64, 64), one_device())
    _, want = load_vae(PIPELINE / "vae", PIPELINE / "vae")
    for name, array in leaves(want).items():
        np.testing.assert_array_equal(leaves(model.vae_params)[name], array, err_msg=name)

    del weights["decoder.conv_in.bias"]
    bad = single(tmp_path, weights, "bad.safetensors")
    with pytest.raises(ValueError, match=r"bad.safetensors lacks decoder.conv_in.bias"):
        abstract_model(pretrained(vae=str(bad)), (64, 64), one_device())
    with pytest.raises(FileNotFoundError, match=r"pretrained\.vae is .none., which does not"):
        abstract_model(pretrained(vae="none"), (64, 64), one_device())


def wide(channels):
    return {"img_in.weight": np.zeros((64, channels), np.float32)}


def gguf(tmp_path):
    (tmp_path / "flux1-dev-Q4_0.gguf").write_bytes(b"GGUF" + bytes(64))
    return tmp_path / "flux1-dev-Q4_0.gguf"


def index(tmp_path, content):
    path = folder(tmp_path / "t", None)
    (path / f"{NAME}.index.json").write_text(content)
    return path


BYTES = {"x_embedder.weight": np.zeros((64, 64), np.uint8)}
SCALES = {"double_blocks.0.img_mod.lin.scale_weight": np.ones(2, np.float32)}
PACKED = {"double_blocks.0.img_mod.lin.weight.quant_map": np.ones(16, np.float32)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: folder(path / "t", in_channels=384, out_channels=64), "FLUX.1-Fill"),
        (lambda path: single(path, BFL | wide(128)), "FLUX.1-Depth .128 and 64. a control picture"),
        (gguf, r"flux1-dev-Q4_0.gguf is not a complete GGUF file .*; download it again"),
        (lambda path: folder(path / "t", WEIGHTS | BYTES), "holds x_embedder.weight of dtype U8"),
        (lambda path: single(path, BFL | SCALES), r"scale_weight of dtype F32 and shape \(2,\)"),
        (lambda path: single(path, BFL | PACKED), "quant_map of dtype F32; expected one of"),
        (
            lambda path: single(path, BFL | {"redux_up.weight": np.zeros((2, 2), np.float32)}),
            r"is FLUX.1-Redux, which takes a picture .*; expected FLUX.1-dev or a fine-tune of it",
        ),
        (lambda path: single(path, BFL, "flux1-Kontext-dev.safetensors"), "is FLUX.1-Kontext"),
        (lambda path: single(path, WEIGHTS, "kontext.safetensors"), "is FLUX.1-Kontext"),
        (lambda path: index(path, '{"metadata": {}}'), 'index.json has no "weight_map"'),
        (lambda path: index(path, "{"), "index.json is not JSON"),
        (
            lambda path: folder(path / "t", quantization_config={"quant_method": "bitsandbytes"}),
            "config.json has quantization_config: quantized weights are not read",
        ),
        (lambda path: folder(path / "t", patch_size=2), "config.json has patch_size 2; expected 1"),
        (lambda path: folder(path / "t", qk_gain=2.0), "qk_gain 2.0, which is not known here"),
        (lambda path: folder(path / "t", axes_dims_rope=[8, 8, 8]), "config.json: axes_dims_rope"),
    ],
)
def test_another_models_files_are_refused_by_name(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_flux(make(tmp_path))


@pytest.mark.parametrize(
    "name",
    ["FluxKontextPipeline", "FluxFillPipeline", "FluxControlPipeline", "Flux2Pipeline"],
)
def test_a_relatives_pipeline_is_refused_with_the_model_to_take(name, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    message = (
        rf"model_index\.json has \"_class_name\" '{name}'; expected a text-to-image pipeline, one "
        rf"of FluxPipeline.*\. {name} is another model, or takes more than text; take FLUX\.1-dev$"
    )
    with pytest.raises(ValueError, match=message):
        pipeline_class(tmp_path)


def test_a_transformer_out_of_another_pipeline_is_refused(tmp_path, monkeypatch):
    """FLUX.1-Kontext's transformer has the sizes of FLUX.1-dev's."""
    kontext = folder(tmp_path / "transformer")
    index = tmp_path / "model_index.json"
    chosen = pretrained(transformer=str(kontext))
    abstract_model(chosen, (32, 32), one_device())
    index.write_text('{"_class_name": "FluxPipeline"}')
    abstract_model(chosen, (32, 32), one_device())

    index.write_text('{"_class_name": "FluxKontextPipeline"}')
    with pytest.raises(ValueError, match=r"model_index\.json has .* 'FluxKontextPipeline'; expect"):
        abstract_model(chosen, (32, 32), one_device())

    index.write_text('{"_class_name": "MadeUpPipeline"}')
    monkeypatch.setitem(FAMILIES, "MadeUpPipeline", "tests.helpers.made_up:MADE_UP")
    message = r"transformer is .*, which is part of a MadeUpPipeline; expected one for the FluxPip"
    with pytest.raises(ValueError, match=message):
        abstract_model(chosen, (32, 32), one_device())


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "Pipeline", "", None, 3])
def test_any_other_pipeline_is_refused(name, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=r"expected a text-to-image pipeline, one of [\w, ]+$"):
        pipeline_class(tmp_path)


def test_diffusers_names_without_sizes_are_refused(tmp_path):
    file = single(tmp_path, WEIGHTS)
    with pytest.raises(FileNotFoundError, match=r"nowhere/config\.json is missing"):
        load_transformer(FLUX, file, tmp_path / "nowhere", **EXACT)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"time_shift_type": "linear"}, "time_shift_type 'linear'; expected 'exponential'"),
        ({"shift_terminal": 0.02}, "shift_terminal 0.02; expected None"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas True; expected False"),
        ({"use_exponential_sigmas": True}, "use_exponential_sigmas True; expected False"),
        ({"use_beta_sigmas": True}, "use_beta_sigmas True; expected False"),
        ({"invert_sigmas": True}, "invert_sigmas True; expected False"),
        ({"stochastic_sampling": True}, "stochastic_sampling True; expected False"),
        ({"num_train_timesteps": 500}, "num_train_timesteps 500; expected 1000"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "_class_name 'FlowMatchHeunDiscrete"),
        ({"sigma_law": "cosine"}, "sigma_law 'cosine', which is not known here"),
        ({"shift": None}, "scheduler_config.json lacks shift"),
    ],
)
def test_other_schedules_are_refused_by_name(entries, message, tmp_path):
    shutil.copytree(PIPELINE, tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    with pytest.raises(ValueError, match=message):
        abstract_model(pretrained(tmp_path / "pipeline"), (64, 64), one_device())


def test_the_table_of_schedule_entries_is_diffusers_own():
    """Every argument of its scheduler is read or has one allowed value: its default."""
    diffusers = pytest.importorskip("diffusers")
    config = diffusers.FlowMatchEulerDiscreteScheduler().config
    fields = FLUX.Schedule.__dataclass_fields__.keys()
    others = {
        name: value
        for name, value in config.items()
        if name not in fields and not name.startswith("_")
    }
    assert {"_class_name": "FlowMatchEulerDiscreteScheduler", **others} == FLUX.schedule_entries


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn 'gelu'; expected 'silu'"),
        ({"latents_mean": [0.0]}, r"latents_mean \[0.0\]; expected None"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention False; expected True"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types"),
        ({"shift_factor": None}, "config.json lacks shift_factor"),
    ],
)
def test_other_autoencoders_are_refused_by_name(entries, message, tmp_path):
    values = json.loads((PIPELINE / "vae" / "config.json").read_text()) | entries
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        vae_config(tmp_path)
