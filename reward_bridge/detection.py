"""Objects in pictures, by a Mask2Former that was trained on COCO's instances (arXiv 2112.01527)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from reward_bridge.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalize, resize
from reward_bridge.transformers_folder import load_model

SHORT, LONG = 800, 1333  # pixels: a picture is resized to this short side, or this long one at most
MULTIPLE = 32  # of which the network's input is padded to
LOGIT_BLOCK = 32  # instances whose masks are enlarged together


@dataclass(frozen=True)
class Detection:
    """An object in a picture."""

    name: str
    score: float
    box: tuple[float, float, float, float]  # left, top, right, bottom, in pixels
    mask: np.ndarray  # bool [h, w]


class Detector:
    """Finds COCO's objects.

    path: a local Mask2FormerForUniversalSegmentation folder for instances, such as
        facebook/mask2former-swin-small-coco-instance.
    """

    def __init__(self, device: str, path: str, option: str, side: int = SHORT):
        self.model = load_model(
            Mask2FormerForUniversalSegmentation, Mask2FormerConfig, path, option, torch.float32
        ).to(device)
        self.names = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        self.side = side

    def __call__(self, image: torch.Tensor, least: float) -> list[Detection]:
        """The objects in uint8 [3, h, w] with a score above `least`, the most certain first.

        As in the paper: the most likely pairs of a mask and a class, scored with the product of the
        class's probability and the mean probability of the mask's pixels.
        """
        height, width = image.shape[1:]
        scale = min(self.side / min(height, width), self.side * LONG / SHORT / max(height, width))
        size = round(height * scale), round(width * scale)
        x = normalize(resize(image[None], size, "bilinear"), IMAGENET_MEAN, IMAGENET_STD)
        x = F.pad(x, (0, -size[1] % MULTIPLE, 0, -size[0] % MULTIPLE))
        output = self.model(x)

        # The most likely pairs, as many as there are masks.
        classes = output.class_queries_logits[0].softmax(-1)[:, :-1]
        likely, index = classes.flatten().topk(len(classes))
        kept = likely > least  # a product is not above a factor
        likely, index = likely[kept], index[kept]
        queries, labels = index // classes.shape[1], index % classes.shape[1]

        # Their masks in the picture's pixels.
        objects = []
        for start in range(0, len(queries), LOGIT_BLOCK):
            block = slice(start, start + LOGIT_BLOCK)
            logits = output.masks_queries_logits[0, queries[block]]
            logits = F.interpolate(logits[None], x.shape[2:], mode="bilinear")
            logits = logits[:, :, : size[0], : size[1]]
            logits = F.interpolate(logits, (height, width), mode="bilinear")[0]
            for mask, label, p in zip(logits, labels[block], likely[block], strict=True):
                inside = mask > 0
                if not inside.any():
                    continue
                score = (p * mask[inside].sigmoid().mean()).item()
                if score > least:
                    pixels = inside.cpu().numpy()
                    objects.append(Detection(self.names[label], score, box_of(pixels), pixels))
        return sorted(objects, key=lambda item: -item.score)


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The smallest box around a mask, bool [h, w] with at least one pixel."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
