"""LoRAs under the names of other programs: merged weights beside dense ones."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from realgen_jax.models.flux.family import FLUX
from realgen_jax.models.sd3.family import SD3
from realgen_jax.models.trainable import with_lora_file
from realgen_jax.models.zimage.family import Z_IMAGE
from realgen_jax.nn.convert import abstract
from realgen_jax.nn.names import flat, shares
from tests.helpers.bfl_names import bfl_transformer
from tests.helpers.lora_names import (
    AB,
    DOWN_UP,
    SINGLE_FILE,
    assert_close,
    factors,
    family_model,
    merged,
    named,
    ours,
)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        (FLUX, FLUX.Config()),
        (SD3, SD3.Config(**SD3.published[0].sizes)),
        (Z_IMAGE, Z_IMAGE.Config()),
    ],
)
def test_a_name_means_one_module_and_modules_are_whole(family, config):
    """In the published models, without dots, whatever the naming."""
    state = abstract(family.Module, config)[1]
    own = family.table(config)
    outputs = {module: content.rows for module, content in shares(state, own, own).items()}
    meanings = {}
    for table in (own, *family.other_tables(config)):
        for module, content in shares(state, own, table).items():
            assert meanings.setdefault(flat(module), content) == content
            for share in content.shares:
                assert sum(stop - start for start, stop in share.spans) == outputs[share.module]
    assert len(meanings) > len(outputs) > 200


@pytest.mark.parametrize("family", SINGLE_FILE)
@pytest.mark.parametrize(
    ("form", "alpha"),
    [
        # sd-scripts (kohya)
        (lambda pairs: named(pairs, "lora_unet_", *DOWN_UP, flat=True, alpha=2), 2),
        # ai-toolkit, ComfyUI
        (lambda pairs: named(pairs, "diffusion_model.", *AB), None),
        (lambda pairs: named(pairs, "", *AB), None),
        (lambda pairs: named(pairs, "base_model.model.", *AB, alpha=4), 4),
    ],
)
def test_the_publishers_names(family, form, alpha, tmp_path):
    """Of every matrix, with two ranks; those of fused projections are split."""
    model, weights = family_model(family)
    single = SINGLE_FILE[family](weights, model.config)
    pairs = factors(single, rank=lambda module: 8 if "qkv" in module else 4)
    save_file(form(pairs), tmp_path / "lora.safetensors")

    changed = ours(model, tmp_path / "lora.safetensors", weights)
    got = SINGLE_FILE[family](changed, model.config)
    assert_close(got, merged(single, pairs, alpha))


@pytest.mark.parametrize("family", SINGLE_FILE)
@pytest.mark.parametrize(
    ("prefix", "is_flat"),
    [
        ("lora_transformer_", True),
        ("lycoris_", True),
        ("lora_unet_", True),
        ("diffusion_model.", False),
    ],
)
def test_diffusers_names(family, prefix, is_flat, tmp_path):
    """As OneTrainer, LyCORIS, some files of sd-scripts, and ai-toolkit have them."""
    model, weights = family_model(family)
    pairs = factors(weights)
    save_file(named(pairs, prefix, *DOWN_UP, flat=is_flat), tmp_path / "lora.safetensors")
    assert_close(ours(model, tmp_path / "lora.safetensors", weights), merged(weights, pairs))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_factors_of_16_bits(dtype, tmp_path):
    model, weights = family_model("flux")
    pairs = {
        module: tuple(factor.astype(dtype).astype(np.float32) for factor in pair)
        for module, pair in factors(weights).items()
    }
    save_file(named(pairs, "transformer.", *AB, dtype=dtype), tmp_path / "lora.safetensors")
    assert_close(ours(model, tmp_path / "lora.safetensors", weights), merged(weights, pairs))


# XLabs' projection -> BFL's, and the share of its outputs.
XLABS = {
    "processor.qkv_lora1": ("img_attn.qkv", 1),
    "processor.qkv_lora2": ("txt_attn.qkv", 1),
    "processor.proj_lora1": ("img_attn.proj", 1),
    "processor.proj_lora2": ("txt_attn.proj", 1),
    "processor.qkv_lora": ("linear1", 3 / 7),
    "processor.proj_lora": ("linear2", 1),
}


def test_xlabs_names(tmp_path):
    model, weights = family_model("flux")
    single = bfl_transformer(weights, model.config)
    random = np.random.default_rng(0)
    tensors = {}
    want = dict(single)
    for block in ("double_blocks.0", "single_blocks.0", "single_blocks.1"):
        for theirs, (module, share) in XLABS.items():
            weight = single.get(f"{block}.{module}.weight")
            if weight is not None and theirs.endswith(("1", "2")) == block.startswith("double"):
                rows = round(share * len(weight))
                a = random.normal(0, 0.1, (4, weight.shape[1])).astype(np.float32)
                b = random.normal(0, 0.1, (rows, 4)).astype(np.float32)
                tensors |= {f"{block}.{theirs}.down.weight": a, f"{block}.{theirs}.up.weight": b}
                change = np.zeros_like(weight)
                change[:rows] = b @ a
                want[f"{block}.{module}.weight"] = weight + change
    assert len(tensors) == 2 * 8
    save_file(tensors, tmp_path / "lora.safetensors")
    got = ours(model, tmp_path / "lora.safetensors", weights)
    assert_close(bfl_transformer(got, model.config), want)


@pytest.mark.slow
def test_diffusers_converts_to_the_same(tmp_path):
    """Its own reading of sd-scripts' and XLabs' names, in the blocks of any size."""
    diffusers, torch = (pytest.importorskip(name) for name in ("diffusers", "torch"))
    pytest.importorskip("peft")
    model, weights = family_model("flux")
    single = bfl_transformer(weights, model.config)
    blocks = {key: array for key, array in single.items() if "double_blocks." in key}
    for tensors in (
        named(factors(blocks), "lora_unet_", *DOWN_UP, flat=True, alpha=2),
        {
            f"double_blocks.0.{name}.{factor}.weight": np.full(shape, 0.1, np.float32)
            for name in ("processor.qkv_lora1", "processor.qkv_lora2")
            for factor, shape in (("down", (4, 64)), ("up", (192, 4)))
        },
    ):
        save_file(tensors, tmp_path / "lora.safetensors")
        state = {key: torch.tensor(array) for key, array in tensors.items()}
        theirs = diffusers.FluxPipeline.lora_state_dict(state)
        pairs = {}
        for key, array in theirs.items():
            if "lora_A" in key:
                b = theirs[key.replace("lora_A", "lora_B")]
                module = key.removeprefix("transformer.").removesuffix(".lora_A.weight")
                pairs[module] = (array.numpy(), b.numpy())
        got = ours(model, tmp_path / "lora.safetensors", weights)
        assert_close(got, merged(weights, pairs))


def test_two_namings_of_one_module_are_refused(tmp_path):
    model, weights = family_model("flux")
    single = bfl_transformer(weights, model.config)
    one = named({"double_blocks.0.img_attn.proj": factors(single)["double_blocks.0.img_attn.proj"]},
                "", *AB)  # fmt: skip
    own = "transformer_blocks.0.attn.to_out.0"
    save_file(one | named({own: factors(weights)[own]}, "", *AB), tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=f"holds two adapters of {own}"):
        with_lora_file(model, tmp_path / "lora.safetensors")
