"""The photographs of the embedded model: their files and subjects, and how crops are cut.

Every photograph ships in the scikit-image or scikit-learn wheel (credits are in
realgen_jax/embedded/README.md). Two squares of each are used, which share no pixel: everything is
trained on crops of the first, and crops of the second are held out.
"""

import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64  # side of a crop in pixels


@dataclass(frozen=True)
class Photo:
    """A photograph and its two squares, each (left, top, side) in pixels."""

    file: str
    subject: str
    category: str  # of its prompts in the report
    train: tuple[int, int, int]
    held_out: tuple[int, int, int]


PHOTOS = (
    Photo(
        "skimage/data/astronaut.png",
        "an astronaut in an orange suit",
        "people",
        (75, 0, 285),
        (70, 290, 222),
    ),
    Photo("skimage/data/brick.png", "a brick pavement", "textures", (0, 0, 300), (306, 306, 206)),
    Photo(
        "skimage/data/camera.png",
        "a photographer in a black coat",
        "people",
        (130, 40, 280),
        (300, 322, 190),
    ),
    Photo(
        "skimage/data/chelsea.png",
        "a tabby cat",
        "animals and plants",
        (115, 20, 235),
        (0, 90, 114),
    ),
    Photo(
        "skimage/data/coffee.png", "a red cup of coffee", "objects", (170, 0, 270), (445, 150, 155)
    ),
    Photo("skimage/data/coins.png", "old silver coins", "objects", (0, 0, 200), (204, 100, 180)),
    Photo("skimage/data/grass.png", "a grass lawn", "textures", (0, 0, 250), (256, 256, 250)),
    Photo("skimage/data/gravel.png", "grey gravel", "textures", (0, 0, 250), (256, 256, 250)),
    Photo(
        "skimage/data/hubble_deep_field.jpg",
        "distant galaxies",
        "science",
        (0, 0, 500),
        (500, 372, 500),
    ),
    Photo("skimage/data/ihc.png", "stained tissue", "science", (0, 0, 280), (290, 290, 222)),
    Photo(
        "skimage/data/moon.png",
        "the surface of the moon",
        "science",
        (20, 10, 300),
        (300, 320, 190),
    ),
    Photo(
        "skimage/data/motorcycle_left.png",
        "a red motorcycle",
        "objects",
        (80, 60, 420),
        (505, 150, 236),
    ),
    Photo(
        "skimage/data/retina.jpg",
        "the retina of an eye",
        "science",
        (60, 300, 760),
        (830, 600, 520),
    ),
    Photo(
        "skimage/data/rocket.jpg",
        "a rocket on its launch pad",
        "scenes",
        (190, 160, 260),
        (455, 150, 180),
    ),
    Photo(
        "sklearn/datasets/images/china.jpg",
        "a chinese pagoda",
        "scenes",
        (70, 20, 330),
        (405, 190, 235),
    ),
    Photo(
        "sklearn/datasets/images/flower.jpg",
        "a dahlia flower",
        "animals and plants",
        (150, 60, 310),
        (465, 150, 175),
    ),
)

# Templates of the prompts: for training, for evaluations during a run, and for its report. All use
# the words of the first two, since T5's tokenizer was built from those. No template is used twice,
# so that no test or report prompt is trained on.
TEMPLATES = (
    "a photo of {}",
    "{}",
    "a photograph of {}",
    "a close photo of {}",
    "a sharp photo of {}",
    "{}, photograph",
)
TEST_TEMPLATES = ("a picture of {}", "a detailed photo of {}")
SHORT_TEMPLATES = ("a sharp picture of {}", "a close photograph of {}")
LONG_TEMPLATES = ("a sharp detailed photo of {}", "a sharp close photo of {}, photograph")


def prompts(templates: tuple[str, ...]) -> list[tuple[str, int]]:
    """Return (prompt, index of its photograph) for every photograph and template, in this order."""
    pairs = []
    for i, photo in enumerate(PHOTOS):
        for template in templates:
            pairs.append((template.format(photo.subject), i))
    return pairs


def write_prompts(folder: Path) -> None:
    """Write prompts_train.txt, prompts_test.txt, realbench_short.jsonl and realbench_long.jsonl.

    The order is by template, so that the first prompts show every subject once.
    """
    for name, templates in (("train", TEMPLATES), ("test", TEST_TEMPLATES)):
        lines = [prompt for prompt, _ in _by_template(templates)]
        (folder / f"prompts_{name}.txt").write_text("\n".join(lines) + "\n")

    for name, templates in (("short", SHORT_TEMPLATES), ("long", LONG_TEMPLATES)):
        lines = []
        for prompt, photo in _by_template(templates):
            lines.append(json.dumps({"prompt": prompt, "category": photo.category}))
        (folder / f"realbench_{name}.jsonl").write_text("\n".join(lines) + "\n")


def _by_template(templates: tuple[str, ...]) -> list[tuple[str, Photo]]:
    """Return (prompt, photograph) for every template and photograph, in this order."""
    return [(template.format(photo.subject), photo) for template in templates for photo in PHOTOS]


@cache
def _square(index: int, region: str) -> Image.Image:
    """Load one of a photograph's two squares, in RGB."""
    photo = PHOTOS[index]
    package, _, inside = photo.file.partition("/")
    path = Path(importlib.util.find_spec(package).origin).parent / inside
    left, top, side = getattr(photo, region)
    return Image.open(path).convert("RGB").crop((left, top, left + side, top + side))


def crop(
    index: int, region: str, rng: np.random.Generator, smallest: float = 0.8, mirror: bool = False
) -> np.ndarray:
    """Cut a random crop from the region "train" or "held_out": uint8 [SIZE, SIZE, 3].

    Its side is `smallest` to 1 times the square's. With `mirror`, half of the crops are mirrored.
    """
    image = _square(index, region)
    side = image.width * rng.uniform(smallest, 1.0)
    x, y = rng.uniform(0, image.width - side, 2)
    box = (x, y, x + side, y + side)
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))
    if mirror and rng.random() < 0.5:
        pixels = pixels[:, ::-1].copy()
    return pixels


def crops(
    labels: np.ndarray, region: str, rng: np.random.Generator, **options: float
) -> np.ndarray:
    """Cut a crop of each labelled photograph: int [n] -> uint8 [n, SIZE, SIZE, 3]."""
    return np.stack([crop(int(i), region, rng, **options) for i in labels])
