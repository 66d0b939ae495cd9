"""Generate pictures from noise that depends only on seed, line and copy."""

import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from realgen_jax.files import expand_home, sampled_digest, write_whole
from realgen_jax.hosts import fetch, process_index, put
from realgen_jax.models.loading import (
    EVALUATIONS,
    find_family,
    load_model,
    load_tuned,
    model_folders,
    size_of,
)
from realgen_jax.models.model import Model, tuned_steps
from realgen_jax.models.trainable import Trainable, with_lora_file
from realgen_jax.nn.lora import PEFT_CONFIG
from realgen_jax.nn.lora_files import open_lora
from realgen_jax.realbench.entries import Weights
from realgen_jax.realbench.picture_files import (
    Picture,
    Slot,
    file_name,
    read_picture,
    write_picture,
)
from realgen_jax.realbench.tasks import Task
from realgen_jax.sharding import batch_sharding, replicated
from realgen_jax.text_cache import TextCache

MANIFEST = "manifest.json"
PATHS = ("model", "transformer")  # manifest keys that only inform people: paths, not contents
LINES = 1 << 20  # in every set, a picture's noise has the number copy * LINES + line


# --- Manifests: how pictures were made


def manifest(
    weights: Weights, config: ConfigDict, seed: int, prompts: Sequence[str]
) -> dict[str, Any]:
    """Return everything that determines the pixels of a set's pictures, except their number.

    `PATHS` only inform people and are not compared. Raises FileNotFoundError if there is no model,
    and the errors of `open_lora`.
    """
    if weights.lora:
        open_lora(weights.lora)

    # -- The model's files.
    model = expand_home(weights.model)
    family = find_family(_pretrained(weights, config))
    sample = config.evaluate.sample
    transformers = [weights.transformer]
    if is_hybrid(weights, config):
        transformers.append(config.pretrained.transformer)
    transformers = [expand_home(path) if path else model / "transformer" for path in transformers]
    paths = [*transformers, *(model / name for name in model_folders(family))]
    if config.pretrained.vae:
        paths.append(expand_home(config.pretrained.vae))
    digest = hashlib.sha256()
    for path in paths:
        for file in _files(path):
            digest.update(sampled_digest(file))

    pretrained = config.pretrained
    return {
        **asdict(weights),
        "weights": digest.hexdigest(),
        "lora": lora_digest(weights.lora),
        "seed": seed,
        "width": sample.width,
        "height": sample.height,
        "steps": sample.num_steps,
        "solver": sample.solver,
        "tuned_steps": tuned_steps(sample),
        "guidance": sample.guidance_scale,
        "dtype": pretrained.dtype,
        "param_dtype": pretrained.param_dtype,
        "vae_dtype": pretrained.vae_dtype,
        "vae_tile": pretrained.vae_tile,
        "quantization": pretrained.quantization,
        "max_tokens": config.prompts.max_tokens,
        "text_dtype": config.prompts.dtype,
        "prompts": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
    }


def is_hybrid(weights: Weights, config: ConfigDict) -> bool:
    """Return whether these weights are a tuned transformer that takes only the first steps."""
    tuned = weights.transformer not in ("", config.pretrained.transformer)
    return tuned and config.evaluate.sample.tuned_share < 1


def _pretrained(weights: Weights, config: ConfigDict) -> ConfigDict:
    """config.pretrained with these weights."""
    pretrained = ConfigDict(config.pretrained.to_dict())
    pretrained.model = str(expand_home(weights.model))
    pretrained.transformer = weights.transformer
    return pretrained


def _files(path: Path) -> list[Path]:
    """A file and the config.json beside it, or the files of a folder."""
    if path.is_file():
        return [file for file in (path, path.with_name("config.json")) if file.exists()]
    return sorted(file for file in path.iterdir() if file.is_file())


def lora_digest(path: str) -> str:
    """Return the SHA-256 of a LoRA's file and peft's config beside it, or of its folder's files.

    It is "" for none.
    """
    if not path:
        return ""
    lora = expand_home(path)
    files = [file for file in (lora, lora.with_name(PEFT_CONFIG)) if file.exists()]
    if lora.is_dir():
        files = [file for file in _files(lora) if file.suffix in (".safetensors", ".json")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def prepare_folder(folder: Path, contents: Mapping[str, Any], remake: bool) -> None:
    """Ensure that a folder contains only pictures made with this manifest.

    With `remake`, other pictures are removed. Otherwise, raises ValueError naming the difference.
    """
    file = folder / MANIFEST
    pictures = sorted(folder.glob("[0-9]*.png"))
    before = _read_manifest(file)
    now = json.loads(json.dumps(contents))
    changed = [key for key in now if before.get(key) != now[key] and key not in PATHS]
    if not changed:
        return

    if pictures and not remake and not before:
        raise ValueError(
            f"{file} is missing or damaged, so it is not known how the pictures in {folder} were "
            "made; use --remake to make them again"
        )
    if pictures and not remake:
        changes = ", ".join(
            f"{key} {before.get(key)!r} then and {now[key]!r} now" for key in changed
        )
        raise ValueError(
            f"the pictures in {folder} were made with other settings: {changes}; choose another "
            "--config.run_name (or another name for the entry), or --remake to make them again"
        )
    for picture in pictures:
        picture.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(now, indent=2) + "\n")


def _read_manifest(file: Path) -> dict[str, Any]:
    """Return the content of a manifest; {} if it is missing or damaged."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        content = json.loads(file.read_bytes())
        if isinstance(content, dict):
            return _today(content)
    return {}


def _today(content: dict[str, Any]) -> dict[str, Any]:
    """Return a manifest with today's keys: older ones are of square pictures and Euler steps."""
    if "resolution" not in content:
        return content
    side = content.pop("resolution")
    return {
        "width": side,
        "height": side,
        "solver": "euler",
        "tuned_steps": content["steps"],
        **content,
    }


# --- Generating pictures


class Sampler:
    """A model in memory, and its programs: one for all LoRAs of the same rank and modules."""

    def __init__(
        self, weights: Weights, config: ConfigDict, mesh: jax.sharding.Mesh, loras: Sequence[str]
    ):
        """loras: all LoRAs that will be used with this model; they are read now, to fail early."""
        self.weights = weights
        self.sample = config.evaluate.sample
        tuned = _pretrained(weights, config)
        base = tuned
        if is_hybrid(weights, config):
            base = _pretrained(replace(weights, transformer=config.pretrained.transformer), config)
        self.model = load_model(base, size_of(self.sample), mesh, key=EVALUATIONS)

        self._programs: dict[Trainable | None, Callable] = {}
        state = None if base is tuned else load_tuned(self.model, tuned)
        self._no_lora: tuple[Model, Any] = (self.model, state)
        everywhere = replicated(mesh)
        paths = [path for path in loras if path]
        for path in reversed(paths):
            model, adapters = self._load_lora(path)
            zeros = jax.tree.map(lambda a: put(np.zeros(a.shape, np.float32), everywhere), adapters)
            self._no_lora = (model, zeros)

    def program(self, lora: str) -> tuple[Model, Callable]:
        """Return the model and its program, (cond, key, ids) -> pictures.

        Without a LoRA, the model runs in the first LoRA's program with adapters that add nothing:
        one program is compiled, and only the weights differ.
        """
        model, adapters = self._no_lora
        trainable = None
        if lora:
            model, adapters = self._load_lora(lora)
        if adapters is not None:
            trainable = model.trainable
        if trainable not in self._programs:
            self._programs[trainable] = model.sampler(
                self.sample.num_steps, self.sample.solver, tuned_steps(self.sample)
            )

        pictures = self._programs[trainable]
        return model, lambda cond, key, ids: pictures(model, adapters, cond, key, ids)

    def _load_lora(self, path: str) -> tuple[Model, Any]:
        """The model with room for this LoRA's modules, and the LoRA's adapters."""
        return with_lora_file(self.model, path)


@dataclass(frozen=True)
class _Batch:
    """One call's pictures."""

    slots: Sequence[Slot]
    missing: np.ndarray  # bool, one per slot
    images: jax.Array | None  # uint8 [size, 3, h, w]; None: no picture is missing


class PictureMaker:
    """Generates the pictures of tasks; consecutive tasks with the same model load it once."""

    def __init__(
        self,
        config: ConfigDict,
        mesh: jax.sharding.Mesh,
        caches: Mapping[str, TextCache],
        weights: Sequence[Weights],
        seed: int,
    ):
        """caches: {model folder: its embeddings}; weights: those of all tasks."""
        self.config = config
        self.mesh = mesh
        self.caches = caches
        self.weights = weights
        self.key = jax.random.key(seed)
        self._sampler: Sampler | None = None

    def batches(self, task: Task, size: int, pool: ThreadPoolExecutor) -> Iterator[list[Picture]]:
        """Yield a task's pictures batch by batch; one batch is written while the next is sampled.

        size: a multiple of the mesh's batch_devices. A batch with a missing picture is sampled as a
        whole, so that its pictures are bit-identical, but existing files are not overwritten. Every
        process must iterate; the first one writes, the others get empty batches.
        """
        copies = self.config.evaluate.images_per_prompt
        lines = len(task.prompt_set.prompts)
        slots = [(line, copy) for line in range(lines) for copy in range(copies)]
        program = None
        ahead: deque[_Batch] = deque()
        for start in range(0, len(slots), size):
            missing = task.missing[start : start + size]
            images = None
            if missing.any():
                if program is None:
                    program = self._program(task.weights)
                # Pad the last batch with pictures from the start.
                filled = [slots[i % len(slots)] for i in range(start, start + size)]
                images = self._sample(task, filled, *program)
            ahead.append(_Batch(slots[start : start + size], missing, images))
            if len(ahead) > 1:
                yield _write(task.folder, ahead.popleft(), pool)
        for batch in ahead:
            yield _write(task.folder, batch, pool)

    def _sample(self, task: Task, slots: Sequence[Slot], model: Model, run: Callable) -> jax.Array:
        """The pictures of these slots, uint8 [n, 3, h, w]."""
        ids = np.array([copy * LINES + line for line, copy in slots], np.int32)
        prompts = [task.texts[line] for line, _ in slots]
        cache = self.caches[task.weights.model]
        cond = model.cond(cache, prompts, self.config.evaluate.sample.guidance_scale)
        return run(cond, self.key, put(ids, batch_sharding(model.mesh)))

    def _program(self, weights: Weights) -> tuple[Model, Callable]:
        """The program of these weights, as `Sampler.program` returns it."""

        def model_of(weights: Weights) -> tuple[str, str]:
            return weights.model, weights.transformer

        if self._sampler is None or model_of(self._sampler.weights) != model_of(weights):
            self._sampler = None  # frees its memory before the next model is loaded
            loras = [other.lora for other in self.weights if model_of(other) == model_of(weights)]
            self._sampler = Sampler(weights, self.config, self.mesh, loras)
        return self._sampler.program(weights.lora)


def _write(folder: Path, batch: _Batch, pool: ThreadPoolExecutor) -> list[Picture]:
    """Write a batch's missing pictures and read its others."""
    pixels = None if batch.images is None else fetch(batch.images)
    if process_index():
        return []
    futures = []
    for i, slot in enumerate(batch.slots):
        file = folder / file_name(*slot)
        if batch.missing[i]:
            futures.append(pool.submit(write_picture, slot, file, pixels[i]))
        else:
            futures.append(pool.submit(read_picture, slot, file))
    return [future.result() for future in futures]
