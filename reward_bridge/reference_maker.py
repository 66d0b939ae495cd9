"""Makes reference pictures for rewards that learn, with any text-to-image pipeline of diffusers.

A picture's file is named by its prompt and the number of its variation, and its noise depends only
on these and the seed. So pictures can be made in any order, and more prompts can be added later.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

SETTINGS = "settings.json"  # how the pictures of a folder were made
TABLE = "references.json"  # {prompt: [files]}, as Adv-GRPO has it


@dataclass(frozen=True)
class Slot:
    """A picture to make: of which prompt, and which of its variations."""

    prompt: str
    variation: int

    @property
    def file(self) -> str:
        """The name of its file."""
        digest = hashlib.sha256(self.prompt.encode()).hexdigest()[:16]
        return f"{digest}_{self.variation}.png"

    def noise(self, seed: int) -> int:
        """The seed of its noise, 63 bits."""
        text = f"{seed}\n{self.variation}\n{self.prompt}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write a new folder's settings, or compare an old one's.

    Raises ValueError naming the first entry that differs: the pictures would not be of one kind.
    """
    file = folder / SETTINGS
    if not file.exists():
        write_whole(file, json.dumps(settings, indent=2) + "\n")
        return
    try:
        before = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); remove {folder} and begin again") from error
    for key in settings:
        if before.get(key) != settings[key]:
            raise ValueError(
                f"{folder} holds pictures that were made with {key} {before.get(key)!r}, now it is "
                f"{settings[key]!r}; use another folder, or the same settings"
            )


def missing_slots(folder: Path, prompts: Sequence[str], variations: int) -> list[Slot]:
    """The pictures that are still to be made, prompt by prompt. Equal prompts count once."""
    slots = []
    for prompt in dict.fromkeys(prompts):
        for variation in range(variations):
            slot = Slot(prompt, variation)
            if not (folder / slot.file).is_file():
                slots.append(slot)
    return slots


def load_pipeline(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """Load a pipeline of diffusers from a folder: no download, no pickle, no code of the folder.

    Raises FileNotFoundError or ValueError for a folder that holds no pipeline.
    """
    # Imported here because of its optional dependencies; it takes seconds.
    from diffusers import DiffusionPipeline

    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model_index.json; expected a text-to-image pipeline of diffusers"
        )
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise ValueError(f"{folder} cannot be loaded by diffusers: {error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def check_arguments(pipeline: Any, arguments: Mapping[str, Any]) -> None:
    """Raise ValueError for a pipeline that draws no texts, or that lacks an argument."""
    known = list(inspect.signature(pipeline.__call__).parameters)
    name = type(pipeline).__name__
    lacking = [key for key in ("prompt", "generator") if key not in known]
    if lacking:
        raise ValueError(f"{name} takes no {lacking[0]}; expected a text-to-image pipeline")
    unknown = [key for key in arguments if key not in known]
    if unknown:
        raise ValueError(f"{name} takes no argument {unknown[0]!r}; it takes {', '.join(known)}")


def make_pictures(
    pipeline: Any,
    slots: Sequence[Slot],
    folder: Path,
    *,
    seed: int,
    batch_size: int,
    arguments: Mapping[str, Any],
    advance: Callable[[int], None],
) -> None:
    """Draw the pictures of slots and write them, `batch_size` at a time.

    arguments: of the pipeline's call. advance: called with the number of pictures that are written.
    Raises ValueError if the pipeline returns another number of pictures.
    """
    for start in range(0, len(slots), batch_size):
        batch = slots[start : start + batch_size]
        noise = [torch.Generator().manual_seed(slot.noise(seed)) for slot in batch]
        prompts = [slot.prompt for slot in batch]
        images = pipeline(prompt=prompts, generator=noise, output_type="pil", **arguments).images
        if len(images) != len(batch):
            raise ValueError(
                f"{type(pipeline).__name__} returned {len(images)} pictures for {len(batch)} "
                "prompts; expected one for each"
            )
        for slot, image in zip(batch, images, strict=True):
            _write_picture(folder / slot.file, image)
        advance(len(batch))


def write_table(folder: Path, prompts: Sequence[str], variations: int) -> Path:
    """Write {prompt: [its files]}, which config.reward.references.path reads. Returns its path."""
    table = {}
    for prompt in prompts:
        table[prompt] = [Slot(prompt, variation).file for variation in range(variations)]
    text = json.dumps(table, indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / TABLE, text)
    return folder / TABLE


def write_whole(file: Path, text: str) -> None:
    """Write a text in UTF-8 so that a reader sees the old or the new one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def _write_picture(file: Path, image: Image.Image) -> None:
    """Write a PNG that is whole or not there."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    image.convert("RGB").save(temporary, "PNG")
    temporary.replace(file)
