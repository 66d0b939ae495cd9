"""imagereward against the package image-reward 1.5.

The golden holds inputs and outputs of the package's own class with a tiny encoder of each kind. Its
weights are drawn here again, in the order of their names, by NumPy's legacy generator.
"""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from reward_bridge.preprocess import (  # noqa: E402
    CLIP_MEAN,
    CLIP_STD,
    normalize,
    resize_and_crop,
)
from reward_bridge.rewards import make_reward  # noqa: E402
from reward_bridge.rewards.imagereward import load_network  # noqa: E402
from tests.helpers.goldens import golden  # noqa: E402
from tests.helpers.pictures import pictures  # noqa: E402

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]


@pytest.fixture(scope="module")
def case():
    return golden("10_rewards/imagereward/io.npz")


def published_state(case):
    """The state dict of ImageReward.pt, with the golden's sizes."""
    rng = np.random.RandomState(0)
    state = {}
    for name, shape in sorted(json.loads(str(case["shapes"])).items()):
        if name.endswith("position_ids"):
            state[name] = torch.arange(shape[1])[None]
            continue
        base = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        values = base + 0.1 * rng.standard_normal(tuple(shape))
        state[name] = torch.from_numpy(values.astype(np.float32))
    return state


@pytest.fixture
def folder(case, tmp_path):
    """ImageReward.pt and the files of a tokenizer of ten letters."""
    torch.save(published_state(case), tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_scores_are_those_of_the_package(case, folder):
    network = load_network(folder / "ImageReward.pt")
    pixels, ids, mask = (
        torch.from_numpy(case[name]) for name in ("pixels", "input_ids", "attention_mask")
    )
    tokens = network.vision(pixels).last_hidden_state
    np.testing.assert_allclose(tokens, case["image_embeds"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(network(pixels, ids, mask), case["score"], rtol=1e-5, atol=1e-5)


def test_prompts_and_pictures_are_prepared(case, folder):
    """35 tokens with start and end, CLIP's normalisation; half precision in the encoders."""
    images = pictures(2, 64, 48)
    reward = make_reward("imagereward", "cpu", {"path": str(folder)})
    scores = reward(images, ["a b j", " ".join("ab" * 40)])
    assert scores.dtype == torch.float32

    short = [2, 5, 6, 14, 3] + [0] * 30
    long = [2, *([5, 6] * 17)[:33], 3]
    mask = torch.tensor([[1] * 5 + [0] * 30, [1] * 35])
    pixels = normalize(resize_and_crop(images, 32), CLIP_MEAN, CLIP_STD)
    expected = reward.model(pixels, torch.tensor([short, long]), mask)
    torch.testing.assert_close(scores, expected)
    assert abs(scores[0] - scores[1]) > 1e-3

    half = make_reward("imagereward", "cpu", {"path": str(folder), "dtype": "bfloat16"})
    torch.testing.assert_close(half(images, ["a b j"] * 2), reward(images, ["a b j"] * 2),
                               rtol=0.1, atol=0.1)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("mlp.layers.0.bias"), r"1 keys missing, such as 'head\.0\.bias'"),
        (
            lambda state: state.pop("blip.visual_encoder.pos_embed"),
            r"is not an ImageReward: it lacks 'vision\.embeddings\.position_embedding'",
        ),
        (lambda state: state.update(odd=torch.zeros(1)), r"1 keys .* such as 'odd'"),
    ],
)
def test_other_weights_are_refused(case, folder, change, message):
    state = published_state(case)
    change(state)
    torch.save(state, folder / "ImageReward.pt")
    with pytest.raises(ValueError, match=message):
        load_network(folder / "ImageReward.pt")


def test_what_is_missing_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"ImageReward\.pt .*set config\.reward\.options\."):
        make_reward("imagereward", "cpu", {"path": "/nowhere"})
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *(f"w{i}" for i in range(60))]))
    with pytest.raises(ValueError, match=r"tokenizer of 75 tokens, but .* knows 60"):
        make_reward("imagereward", "cpu", {"path": str(folder)})
