"""Sampling from a language model: one program that draws a whole call of rewrites.

Functions here do not depend on a model. They take one with the methods `prefill` and `decoder` of
models/language.py. Shapes: n rows, l prompt tokens, t new tokens, V tokens in the vocabulary.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from realgen_jax.sharding import batch_sharding


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids", "mask", "completion", "logp"],
    meta_fields=["length"],
)
@dataclass(frozen=True)
class Tokens:
    """One call's prompts and completions; leaves may have leading axes.

    ids: int32 [n, l + t], prompts padded on the left, completions on the right. mask: bool
    [n, l + t], the real tokens. completion: bool [n, t], those of the completion, its end included.
    logp: float32 [n, t], their log-probs when they were drawn; 0 elsewhere. length: l.
    """

    ids: Array
    mask: Array
    completion: Array
    logp: Array
    length: int

    @property
    def new_ids(self) -> Array:
        """The completions, int32 [n, t]."""
        return self.ids[..., self.length :]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Loop:
    """What a step of the loop over tokens changes.

    number: int32 [], tokens drawn so far. alive: bool [n], rows that have not ended. cache: the
    model's. finite: bool [].
    """

    number: Array
    ids: Array
    completion: Array
    logp: Array
    alive: Array
    cache: Any
    finite: Array


def generate(
    model: Any,
    trainable: Any,
    prompt_ids: Array,
    prompt_mask: Array,
    keys: Array,
    *,
    steps: int,
    ends: tuple[int, ...],
    pad: int,
    temperature: float,
    top_p: float = 1.0,
) -> tuple[Tokens, Array]:
    """Draw at most `steps` new tokens a row, until all rows have ended.

    prompt_ids: int32 [n, l], padded on the left; prompt_mask: bool [n, l]. keys: one a row. ends:
    ids that end a row; `pad` follows them. temperature: divides the logits; 0 takes the likeliest
    token. top_p: below 1, only the likeliest tokens with this much probability are drawn from
    (arXiv 1904.09751). Training needs 1: else `logp` belongs to another distribution than the
    replay's.

    Token number i of a row is argmax(logits / temperature + Gumbel noise of fold_in(key, i)), so
    but for rounding a row depends on its own prompt and key alone. Returns the tokens, and whether
    all logits were finite, bool []. Everything but the first five arguments is static.
    """
    length = prompt_ids.shape[1]
    prompt_tokens = prompt_mask.sum(axis=1)
    step, logits = model.decoder(trainable)
    draw = partial(_draw, keys=keys, temperature=temperature, top_p=top_p)

    def with_token(loop: _Loop, hidden: Array) -> _Loop:
        """Draw a token from hidden states [n, D] and write it down."""
        scores = logits(hidden)
        drawn, logp = draw(scores, loop.number)
        drawn = jnp.where(loop.alive, drawn, pad)
        write = partial(_write, number=loop.number)
        return replace(
            loop,
            number=loop.number + 1,
            ids=write(loop.ids, drawn),
            completion=write(loop.completion, loop.alive),
            logp=write(loop.logp, jnp.where(loop.alive, logp, 0.0)),
            alive=loop.alive & ~_is_in(drawn, ends),
            finite=loop.finite & jnp.isfinite(scores).all(),
        )

    def goes_on(loop: _Loop) -> Array:
        return (loop.number < steps) & loop.alive.any()

    def body(loop: _Loop) -> _Loop:
        # Read the last token, which is at this place of the row, and draw the next one.
        last = loop.number - 1
        place = length + last
        ids = jax.lax.dynamic_index_in_dim(loop.ids, last, axis=1, keepdims=False)
        hidden, cache = step(ids, prompt_tokens + last, loop.cache, place, _before(place))
        return with_token(replace(loop, cache=cache), hidden)

    def _before(place: Array) -> Array:
        """The prompt, and the new tokens up to a place: bool [n, l + steps]."""
        new = length + jnp.arange(steps) <= place
        return jnp.concatenate([prompt_mask, jnp.broadcast_to(new, (len(keys), steps))], axis=1)

    # Read the prompts and draw the first tokens.
    hidden, cache = model.prefill(trainable, prompt_ids, prompt_mask, length + steps)
    rows = (len(prompt_ids), steps)
    loop = _Loop(
        number=jnp.int32(0),
        ids=jnp.full(rows, pad, jnp.int32),
        completion=jnp.zeros(rows, bool),
        logp=jnp.zeros(rows, jnp.float32),
        alive=jnp.ones(len(prompt_ids), bool),
        cache=cache,
        finite=jnp.bool_(True),
    )
    loop = with_token(loop, hidden)

    # Draw the others.
    loop = jax.lax.while_loop(goes_on, body, loop)

    tokens = Tokens(
        ids=jnp.concatenate([prompt_ids, loop.ids], axis=1),
        mask=jnp.concatenate([prompt_mask, loop.completion], axis=1),
        completion=loop.completion,
        logp=loop.logp,
        length=length,
    )
    tokens = jax.lax.with_sharding_constraint(tokens, batch_sharding(model.mesh))
    return tokens, loop.finite


def token_noise(keys: Array, number: Array, vocabulary: int) -> Array:
    """The Gumbel noise of token `number` of each row, float32 [n, V]; keys [n]."""

    def row(key: Array) -> Array:
        return jax.random.gumbel(jax.random.fold_in(key, number), (vocabulary,), jnp.float32)

    return jax.vmap(row)(keys)


def chosen_log_probs(scores: Array, ids: Array) -> Array:
    """log softmax(scores)[id], float32 [...], for scores float32 [..., V] and ids int32 [...].

    The score of the id is taken by a masked sum: a gather would bring all parts of a vocabulary
    together that is split over devices.
    """
    here = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1) == ids[..., None]
    chosen = jnp.where(here, scores, 0.0).sum(axis=-1)
    return chosen - jax.nn.logsumexp(scores, axis=-1)


def _draw(
    logits: Array, number: Array, *, keys: Array, temperature: float, top_p: float
) -> tuple[Array, Array]:
    """Tokens int32 [n] from logits [n, V], and their log-probs float32 [n]."""
    scores = logits / temperature if temperature else logits
    noisy = scores
    if temperature:
        scores = _nucleus(scores, top_p) if top_p < 1.0 else scores
        noisy = scores + token_noise(keys, number, logits.shape[-1])
    drawn = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    return drawn, chosen_log_probs(scores, drawn)


def _nucleus(scores: Array, top_p: float) -> Array:
    """Scores [n, V] with -inf for tokens that are less likely than a share top_p of all."""
    order = jnp.argsort(-scores, axis=-1)
    ranked = jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), order, axis=-1)
    likelier = jnp.cumsum(ranked, axis=-1) - ranked
    kept = jnp.put_along_axis(
        jnp.zeros(scores.shape, bool), order, likelier < top_p, axis=-1, inplace=False
    )
    return jnp.where(kept, scores, -jnp.inf)


def _write(array: Array, column: Array, number: Array) -> Array:
    """Put a column [n] at a place of an array [n, t]."""
    return jax.lax.dynamic_update_slice_in_dim(array, column[:, None], number, axis=1)


def _is_in(ids: Array, ends: tuple[int, ...]) -> Array:
    """Which ids are among the ends, bool [n]; there may be none."""
    return (ids[:, None] == jnp.asarray(ends, jnp.int32)).any(axis=1)
