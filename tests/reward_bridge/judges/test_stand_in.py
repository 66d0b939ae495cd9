"""A reward as the judge, in this process and behind an endpoint."""

import base64
import hashlib
import io
import signal

import numpy as np
import pytest
from PIL import Image

from tests.helpers.goldens import ROOT

torch = pytest.importorskip("torch")
for module in ("httpx2", "starlette", "tenacity", "uvicorn"):
    pytest.importorskip(module)


import httpx2  # noqa: E402

from realgen_jax.realbench import questions  # noqa: E402
from realgen_jax.realbench.results import Results, ScoredPicture  # noqa: E402
from reward_bridge.judges import api as judge  # noqa: E402
from reward_bridge.judges import reward as reward_judge  # noqa: E402
from reward_bridge.judges.stand_in import serving  # noqa: E402
from reward_bridge.rewards import make_reward  # noqa: E402
from tests.helpers.arena_judges import make, run  # noqa: E402
from tests.helpers.reward_servers import end, start  # noqa: E402


@pytest.fixture
def evaluated(tmp_path):
    """Noise against a photograph."""
    photographs = np.load(ROOT / "tests/goldens/photographs.npz")
    photo = next(iter(photographs.values()))
    photo = photo[0] if photo.ndim == 4 else photo
    photo = photo.transpose(1, 2, 0) if photo.shape[0] == 3 else photo
    evaluated = make(tmp_path / "pictures", ("noise", "photos"), lines=1)
    rng = np.random.default_rng(0)
    for i, array in enumerate([rng.integers(0, 256, (64, 64, 3), np.uint8), photo]):
        scored = evaluated.pictures[i]
        Image.fromarray(array).save(scored.file)
        digest = hashlib.sha256(scored.file.read_bytes()).hexdigest()
        evaluated.pictures[i] = ScoredPicture(**{**vars(scored), "sha256": digest})
    return evaluated


def test_a_reward_judges_in_this_process(evaluated, tmp_path):
    """Noise against a photograph, both ways round; and no picture is better than itself."""
    judgements, _ = run(evaluated, tmp_path, "embedded")
    assert {(j.first, j.verdict) for j in judgements} == {("noise", "second"), ("photos", "first")}
    judgements, _ = run(evaluated, tmp_path, "embedded", protocol="realgen")
    reward = make_reward("embedded_held_out", "cpu", {})
    sent = [
        np.array(Image.open(io.BytesIO(questions.encode_picture(p, "JPEG"))))
        for p in evaluated.pictures
    ]
    scores = [reward(torch.from_numpy(array).permute(2, 0, 1)[None], [""]).item() for array in sent]
    better = 1 if scores[0] > scores[1] else 2
    assert [j.verdict for j in judgements] == [("first", "second")[better - 1]]
    assert judgements[0].reply.startswith(f"More Realistic Image: Image {better}\nReason: ")
    assert (tmp_path / "embedded_held_out" / "realgen.jsonl").exists()
    same = Results(evaluated.sets, evaluated.entries, [], [evaluated.pictures[0]], [])
    copied = ScoredPicture(**{**vars(evaluated.pictures[0]), "entry": "photos"})
    same.pictures.append(copied)
    judgements, _ = run(same, tmp_path, "embedded")
    assert {j.verdict for j in judgements} == {"tie"}


def test_the_endpoint_gives_the_same_answers(evaluated, tmp_path, monkeypatch):
    """Verdicts and replies, under both protocols."""
    with serving("embedded_held_out") as address:
        monkeypatch.setenv(judge.URL_ENV, address)
        monkeypatch.setenv(judge.MODEL_ENV, "embedded_held_out")
        for protocol in ("balanced", "realgen"):
            here, _ = run(evaluated, tmp_path / "here", "embedded", protocol=protocol)
            there, _ = run(evaluated, tmp_path / "there", "api", protocol=protocol)
            assert here == there
            assert here


def test_a_reward_that_fails_is_not_asked_further(evaluated, tmp_path, monkeypatch):
    def broken(images, prompts):
        raise RuntimeError("out of order")

    monkeypatch.setattr(reward_judge, "make_reward", lambda *_: broken)
    judgements, said = run(evaluated, tmp_path, "embedded")
    assert judgements == []
    assert "stopped asking embedded_held_out: the reward embedded_held_out failed: out of" in said
    assert "judged 0 of 1 pairs in both orders; run the same command again" in said


def test_the_stand_in_tells_what_is_wrong(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"

    def body(*urls, text="Verdict:", model="embedded_held_out", **more):
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return {
            "model": model,
            "messages": [{"role": "user", "content": [{"type": "text", "text": text}, *parts]}],
            **more,
        }

    with serving("embedded_held_out") as address:
        assert httpx2.get(f"{address}/models").json()["data"][0]["id"] == "embedded_held_out"
        cases = [
            (body(url), 400, "1 pictures"),
            (body(url, "https://example.com/a.png"), 400, "data URL"),
            (body(url, "data:image/png;base64,AAAA"), 400, "data URL"),
            (body(url, url, text="Which?"), 400, "no known form of answer"),
            (body(url, url, model="gpt"), 404, "'gpt'"),
            (body(url, url, stream=True), 400, "does not stream"),
            ({"messages": 3}, 400, "not a chat"),
        ]
        for sent, status, words in cases:
            answer = httpx2.post(f"{address}/chat/completions", json=sent)
            assert answer.status_code == status
            assert words in answer.json()["error"]["message"]
            assert answer.json()["error"]["type"] == "invalid_request_error"
        assert httpx2.post(f"{address}/chat/completions", content=b"{").status_code == 400
        good = httpx2.post(f"{address}/chat/completions", json=body(url, url)).json()
        assert good["choices"][0]["message"]["content"] == "Verdict: tie"
    with pytest.raises(ValueError, match="no reward 'x'"), serving("x"):
        pass


def test_the_script_says_how_to_use_it():
    process = start(["scripts/serve_judge.py", "--port=0"])
    try:
        first, *_ = lines = [process.stdout.readline() for _ in range(3)]
        address = first.split()[-1]
        assert f"{judge.URL_ENV}={address} {judge.MODEL_ENV}=embedded_held_out" in lines[2]
        assert httpx2.get(f"{address}/models").json()["data"][0]["id"] == "embedded_held_out"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        end(process)
