"""LoRAs under the names of other programs, and the weights that they should give.

The reference is dense: W + scale B A on the weights of a file, under its own names.
"""

from functools import cache

import numpy as np
from safetensors.numpy import load_file

from realgen_jax.models.trainable import with_lora_file
from realgen_jax.nn.lora import lora_tensors
from tests.helpers.bfl_names import bfl_transformer
from tests.helpers.comfyui_names import comfyui_zimage
from tests.helpers.goldens import PIPELINE
from tests.helpers.models import golden_model
from tests.helpers.sd3 import SD3_PIPELINE, sd3_model
from tests.helpers.stability_names import stability_transformer
from tests.helpers.zimage import ZIMAGE, zimage_model

FILE = "transformer/diffusion_pytorch_model.safetensors"
SINGLE_FILE = {
    "flux": bfl_transformer,
    "sd3": stability_transformer,
    "zimage": lambda weights, config: comfyui_zimage(weights),
}


@cache
def family_model(family):
    """(the golden model, its weights under diffusers' names) of a key of SINGLE_FILE."""
    model, folder = {
        "flux": (golden_model, PIPELINE),
        "sd3": (sd3_model, SD3_PIPELINE),
        "zimage": (zimage_model, ZIMAGE),
    }[family]
    weights = load_file(folder / FILE)
    return model(), {key: array.astype(np.float32) for key, array in weights.items()}


def factors(weights, rank=4):
    """{module: (A, B)} of every matrix and convolution; `rank` may depend on the module's name."""
    random = np.random.default_rng(0)
    found = {}
    for key, weight in weights.items():
        if key.endswith(".weight") and weight.ndim > 1:
            module = key.removesuffix(".weight")
            r = rank(module) if callable(rank) else rank
            a = random.normal(0, 0.1, (r, *weight.shape[1:])).astype(np.float32)
            found[module] = (a, random.normal(0, 0.1, (len(weight), r)).astype(np.float32))
    return found


def merged(weights, pairs, alpha=None):
    """W + alpha / r B A; without alpha, W + B A."""
    result = dict(weights)
    for module, (a, b) in pairs.items():
        key = f"{module}.weight"
        scale = np.float32(1 if alpha is None else alpha / len(a))
        change = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
        result[key] = weights[key] + scale * change.reshape(weights[key].shape)
    return result


def ours(model, path, weights):
    """Weights under diffusers' names with our adapters of the file."""
    _, adapters = with_lora_file(model, path)
    tensors = lora_tensors(adapters, model.family.table(model.config))
    names = {name.rpartition(".")[0] for name in tensors}
    pairs = {name: tuple(tensors[f"{name}.lora_{letter}"] for letter in "AB") for name in names}
    return merged(weights, pairs)


def comfyui_merges(weights, file):
    """ComfyUI's rules for a file under its own names of the weights.

    A key is "diffusion_model.", a weight's name without ".weight", and the factor. Without alpha,
    the product B A is added as it is, in the weight's shape. Every key must be one of these.
    """
    left = load_file(file)
    result = dict(weights)
    for key, weight in weights.items():
        name = f"diffusion_model.{key.removesuffix('.weight')}"
        if f"{name}.lora_A.weight" in left:
            down = left.pop(f"{name}.lora_A.weight")
            up = left.pop(f"{name}.lora_B.weight")
            product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
            result[key] = weight + product.reshape(weight.shape)
    assert not left, sorted(left)
    return result


def assert_close(got, want):
    assert got.keys() == want.keys()
    for key, array in want.items():
        np.testing.assert_allclose(got[key], array, rtol=1e-6, atol=1e-6, err_msg=key)


def named(pairs, prefix, a, b, flat=False, alpha=None, dtype=np.float32):
    tensors = {}
    for module, (down, up) in pairs.items():
        name = prefix + (module.replace(".", "_") if flat else module)
        tensors |= {f"{name}.{a}": down.astype(dtype), f"{name}.{b}": up.astype(dtype)}
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    return tensors


AB = ("lora_A.weight", "lora_B.weight")
DOWN_UP = ("lora_down.weight", "lora_up.weight")
