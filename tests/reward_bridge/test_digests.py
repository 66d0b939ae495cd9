"""Digests of rewards, and what is done when servers serve something else."""

import itertools
import json
import logging
import shutil

import pytest
from ml_collections import ConfigDict

from realgen_jax.files import content_digest
from realgen_jax.realbench.scores import ScoreStore
from reward_bridge.client import RemoteReward
from reward_bridge.digests import reward_digest, run_digests, score_keys, served_rewards
from reward_bridge.reward import RewardError
from reward_bridge.wire import decode
from tests.helpers.adversaries import write_references
from tests.helpers.faults import changed, lying_server
from tests.helpers.reward_servers import IMAGES

NAMES = itertools.count()


@pytest.fixture
def name():
    """A reward that no other test has asked servers for: what they tell is kept for a process."""
    return f"reward{next(NAMES)}"


def config(**changes):
    """config.reward without rewards."""
    empty = {
        "options": {},
        "adversarial": {},
        "metrics": (),
        "references": {"path": "", "root": ""},
    }
    return ConfigDict({**empty, **changes})


def run_of(reward, *names, served=()):
    return run_digests(reward, names, dict(served), content_digest)


def test_servers_and_endpoints_are_asked_before_anything_is_loaded(monkeypatch):
    """Rewards of this process are not made for that."""
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with lying_server(lambda path, body: (200, {}, b"{}")) as good:
        pass
    wrong_token = 401, {}, b'{"error": "wrong or missing bearer token"}'
    with lying_server(lambda path, body: wrong_token) as wrong:
        judge = {"url": f"{good}/v1", "model": "m"}
        reward = config(
            options={
                "beauty": {"servers": (wrong,)},
                "truth": {"servers": (good,)},
                "vlm_judge": judge,
                "jpeg_compressibility": {"quality": "none"},
            }
        )
        names = ["embedded_detector", "jpeg_compressibility", "beauty", "truth", "vlm_judge"]
        with pytest.raises(ValueError, match="beauty") as refusal:
            served_rewards(reward, names)
    beauty, truth, vlm_judge = str(refusal.value).splitlines()
    assert beauty == (
        f"reward 'beauty', server {wrong} answered 401: wrong or missing bearer token"
    )
    assert truth.startswith(f"reward 'truth', server {good}: ConnectError ")
    assert vlm_judge.startswith(f"{good}/v1 failed: ConnectError ")

    reward.options.vlm_judge.api_key_env = "JUDGE_KEY"
    with pytest.raises(ValueError, match=r"^the environment has no variable 'JUDGE_KEY'"):
        served_rewards(reward, ["vlm_judge"])
    assert served_rewards(reward, ["embedded_detector"]) == {}


def test_a_reward_is_its_options_and_what_their_files_hold(tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"weights")

    def digest(name="clip_score", **options):
        return reward_digest(name, {"path": str(weights), "scale": 1.0, **options}, content_digest)

    first = digest()
    with changed(weights / "model.safetensors"):
        assert digest() != first
    others = [digest(scale=2.0), digest(dtype="float16"), digest("pickscore")]
    assert len({first, *others}) == 4

    # Where the files are, and how servers are asked, changes nothing.
    copy = shutil.copytree(weights, tmp_path / "copy")
    assert digest(path=str(copy), deadline=3.0, attempts=2, token_env="X") == first


def test_the_digests_of_a_run(tmp_path):
    picture = write_references(tmp_path) / "0.png"
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"a": ["0.png", "1.png"], "b": ["1.png"]}))
    reward = config(
        options={"clip_score": {"path": str(table)}, "far": {"servers": ("http://a:1",)}},
        metrics=("embedded_frechet",),
        references={"path": str(table), "root": ""},
    )
    names = ["clip_score", "far", "old", "embedded_detector"]
    digests = run_of(reward, *names, served={"far": "told", "old": ""})
    assert sorted(digests) == [
        "reward.metrics",
        "reward.options.clip_score",
        "reward.options.embedded_detector",
        "reward.options.far",
        "reward.references",
    ]
    assert digests["reward.options.far"] == "told"

    # The pictures count if a reward learns from them.
    reward.adversarial = ConfigDict({"clip_score": {"options": {"dtype": "float16"}}})
    learning = run_of(reward, *names)
    assert learning["reward.options.clip_score"] != digests["reward.options.clip_score"]
    keys = ("reward.adversarial.clip_score.options", "reward.options.clip_score")
    assert learning[keys[0]] == learning[keys[1]]
    with changed(picture):
        assert run_of(reward, *names)["reward.references"] != learning["reward.references"]
    picture.unlink()
    assert run_of(reward, *names)["reward.references"] != learning["reward.references"]


def test_stored_scores_belong_to_the_weights_that_gave_them(tmp_path):
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    reward = config(
        options={"clip_score": {"path": str(weights)}, "far": {"servers": ("http://a:1",)}}
    )
    names = ["clip_score", "far"]
    keys = score_keys(reward, names, {"far": "told"}, content_digest)
    assert keys["far"] == "told"
    with changed(weights):
        others = score_keys(reward, names, {"far": ""}, content_digest)
    assert set(keys.values()).isdisjoint(others.values())
    row = {"sha256": "s", "prompt": "p", "key": keys["clip_score"], "score": 1.0}
    (tmp_path / "scores.jsonl").write_text(json.dumps(row) + "\n")
    for current, stored in ((keys, 1), (others, 0)):
        store = ScoreStore(tmp_path / "scores.jsonl", current)
        found = [key for key in current.values() if ("s", "p", key) in store._scores]
        assert len(found) == stored


def answers(*digests):
    """What a server answers that serves these things, one after the other; None: does not tell."""
    left = list(digests)

    def answer(path, body):
        digest = left.pop(0) if len(left) > 1 else left[0]
        content = {"scores": [1.0] * len(decode(body)[1])} if path.startswith("/score") else {}
        if digest is not None:
            content["digest"] = digest
        return 200, {}, json.dumps(content).encode()

    return answer


def test_a_server_that_serves_something_else_ends_the_run(name):
    with lying_server(answers("a" * 64, "a" * 64, "b" * 64)) as server:
        reward = RemoteReward(name, [server])
        assert reward.check_connection() == "a" * 64
        assert reward(IMAGES, ["x", "y"]).tolist() == [1, 1]
        message = (
            f"reward '{name}', server {server} serves something else than before: its digest was "
            "aaaaaaaaaaaaaaaa, is now bbbbbbbbbbbbbbbb; start it"
        )
        for again in (reward, RemoteReward(name, [server])):  # such as that of the run's report
            with pytest.raises(RewardError, match=message):
                again(IMAGES, ["x", "y"])


def test_servers_of_one_reward_must_serve_the_same(name):
    with lying_server(answers("a" * 64)) as one, lying_server(answers("b" * 64)) as other:
        reward = config(options={name: {"servers": (one, other)}})
        message = (
            rf"reward '{name}': the servers http://\S+ and http://\S+ serve different things: "
            r"their digests are (a{16} and b{16}|b{16} and a{16}); start both with the same weights"
        )
        with pytest.raises(ValueError, match=message):
            served_rewards(reward, [name])
        with pytest.raises(RewardError, match=message):
            RemoteReward(name, [one, other])(IMAGES, ["x", "y"])


def test_a_server_that_does_not_tell_is_warned_of_once(name, caplog):
    caplog.set_level(logging.WARNING, "reward_bridge")
    logging.getLogger("reward_bridge").propagate = True
    with lying_server(answers(None)) as server:
        reward = RemoteReward(name, [server])
        assert reward.check_connection() == ""
        for _ in range(2):
            assert reward(IMAGES, ["x", "y"]).tolist() == [1, 1]
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"reward '{name}', server {server} does not tell what it serves"
    )


def test_a_server_that_told_and_no_longer_does_is_another_one(name):
    with lying_server(answers("a" * 64, None)) as server:
        reward = RemoteReward(name, [server])
        reward.check_connection()
        with pytest.raises(RewardError, match=r"its digest was a{16}, is now unknown; start it"):
            reward(IMAGES, ["x", "y"])


def test_the_server_tells_its_digest(servers):
    reward = RemoteReward("identity", [servers.a, servers.b])
    assert reward.check_connection() == "digest of identity"
    assert reward(IMAGES, ["x", "y"]).shape == (2,)
    local = reward_digest("embedded_detector", {}, content_digest)
    assert RemoteReward("embedded_detector", [servers.address]).check_connection() == local
