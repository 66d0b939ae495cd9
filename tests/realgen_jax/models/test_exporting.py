"""LoRAs and merged weights for other programs, read by rules that are written out here."""

import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from realgen_jax.models.exporting import export_lora, export_weights
from realgen_jax.models.flux.tables import BFL, DIFFUSERS
from realgen_jax.models.flux.transformer import FluxConfig, FluxTransformer
from realgen_jax.models.trainable import with_lora_file
from realgen_jax.nn.convert import abstract
from realgen_jax.nn.export import merged_tensors
from realgen_jax.nn.lora import lora_tensors
from realgen_jax.nn.stored import write_tensors
from realgen_jax.nn.tensors import Tensors
from tests.helpers.bfl_names import bfl_transformer
from tests.helpers.goldens import PIPELINE
from tests.helpers.lora_names import (
    AB,
    DOWN_UP,
    FILE,
    SINGLE_FILE,
    assert_close,
    comfyui_merges,
    factors,
    family_model,
    merged,
    named,
)
from tests.helpers.models import EXACT, load_flux, pretrained, save_flux
from tests.helpers.sd3 import SD3_PIPELINE, load_sd3
from tests.helpers.zimage import ZIMAGE

FOLDERS = {"flux": PIPELINE, "sd3": SD3_PIPELINE, "zimage": ZIMAGE}


def is_trained(module):
    """RealGen's and Flow-GRPO's targets, of which fused modules hold others too."""
    ends = ("to_q", "to_k", "to_v", "add_q_proj", "to_out.0", "ff.net.2")
    return module.endswith(ends) or "ff_context" in module


@pytest.mark.parametrize("family", SINGLE_FILE)
@pytest.mark.parametrize("chosen", [lambda module: True, is_trained])
def test_comfyui_adds_what_was_trained(family, chosen, tmp_path):
    model, weights = family_model(family)
    pairs = {module: pair for module, pair in factors(weights).items() if chosen(module)}
    save_file(named(pairs, "transformer.", *AB, alpha=6), tmp_path / "lora.safetensors")
    export_lora(model, tmp_path / "lora.safetensors", "comfyui", tmp_path / "comfyui.safetensors")

    single = SINGLE_FILE[family](weights, model.config)
    want = SINGLE_FILE[family](merged(weights, pairs, alpha=6), model.config)
    assert_close(comfyui_merges(single, tmp_path / "comfyui.safetensors"), want)


@pytest.mark.parametrize("form", ["comfyui", "diffusers", "peft"])
@pytest.mark.parametrize("family", SINGLE_FILE)
def test_what_is_written_is_read_again(form, family, tmp_path):
    """From sd-scripts' names and two ranks."""
    model, weights = family_model(family)
    single = SINGLE_FILE[family](weights, model.config)
    pairs = factors(single, rank=lambda module: 8 if "qkv" in module else 4)
    tensors = named(pairs, "lora_unet_", *DOWN_UP, flat=True, alpha=8)
    save_file(tensors, tmp_path / "lora.safetensors")
    export_lora(model, tmp_path / "lora.safetensors", form, tmp_path / "out")

    once, again = (
        lora_tensors(with_lora_file(model, path)[1], model.family.table(model.config))
        for path in (tmp_path / "lora.safetensors", tmp_path / "out")
    )
    assert once.keys() == again.keys()
    for name, array in once.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)

    # A of the fused modules is one for all of their parts, and so it stays.
    if form == "comfyui":
        own = load_file(tmp_path / "out")
        for module in pairs:
            assert len(own[f"diffusion_model.{module}.lora_A.weight"]) == 8


def export(family, tmp_path, form, dtype, alpha=None):
    """The merged export's path, and the weights that it should hold under diffusers' names."""
    model, weights = family_model(family)
    pairs = factors(weights)
    save_file(named(pairs, "transformer.", *AB, alpha=alpha), tmp_path / "lora.safetensors")
    names = pretrained(FOLDERS[family], family=model.family.pipeline)
    lora = tmp_path / "lora.safetensors"
    export_weights(model, names, lora, form, tmp_path / "out", np.dtype(dtype))
    return tmp_path / "out", merged(weights, pairs, alpha)


@pytest.mark.parametrize("family", SINGLE_FILE)
def test_merged_weights_as_a_folder_of_diffusers(family, tmp_path):
    out, want = export(family, tmp_path, "diffusers", np.float32, alpha=6)
    assert_close(load_file(out / "diffusion_pytorch_model.safetensors"), want)


@pytest.mark.parametrize("family", SINGLE_FILE)
def test_merged_weights_as_one_file(family, tmp_path):
    out, want = export(family, tmp_path, "comfyui", np.float32)
    assert_close(load_file(out), SINGLE_FILE[family](want, family_model(family)[0].config))


def test_merged_weights_are_rounded_once(tmp_path):
    out, want = export("flux", tmp_path, "comfyui", ml_dtypes.bfloat16)
    for key, array in bfl_transformer(want, family_model("flux")[0].config).items():
        got = load_file(out)[key]
        assert got.dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(got.astype(np.float32), array, rtol=2**-8, atol=1e-7)

    # Our own reading of that file.
    _, params = load_flux(out)
    want = {key: array.astype(ml_dtypes.bfloat16) for key, array in want.items()}
    save_file(want, tmp_path / "want.safetensors")
    _, expected = load_flux(tmp_path / "want.safetensors")
    np.testing.assert_allclose(
        params["double"]["img"]["qkv"]["kernel"][...],
        expected["double"]["img"]["qkv"]["kernel"][...],
        rtol=2**-7,
    )


def test_diffusers_and_peft_load_what_is_written(tmp_path):
    diffusers, peft = (pytest.importorskip(name) for name in ("diffusers", "peft"))
    model, weights = family_model("flux")
    pairs = {name: pair for name, pair in factors(weights).items() if is_trained(name)}
    save_file(named(pairs, "transformer.", *AB, alpha=6), tmp_path / "lora.safetensors")
    export_lora(model, tmp_path / "lora.safetensors", "peft", tmp_path / "peft")
    network = diffusers.FluxTransformer2DModel.from_pretrained(PIPELINE / "transformer")
    network = peft.PeftModel.from_pretrained(network, tmp_path / "peft").merge_and_unload()
    state = {key: array.numpy() for key, array in network.state_dict().items()}
    for key, array in merged(weights, pairs, alpha=6).items():
        np.testing.assert_allclose(state[key], array, atol=1e-5, err_msg=key)

    names = pretrained(PIPELINE)
    lora = tmp_path / "lora.safetensors"
    export_weights(model, names, lora, "diffusers", tmp_path / "merged", np.dtype(np.float32))
    network = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "merged")
    state = {key: array.numpy() for key, array in network.state_dict().items()}
    for key, array in merged(weights, pairs, alpha=6).items():
        np.testing.assert_allclose(state[key], array, atol=1e-5, err_msg=key)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """Of a checkpoint of 12 MB, the largest of whose tensors has 0.5 MB."""
    config = FluxConfig(
        num_layers=4,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
        **EXACT,
    )
    state = abstract(FluxTransformer, config)[1]
    weights = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, leaf.dtype), state)
    save_flux(tmp_path, config, weights)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    largest = max(array.nbytes for array in load_file(file).values())
    assert file.stat().st_size > 20 * largest

    source = Tensors(file)
    tracemalloc.start()
    tensors = merged_tensors(source, state, DIFFUSERS, BFL, lambda target, layer: None, np.float32)
    before = tracemalloc.get_traced_memory()[0]
    write_tensors(tmp_path / "single.safetensors", tensors.shapes, tensors, {})
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert (tmp_path / "single.safetensors").stat().st_size > 20 * largest
    assert largest < peak < 6 * largest


def test_positions_of_sd3_are_written_as_they_were(tmp_path):
    """All of the file's, though a model holds those of its own pictures."""
    model, weights = family_model("sd3")
    names = pretrained(SD3_PIPELINE, family="StableDiffusion3Pipeline")
    export_weights(model, names, "", "diffusers", tmp_path / "out", np.dtype(np.float32))
    load_sd3(tmp_path / "out", 2, 2)
    for key, array in load_file(tmp_path / "out" / FILE.removeprefix("transformer/")).items():
        np.testing.assert_array_equal(array, weights[key], err_msg=key)
