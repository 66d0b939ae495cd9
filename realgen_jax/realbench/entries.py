"""The entries to compare: the config's model, LoRAs, other models, and folders of pictures."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ml_collections import ConfigDict

from realgen_jax.files import expand_home
from realgen_jax.input_files import FORMATS, list_pictures
from realgen_jax.realbench.picture_files import Slot
from realgen_jax.realbench.prompts import SAFE
from realgen_jax.realbench.results import Entry, Problem, PromptSet
from realgen_jax.rewriter.files import FILE as REWRITER_FILE

BASE = "base"  # the name of the config's own model
RESERVED = ("arena",)  # names of other folders next to those of the entries
PICTURE = re.compile(r"(\d{5,})(?:_(\d+))?")  # a picture's name without its suffix
WEIGHT_FILES = ("pytorch_lora_weights", "adapter_model", "diffusion_pytorch_model")


def read_entries(
    pretrained: ConfigDict,
    loras: Sequence[str],
    models: Sequence[str],
    pictures: Sequence[str],
    photographs: str | None,
    base: bool,
    rewriters: Sequence[str] = (),
) -> list[Entry]:
    """Return the entries that flags name as [NAME=]PATH, the config's own model first.

    Each of them is followed by itself with every rewriter: base, A, lora, lora+A.

    Raises FileNotFoundError for a path that does not exist. Raises ValueError for a name that is
    used twice, is reserved or cannot name a folder, and if there are no entries.
    """
    entries = []
    if base:
        entries.append(Entry(BASE, "model", pretrained.model))
    entries += [_entry("lora", value) for value in loras]
    entries += [_entry("model", value) for value in models]
    entries = [other for entry in entries for other in (entry, *_rewritten(entry, rewriters))]
    entries += [_entry("folder", value) for value in pictures]
    if photographs:
        entries.append(_entry("photographs", photographs))
    if not entries:
        raise ValueError(
            "nothing to evaluate: --nobase leaves out the config's model and there is no other "
            "entry; add --lora, --model, --pictures or --photographs"
        )

    for entry in entries:
        if not SAFE.fullmatch(entry.name) or entry.name in RESERVED:
            raise ValueError(
                f"{entry.name!r} cannot name an entry: expected letters, digits, '.', '_', '+', "
                f"'-' and none of {', '.join(RESERVED)}; --lora NAME=PATH gives it another name"
            )
        if not expand_home(entry.source).exists():
            raise FileNotFoundError(
                f"{entry.source} does not exist; it was given as {entry.kind} {entry.name!r}"
            )

    for name, count in Counter(entry.name for entry in entries).items():
        if count > 1:
            paths = ", ".join(entry.source for entry in entries if entry.name == name)
            raise ValueError(f"{name!r} names several entries ({paths}); use NAME=PATH")
    return entries


def _entry(kind: str, value: str) -> Entry:
    """The entry of a flag's value, [NAME=]PATH. A path may contain "=" as well."""
    name, equals, path = value.partition("=")
    if equals and "/" not in name:
        return Entry(name, kind, path)
    name = "photographs" if kind == "photographs" else default_name(value)
    return Entry(name, kind, value)


def _rewritten(entry: Entry, rewriters: Sequence[str]) -> list[Entry]:
    """An entry's model with prompts by each rewriter, of a flag's values [NAME=]DIR."""
    entries = []
    for value in rewriters:
        own = _entry("model", value)
        if not (expand_home(own.source) / REWRITER_FILE).is_file():
            raise FileNotFoundError(
                f"{own.source} holds no {REWRITER_FILE}; --rewriter needs the folder rewriter/ of "
                "a run with config.stage='rewriter'"
            )
        name = own.name if entry.name == BASE else f"{entry.name}+{own.name}"
        entries.append(replace(entry, name=name, rewriter=own.source, of=entry.name))
    return entries


def default_name(path: str) -> str:
    """Return an entry's name by its path: runs/NAME/lora -> NAME, runs/NAME/best -> NAME-best.

    runs/NAME/rewriter -> NAME.
    """
    folder = expand_home(path).absolute()
    if folder.suffix == ".safetensors":
        folder = folder.parent if folder.stem in WEIGHT_FILES else folder.with_suffix("")
    if folder.name == "transformer":
        folder = folder.parent

    if folder.name in ("lora", "rewriter"):
        name = folder.parent.name
    elif folder.name == "best":
        name = f"{folder.parent.name}-best"
    else:
        name = folder.name
    return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._+-]+", "-", name).strip("-")


@dataclass(frozen=True)
class Weights:
    """The weights that generate the pictures of a `model` or `lora` entry; "" for none."""

    model: str  # FluxPipeline folder
    transformer: str  # replaces the folder's transformer
    lora: str


def weights_of(entry: Entry, pretrained: ConfigDict) -> Weights:
    """Return an entry's weights. Raises ValueError for a folder that contains no model."""
    if entry.kind == "lora":
        return Weights(pretrained.model, pretrained.transformer, entry.source)
    if BASE in (entry.name, entry.of):
        return Weights(pretrained.model, pretrained.transformer, pretrained.lora)

    path = expand_home(entry.source)
    if (path / "model_index.json").exists():
        return Weights(entry.source, "", "")
    for transformer in (path, path / "transformer"):
        if transformer.is_file() or (transformer / "config.json").exists():
            return Weights(pretrained.model, str(transformer), "")
    raise ValueError(
        f"{entry.source} holds neither model_index.json (a FluxPipeline folder of diffusers) nor "
        "config.json (its transformer, as a run with config.train.lora=False leaves it)"
    )


def find_pictures(
    entry: Entry, sets: Sequence[PromptSet]
) -> tuple[dict[str, dict[Slot, Path]], list[Problem]]:
    """Return the pictures of a `folder` or `photographs` entry, {set: {(line, copy): file}}.

    FOLDER/<set>/ holds a set's pictures; without such a folder, FOLDER itself stands for every set.
    A line without a picture is a Problem, and so is a picture without a line. Raises ValueError if
    there are no pictures at all, or if two files are the same line and copy.
    """
    folder = expand_home(entry.source)
    if not folder.is_dir():
        raise ValueError(
            f"{entry.source} is not a folder; {entry.name!r} needs one with 00000.png, 00001.png, "
            "..."
        )

    has_set_folders = any((folder / prompt_set.name).is_dir() for prompt_set in sets)
    pictures = {}
    problems = []
    for prompt_set in sets:
        set_folder = folder / prompt_set.name if has_set_folders else folder
        files, extra, others = _pictures_in(set_folder, len(prompt_set.prompts))
        if not files and set_folder.is_dir():
            raise ValueError(
                f"{set_folder} holds no picture of {entry.name!r}; expected 00000.png to "
                f"{len(prompt_set.prompts) - 1:05}.png, or with the suffix of another format: "
                f"{', '.join(FORMATS)}"
            )
        pictures[prompt_set.name] = files
        problems += _problems(entry, prompt_set, set_folder, files, extra, others)
    return pictures, problems


def _pictures_in(
    folder: Path, lines: int
) -> tuple[dict[Slot, Path], list[Path], dict[int, list[str]]]:
    """({(line, copy): file}, pictures without a line, {line: its files that are no pictures}).

    All are empty if there is no folder.
    """
    pictures, others = list_pictures(folder, "*")
    files: dict[Slot, Path] = {}
    extra = []
    for file in pictures:
        match = PICTURE.fullmatch(file.stem)
        if match is None or int(match[1]) >= lines:
            extra.append(file)
            continue
        slot = int(match[1]), int(match[2] or 0)
        if slot in files:
            raise ValueError(
                f"{files[slot]} and {file} are both picture {slot[1]} of line {slot[0]}; keep one"
            )
        files[slot] = file

    no_pictures: dict[int, list[str]] = {}
    for file in others:
        match = PICTURE.fullmatch(file.stem)
        if match is not None:
            no_pictures.setdefault(int(match[1]), []).append(file.name)
    return files, extra, no_pictures


def _problems(
    entry: Entry,
    prompt_set: PromptSet,
    folder: Path,
    files: dict[Slot, Path],
    extra: Sequence[Path],
    others: Mapping[int, Sequence[str]],
) -> list[Problem]:
    """The pictures without a line, and the lines without a picture. others: as `_pictures_in`'s."""
    lines = len(prompt_set.prompts)
    expected = f"expected 00000.png to {lines - 1:05}.png, more pictures of a line as 00000_1.png"
    problems = [Problem(entry.name, prompt_set.name, file, "extra", expected) for file in extra]

    present = {line for line, _ in files}
    for line in range(lines):
        if line not in present:
            file = folder / f"{line:05}.png"
            detail = f"of line {line}"
            if line in others:
                detail += f"; {', '.join(others[line])} is none of {', '.join(FORMATS)}"
            problems.append(Problem(entry.name, prompt_set.name, file, "missing", detail))
    return problems
