"""rewriter.json, and the folder of a rewriter."""

import json

import pytest

from realgen_jax.rewriter.files import (
    RewriterSettings,
    model_digest,
    open_rewriter,
    read_rewriter,
    write_rewriter,
)
from tests.helpers.language import ADAPTER, TIED


@pytest.fixture
def settings():
    return RewriterSettings(
        base=str(TIED),
        base_digest=model_digest(TIED),
        system="Rewrite “this”.",
        thinking=False,
        answer_tag="",
        max_prompt_tokens=320,
        max_new_tokens=384,
        temperature=1.0,
        min_words=120,
        max_words=240,
        dtype="bfloat16",
    )


def write(folder, settings, files=()):
    folder.mkdir(exist_ok=True)
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())
    write_rewriter(folder, settings)
    return folder


def test_what_is_written_is_read(tmp_path, settings):
    write_rewriter(tmp_path, settings)
    assert read_rewriter(tmp_path) == settings


def test_adapters_need_the_model_they_were_trained_on(tmp_path, settings):
    folder = write(tmp_path / "rewriter", settings, ADAPTER.iterdir())
    rewriter = open_rewriter(folder)
    assert (rewriter.model, rewriter.adapter, rewriter.settings) == (TIED, str(folder), settings)

    # The model may have moved, but must be the same.
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in TIED.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert open_rewriter(folder, moved).model == moved
    (moved / "README.md").write_text("nothing that matters")
    assert open_rewriter(folder, moved).model == moved
    (moved / "generation_config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"moved is not the language model that the adapters in .*"
    ):
        open_rewriter(folder, moved)
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no config\.json; .* --model"):
        open_rewriter(folder, tmp_path / "nowhere")


def test_a_whole_model_needs_no_other(tmp_path, settings):
    folder = write(tmp_path / "rewriter", settings, TIED.iterdir())
    rewriter = open_rewriter(folder)
    assert (rewriter.model, rewriter.adapter) == (folder, "")
    with pytest.raises(ValueError, match="holds a whole model; leave out --model"):
        open_rewriter(folder, TIED)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither adapter_config\.json \(peft\) nor"):
        open_rewriter(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"system": None}, r"rewriter\.json has no entry 'system'"),
        ({"top_k": 3}, r"rewriter\.json has an unknown entry 'top_k'; expected base, base_digest"),
        ({"thinking": 1}, r"rewriter\.json: thinking is 1; expected bool"),
        ({"max_new_tokens": 0}, r"rewriter\.json: max_new_tokens is 0; expected 1 or more"),
        ({"max_new_tokens": True}, r"rewriter\.json: max_new_tokens is True; expected int"),
        ({"temperature": -1}, r"rewriter\.json: temperature is -1; expected 0 or more"),
        ({"dtype": "float16"}, r"rewriter\.json: dtype is 'float16'; expected bfloat16 or float32"),
        ({"system": "\udc00"}, r"half of a surrogate pair"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path, settings, change, message):
    write_rewriter(tmp_path, settings)
    content = json.loads((tmp_path / "rewriter.json").read_text()) | change
    content = {name: value for name, value in content.items() if value is not None}
    (tmp_path / "rewriter.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_rewriter(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", r"rewriter\.json is damaged"), ("[]", r"rewriter\.json is not a JSON object")],
)
def test_a_damaged_file_is_named(tmp_path, text, message):
    (tmp_path / "rewriter.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_rewriter(tmp_path)


def test_a_folder_without_the_file_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"rewriter\.json is missing; expected a rewriter as"
    ):
        read_rewriter(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"config\.json is missing; expected a Hugging Face"
    ):
        model_digest(tmp_path)
