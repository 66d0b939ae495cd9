"""Pictures and texts as Qwen2-VL and Qwen2.5-VL take them (arXiv 2409.12191, 2502.13923), made on their device.

transformers' own processors want torchvision. This repeats what their authors' tools do one after the other:
qwen_vl_utils rounds and bounds the size, the image processor does so again with the folder's bounds, normalises and
cuts into patches; the text takes one `<|image_pad|>` for every 2x2 patches.
"""

from collections.abc import Sequence

import torch
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from reward_bridge.preprocess import normalize, resize
from reward_bridge.weights import find

IMAGE = "<|image_pad|>"
UTILS_PIXELS = (
    4 * 28 * 28,
    16384 * 28 * 28,
)  # the bounds of qwen_vl_utils where the message sets none


class QwenInputs:
    """The model's keyword arguments for pictures and texts, by the tokenizer and image processor of a local folder.

    `pixels` are the least and the most pixels a picture is scaled to before the folder's own bounds apply. `option`
    is what config.reward.options calls the folder. Raises FileNotFoundError where the folder is not one.
    """

    def __init__(self, path: str, option: str, pixels: tuple[int, int] = UTILS_PIXELS):
        self.folder, self.pixels = find(path, option, "config.json").parent, pixels
        find(str(self.folder), option, "preprocessor_config.json", "processor_config.json")
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(self.folder)

    def __call__(self, images: torch.Tensor, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """uint8 [n, 3, h, w] and the n texts that follow them, each as a user's turn that the assistant has to answer.

        Texts are padded on the right, where no token of a causal model looks; the mask says what is padding.
        """
        patches, grid = self.patches(images)
        image = IMAGE * (grid.prod().item() // self.processor.merge_size**2)
        turns = [self.turn(text).replace(IMAGE, image) for text in texts]
        tokens = self.tokenizer(turns, padding=True, padding_side="right", return_tensors="pt").to(
            images.device
        )
        return {
            "input_ids": tokens.input_ids,
            "attention_mask": tokens.attention_mask,
            "mm_token_type_ids": (
                tokens.input_ids == self.tokenizer.convert_tokens_to_ids(IMAGE)
            ).int(),
            "pixel_values": patches,
            "image_grid_thw": grid.expand(len(images), 3).to(images.device),
        }

    def patches(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 [n, 3, h, w] -> float32 [n * rows * columns, values a patch], and one picture's (1, rows, columns)."""
        to = self.processor
        for least, most in (self.pixels, (to.size["shortest_edge"], to.size["longest_edge"])):
            size = smart_resize(*images.shape[2:], to.patch_size * to.merge_size, least, most)
            images = resize(images, size, "bicubic")
        x = normalize(images, tuple(to.image_mean), tuple(to.image_std))
        return patchify(x, to.patch_size, to.merge_size, to.temporal_patch_size)

    def turn(self, text: str) -> str:
        """The dialogue with one picture, then `text`, by the folder's chat template, else by that of both models."""
        if self.tokenizer.chat_template is None:
            turn = (
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                f"<|im_start|>user\n<|vision_start|>{IMAGE}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
            )
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
                f"the chat template of {self.folder} makes {turn.count(IMAGE)} {IMAGE} of one picture and the text "
                f"{text[-80:]!r}; expected 1: take the template of Qwen2-VL or Qwen2.5-VL, and a text without {IMAGE}"
            )
        return turn


def patchify(
    x: torch.Tensor, patch: int, merge: int, frames: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, c, h, w] -> [n * rows * columns, c * frames * patch * patch], and (1, rows, columns).

    The patches of one merge x merge block follow each other, blocks row by row. A picture is a film of `frames` equal
    frames.
    """
    n, channels, height, width = x.shape
    rows, columns = height // patch, width // patch
    x = x.view(n, channels, rows // merge, merge, patch, columns // merge, merge, patch)
    x = (
        x.permute(0, 2, 5, 3, 6, 1, 4, 7)
        .unsqueeze(6)
        .expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
    )
    return x.reshape(n * rows * columns, -1), torch.tensor([1, rows, columns])
