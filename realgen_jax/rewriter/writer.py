"""Rewriting prompts with a language model, outside training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from realgen_jax.hosts import fetch, put
from realgen_jax.rewriter.files import RewriterSettings
from realgen_jax.rewriter.generate import Tokens, generate
from realgen_jax.rewriter.texts import drawn, parse, usable
from realgen_jax.rollout import decoder_options
from realgen_jax.sharding import batch_devices, batch_sharding

FIXED = ("steps", "ends", "pad", "temperature", "top_p")


class Tokenizer(Protocol):
    """A language model's tokenizer; reward_bridge.chat.ChatTokenizer implements it."""

    ends: tuple[int, ...]
    pad: int

    def encode(
        self, prompts: Sequence[str], max_tokens: int, place: str = "prompt"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ids int32 [n, max_tokens] and mask bool [n, max_tokens], padded on the left."""

    def decode(self, ids: np.ndarray, completion: np.ndarray) -> list[str]:
        """Return the texts of answers, ids and mask [n, t], without their end tokens."""

    def ended(self, ids: np.ndarray, completion: np.ndarray) -> np.ndarray:
        """Return which answers have an end token: bool [n]."""


@dataclass(frozen=True)
class Rewrite:
    """A rewrite, and whether it can be drawn."""

    text: str
    usable: bool


# (texts) -> whether the image model reads each of them to its end.
Fits = Callable[[Sequence[str]], Sequence[bool]]


@dataclass(frozen=True)
class Writer:
    """A language model in memory that rewrites prompts.

    state: the trained state, or None for the model's own weights. fits: None if any length is
    drawn. temperature 0: the most probable token. top_p: the share of the probability that is drawn
    from. batch: prompts of one call, a multiple of the mesh's batch_devices.
    """

    model: Any
    state: Any
    tokenizer: Tokenizer
    settings: RewriterSettings
    fits: Fits | None
    temperature: float
    top_p: float
    batch: int

    def rewrite(self, prompts: Sequence[str], numbers: np.ndarray, key: jax.Array) -> list[Rewrite]:
        """Return the rewrites of at most `batch` prompts.

        numbers: int32 [n, 2], the line and the copy of each. A rewrite's noise depends on these and
        the key alone. Raises ValueError for a prompt that is too long, FloatingPointError if the
        model's logits are not finite.
        """
        # Every call has the same shape: the last one repeats its first prompt.
        count = len(prompts)
        filled = [*range(count), *[0] * (self.batch - count)]
        ids, mask = self.tokenizer.encode(
            [prompts[row] for row in filled], self.settings.max_prompt_tokens
        )
        rows = batch_sharding(self.model.mesh)
        keys = jax.vmap(lambda pair: jax.random.fold_in(jax.random.fold_in(key, pair[0]), pair[1]))
        tokens, finite = _sampler(self.model.config.dtype, self.model.mesh)(
            self.model,
            self.state,
            put(ids, rows),
            put(mask, rows),
            keys(jnp.asarray(numbers[filled])),
            steps=self.settings.max_new_tokens,
            ends=self.tokenizer.ends,
            pad=self.tokenizer.pad,
            temperature=self.temperature,
            top_p=self.top_p,
        )
        if not finite:
            raise FloatingPointError(
                "the language model's logits are not finite; are its weights damaged?"
            )

        return read_answers(tokens, count, self.tokenizer, self.settings.answer_tag, self.fits)


@cache
def _sampler(dtype: Any, mesh: Mesh) -> Callable[..., tuple[Tokens, jax.Array]]:
    """`generate`, compiled for a mesh. dtype: what the model computes in."""
    return jax.jit(generate, static_argnames=FIXED, compiler_options=decoder_options(dtype, mesh))


def read_answers(
    tokens: Tokens, count: int, tokenizer: Tokenizer, answer_tag: str, fits: Fits | None
) -> list[Rewrite]:
    """Return the first `count` rewrites of a call in words, and whether they can be drawn.

    fits: None if any length is drawn.
    """
    completion = fetch(tokens.completion)[:count]
    answers = fetch(tokens.new_ids)[:count]
    ended = tokenizer.ended(answers, completion)
    texts = [parse(text, answer_tag) for text in tokenizer.decode(answers, completion)]
    whole = [True] * count if fits is None else fits(texts)
    return [
        Rewrite(text, usable(text, bool(end), bool(fit)))
        for text, end, fit in zip(texts, ended, whole, strict=True)
    ]


def rewrite_all(writer: Writer, prompts: Sequence[str], key: jax.Array) -> list[str]:
    """Return the texts to draw for any number of prompts: rewrites, or prompts in their place."""
    rewrites: list[Rewrite] = []
    for start in range(0, len(prompts), writer.batch):
        part = prompts[start : start + writer.batch]
        numbers = np.array([(start + i, 0) for i in range(len(part))], np.int32)
        rewrites += writer.rewrite(part, numbers, key)
    return drawn(prompts, [row.text for row in rewrites], [row.usable for row in rewrites])


def whole_batch(wanted: int, mesh: jax.sharding.Mesh) -> int:
    """Round up to a multiple of the number of devices that share a batch."""
    devices = batch_devices(mesh)
    return -(-wanted // devices) * devices
