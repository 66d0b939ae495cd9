"""The tokenizer and the chat template of a language model's folder."""

import json

import numpy as np
import pytest

from reward_bridge.chat import ChatTokenizer
from tests.helpers.chat import ENDS, TEMPLATE, chat_folder

SYSTEM = "You rewrite."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return chat_folder(tmp_path_factory.mktemp("chat"))


def text_of(tokenizer, ids, mask):
    return [tokenizer.decode(ids[row : row + 1], mask[row : row + 1])[0] for row in range(len(ids))]


def test_the_template_holds_system_prompt_and_prompt_padded_on_the_left(folder):
    tokenizer = ChatTokenizer(folder, system=SYSTEM, thinking=True)
    assert (tokenizer.ends, tokenizer.pad, tokenizer.vocab_size) == (ENDS, 258, 259)
    want = (
        "<|im_start|>system\nYou rewrite.<|im_end|>\n<|im_start|>user\nein Kätzchen<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.text("ein Kätzchen") == want

    ids, mask = tokenizer.encode(["ein Kätzchen", "a cat on a roof"], 100)
    assert (ids.shape, ids.dtype, mask.dtype) == ((2, 100), np.int32, bool)
    assert mask[:, -1].all()
    assert not mask[:, 0].any()
    assert (ids[~mask] == tokenizer.pad).all()
    assert (np.diff(mask.astype(int), axis=1) >= 0).all()

    # Special pieces are one token each: two turns of 3 pieces and the assistant's 1.
    assert np.isin(ids[0, mask[0]], [256, 257]).sum() == 5
    without_ends = want.replace("<|im_end|>", "")
    assert text_of(tokenizer, ids, mask)[0] == without_ends


def test_without_a_system_prompt_there_is_no_such_turn(folder):
    text = ChatTokenizer(folder, system="", thinking=True).text("a cat")
    assert text == "<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n"


def test_the_template_is_told_whether_to_think(folder):
    thinks = ChatTokenizer(folder, system="", thinking=True).text("a cat")
    assert ChatTokenizer(folder, system="", thinking=False).text("a cat") == (
        thinks + "<think>\n\n</think>\n\n"
    )


def test_answers_are_decoded_without_their_ends(folder):
    tokenizer = ChatTokenizer(folder, system="", thinking=True)
    letters, valid = tokenizer.encode(["ein Kätzchen"], 80)
    start = int(valid[0].argmax()) + len("<user\n")  # START is one token
    letters = letters[0, start : start + 13]  # ä has two bytes
    ids = np.full((3, 16), 258, np.int32)
    completion = np.zeros((3, 16), bool)
    ids[:, :13] = letters
    ids[0, 13] = 257
    completion[0, :14] = True
    completion[1, :13] = True
    completion[2, :6] = True  # it ends inside the ä
    assert tokenizer.decode(ids, completion) == ["ein Kätzchen", "ein Kätzchen", "ein K\ufffd"]
    assert tokenizer.ended(ids, completion).tolist() == [True, False, False]


def test_a_prompt_that_is_too_long_is_named_and_never_cut(folder):
    tokenizer = ChatTokenizer(folder, system="", thinking=True)
    with pytest.raises(ValueError, match=r"^prompts\.txt, line 2 has 56 tokens with the system p"):
        tokenizer.encode(
            ["a cat", "a cat on a roof and a dog in the yard"], 50, "prompts.txt, line"
        )
    ids, _ = tokenizer.encode(["a cat"], 24)
    with pytest.raises(
        ValueError,
        match=r"^prompt 1 has 24 tokens .* config\.rewriter\.max_prompt_tokens 23: 'a",
    ):
        tokenizer.encode(["a cat"], 23)
    assert ids.shape == (1, 24)


def change(folder, file, **entries):
    content = json.loads((folder / file).read_text())
    content = {k: v for k, v in (content | entries).items() if v is not None}
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "config.json").unlink(),
            r"config\.json is missing; expected a Hugging Face folder of a language model",
        ),
        (
            lambda folder: (folder / "generation_config.json").unlink(),
            r"generation_config\.json is missing",
        ),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            r"config\.json is damaged",
        ),
        (
            lambda folder: change(folder, "generation_config.json", eos_token_id=None),
            r"generation_config\.json has no eos_token_id",
        ),
        (
            lambda folder: change(folder, "generation_config.json", eos_token_id=[257, 259]),
            r"eos_token_id in .* is \[257, 259\]; expected ids below 259",
        ),
        (
            lambda folder: change(folder, "config.json", vocab_size=258),
            r"has the id 258, but vocab_size in .*config\.json is 258; expected the model's own",
        ),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            r"(cannot be read|holds no tokenizer\.json)",
        ),
        (
            lambda folder: chat_folder(folder, None),
            r"has no chat template \(chat_template\.jinja, or an entry of tokenizer_config\.json\)",
        ),
        (
            lambda folder: chat_folder(folder, "{{ messages[1].content }}"),
            r"the chat template in .* leaves out the system prompt \(config\.rewriter\.system\)",
        ),
        (
            lambda folder: chat_folder(folder, "{{ messages[0].content }}"),
            r"the chat template in .* leaves out the user's prompt \(config\.rewriter\.path\)",
        ),
        (
            lambda folder: chat_folder(folder, TEMPLATE + "{{ raise_exception('no') }}"),
            r"the chat template of .* cannot be filled in \(TemplateError: no\)",
        ),
        (
            lambda folder: chat_folder(folder, pad_token=None),
            r"has no pad_token",
        ),
    ],
)
def test_folders_that_do_not_fit_are_refused_by_name(tmp_path, damage, message):
    folder = chat_folder(tmp_path)
    damage(folder)
    with pytest.raises((ValueError, OSError), match=message) as refusal:
        ChatTokenizer(folder, system=SYSTEM, thinking=False)
    assert len(str(refusal.value).splitlines()) == 1
