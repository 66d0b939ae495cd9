"""Quantized checkpoints, float8 with scales and GGUF: values beside written-out formulas."""

import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from realgen_jax.models.sd3.family import SD3
from realgen_jax.models.sources import load_transformer
from realgen_jax.nn.convert import leaves
from realgen_jax.nn.stored import write_tensors
from realgen_jax.nn.tensors import Tensors
from tests.helpers.bfl_names import bfl_transformer
from tests.helpers.goldens import PIPELINE
from tests.helpers.models import EXACT, load_flux
from tests.helpers.sd3 import SD3_PIPELINE
from tests.helpers.stability_names import stability_transformer

CONFIG, _ = load_flux(PIPELINE / "transformer")
BFL = bfl_transformer(
    load_file(PIPELINE / "transformer" / "diffusion_pytorch_model.safetensors"), CONFIG
)
MATRICES = [key for key, array in BFL.items() if array.ndim == 2]


def assert_read_as(path, weights, tmp_path):
    """The file is read as one of float32 weights."""
    save_file(weights, tmp_path / "exact.safetensors")
    _, want = load_flux(tmp_path / "exact.safetensors")
    config, got = load_flux(path)
    assert config == CONFIG
    for name, array in leaves(want).items():
        np.testing.assert_array_equal(leaves(got)[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("scale_name", "notes", "shape", "prefix"),
    [
        ("scale_weight", {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}, (), ""),
        ("scale_weight", {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}, (1,),
         "model.diffusion_model."),
        ("weight_scale", {"img_in.comfy_quant": np.zeros(2, ml_dtypes.float8_e4m3fn)}, (), ""),
    ],
)  # fmt: skip
def test_float8_with_scales(scale_name, notes, shape, prefix, tmp_path):
    tensors = dict(notes)
    exact = dict(BFL)
    for key, array in BFL.items():
        tensors[key] = array
        if key in MATRICES[:-1]:
            module = key.removesuffix("weight")
            scale = np.float32(np.abs(array).max() / 448)
            tensors[key] = (array / scale).astype(ml_dtypes.float8_e4m3fn)
            tensors[module + scale_name] = np.full(shape, scale)
            tensors[module + "input_scale"] = np.full(shape, 3, np.float32)
            exact[key] = tensors[key].astype(np.float32) * scale
    tensors = {prefix + key: array for key, array in tensors.items()}
    write_tensors(tmp_path / "fp8.safetensors", tensors, tensors.items(), {})
    assert_read_as(tmp_path / "fp8.safetensors", exact, tmp_path)


# -- GGUF


def q8_0(blocks):
    """int8 times a float16 scale, of 32 weights."""
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    return scale * blocks[:, 2:].copy().view(np.int8)


def q4_0(blocks):
    """4 bits less 8, times a float16 scale; the low halves of the bytes come first."""
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    numbers = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return scale * (numbers.astype(np.float32) - 8)


def q4_k(blocks):
    """256 weights in eights of 32: scale and minimum of 6 bits, times two float16 scales."""
    d, low = blocks[:, :4].copy().view(np.float16).astype(np.float32).T
    packed = blocks[:, 4:16].astype(np.int32)
    weights = np.empty((len(blocks), 256), np.float32)
    for part in range(8):
        if part < 4:
            scale = packed[:, part] & 63
            minimum = packed[:, part + 4] & 63
        else:
            scale = packed[:, part + 4] & 15 | packed[:, part - 4] >> 6 << 4
            minimum = packed[:, part + 4] >> 4 | packed[:, part] >> 6 << 4
        content = blocks[:, 16 + 32 * (part // 2) : 16 + 32 * (part // 2) + 32]
        numbers = content >> 4 if part % 2 else content & 15
        column = slice(32 * part, 32 * part + 32)
        weights[:, column] = (d * scale)[:, None] * numbers - (low * minimum)[:, None]
    return weights


TYPES = {"Q8_0": (q8_0, 34, 32), "Q4_0": (q4_0, 18, 32), "Q4_K": (q4_k, 144, 256)}


def write_gguf(path, weights, kind, architecture="flux"):
    """Write weights quantized where their width allows it; return what they then are."""
    gguf = pytest.importorskip("gguf")
    formula, size, block = TYPES[kind]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    exact = {}
    for key, array in weights.items():
        exact[key] = array
        if array.ndim == 2 and array.shape[1] % block == 0:
            # Random bytes, with scales that are small numbers.
            content = random.integers(0, 256, (array.size // block, size), np.uint8)
            scales = random.uniform(0.001, 0.01, (len(content), 2)).astype(np.float16)
            width = 4 if kind == "Q4_K" else 2
            content[:, :width] = scales.view(np.uint8)[:, :width]
            exact[key] = formula(content).reshape(array.shape)
            content = content.reshape(len(array), -1)
            writer.add_tensor(key, content, raw_dtype=gguf.GGMLQuantizationType[kind])
        elif key.endswith(".bias"):
            low = array.astype(ml_dtypes.bfloat16)
            exact[key] = low.astype(np.float32)
            low = low.view(np.uint8)
            writer.add_tensor(key, low, raw_dtype=gguf.GGMLQuantizationType.BF16)
        elif key.endswith(".scale"):
            writer.add_tensor(key, array)
        else:
            exact[key] = array.astype(np.float16).astype(np.float32)
            writer.add_tensor(key, array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return exact


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_gguf(kind, prefix, tmp_path):
    named = {prefix + key: array for key, array in BFL.items()}
    exact = write_gguf(tmp_path / "flux.gguf", named, kind)
    exact = {key.removeprefix(prefix): array for key, array in exact.items()}
    assert any((exact[key] != BFL[key]).mean() > 0.9 for key in MATRICES)
    assert_read_as(tmp_path / "flux.gguf", exact, tmp_path)


def test_gguf_of_another_family(tmp_path):
    """SD3's, with tensors of three and four axes."""
    overrides = {**EXACT, "image_size": (4, 4)}
    folder = SD3_PIPELINE / "transformer"
    config, _ = load_transformer(SD3, folder, folder, **overrides)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights = {key: array.astype(np.float32) for key, array in weights.items()}
    named = stability_transformer(weights, config)
    exact = write_gguf(tmp_path / "sd3.gguf", named, "Q8_0", "sd3")
    read = Tensors(tmp_path / "sd3.gguf")
    assert read.keys() == exact.keys()
    for key, array in exact.items():
        np.testing.assert_array_equal(read.read(key), array, err_msg=key)
        np.testing.assert_array_equal(read.read(key, 0, 1), array[:1], err_msg=key)


def test_a_reshaped_tensor_of_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    array = np.arange(24, dtype=np.float32)
    writer.add_array("comfy.gguf.orig_shape.x.weight", [6, 2, 2])
    writer.add_tensor("x.weight", array.reshape(4, 6))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = Tensors(tmp_path / "a.gguf")
    assert tensors.shape("x.weight") == (6, 2, 2)
    np.testing.assert_array_equal(tensors.read("x.weight", 1, 3), array.reshape(6, 2, 2)[1:3])


def test_gguf_that_is_not_read_is_named(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    writer.add_tensor("x", np.zeros(4, np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"a.gguf holds tensors of type I32, which is not read"):
        Tensors(tmp_path / "a.gguf")

    monkeypatch.setitem(sys.modules, "gguf", None)
    message = r"a.gguf is a GGUF file, which needs a package: pip install \"realgen_jax\[gguf\]\"$"
    with pytest.raises(ValueError, match=message):
        Tensors(tmp_path / "a.gguf")
