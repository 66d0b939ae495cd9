"""The arena's questions, and how verdicts are read from replies."""

import json

import pytest

from realgen_jax.realbench import questions
from tests.helpers.arena_judges import make, settings
from tests.helpers.goldens import GOLDENS


def test_realgen_verdicts_are_read_as_the_reference_reads_them():
    golden = json.loads((GOLDENS / "11_arena/arena_parse.json").read_text())
    names = {"first": "image_1", "second": "image_2", None: "unknown"}
    read = [names[questions.read_realgen(case["response"])] for case in golden["cases"]]
    assert read == [case["verdict"] for case in golden["cases"]]
    assert {name: read.count(name) for name in golden["counts"]} == golden["counts"]


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Hands look odd in 1.\n\nVerdict: 2", "second"),
        ("**Verdict: 1**\n", "first"),
        ("verdict: TIE.", "tie"),
        ("Verdict: 1\nVerdict: 2", "second"),
        ("Verdict: 1 or 2", None),
        ("Verdict: 12", None),
        ("Verdict: 1\nBut I am not sure.", None),
        ("The verdict: 1", None),
        ("Image 1 is better", None),
        ("", None),
    ],
)
def test_balanced_verdicts_are_the_last_line_or_none(reply, verdict):
    assert questions.read_balanced(reply) == verdict


def test_the_questions_do_not_answer_themselves():
    """A judge that repeats what it was asked names no verdict."""
    for name in ("realgen", "balanced"):
        protocol = questions.PROTOCOLS[name]
        assert protocol.read(protocol.text) is None


def test_questions_of_each_protocol(tmp_path):
    evaluated = make(tmp_path, ("base", "photos", "tuned"), lines=4)

    def asked(protocol, **changed):
        protocol = questions.PROTOCOLS[protocol]
        made, incomplete = questions.make_questions(
            evaluated, settings(**changed), protocol, seed=1
        )
        assert not incomplete
        return sorted((q.first.line, q.first.entry, q.second.entry) for q in made)

    both = [
        ("base", "photos"),
        ("base", "tuned"),
        ("photos", "base"),
        ("photos", "tuned"),
        ("tuned", "base"),
    ]
    both.append(("tuned", "photos"))
    assert asked("balanced") == [(line, *pair) for line in range(4) for pair in both]
    assert asked("balanced", prompts=2, pairs="first") == [
        (line, *pair) for line in (0, 2) for pair in both if "base" in pair
    ]
    assert asked("realgen") == [
        (line, entry, "photos") for line in range(4) for entry in ("base", "tuned")
    ]
    once = asked("human")
    assert len(once) == 12
    assert len({(line, frozenset(pair)) for line, *pair in once}) == 12
    assert once == asked("human")
    assert {first < second for _, first, second in once} == {True, False}


def test_prompts_are_spread_evenly():
    assert questions.spread(10, 0) == list(range(10))
    assert questions.spread(10, 4) == [0, 2, 5, 7]
    assert questions.spread(3, 9) == [0, 1, 2]
