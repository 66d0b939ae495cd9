"""The arena: what is asked, what is stored of the answers, and what is not asked again."""

import contextlib
import hashlib

import pytest
from PIL import Image

for module in ("torch", "httpx2", "starlette", "tenacity", "uvicorn"):
    pytest.importorskip(module)


import tenacity  # noqa: E402

from realgen_jax.realbench import arena  # noqa: E402
from realgen_jax.realbench.results import ScoredPicture  # noqa: E402
from reward_bridge import openai_chat  # noqa: E402
from reward_bridge.judges import api as judge  # noqa: E402
from reward_bridge.judges import make_judge  # noqa: E402
from tests.helpers.arena_judges import (  # noqa: E402
    brighter,
    judging,
    kept,
    make,
    run,
    settings,
)


@pytest.fixture(autouse=True)
def _no_back_off(monkeypatch):
    monkeypatch.setattr(openai_chat, "BACK_OFF", tenacity.wait_none())


def test_settings_that_ask_for_what_is_not_there(tmp_path, monkeypatch):
    evaluated = make(tmp_path)
    for changed in ({"protocol": "realgen"}, {"pairs": "photographs"}):
        with pytest.raises(ValueError, match="photographs"):
            run(evaluated, tmp_path, "embedded", **changed)
    for name in (judge.URL_ENV, judge.MODEL_ENV, judge.KEY_ENV):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=judge.URL_ENV):
        run(evaluated, tmp_path)
    monkeypatch.setenv(judge.URL_ENV, "api.example.com/v1?secret")
    monkeypatch.setenv(judge.MODEL_ENV, "m")
    with pytest.raises(ValueError, match="holds no address") as raised:
        run(evaluated, tmp_path)
    assert "secret" not in str(raised.value)
    monkeypatch.setenv(judge.URL_ENV, "https://api.example.com/v1")
    monkeypatch.setenv(judge.KEY_ENV, "sk-se\ncret")
    with pytest.raises(
        ValueError, match=f"{judge.KEY_ENV} holds characters that an HTTP"
    ) as raised:
        run(evaluated, tmp_path)
    assert "cret" not in str(raised.value)
    embedded = make_judge("embedded", settings())
    with pytest.raises(ValueError, match="there is only 'base'"):
        arena.check_arena(make(tmp_path, ("base",)).entries, settings(), embedded)
    arena.check_arena(evaluated.entries, settings(), embedded)
    with pytest.raises(
        ValueError, match="no judge 'x'; choose embedded, api, human, or module:Class"
    ):
        make_judge("x", settings())


def test_pictures_are_told_apart_from_those_that_lack(tmp_path):
    evaluated = make(tmp_path / "pictures")
    evaluated.pictures.pop()  # tuned, line 2
    with judging(brighter) as server:
        judgements, said = run(evaluated, tmp_path)
    assert len(server.seen) == len(judgements) == 4
    assert "1 prompts of 'short' without a picture of both base and tuned are left out" in said
    assert "WARNING" not in said


def test_answers_are_kept_and_not_asked_for_again(tmp_path):
    evaluated = make(tmp_path / "pictures")
    with judging(brighter) as server:
        judgements, said = run(evaluated, tmp_path)
        assert len(server.seen) == len(judgements) == 6
        assert all((j.verdict == "first") == (j.first == "tuned") for j in judgements)
        assert not said
        again, _ = run(evaluated, tmp_path)
        assert again == judgements
        assert len(server.seen) == 6
        Image.new("RGB", (16, 16), (250, 0, 0)).save(
            evaluated.pictures[0].file
        )  # base, line 0: now the brightest
        digest = hashlib.sha256(evaluated.pictures[0].file.read_bytes()).hexdigest()
        evaluated.pictures[0] = ScoredPicture(**{**vars(evaluated.pictures[0]), "sha256": digest})
        changed, _ = run(evaluated, tmp_path)
        assert len(server.seen) == 8
        assert {j.verdict for j in changed if j.line == 0 and j.first == "base"} == {"first"}


def test_a_full_stop_in_the_middle_of_a_line_loses_that_line_only(tmp_path):
    evaluated = make(tmp_path / "pictures")
    with judging(brighter) as server:
        judgements, _ = run(evaluated, tmp_path)
        file = tmp_path / "org%2Fjudge-1" / "balanced.jsonl"
        file.write_bytes(file.read_bytes()[:-20])
        again, _ = run(evaluated, tmp_path)
        assert again == judgements
        assert len(server.seen) == 7
        assert len(kept(tmp_path)) == 6
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join([lines[0], "not a judgement\n", *lines[1:]]))
        with pytest.raises(ValueError, match="line 2"):
            run(evaluated, tmp_path)


def test_an_interrupted_call_has_kept_every_answer(tmp_path):
    evaluated = make(tmp_path / "pictures", lines=8)

    def stop_at_five(n, body):
        return 30.0 if n >= 5 else brighter(n, body)

    with judging(stop_at_five) as server, pytest.MonkeyPatch.context() as patch:
        storing = arena.storing_answers

        @contextlib.contextmanager
        def interrupting(file, answers):
            with storing(file, answers) as keep:

                def keep_or_stop(*answer):
                    keep(*answer)
                    if len(kept(tmp_path)) == 4:  # they are in the file, not only in memory
                        raise KeyboardInterrupt

                yield keep_or_stop

        patch.setattr(arena, "storing_answers", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(evaluated, tmp_path)
        assert len(kept(tmp_path)) == 4
        before = len(server.seen)
    with judging(brighter) as server:
        judgements, _ = run(evaluated, tmp_path)
        assert len(server.seen) == 12
        assert len(judgements) == 16
    assert before >= 4


def test_a_picture_that_has_changed_is_not_judged(tmp_path):
    evaluated = make(tmp_path / "pictures")
    evaluated.pictures[0].file.write_bytes(b"something else")
    with judging(brighter) as server:
        judgements, said = run(evaluated, tmp_path)
    assert len(server.seen) == len(judgements) == 4
    assert "base_0.png has changed since it was scored" in said
