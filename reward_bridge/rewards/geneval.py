"""GenEval: whether a picture holds the objects of its prompt (arXiv 2310.11513)."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from reward_bridge.detection import Detection, Detector
from reward_bridge.object_checks import COLOURS, NAMES, Requirement, check, read_requirements
from reward_bridge.rewards.clip import image_features, load_folder, load_tokenizer, text_features
from reward_bridge.weights import expand_home

TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
BACKGROUND = 0x99  # of what is around an object whose colour is asked for


class Geneval:
    """1 if GenEval's checks find what the prompt asks for, else 0.

    Counts, positions and classes come from a Mask2Former's objects; an object's colour is the one
    whose descriptions are closest to its cut-out, by CLIP. The thresholds are GenEval's.

    path: a Mask2Former folder, facebook/mask2former-swin-small-coco-instance.
    clip: the CLIPModel folder openai/clip-vit-large-patch14.
    prompts: GenEval's evaluation_metadata.jsonl. Only its prompts can be scored.
    side: the short side in pixels to which pictures are resized for the detector.

    Differences from GenEval: its detector is mmdet's Mask2Former Swin-S on COCO, and this is its
    authors' own of the same size, so weights and resampling differ; pictures are not stored as
    files in between. CLIP is the same.
    """

    def __init__(self, device: str, path: str, clip: str, prompts: str, side: int = 800):
        self.requirements = read_once(prompts)
        self.detector = Detector(device, path, "geneval.path", side)
        known = {NAMES.get(name, name) for name in self.detector.names}
        unknown = set().union(*(item.names for item in self.requirements.values())) - known
        if unknown:
            raise ValueError(
                f"the detector in {path} does not know {', '.join(sorted(unknown))}, which "
                f"{prompts} asks for; set config.reward.options.geneval.path to one for COCO"
            )
        self.clip = load_folder(clip, "geneval.clip", device, "float32")
        self.tokenizer = load_tokenizer(clip, "geneval.clip", self.clip)
        self.directions: dict[str, torch.Tensor] = {}  # {class: its colours' directions}

    @staticmethod
    def check_prompt(prompt: str, options: Mapping[str, Any]) -> None:
        """Raise ValueError for a prompt that is not in the file `prompts`."""
        if "prompts" in options:
            requirement_of(prompt, read_once(options["prompts"]))

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """uint8 [n, 3, h, w] and n prompts -> float32 [n], 0 or 1."""
        wanted = [requirement_of(prompt, self.requirements) for prompt in prompts]
        scores = []
        for image, requirement in zip(images, wanted, strict=True):
            detections = self.detector(image, requirement.least_score)
            colours = functools.partial(self.colours, image)
            scores.append(float(check(detections, requirement, colours)))
        return torch.tensor(scores, dtype=torch.float32)

    def colours(self, image: torch.Tensor, objects: Sequence[Detection], name: str) -> list[str]:
        """The colour of each object of a class in uint8 [3, h, w]."""
        if name not in self.directions:
            self.directions[name] = self._directions(name)
        nearest = []
        for item in objects:
            feature = F.normalize(image_features(self.clip, cut_out(image, item)[None]), dim=-1)
            nearest.append(COLOURS[(feature @ self.directions[name].T).argmax().item()])
        return nearest

    def _directions(self, name: str) -> torch.Tensor:
        """The mean direction of each colour's descriptions of a class: float32 [colours, d]."""
        means = []
        for colour in COLOURS:
            texts = [template.format(colour, name) for template in TEMPLATES]
            features = F.normalize(text_features(self.clip, self.tokenizer, texts), dim=-1)
            means.append(features.mean(0))
        return F.normalize(torch.stack(means), dim=-1)


def cut_out(image: torch.Tensor, item: Detection) -> torch.Tensor:
    """The object's box of uint8 [3, h, w], grey outside of its mask."""
    mask = torch.from_numpy(item.mask).to(image.device)
    left, top, right, bottom = (int(value) for value in item.box)
    alone = torch.where(mask, image, BACKGROUND).to(torch.uint8)
    return alone[:, top:bottom, left:right]


def requirement_of(prompt: str, requirements: Mapping[str, Requirement]) -> Requirement:
    """What a prompt asks for. Raises ValueError for an unknown prompt."""
    if prompt not in requirements:
        raise ValueError(
            f"the prompt {prompt!r} is not in config.reward.options.geneval.prompts; the checks "
            "know only prompts of that file"
        )
    return requirements[prompt]


@functools.lru_cache(maxsize=4)
def read_once(file: str) -> dict[str, Requirement]:
    """Return {prompt: what it asks for} of a file. Raises FileNotFoundError if it is missing."""
    path = expand_home(file)
    if not path.is_file():
        raise FileNotFoundError(
            f"config.reward.options.geneval.prompts is {file!r}, which does not exist; expected "
            "GenEval's evaluation_metadata.jsonl"
        )
    return {item.prompt: item for item in read_requirements(Path(path))}
