"""GenEval's checks on detections made by hand, whose right answer is known."""

import json

import numpy as np
import pytest

from reward_bridge.detection import Detection, box_of
from reward_bridge.object_checks import check, positions, read_requirements

MASK = np.zeros((1, 1), bool)


def seen(name, left=0, top=0, right=10, bottom=10, score=0.95):
    return Detection(name, score, (left, top, right, bottom), MASK)


def requirement(tmp_path, tag, include, exclude=()):
    file = tmp_path / "evaluation_metadata.jsonl"
    record = {"tag": tag, "include": include, "exclude": list(exclude), "prompt": "a photo"}
    file.write_text(json.dumps(record) + "\n")
    (read,) = read_requirements(file)
    return read


def no_colours(objects, name):
    raise AssertionError("no colour is asked for")


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}


@pytest.mark.parametrize(
    ("detections", "correct"),
    [
        ([seen("dog")], True),
        ([seen("dog"), seen("cat"), seen("dog")], True),
        ([seen("cat")], False),
        ([], False),
        ([seen("dog", score=0.3)], False),  # not above the threshold
        ([seen("dog", score=0.31)], True),
    ],
)
def test_a_single_object(tmp_path, detections, correct):
    assert check(detections, requirement(tmp_path, "single_object", [DOG]), no_colours) == correct


def test_two_objects_and_names_that_differ_from_cocos(tmp_path):
    two = requirement(tmp_path, "two_object", [DOG, {"class": "computer mouse", "count": 1}])
    assert check([seen("mouse"), seen("dog")], two, no_colours)
    assert not check([seen("mouse")], two, no_colours)


@pytest.mark.parametrize(
    ("scores", "correct"),
    [
        ([0.95, 0.95], True),
        ([0.95], False),
        ([0.95, 0.9], False),  # counting wants more certainty
        ([0.95, 0.95, 0.95], False),  # one too many
        ([0.95, 0.95, 0.5], True),
    ],
)
def test_counting(tmp_path, scores, correct):
    two = requirement(
        tmp_path, "counting", [{"class": "dog", "count": 2}], [{"class": "dog", "count": 3}]
    )
    assert check([seen("dog", score=score) for score in scores], two, no_colours) == correct


@pytest.mark.parametrize(
    ("colours", "correct"), [(["red"], True), (["blue"], False), (["blue", "red"], False)]
)
def test_colours_of_the_most_certain_objects(tmp_path, colours, correct):
    """Of two dogs, only the first is asked about."""
    asked = []

    def named(objects, name):
        asked.append((len(objects), name))
        return colours[: len(objects)]

    red = requirement(tmp_path, "colors", [{"class": "dog", "count": 1, "color": "red"}])
    assert check([seen("dog") for _ in colours], red, named) == correct
    assert asked == [(1, "dog")]


def test_attributes_belong_to_their_object(tmp_path):
    both = [
        {"class": "dog", "count": 1, "color": "red"},
        {"class": "cat", "count": 1, "color": "blue"},
    ]
    bound = requirement(tmp_path, "color_attr", both)
    right = {"dog": ["red"], "cat": ["blue"]}
    wrong = {"dog": ["blue"], "cat": ["red"]}
    detections = [seen("dog"), seen("cat")]
    assert check(detections, bound, lambda objects, name: right[name])
    assert not check(detections, bound, lambda objects, name: wrong[name])


@pytest.mark.parametrize(
    ("box", "sides"),
    [
        ((-30, 0, -20, 10), {"left of"}),
        ((30, 0, 40, 10), {"right of"}),
        ((0, -30, 10, -20), {"above"}),
        ((0, 30, 10, 40), {"below"}),
        ((30, 30, 40, 40), {"right of", "below"}),  # 26 of 42.4 pixels each
        ((30, 5, 40, 15), {"right of"}),  # 3 of 30.4 pixels
        ((1, 1, 11, 11), set()),  # closer than a tenth of both sizes
        ((0, 0, 10, 10), set()),
    ],
)
def test_positions(box, sides):
    assert positions(seen("a", *box), seen("b")) == sides


def test_a_position_relative_to_an_earlier_object(tmp_path):
    left = [CAT, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    placed = requirement(tmp_path, "position", left)
    cat = seen("cat", 50, 0, 60, 10)
    assert check([cat, seen("dog", 0, 0, 10, 10)], placed, no_colours)
    assert not check([cat, seen("dog", 90, 0, 99, 10)], placed, no_colours)
    assert not check([seen("dog")], placed, no_colours)  # nothing to be left of


def test_a_box_surrounds_its_mask():
    mask = np.zeros((8, 9), bool)
    mask[2, 3] = mask[5, 7] = True
    assert box_of(mask) == (3, 2, 8, 6)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tag": "colors"}, r"line 1, is no line of .* \(KeyError: 'include'\)"),
        ({"include": [{**DOG, "color": "teal"}]}, "color is 'teal'; expected one of red"),
        ({"include": [{**DOG, "position": ["near", 0]}]}, "position is 'near'; expected one of"),
        ({"include": [{**DOG, "position": ["above", 0]}]}, "relative to entry 0; expected one bef"),
    ],
)
def test_bad_lines_are_named(tmp_path, record, message):
    file = tmp_path / "metadata.jsonl"
    whole = {"prompt": "a", "tag": "colors", **record}
    file.write_text(json.dumps(whole if "include" in record else record))
    with pytest.raises(ValueError, match=message):
        read_requirements(file)
