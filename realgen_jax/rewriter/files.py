"""rewriter.json: what a trained rewriter was trained with, beside its weights.

runs/NAME/rewriter/     adapter_model.safetensors, adapter_config.json (peft), rewriter.json; or
                        config.json, model.safetensors (Hugging Face), rewriter.json
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from realgen_jax.files import content_digest, expand_home, write_whole
from realgen_jax.input_files import check_text
from realgen_jax.nn.lora import PEFT_CONFIG

FILE = "rewriter.json"

# The files of a language model's folder that determine its answers.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class RewriterSettings:
    """How a language model rewrites prompts. rewriter.json has these entries.

    base: the folder of the model that training started from; its place may have changed.
    base_digest: `model_digest` of it. system: the system prompt, as text. thinking: what the chat
    template is told. answer_tag: "" if the whole answer is the rewrite. max_prompt_tokens,
    max_new_tokens: tokens. temperature: of training. min_words, max_words: of the length reward.
    dtype: bfloat16 or float32, of the model.
    """

    base: str
    base_digest: str
    system: str
    thinking: bool
    answer_tag: str
    max_prompt_tokens: int
    max_new_tokens: int
    temperature: float
    min_words: int
    max_words: int
    dtype: str


def model_digest(folder: str | Path) -> str:
    """Return a digest of a language model's folder, wherever it is. Large files are sampled.

    Raises FileNotFoundError for a folder without config.json.
    """
    folder = expand_home(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder / 'config.json'} is missing; expected a Hugging Face folder of a language "
            "model"
        )
    return content_digest(model_files(folder))


def model_files(folder: Path) -> Iterable[Path]:
    """Return the files of a language model's folder that determine its answers, sorted."""
    return sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})


def write_rewriter(folder: Path, settings: RewriterSettings) -> None:
    """Write rewriter.json to a folder of trained weights."""
    write_whole(folder / FILE, json.dumps(asdict(settings), indent=2) + "\n")


def read_rewriter(folder: str | Path) -> RewriterSettings:
    """Read rewriter.json. Raises FileNotFoundError, or ValueError naming a wrong entry."""
    file = expand_home(folder) / FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing; expected a rewriter as a run with config.stage='rewriter' leaves "
            "it in its folder"
        )
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object; expected the entries of a rewriter")

    known = {field.name: field.type for field in fields(RewriterSettings)}
    for name in content.keys() - known.keys():
        raise ValueError(f"{file} has an unknown entry {name!r}; expected {', '.join(known)}")
    for name, kind in known.items():
        if name not in content:
            raise ValueError(f"{file} has no entry {name!r}")
        _check_entry(file, name, content[name], kind)
    return RewriterSettings(**content)


def _check_entry(file: Path, name: str, value: Any, kind: type) -> None:
    """Raise ValueError unless an entry has its type and a value that makes sense."""
    kinds = (int, float) if kind is float else kind
    is_right = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    if not is_right:
        raise ValueError(f"{file}: {name} is {value!r}; expected {kind.__name__}")
    if isinstance(value, str):
        check_text(value, f"{file}: {name}")
    if name == "dtype" and value not in ("bfloat16", "float32"):
        raise ValueError(f"{file}: dtype is {value!r}; expected bfloat16 or float32")
    if kind is int and value < 1:
        raise ValueError(f"{file}: {name} is {value}; expected 1 or more")
    if kind is float and not value >= 0:
        raise ValueError(f"{file}: {name} is {value}; expected 0 or more")


@dataclass(frozen=True)
class Rewriter:
    """A rewriter on disk: the folder of the language model, and a peft folder on it, or ""."""

    model: Path
    adapter: str
    settings: RewriterSettings


def open_rewriter(folder: str | Path, base: str | Path = "") -> Rewriter:
    """Return the rewriter in a folder; no weight is read.

    base: the folder of the model that adapters were trained on, if it has moved. Raises
    FileNotFoundError or ValueError for files that are missing, and for another base model.
    """
    folder = expand_home(folder)
    settings = read_rewriter(folder)

    # A whole model, with its tokenizer.
    if not (folder / PEFT_CONFIG).is_file():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds neither {PEFT_CONFIG} (peft) nor config.json (Hugging Face)"
            )
        if base:
            raise ValueError(f"{folder} holds a whole model; leave out --model {base}")
        return Rewriter(folder, "", settings)

    # Adapters, and the model that they were trained on.
    own = expand_home(base or settings.base)
    if not (own / "config.json").is_file():
        raise FileNotFoundError(
            f"{own} holds no config.json; the adapters in {folder} need the language model that "
            "they were trained on: name its folder with --model"
        )
    if model_digest(own) != settings.base_digest:
        raise ValueError(
            f"{own} is not the language model that the adapters in {folder} were trained on, or "
            "has changed since; name the right folder with --model"
        )
    return Rewriter(own, str(folder), settings)
