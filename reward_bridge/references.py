"""Reference pictures, the real examples for rewards that learn.

Real and generated pictures go through the same resize and the same codec before they are learnt
from or scored. So only their content can tell them apart, not how their files were made.
"""

import hashlib
import io
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reward_bridge.input_files import FORMATS, check_text, list_pictures, read_image, read_lines
from reward_bridge.weights import expand_home

SHOWN = 10  # unusable pictures that an error lists


class References:
    """Reference pictures, either per prompt or shared by all prompts.

    path: one of
        - a .jsonl file whose lines have "prompt" and "image" (a file) or "images" (a list of
          files), as RealGen's,
        - a .json file {prompt: [files]}, as Adv-GRPO's,
        - a folder of photographs, any of which may be used for any prompt. Files that are no
          pictures are left out with a warning, hidden ones without.
    root: the folder that file names are relative to; empty: the folder of `path`.
    prompts: the run's prompts, each of which needs a picture.

    All pictures are opened and decoded at once. Raises FileNotFoundError if `path` does not exist,
    ValueError naming pictures that are missing or broken and prompts without a picture.
    """

    def __init__(self, path: str, root: str, prompts: Iterable[str]):
        source = _source(path)
        self._by_prompt: dict[str, list[Path]] = {}
        self._unpaired: list[Path] = []
        if source.is_dir():
            self._unpaired = _pictures_in(source)
        else:
            self._by_prompt = _read_table(source, root)
            _check_prompts(source, self._by_prompt, prompts)
        files = itertools.chain(self._unpaired, *self._by_prompt.values())
        self._digests = _check_pictures(list(dict.fromkeys(files)))  # prompts may share them

    def draw(self, prompts: Sequence[str], seed: int) -> list[Path]:
        """Draw a picture for each prompt, without repeats while the prompt has unused pictures."""
        random = np.random.default_rng(seed)
        pools: dict[str, list[Path]] = {}
        drawn = []
        for prompt in prompts:
            key = prompt if self._by_prompt else ""
            if not pools.get(key):
                files = self._by_prompt[prompt] if self._by_prompt else self._unpaired
                pools[key] = [files[i] for i in random.permutation(len(files))]
            drawn.append(pools[key].pop())
        return drawn

    def load(self, file: Path, height: int, width: int) -> torch.Tensor:
        """Load a picture as the function `load` does.

        Raises ValueError or OSError if its file is not the one that was there at the start.
        """
        if _digest(file.read_bytes()) != self._digests[file]:
            raise ValueError(f"{file} holds something else")
        return load(file, height, width)


def _source(path: str) -> Path:
    """The table or folder of config.reward.references.path. Raises FileNotFoundError."""
    source = expand_home(path)
    if not source.exists():
        raise FileNotFoundError(
            f"config.reward.references.path is {path!r}, which does not exist; expected .jsonl "
            "(prompt, image), .json ({prompt: [images]}) or a folder of photographs"
        )
    return source


def reference_files(path: str, root: str) -> list[Path]:
    """The files that make up the reference pictures, for a digest of them.

    These are the folder of photographs, or the table and the pictures that it names. Pictures that
    do not exist are left out. Raises ValueError or OSError for a table that cannot be read.
    """
    source = _source(path)
    if source.is_dir():
        return [source]
    pictures = itertools.chain(*_read_table(source, root).values())
    return [source, *(file for file in dict.fromkeys(pictures) if file.is_file())]


def load(file: Path, height: int, width: int) -> torch.Tensor:
    """Load a picture, centre-cropped to the aspect ratio height x width.

    Returns uint8 [3, h, w], not resized. Raises ValueError or OSError naming the file if it cannot
    be read.
    """
    image = _read(file)
    scale = min(image.height / height, image.width / width)
    h = max(1, round(height * scale))
    w = max(1, round(width * scale))
    top = (image.height - h) // 2
    left = (image.width - w) // 2
    pixels = np.array(image.crop((left, top, left + w, top + h)))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def recode(images: torch.Tensor, codec: str, quality: int) -> torch.Tensor:
    """Encode and decode uint8 images [n, 3, h, w].

    codec: "none", or "jpeg" with 4:2:0 chroma subsampling and `quality` 1 to 95.
    """
    if codec == "none":
        return images

    pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    with ThreadPoolExecutor() as pool:
        decoded = list(pool.map(lambda picture: _through_jpeg(picture, quality), pixels))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous().to(images.device)


def _through_jpeg(picture: np.ndarray, quality: int) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [h, w, 3]."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling=2)
    return np.array(Image.open(file))


def _pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder and its subfolders. Warns of other files."""
    files, others = list_pictures(folder, "**/*")
    if not files:
        raise ValueError(
            f"config.reward.references.path: {folder} contains no pictures ({', '.join(FORMATS)})"
        )
    if others:
        counts = Counter(file.suffix.lower() or "no suffix" for file in others)
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(SHOWN))
        logging.getLogger(__name__).warning(
            "%s: %d files are left out, which are not %s: %s",
            folder,
            len(others),
            ", ".join(FORMATS),
            kinds,
        )
    return files


def _read(file: Path) -> Image.Image:
    """The picture in a file, 8-bit RGB. Raises ValueError or OSError naming it."""
    try:
        return read_image(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged or not a picture ({error})") from error


def _check_prompts(source: Path, by_prompt: dict[str, list[Path]], prompts: Iterable[str]) -> None:
    without = [prompt for prompt in dict.fromkeys(prompts) if not by_prompt.get(prompt)]
    if without:
        raise ValueError(
            f"{source} has no picture for {len(without)} prompts of this run, such as "
            f"{without[0]!r}; add them, or use a folder, whose pictures stand for every prompt"
        )


def _check_pictures(files: Sequence[Path]) -> dict[Path, bytes]:
    """Decode every picture; return {file: digest of its content}.

    Raises ValueError listing those that cannot be used.
    """
    with ThreadPoolExecutor() as pool:
        examined = list(pool.map(_examine, files))
    problems = [problem for _, problem in examined if problem]
    if not problems:
        return {file: digest for file, (digest, _) in zip(files, examined, strict=True)}

    lines = problems[:SHOWN]
    if len(problems) > SHOWN:
        lines.append(f"and {len(problems) - SHOWN} more")
    listing = "\n  ".join(lines)
    raise ValueError(
        f"{len(problems)} of {len(files)} reference pictures cannot be used:\n  {listing}"
    )


def _examine(file: Path) -> tuple[bytes, str]:
    """A picture's digest, and why it cannot be used; empty if it can."""
    try:
        _read(file)
        return _digest(file.read_bytes()), ""
    except FileNotFoundError:
        return b"", f"{file} does not exist"
    except (ValueError, OSError) as error:
        return b"", str(error)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _read_table(source: Path, root: str) -> dict[str, list[Path]]:
    """{prompt: its pictures} of a .json or .jsonl file."""
    table = _read_json(source) if source.suffix == ".json" else _read_jsonl(source)
    folder = expand_home(root) if root else source.parent
    return {prompt: [folder / name for name in names] for prompt, names in table.items()}


def _read_json(file: Path) -> dict[str, list[str]]:
    """{prompt: file names} of a .json file."""
    text = "\n".join(read_lines(file))
    try:
        table = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); expected {{prompt: [files]}}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{file} holds a {type(table).__name__}; expected {{prompt: [files]}}")

    names = {}
    for prompt, value in table.items():
        names[prompt] = _file_names(value, f"{file}, prompt {prompt!r}")
    return names


def _read_jsonl(file: Path) -> dict[str, list[str]]:
    """{prompt: file names} of a .jsonl file. Lines with the same prompt are merged."""
    if file.suffix != ".jsonl":
        raise ValueError(
            f"{file} ends in {file.suffix!r}; expected .jsonl, .json or a folder of photographs"
        )
    table: dict[str, list[str]] = {}
    for number, line in enumerate(read_lines(file), start=1):
        prompt, names = _read_line(line, f"{file}, line {number}")
        table.setdefault(prompt, []).extend(names)
    return table


def _read_line(line: str, source: str) -> tuple[str, list[str]]:
    """Prompt and file names of a line."""
    expected = 'expected {"prompt": ..., "image": ...}'
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{source} is not JSON ({error}); {expected}") from error
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f'{source} has no "prompt"; {expected}')

    value = record["images"] if "images" in record else record.get("image")
    return prompt.strip(), _file_names(value, source)


def _file_names(value: object, source: str) -> list[str]:
    """A file name or a list of them, as a list."""
    names = [value] if isinstance(value, str) else value
    is_list = isinstance(names, list) and bool(names)
    if not is_list or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f'{source}: got images {names!r}; expected a file under "image", or a list of files '
            'under "images"'
        )
    for name in names:
        check_text(name, source)
    return names
