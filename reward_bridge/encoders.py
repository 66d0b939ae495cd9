"""The text encoders of an image model: checked, loaded, and run on texts.

scripts/encode_prompts.py runs them once. A run that rewrites prompts keeps them in memory
(TextEncoders), since its texts are new in every epoch.
"""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from reward_bridge.devices import is_out_of_memory, resolve
from reward_bridge.reward import RewardError
from reward_bridge.text_encoders import load_model, load_tokenizer, read_config, weights_file
from reward_bridge.text_recipes import Recipe, Tokens, get_recipe
from reward_bridge.weights import torch_dtype
from reward_bridge.worker import Answer, Pending, Worker

BATCH = 16  # prompts per forward pass
NAME = "text encoders"  # in errors


class Encoder(Protocol):
    """A text encoder of a model family; realgen_jax.models.family.Encoder says what it has."""

    arrays: tuple[str, ...]
    recipe: str
    tokenizer: str
    model: str
    padding: str


class NotFinite(ValueError):
    """An encoder gave NaN or infinity."""


@dataclass(frozen=True)
class Prepared:
    """A text encoder whose files have been checked; its weights are not in memory."""

    encoder: Encoder
    recipe: Recipe
    folder: Path
    config: Any
    tokenizer: PreTrainedTokenizerBase

    def tokens(self, prompts: Sequence[str], max_tokens: int) -> Tokens:
        """The tokens of these prompts."""
        return self.recipe.tokens(self.tokenizer, self.config, prompts, max_tokens)

    def whole_tokens(self, prompts: Sequence[str], max_tokens: int) -> Tokens:
        """The tokens of these prompts, so padded that arrays have one shape for all prompts."""
        tokens = self.tokens(prompts, max_tokens)
        if self.recipe.width is None:
            return tokens
        rest = self.recipe.width(max_tokens) - tokens.ids.shape[1]
        ids = pad(tokens.ids, (0, rest), value=self.tokenizer.pad_token_id)
        return Tokens(ids, tokens.lengths, tokens.cut)


def prepare(model: Path, encoder: Encoder) -> Prepared:
    """Check the files of an encoder of a pipeline folder, before its weights are read.

    Raises ValueError or OSError for files that are missing or another model's.
    """
    recipe = get_recipe(encoder.recipe)
    folder = model / encoder.model
    config = read_config(recipe.model, folder)
    weights_file(folder)
    tokenizer = load_tokenizer(
        model / encoder.tokenizer, recipe.model, config.vocab_size, encoder.padding
    )
    return Prepared(encoder, recipe, folder, config, tokenizer)


def load(prepared: Prepared, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Load a text encoder, without the parts that are not run."""
    recipe = prepared.recipe
    model = load_model(recipe.model, prepared.folder, recipe.unused, dtype, device)
    recipe.trim(model)
    return model


def check_words(tokenizers: Sequence[PreTrainedTokenizerBase], prompts: Sequence[str]) -> None:
    """Raise ValueError for a prompt of which a tokenizer knows no word; it would mean nothing."""
    for prompt in prompts:
        for tokenizer in tokenizers:
            if prompt.strip() and not knows_a_word(tokenizer, prompt):
                raise ValueError(
                    f"the tokenizer in {tokenizer.name_or_path} knows no word of the prompt "
                    f"{prompt!r}; write it in a language of the model, or remove it"
                )


def knows_a_word(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Return whether a prompt has a token that is neither special nor a space."""
    # The padding is not among these: CLIP-G's is "!", a word.
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    ids = set(tokenizer(prompt, verbose=False).input_ids) - special
    words = [token.strip("▁") for token in tokenizer.convert_ids_to_tokens(sorted(ids))]
    return any(words)


@torch.inference_mode()
def encode_batch(
    encoders: Sequence[tuple[Prepared, PreTrainedModel]],
    tokens: Sequence[Tokens],
    rows: slice,
    prompts: Sequence[str],
) -> dict[str, np.ndarray]:
    """Return {array: [n, ...]} of n rows of the prompts. tokens: of all prompts, by encoder.

    Raises NotFinite if an encoder gives NaN.
    """
    arrays = {}
    for (prepared, model), own in zip(encoders, tokens, strict=True):
        ids = own.ids[rows].to(model.device)
        lengths = own.lengths[rows].to(model.device)
        results = prepared.recipe.arrays(model, ids, lengths)
        for name, array in zip(prepared.encoder.arrays, results, strict=True):
            if not array.isfinite().all():
                raise NotFinite(
                    f"the text encoder of {name} gave NaN or infinity for one of the prompts from "
                    f"{prompts[rows.start]!r} on; are its weights damaged?"
                )
            arrays[name] = to_numpy(array)
    return arrays


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Copy a tensor to the host; numpy has bfloat16 only through ml_dtypes."""
    tensor = tensor.cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


class TextWindow:
    """What an image model reads of a text, by the tokenizers of its encoders alone.

    max_tokens: config.prompts.max_tokens. CLIP's 77 tokens do not count: it cuts longer texts.
    """

    def __init__(self, prepared: Sequence[Prepared], max_tokens: int):
        self.max_tokens = max_tokens
        self._prepared = prepared

        # Tokenizers of transformers change their state while they tokenize.
        self._lock = threading.Lock()

    def count(self, texts: Sequence[str]) -> list[int]:
        """The numbers of tokens of texts, of which the model reads max_tokens."""
        most = [0] * len(texts)
        if not texts:
            return most
        with self._lock:
            for prepared in self._prepared:
                if prepared.recipe.counts is not None:
                    counts = prepared.recipe.counts(prepared.tokenizer, texts)
                    most = [max(pair) for pair in zip(most, counts, strict=True)]
        return most

    def fits(self, texts: Sequence[str]) -> list[bool]:
        """Whether the model reads texts to their ends, and every encoder knows a word of them."""
        counts = self.count(texts)
        with self._lock:
            known = [
                all(knows_a_word(prepared.tokenizer, text) for prepared in self._prepared)
                for text in texts
            ]
        return [
            count <= self.max_tokens and word for count, word in zip(counts, known, strict=True)
        ]

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of texts, by encoder; arrays have one shape for all texts."""
        with self._lock:
            return [prepared.whole_tokens(texts, self.max_tokens) for prepared in self._prepared]


def open_window(model: Path, encoders: Sequence[Encoder], max_tokens: int) -> TextWindow:
    """Return the TextWindow of a pipeline folder. Raises as `prepare` does."""
    return TextWindow([prepare(Path(model), encoder) for encoder in encoders], max_tokens)


class TextEncoders:
    """An image model's text encoders in memory, for texts that are new in every epoch.

    A thread of its own encodes one list of texts after another, `batch` texts at a time, or half as
    many once memory has run out. A list fails with a RewardError if that takes more than `deadline`
    seconds, still fails after `retries` further attempts, or gives NaN.
    """

    def __init__(
        self,
        models: Sequence[tuple[Prepared, PreTrainedModel]],
        max_tokens: int,
        *,
        deadline: float,
        retries: int,
        batch: int = BATCH,
    ):
        self.window = TextWindow([prepared for prepared, _ in models], max_tokens)
        self.deadline = deadline
        self.retries = retries
        self.batch = batch
        self.seconds = 0.0  # time spent on encoding so far
        self._models = models
        self._worker = Worker(NAME)

    def encode(self, texts: Sequence[str]) -> "PendingTexts":
        """Queue texts and return at once. Raises ValueError if there are none."""
        if not texts:
            raise ValueError(f"the {NAME} got no text; expected one or more")
        done: queue.SimpleQueue = queue.SimpleQueue()
        answer = Answer(done)
        self._worker.put(partial(self._encode, list(texts)), answer)
        return PendingTexts({self._worker: answer}, done)

    def close(self, wait: float = 10.0) -> None:
        """Drop queued texts, and give running encoders `wait` seconds to finish."""
        self._worker.stop(f"the {NAME} were closed before these texts were encoded")
        self._worker.thread.join(wait)

    # -- The thread

    def _encode(self, texts: list[str]) -> dict[str, np.ndarray]:
        """The job of `encode`."""
        late = f"the {NAME} did not answer within {self.deadline:g} s (config.reward.deadline)"
        self._worker.begin(NAME, self.deadline, late)
        start = time.monotonic()
        try:
            return self._worker.retry(f"the {NAME}", partial(self._encode_all, texts), self.retries)
        finally:
            self.seconds += time.monotonic() - start

    def _encode_all(self, texts: list[str]) -> dict[str, np.ndarray]:
        """{array: [n, ...]} of n texts. If memory runs out, the rest goes in half the batches."""
        tokens = self.window.tokens(texts)
        batches = []
        start = 0
        while start < len(texts):
            rows = slice(start, start + self.batch)
            arrays = self._encode_rows(tokens, rows, texts)
            if arrays is None:
                self._halve_batch(len(texts[rows]))
                continue
            batches.append(arrays)
            start = rows.stop
        return {name: np.concatenate([arrays[name] for arrays in batches]) for name in batches[0]}

    def _encode_rows(
        self, tokens: Sequence[Tokens], rows: slice, texts: list[str]
    ) -> dict[str, np.ndarray] | None:
        """One batch's arrays, or None if memory ran out."""
        try:
            return encode_batch(self._models, tokens, rows, texts)
        except NotFinite as error:
            raise RewardError(f"{NAME}: {error}") from error
        except Exception as error:
            if not is_out_of_memory(error) or len(texts[rows]) == 1:
                raise
            return None

    def _halve_batch(self, size: int) -> None:
        # The caller has dropped the error's traceback, which kept the batch's memory alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.batch = (size + 1) // 2
        logging.getLogger(__name__).warning(
            "the %s ran out of memory on %d texts and continue with %d at a time",
            NAME,
            size,
            self.batch,
        )


class PendingTexts(Pending):
    """The arrays of a list of texts, once they are encoded."""

    def result(self) -> dict[str, np.ndarray]:
        """Wait for {array: [n, ...]}. Raises RewardError that names the text encoders."""
        (arrays,) = self._outcomes()
        return arrays


def open_encoders(
    model: Path,
    encoders: Sequence[Encoder],
    *,
    max_tokens: int,
    dtype: str,
    device: str,
    deadline: float,
    retries: int,
) -> TextEncoders:
    """Load the text encoders of a pipeline folder onto a device, to stay there.

    max_tokens, dtype: of config.prompts. device: as for `resolve`. deadline: seconds for a list of
    texts. Raises ValueError or OSError for files that are missing, damaged or another model's, and
    ValueError if the device has no room.
    """
    disable_progress_bar()  # loading would draw over the run's own progress bar
    everything = [prepare(Path(model), encoder) for encoder in encoders]
    where = resolve(device)
    try:
        models = [(prepared, load(prepared, torch_dtype(dtype), where)) for prepared in everything]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(
            f"no room for the {NAME} on {where} ({str(error).splitlines()[0]}); choose another "
            "device (config.prompts.device)"
        ) from error
    return TextEncoders(models, max_tokens, deadline=deadline, retries=retries)
