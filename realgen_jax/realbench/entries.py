"""Who is compared: the config's model, LoRAs, other models, and folders of pictures that something else has made."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from realgen_jax.realbench.prompts import SAFE
from realgen_jax.realbench.results import Entry, Problem, PromptSet

BASE = "base"  # the name of the config's own model
TAKEN = ("arena",)  # folders beside those of the entries
PICTURE = re.compile(r"(\d{5,})(?:_(\d+))?\.(?:png|jpe?g|webp)", re.IGNORECASE)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Slot = tuple[int, int]  # line of the prompts, copy


def read_entries(
    pretrained: ConfigDict,
    loras: Sequence[str],
    models: Sequence[str],
    pictures: Sequence[str],
    photographs: str | None,
    base: bool,
) -> list[Entry]:
    """The entries that flags name as [NAME=]PATH, the config's own model first.

    Raises FileNotFoundError for what does not exist and ValueError for names that are taken or cannot be a folder's.
    """
    entries = [Entry(BASE, "model", pretrained.model)] if base else []
    for kind, words in (
        ("lora", loras),
        ("model", models),
        ("folder", pictures),
        ("photographs", [photographs]),
    ):
        entries += [_entry(kind, word) for word in words if word]
    if not entries:
        raise ValueError(
            "nothing to evaluate: --nobase leaves out the config's model and no other entry is named"
        )
    for entry in entries:
        if not SAFE.fullmatch(entry.name) or entry.name in TAKEN:
            raise ValueError(
                f"{entry.name!r} cannot name an entry: expected letters, digits, '.', '_', '+', '-' and none of "
                f"{', '.join(TAKEN)}; --lora NAME=PATH gives it another name"
            )
        if not Path(entry.source).expanduser().exists():
            raise FileNotFoundError(
                f"{entry.source} does not exist; it was named as {entry.kind} {entry.name!r}"
            )
    if twice := [name for name, n in Counter(entry.name for entry in entries).items() if n > 1]:
        paths = ", ".join(entry.source for entry in entries if entry.name == twice[0])
        raise ValueError(
            f"{twice[0]!r} names several entries ({paths}); tell them apart with NAME=PATH"
        )
    return entries


def _entry(kind: str, word: str) -> Entry:
    name, equals, path = word.partition("=")
    if not equals or "/" in name:  # a path may contain =
        name, path = "photographs" if kind == "photographs" else default_name(word), word
    return Entry(name, kind, path)


def default_name(path: str) -> str:
    """What an entry is called by its path: runs/NAME/lora is NAME, runs/NAME/best NAME-best."""
    where = Path(path).expanduser().absolute()
    if where.suffix == ".safetensors":
        generic = where.stem in ("pytorch_lora_weights", "adapter_model", "diffusion_pytorch_model")
        where = where.parent if generic else where.with_suffix("")
    if where.name == "transformer":
        where = where.parent
    name = {"lora": where.parent.name, "best": f"{where.parent.name}-best"}.get(
        where.name, where.name
    )
    return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._+-]+", "-", name).strip("-")


@dataclass(frozen=True)
class Weights:
    """What the pictures of a `model` or `lora` entry are made with; empty where there is no such file."""

    model: str  # FluxPipeline folder
    transformer: str  # instead of the folder's
    lora: str


def weights_of(entry: Entry, pretrained: ConfigDict) -> Weights:
    """Raises ValueError for a folder that is none of a model."""
    if entry.kind == "lora":
        return Weights(pretrained.model, pretrained.transformer, entry.source)
    if entry.name == BASE:
        return Weights(pretrained.model, pretrained.transformer, pretrained.lora)
    path = Path(entry.source).expanduser()
    if (path / "model_index.json").exists():
        return Weights(entry.source, "", "")
    for transformer in (path, path / "transformer"):
        if transformer.is_file() or (transformer / "config.json").exists():
            return Weights(pretrained.model, str(transformer), "")
    raise ValueError(
        f"{entry.source} holds neither model_index.json (a FluxPipeline folder of diffusers) nor config.json (its "
        "transformer, as a run of config.train.lora=False leaves it)"
    )


def find_pictures(
    entry: Entry, sets: Sequence[PromptSet]
) -> tuple[dict[str, dict[Slot, Path]], list[Problem]]:
    """The pictures of a `folder` or `photographs` entry, {set: {(line, copy): file}}. A line without any is a Problem,
    and so is a picture that no line is called for.

    FOLDER/<set>/ holds a set's pictures; where there is no such folder, FOLDER itself stands for every set.
    Raises ValueError where there is no picture at all.
    """
    folder = Path(entry.source).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"{entry.source} is no folder; {entry.name!r} needs one with 00000.png, 00001.png, ..."
        )
    split = any((folder / one.name).is_dir() for one in sets)
    found, problems = {}, []
    for one in sets:
        place, files, number = folder / one.name if split else folder, {}, len(one.prompts)
        for file in sorted(place.iterdir()) if place.is_dir() else []:
            match = PICTURE.fullmatch(file.name)
            if match is None or int(match[1]) >= number:
                if file.suffix.lower() in SUFFIXES:
                    detail = f"expected 00000.png to {number - 1:05}.png, further ones of a line 00000_1.png"
                    problems.append(Problem(entry.name, one.name, file, "extra", detail))
                continue
            slot = int(match[1]), int(match[2] or 0)
            if slot in files:
                raise ValueError(
                    f"{files[slot]} and {file} are both picture {slot[1]} of line {slot[0]}; keep one"
                )
            files[slot] = file
        if not files and place.is_dir():
            raise ValueError(
                f"{place} holds no picture of {entry.name!r}; expected {{line:05}}.png, .jpg, .jpeg or .webp, "
                f"00000.png to {number - 1:05}.png"
            )
        for line in sorted(set(range(number)) - {line for line, _ in files}):
            problems.append(
                Problem(
                    entry.name, one.name, place / f"{line:05}.png", "missing", f"of line {line}"
                )
            )
        found[one.name] = files
    return found, problems
