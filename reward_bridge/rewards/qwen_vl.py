"""Inputs of Qwen2-VL and Qwen2.5-VL (arXiv 2409.12191, 2502.13923), made on the pictures' device.

transformers' own processors need torchvision. This module repeats the steps of the authors' tools.
qwen_vl_utils rounds the size and keeps it within bounds. The image processor does so again with the
folder's bounds, normalises, and cuts the picture into patches. In the text, one `<|image_pad|>`
stands for every 2x2 patches.
"""

from collections.abc import Sequence

import torch
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from reward_bridge.preprocess import normalize, resize
from reward_bridge.weights import find

IMAGE = "<|image_pad|>"

# The bounds on the number of pixels in qwen_vl_utils if the message sets none.
UTILS_PIXELS = (4 * 28 * 28, 16384 * 28 * 28)

# The chat template of both models, for a picture and a text.
TURN = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{text}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


class QwenInputs:
    """The model's keyword arguments for pictures and texts.

    path: a local folder with the tokenizer and the image processor.
    option: the name of that folder in config.reward.options.
    pixels: the minimum and maximum number of pixels to which a picture is scaled, before the
        folder's own bounds apply.

    Raises FileNotFoundError if a file is missing.
    """

    def __init__(self, path: str, option: str, pixels: tuple[int, int] = UTILS_PIXELS):
        self.folder = find(path, option, "config.json").parent
        self.pixels = pixels
        find(str(self.folder), option, "preprocessor_config.json", "processor_config.json")
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(self.folder)

    def __call__(self, images: torch.Tensor, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The inputs for uint8 [n, 3, h, w] and n texts, each the user's turn of a dialogue.

        Texts are padded on the right, which no token of a causal model attends to; the mask marks
        the padding.
        """
        patches, grid = self.patches(images)

        # One image token for every merged block of patches.
        blocks = grid.prod().item() // self.processor.merge_size**2
        turns = [self.turn(text).replace(IMAGE, IMAGE * blocks) for text in texts]
        tokens = self.tokenizer(turns, padding=True, padding_side="right", return_tensors="pt")
        tokens = tokens.to(images.device)

        image_token = self.tokenizer.convert_tokens_to_ids(IMAGE)
        return {
            "input_ids": tokens.input_ids,
            "attention_mask": tokens.attention_mask,
            "mm_token_type_ids": (tokens.input_ids == image_token).int(),
            "pixel_values": patches,
            "image_grid_thw": grid.expand(len(images), 3).to(images.device),
        }

    def patches(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Resize, normalise and cut uint8 [n, 3, h, w].

        Returns float32 [n * rows * columns, values per patch], and one picture's grid (1, rows,
        columns).
        """
        processor = self.processor
        own_pixels = (processor.size["shortest_edge"], processor.size["longest_edge"])
        factor = processor.patch_size * processor.merge_size
        for least, most in (self.pixels, own_pixels):
            size = smart_resize(*images.shape[2:], factor, least, most)
            images = resize(images, size, "bicubic")

        x = normalize(images, tuple(processor.image_mean), tuple(processor.image_std))
        return patchify(
            x, processor.patch_size, processor.merge_size, processor.temporal_patch_size
        )

    def turn(self, text: str) -> str:
        """The dialogue with one picture and `text`, by the folder's chat template if it has one.

        Raises ValueError if it does not contain exactly one image token.
        """
        if self.tokenizer.chat_template is None:
            turn = TURN.format(image=IMAGE, text=text)
        else:
            message = {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": text}],
            }
            turn = self.tokenizer.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True
            )
        if turn.count(IMAGE) != 1:
            raise ValueError(
                f"the chat template of {self.folder} makes {turn.count(IMAGE)} {IMAGE} of one "
                f"picture and the text {text[-80:]!r}; expected 1: use the template of Qwen2-VL or "
                f"Qwen2.5-VL, and a text without {IMAGE}"
            )
        return turn


def patchify(
    x: torch.Tensor, patch: int, merge: int, frames: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut [n, c, h, w] into patches [n * rows * columns, c * frames * patch * patch].

    The patches of a merge x merge block follow each other, and blocks go row by row. A picture is
    repeated as a video of `frames` equal frames. Also returns the grid, int64 (1, rows, columns).
    """
    n, channels, height, width = x.shape
    rows = height // patch
    columns = width // patch
    x = x.view(n, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # n, block row, block column, row, column, c, y, x
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    return x.reshape(n * rows * columns, -1), torch.tensor([1, rows, columns])
