"""Bodies that are not a batch are refused, and nothing in them is executed."""

import ast
import pickle
import random
import re
from pathlib import Path

import pytest
from safetensors.torch import save

from tests.helpers.goldens import ROOT
from tests.helpers.reward_servers import (
    GOOD,
    IMAGES,
    expected,
    payload,
    post,
)


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


BAD = {
    "nothing": (b"", "not safetensors"),
    "garbage": (random.Random(0).randbytes(5000), "not safetensors"),
    "cut off": (GOOD[:-1], "not safetensors"),
    "longer than it says": (GOOD + b"x", "not safetensors"),
    "header longer than the body": ((2**62).to_bytes(8, "little") + GOOD[8:], "not safetensors"),
    "text": (b'{"images": [1]}', "not safetensors"),
    "no metadata": (save({"images": IMAGES}), "__metadata__"),
    "no prompts": (save({"images": IMAGES}, {"prompt": "[]"}), "'prompts'"),
    "prompts no JSON": (save({"images": IMAGES}, {"prompts": "x"}), "not safetensors"),
    "prompts nested too deep": (
        save({"images": IMAGES}, {"prompts": "[" * 100_000}),
        "RecursionError",
    ),
    "prompts no list": (
        save({"images": IMAGES}, {"prompts": '"xy"'}),
        "is not a JSON list of strings",
    ),
    "prompts no strings": (
        save({"images": IMAGES}, {"prompts": '["x", 1]'}),
        "is not a JSON list of strings",
    ),
    "too few prompts": (payload(IMAGES, ["x"]), "got 2 images and 1 prompts"),
    "too many prompts": (payload(IMAGES, ["x", "y", "z"]), "got 2 images and 3 prompts"),
    "no images": (payload(IMAGES[:0], []), "nothing to score"),
    "no pixels": (payload(IMAGES[:, :, :, :0], ["x", "y"]), "nothing to score"),
    "floats": (payload(IMAGES.float(), ["x", "y"]), r"'images' torch.float32 \[2, 3, 4, 6\]"),
    "grey": (payload(IMAGES[:, :1].contiguous(), ["x", "y"]), r"\[2, 1, 4, 6\]"),
    "one image alone": (payload(IMAGES[0].contiguous(), ["x"]), r"\[3, 4, 6\]"),
    "another tensor": (save({"pixels": IMAGES}, {"prompts": '["x", "y"]'}), "'pixels'"),
    "two tensors": (
        save({"images": IMAGES, "more": IMAGES.clone()}, {"prompts": '["x", "y"]'}),
        "'more'",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_a_body_that_is_no_batch_is_refused(servers, case):
    body, message = BAD[case]
    answer = post(servers.a, body)
    assert answer.status_code == 400
    assert re.search(message, answer.json()["error"])
    assert post(servers.a, GOOD).json()["scores"] == expected([1, 2], "xy")


def test_pickle_is_refused_and_not_run(servers, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    for body in (
        bomb,
        payload(IMAGES, ["x", "y"])[:8] + bomb,
        save({"images": IMAGES}, {"prompts": repr(bomb)}),
    ):
        answer = post(servers.a, body)
        assert answer.status_code == 400
        assert "pickle" in answer.json()["error"]
    assert not (tmp_path / "ran").exists()
    pickle.loads(bomb)
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("file", ["server", "batching", "wire", "client"])
def test_the_code_has_no_pickle_and_no_eval(file):
    tree = ast.parse((ROOT / "reward_bridge" / f"{file}.py").read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert not names & {
        "pickle",
        "eval",
        "exec",
        "marshal",
        "joblib",
        "cloudpickle",
        "numpy.load",
        "torch.load",
    }
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"torch.load", "np.load"}
