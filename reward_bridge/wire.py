"""The body of a scoring request, in safetensors, so that parsing it executes no code.

It has one tensor, "images", uint8 [n, 3, h, w]. Its metadata has "prompts", a JSON list of n
strings.
"""

import json
from collections.abc import Mapping, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

# A header of the request, which the answer repeats under the same key.
REQUEST_ID = "x-request-id"

# A key of the answers: the digest of what computes the scores (reward_bridge/digests.py).
DIGEST = "digest"

# What safetensors and json raise for malformed bytes.
MALFORMED = (
    SafetensorError,
    KeyError,
    TypeError,
    ValueError,
    RuntimeError,
    RecursionError,
)


def encode(images: torch.Tensor, prompts: Sequence[str]) -> bytes:
    """The body for uint8 images [n, 3, h, w] and their n prompts."""
    return save({"images": images.cpu().contiguous()}, {"prompts": json.dumps(list(prompts))})


def decode(body: bytes) -> tuple[torch.Tensor, list[str]]:
    """The images, uint8 [n, 3, h, w] on the CPU, and the n prompts of a body.

    Raises ValueError if the body is anything else or has no pixels.
    """
    try:
        tensors = load(body)
        prompts = json.loads(_metadata(body)["prompts"])
    except MALFORMED as error:
        raise ValueError(
            f'the body is not safetensors with metadata "prompts", a JSON list '
            f"({type(error).__name__}: {error}); no other format is read, and never pickle"
        ) from None

    images = _images(tensors)
    _check_prompts(prompts, len(images))
    return images, prompts


def _metadata(body: bytes) -> Mapping[str, str]:
    """The metadata of a safetensors body: 8 bytes of length, then a JSON header."""
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    return header["__metadata__"]


def _images(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    images = tensors.get("images")
    is_batch = (
        images is not None
        and len(tensors) == 1
        and images.dtype == torch.uint8
        and images.ndim == 4
        and images.shape[1] == 3
    )
    if not is_batch:
        descriptions = []
        for name, tensor in list(tensors.items())[:3]:
            descriptions.append(f"{name!r} {tensor.dtype} {list(tensor.shape)}")
        raise ValueError(
            f"got {', '.join(descriptions) or 'no tensor'}; expected one tensor, 'images', "
            "torch.uint8 [n, 3, h, w]"
        )
    if not images.numel():
        raise ValueError(f"got images of shape {list(images.shape)}: there is nothing to score")
    return images


def _check_prompts(prompts: object, images: int) -> None:
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError('metadata "prompts" is not a JSON list of strings')
    if len(prompts) != images:
        raise ValueError(
            f"got {images} images and {len(prompts)} prompts; expected one prompt per image"
        )
