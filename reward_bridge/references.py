"""Reference pictures: what rewards that learn take for real.

Real and generated pictures pass the same resize and the same codec before anything learns from them or scores them, so
that only what they show tells them apart, and not how their files were made.
"""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class References:
    """Pictures by prompt, or for all prompts alike.

    `path` is one of
    - a .jsonl file, each line with "prompt" and "image" (a file) or "images" (a list of files), as RealGen's,
    - a .json file {prompt: [files]}, as Adv-GRPO's,
    - a folder of photographs, which stand for every prompt.
    Files are meant relative to `root`, or to where `path` lies if that is empty. All of them are opened and decoded
    before training starts; raises ValueError naming the first that are missing or broken, and prompts without any.
    """

    def __init__(self, path: str, root: str, prompts: Iterable[str]):
        place = Path(path).expanduser()
        if not place.exists():
            raise FileNotFoundError(
                f"config.reward.references.path is {path!r}, which does not exist; expected .jsonl (prompt, image), "
                ".json ({prompt: [images]}) or a folder of photographs"
            )
        base = Path(root).expanduser() if root else place if place.is_dir() else place.parent
        if place.is_dir():
            everything = sorted(
                file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES
            )
            self._files: Mapping[str, list[Path]] = {}
            self._unpaired = everything
            if not everything:
                raise ValueError(
                    f"{place} holds no pictures ({', '.join(SUFFIXES)}); config.reward.references.path"
                )
        else:
            table = _read_json(place) if place.suffix == ".json" else _read_jsonl(place)
            self._files = {
                prompt: [base / file for file in files] for prompt, files in table.items()
            }
            self._unpaired = []
            if lacking := [
                prompt for prompt in dict.fromkeys(prompts) if not self._files.get(prompt)
            ]:
                raise ValueError(
                    f"{place} has no picture for {len(lacking)} prompts of this run, such as {lacking[0]!r}; add them, "
                    "or give a folder, whose pictures stand for every prompt"
                )
        _check([*self._unpaired, *(file for files in self._files.values() for file in files)])

    def draw(self, prompts: Sequence[str], seed: int) -> list[Path]:
        """A picture for each prompt: without repetition while a prompt has others left."""
        random, pools, drawn = np.random.default_rng(seed), {}, []
        for prompt in prompts:
            key = prompt if self._files else ""
            if not pools.get(key):
                files = self._files[prompt] if self._files else self._unpaired
                pools[key] = [files[i] for i in random.permutation(len(files))]
            drawn.append(pools[key].pop())
        return drawn


def load(file: Path, height: int, width: int) -> torch.Tensor:
    """A picture file as uint8 [3, h, w], the largest middle part of it that has the aspect of height x width."""
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    scale = min(image.height / height, image.width / width)
    h, w = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (image.height - h) // 2, (image.width - w) // 2
    return (
        torch.from_numpy(np.array(image.crop((left, top, left + w, top + h))))
        .permute(2, 0, 1)
        .contiguous()
    )


def recode(images: torch.Tensor, codec: str, quality: int) -> torch.Tensor:
    """uint8 [n, 3, h, w] written and read again. codec: "none", or "jpeg" (4:2:0, `quality` 1 to 95)."""
    if codec == "none":
        return images

    def through(pixels: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=2)
        return np.array(Image.open(file))

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(through, images.permute(0, 2, 3, 1).cpu().numpy()))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous().to(images.device)


def _check(files: Sequence[Path]) -> None:
    def wrong(file: Path) -> str:
        try:
            with Image.open(file) as image:
                image.load()
        except FileNotFoundError:
            return f"{file} does not exist"
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            return f"{file} is no whole picture ({error})"
        return ""

    files = list(dict.fromkeys(files))  # prompts may share them
    with ThreadPoolExecutor() as pool:
        bad = [text for text in pool.map(wrong, files) if text]
    if bad:
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise ValueError(
            f"{len(bad)} of {len(files)} reference pictures cannot be used:\n  "
            + "\n  ".join(bad[:10])
            + more
        )


def _read_json(file: Path) -> dict[str, list[str]]:
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); expected {{prompt: [files]}}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{file} holds a {type(table).__name__}; expected {{prompt: [files]}}")
    return {prompt: _files(files, f"{file}, prompt {prompt!r}") for prompt, files in table.items()}


def _read_jsonl(file: Path) -> dict[str, list[str]]:
    if file.suffix != ".jsonl":
        raise ValueError(
            f"{file} ends in {file.suffix!r}; expected .jsonl, .json or a folder of photographs"
        )
    table: dict[str, list[str]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f'{where} is not JSON ({error}); expected {{"prompt": ..., "image": ...}}'
            ) from error
        prompt = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f'{where} has no "prompt"; expected {{"prompt": ..., "image": ...}}')
        found = record["images"] if "images" in record else record.get("image")
        table.setdefault(prompt.strip(), []).extend(_files(found, where))
    return table


def _files(found: object, where: str) -> list[str]:
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not found or not all(isinstance(file, str) for file in found):
        raise ValueError(
            f'{where}: got images {found!r}; expected a file under "image", or a list of them'
        )
    return found
