"""geneval on pictures made by hand, with a tiny random detector and CLIP."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from reward_bridge.detection import Detection, Detector  # noqa: E402
from reward_bridge.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalize  # noqa: E402
from reward_bridge.rewards import make_reward  # noqa: E402
from reward_bridge.rewards.geneval import Geneval, cut_out  # noqa: E402
from tests.helpers.pictures import pictures  # noqa: E402
from tests.helpers.tiny_detector import NAMES, write_geneval  # noqa: E402


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return write_geneval(tmp_path_factory.mktemp("geneval"))


def options(models, **changed):
    return {
        "path": str(models / "detector"),
        "clip": str(models / "clip"),
        "prompts": str(models / "metadata.jsonl"),
        "side": 64,
        **changed,
    }


def test_detections_are_those_of_transformers(models):
    """Their classes and scores, up to the size at which masks are averaged."""
    detector = Detector("cpu", str(models / "detector"), "geneval.path", 64)
    image = pictures(1, 64, 96)[0]
    detections = detector(image, 0.0)
    assert detections
    assert [item.score for item in detections] == sorted(
        (item.score for item in detections), reverse=True
    )
    for item in detections:
        left, top, right, bottom = item.box
        assert item.mask.shape == (64, 96)
        assert item.mask[int(top) : int(bottom), int(left) : int(right)].sum() == item.mask.sum()

    output = detector.model(normalize(image[None], IMAGENET_MEAN, IMAGENET_STD))
    processor = transformers.Mask2FormerImageProcessorPil()
    theirs = processor.post_process_instance_segmentation(
        output, threshold=0.0, return_binary_maps=True, target_sizes=[(64, 96)]
    )[0]["segments_info"]
    ours = sorted((NAMES.index(item.name), item.score) for item in detections)
    wanted = sorted((entry["label_id"], entry["score"]) for entry in theirs)
    assert [label for label, _ in ours] == [label for label, _ in wanted]
    np.testing.assert_allclose([s for _, s in ours], [s for _, s in wanted], atol=1e-4)

    # A threshold keeps the most certain ones.
    middle = detections[len(detections) // 2].score
    assert [item.score for item in detector(image, middle)] == [
        item.score for item in detections if item.score > middle
    ]


def test_scores_follow_the_detections(models, monkeypatch):
    """A picture of a red dog, one of a cat; the detector and CLIP are told what they see."""
    reward = make_reward("geneval", "cpu", options(models))
    images = pictures(3, 32, 32)
    mask = np.ones((32, 32), bool)
    asked = []

    def detect(image, least):
        asked.append(least)
        number = [torch.equal(image, other) for other in images].index(True)
        name = ["dog", "cat", "cat"][number]
        return [Detection(name, 0.8, (0.0, 0.0, 32.0, 32.0), mask)]

    monkeypatch.setattr(reward, "detector", detect)
    monkeypatch.setattr(Geneval, "colours", lambda self, image, objects, name: ["red"])
    assert reward(images, ["a dog", "a cat", "a dog"]).tolist() == [1.0, 1.0, 0.0]
    assert asked == [0.3] * 3
    monkeypatch.setattr(Geneval, "colours", lambda self, image, objects, name: ["blue"])
    assert reward(images, ["a dog", "a cat", "a dog"]).tolist() == [0.0, 1.0, 0.0]


def test_the_colour_is_the_nearest_description(models, monkeypatch):
    """With a CLIP whose features are a cut-out's and a word's mean colour."""
    reward = make_reward("geneval", "cpu", options(models))
    rgb = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}

    def of_text(model, tokenizer, texts):
        words = [next((rgb[w] for w in rgb if w in text.split("-")[0].split()), (0, 0, -1))
                 for text in texts]  # fmt: skip
        return torch.tensor(words, dtype=torch.float32)

    monkeypatch.setattr("reward_bridge.rewards.geneval.text_features", of_text)
    monkeypatch.setattr(
        "reward_bridge.rewards.geneval.image_features",
        lambda model, images: images.float().mean((2, 3)),
    )
    image = torch.zeros(3, 16, 32, dtype=torch.uint8)
    image[0, 4:12, 4:12] = 255
    image[2, 4:12, 20:28] = 255
    objects = []
    for left in (4, 20):
        mask = np.zeros((16, 32), bool)
        mask[4:12, left : left + 8] = True
        objects.append(Detection("dog", 0.9, (left, 4, left + 8, 12), mask))
    assert reward.colours(image, objects, "dog") == ["red", "blue"]


def test_a_cut_out_is_grey_around_its_object():
    mask = np.zeros((6, 6), bool)
    mask[2, 1:4] = mask[3, 2] = True
    image = torch.full((3, 6, 6), 7, dtype=torch.uint8)
    crop = cut_out(image, Detection("dog", 0.9, (1, 2, 4, 4), mask))
    assert crop[0].tolist() == [[7, 7, 7], [0x99, 7, 0x99]]


def test_the_real_clip_is_asked_about_cut_outs(models):
    reward = make_reward("geneval", "cpu", options(models))
    item = Detection("dog", 0.9, (0, 0, 20, 10), np.ones((10, 20), bool))
    (colour,) = reward.colours(pictures(1, 16, 24)[0][:, :10, :20], [item], "dog")
    assert isinstance(colour, str)


def test_what_does_not_fit_is_named(models, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"prompts is '/nowhere', which does not exist"):
        make_reward("geneval", "cpu", options(models, prompts="/nowhere"))
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(
        {"prompt": "a yak", "tag": "single_object", "include": [{"class": "yak", "count": 1}]}
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"does not know yak, which .*other\.jsonl asks for"):
        make_reward("geneval", "cpu", options(models, prompts=str(other)))
    with pytest.raises(ValueError, match="the prompt 'a bird' is not in config"):
        Geneval.check_prompt("a bird", options(models))
