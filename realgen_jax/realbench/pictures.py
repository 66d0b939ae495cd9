"""Pictures on disk: made here, from noise that depends on seed, line and copy alone, or read as they were found."""

import base64
import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from realgen_jax.files import sampled_digest, write_whole
from realgen_jax.hosts import fetch, process_index, put
from realgen_jax.models.flux.family import Pipeline, load_pipeline, no_model
from realgen_jax.nn.lora import load_lora
from realgen_jax.realbench.entries import Slot, Weights
from realgen_jax.realbench.results import PromptSet
from realgen_jax.sharding import batch_sharding, replicated
from realgen_jax.text_cache import TextCache

MANIFEST = "manifest.json"
PATHS = ("model", "transformer")  # keys of the manifest that say where, not what
PARTS = ("vae", "scheduler", "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
LINES = 1 << 20  # a picture's noise has the number copy * LINES + line, in every set


@dataclass(frozen=True)
class Picture:
    """A picture in memory: uint8 [3, h, w], or why there is none."""

    slot: Slot
    file: Path
    sha256: str
    pixels: np.ndarray | None
    detail: str = ""


def file_name(line: int, copy: int) -> str:
    return f"{line:05}_{copy}.png" if copy else f"{line:05}.png"


def read_image(data: bytes) -> Image.Image:
    """A picture file in RGB: upright, transparent parts over white, 8 bits, the first of several frames.

    Raises ValueError for what cannot be decoded to its end.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16 bits a pixel
            values = np.asarray(image).astype(np.float64)
            image = Image.fromarray((values / 257 + 0.5).clip(0, 255).astype(np.uint8))
        elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{error}") from error


def decode(data: bytes) -> np.ndarray:
    """uint8 [3, h, w] of a picture file, as `read_image` reads it."""
    return np.ascontiguousarray(np.asarray(read_image(data)).transpose(2, 0, 1))


def data_url(data: bytes, kind: str) -> str:
    """kind: png, jpeg, webp."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def read_picture(slot: Slot, file: Path) -> Picture:
    try:
        data = file.read_bytes()
    except OSError as error:
        return Picture(slot, file, "", None, str(error))
    digest = hashlib.sha256(data).hexdigest()
    try:
        return Picture(slot, file, digest, decode(data))
    except ValueError as error:
        return Picture(slot, file, digest, None, str(error))


def write_picture(slot: Slot, file: Path, pixels: np.ndarray) -> Picture:
    """Lossless, and whole or not at all."""
    data = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(data, "PNG")
    write_whole(file, data.getvalue())
    return Picture(
        slot, file, hashlib.sha256(data.getvalue()).hexdigest(), np.ascontiguousarray(pixels)
    )


def read_batches(
    files: Mapping[Slot, Path], lines: int, size: int, pool: ThreadPoolExecutor
) -> Iterator[list]:
    """Found pictures in batches of `size` places, a place for every line and copy whether its file is there or not, so
    that a picture is scored in the same company when others come and go. The next batch is read ahead.
    """
    copies = 1 + max((copy for _, copy in files), default=0)
    slots = [(line, copy) for line in range(lines) for copy in range(copies)]
    ahead = deque()
    for start in range(0, len(slots), size):
        batch = [slot for slot in slots[start : start + size] if slot in files]
        ahead.append([pool.submit(read_picture, slot, files[slot]) for slot in batch])
        if len(ahead) > 1:
            yield [one.result() for one in ahead.popleft()]
    for batch in ahead:
        yield [one.result() for one in batch]


def manifest(
    weights: Weights, config: ConfigDict, seed: int, prompts: Sequence[str]
) -> dict[str, Any]:
    """What decides the pixels of a set's pictures, but for their number; `PATHS` are told for people."""
    model, digest = Path(weights.model).expanduser(), hashlib.sha256()
    if not (model / "model_index.json").exists():
        raise FileNotFoundError(no_model(model))
    transformer = (
        Path(weights.transformer).expanduser() if weights.transformer else model / "transformer"
    )
    for place in (transformer, *(model / name for name in PARTS)):
        for file in (
            [place] if place.is_file() else sorted(f for f in place.iterdir() if f.is_file())
        ):
            digest.update(sampled_digest(file))
    sample, pretrained = config.sample, config.pretrained
    made = asdict(weights) | {
        "weights": digest.hexdigest(),
        "lora": lora_digest(weights.lora),
        "seed": seed,
    }
    made |= {
        "steps": sample.eval_num_steps,
        "guidance": sample.guidance_scale,
        "resolution": sample.resolution,
    }
    made |= {name: pretrained[name] for name in ("dtype", "param_dtype", "vae_dtype")}
    made |= {"max_tokens": config.prompts.max_tokens, "text_dtype": config.prompts.dtype}
    return made | {"prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()}


def lora_digest(path: str) -> str:
    """SHA-256 of a LoRA's file, or of its folder's; "" for none."""
    if not path:
        return ""
    where = Path(path).expanduser()
    kept = (
        sorted(f for f in where.iterdir() if f.suffix in (".safetensors", ".json"))
        if where.is_dir()
        else [where]
    )
    digest = hashlib.sha256()
    for file in kept:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def prepare(folder: Path, made: Mapping[str, Any], remake: bool) -> None:
    """Have `folder` hold pictures that were made with just this, and nothing else.

    Raises ValueError naming what differs, unless `remake`, which removes what was made with something else.
    """
    file = folder / MANIFEST
    there = sorted(folder.glob("[0-9]*.png"))
    before = json.loads(file.read_text()) if file.exists() else {}
    now = json.loads(json.dumps(made))
    differ = [key for key in now if before.get(key) != now[key] and key not in PATHS]
    if there and differ and not remake:
        was = ", ".join(f"{key} {before.get(key)!r} then and {now[key]!r} now" for key in differ)
        raise ValueError(
            f"the pictures in {folder} were made with something else: {was}; choose another --config.run_name (or "
            "another name for the entry), or --remake to make them again"
        )
    if differ:
        for old in there:
            old.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(now, indent=2) + "\n")


class Sampler:
    """A model in memory, and its programs: one for all LoRAs of a rank and an alpha."""

    def __init__(
        self, weights: Weights, config: ConfigDict, mesh: jax.sharding.Mesh, loras: Sequence[str]
    ):
        """`loras`: all that this model will be asked for, which are looked at now."""
        pretrained = ConfigDict(config.pretrained.to_dict())
        pretrained.model, pretrained.transformer = weights.model, weights.transformer
        self.steps, self.weights = config.sample.eval_num_steps, weights
        self.pipe = load_pipeline(pretrained, config.sample.resolution, None, mesh)
        self._programs, self._nothing = {}, (None, None)
        for path in reversed([lora for lora in loras if lora]):
            lora, adapters = load_lora(Path(path).expanduser(), self.pipe.model)
            self._nothing = lora, jax.tree.map(lambda a: np.zeros(a.shape, np.float32), adapters)

    def program(self, lora: str) -> tuple[Pipeline, Callable]:
        """(the pipeline, its program: (cond, key, ids) -> pictures). Without a LoRA the model runs in the first LoRA's
        program, with adapters that add nothing: it is compiled once, and the weights are all that differs.
        """
        config, adapters = self._nothing
        if lora:
            config, adapters = load_lora(Path(lora).expanduser(), self.pipe.model)
        if config not in self._programs:
            pipe = self.pipe if config is None else self.pipe.with_lora(config)
            self._programs[config] = pipe.sampler(self.steps)
        if adapters is not None:
            adapters = jax.tree.map(
                lambda a: put(np.asarray(a), replicated(self.pipe.mesh)), adapters
            )
        run = self._programs[config]
        return self.pipe, lambda cond, key, ids: run(adapters, cond, key, ids)


def make_batches(
    sampler: Callable[[], tuple[Pipeline, Callable]],
    cache: TextCache | None,
    prompts: PromptSet,
    folder: Path,
    config: ConfigDict,
    missing: np.ndarray,
    seed: int,
    size: int,
    pool: ThreadPoolExecutor,
) -> Iterator[list[Picture]]:
    """A set's pictures, batch by batch; those that are missing (bool [lines x copies]) are made, while the batch before
    is written and handed on. All processes must go through it; the first one writes, the others get nothing.

    `size` is a multiple of the mesh's batch_devices. A batch with a hole is sampled as a whole, so that its pictures
    are the same bits, but files that are there stay as they are.
    """
    copies = config.evaluate.images_per_prompt
    slots = [(line, copy) for line in range(len(prompts.prompts)) for copy in range(copies)]
    program, key, ahead = None, jax.random.key(seed), deque()

    def finish(start: int, images: jax.Array | None) -> list[Picture]:
        batch, pixels = slots[start : start + size], None if images is None else fetch(images)
        if process_index():
            return []
        work = []
        for i, slot in enumerate(batch):
            file = folder / file_name(*slot)
            if missing[start + i]:
                work.append(pool.submit(write_picture, slot, file, pixels[i]))
            else:
                work.append(pool.submit(read_picture, slot, file))
        return [one.result() for one in work]

    for start in range(0, len(slots), size):
        images = None
        if missing[start : start + size].any():
            program = program or sampler()
            pipe, run = program
            batch = [
                slots[i % len(slots)] for i in range(start, start + size)
            ]  # the last one is filled up
            ids = np.array([copy * LINES + line for line, copy in batch], np.int32)
            cond = pipe.cond(
                cache, [prompts.prompts[line] for line, _ in batch], config.sample.guidance_scale
            )
            images = run(cond, key, put(ids, batch_sharding(pipe.mesh)))
        ahead.append((start, images))
        if len(ahead) > 1:
            yield finish(*ahead.popleft())
    for one in ahead:
        yield finish(*one)


def missing_pictures(folder: Path, lines: int, copies: int) -> np.ndarray:
    """bool [lines x copies]."""
    return np.array(
        [
            not (folder / file_name(line, copy)).exists()
            for line in range(lines)
            for copy in range(copies)
        ]
    )
