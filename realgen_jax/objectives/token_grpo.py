"""Group-relative policy optimisation of a language model, on the tokens that it drew.

Sources: GRPO (arXiv 2402.03300), its clip and token mean (DAPO, arXiv 2503.14476), GSPO
(arXiv 2507.18071), the constant divisor (Dr. GRPO, arXiv 2503.20783).

Functions here do not depend on a model. Their policy has the methods `hidden` and `logits` of
models/language.py. Shapes: n rows, l prompt tokens, t new tokens, V tokens in the vocabulary.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from realgen_jax.rewriter.generate import Tokens, chosen_log_probs, token_noise
from realgen_jax.update import Metrics, TrainState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenBatch:
    """The rows of one optimizer step; every leaf but `denominators` is [microbatches, n, ...].

    advantages: float32 [microbatches, n]. reference: log-probs of the base model, float32
    [microbatches, n, t], or None without KL. old: log-probs before the first step on these rows,
    likewise, or None if this is the first one. denominators: `TokenGrpo.denominators`, float32 [].
    """

    tokens: Tokens
    advantages: Array
    reference: Array | None
    old: Array | None
    denominators: Array


# -- The log-ratio of a token, from d = log-prob - old log-prob [n, t], 0 outside the mask.


def token_log_ratio(difference: Array, mask: Array) -> Array:
    """GRPO: that of the token itself."""
    return difference


def sequence_log_ratio(difference: Array, mask: Array) -> Array:
    """GSPO: the mean over the row's tokens, for all of them."""
    lengths = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    return jnp.broadcast_to(difference.sum(axis=1, keepdims=True) / lengths, mask.shape)


LOSSES = {"grpo": token_log_ratio, "gspo": sequence_log_ratio}


# -- Weights of the tokens [n, t] in a sum that is then divided by `denominators`.


def _equal(mask: Array) -> Array:
    return mask.astype(jnp.float32)


def _by_length(mask: Array) -> Array:
    return mask / jnp.maximum(mask.sum(axis=1, keepdims=True), 1)


# Name -> weights of the tokens, and the divisor from the mask of all rows, bool [rows, t].
AGGREGATES = {
    "token": (_equal, lambda mask: mask.sum()),  # mean over all tokens
    "sequence": (_by_length, lambda mask: len(mask)),  # mean over rows of the mean over tokens
    "constant": (_equal, lambda mask: mask.size),  # sum over tokens by rows x max_new_tokens
}


@dataclass(frozen=True)
class TokenGrpo:
    """The clipped policy ratio of every token, and a KL to the base model.

    loss: a key of LOSSES, aggregate: of AGGREGATES. clip: (low, high), the ratio is clipped to
    [1 - low, 1 + high]. adv_clip_max: largest absolute advantage. beta: weight of the KL.
    importance_cap: largest weight of a token for the difference between sampler and replay; 0: all
    weights are 1. temperature: that of sampling. logit_chunk: tokens of a row whose logits exist at
    a time.

    Raises ValueError for unknown names and numbers that make no loss.
    """

    loss: str = "grpo"
    aggregate: str = "token"
    clip: tuple[float, float] = (0.2, 0.28)
    adv_clip_max: float = 5.0
    beta: float = 0.0
    importance_cap: float = 0.0
    temperature: float = 1.0
    logit_chunk: int = 64

    keeps_old = False
    largest_metrics = ("ratio_deviation", "gap_max")

    def __post_init__(self):
        for name, table in (("loss", LOSSES), ("aggregate", AGGREGATES)):
            value = getattr(self, name)
            if value not in table:
                raise ValueError(
                    f"config.rewriter.{name} is {value!r}; choose one of {', '.join(table)}"
                )
        if len(self.clip) != 2 or not (0 < self.clip[0] < 1 and self.clip[1] > 0):
            raise ValueError(
                f"config.rewriter.clip_range is {self.clip}; expected (low, high), low between 0 "
                "and 1 and high above 0"
            )
        if not (self.importance_cap == 0 or self.importance_cap >= 1):
            raise ValueError(
                f"config.rewriter.importance_cap is {self.importance_cap:g}; expected 1 or more, "
                "or 0 for weights of 1"
            )
        for name, value in (("temperature", self.temperature), ("logit_chunk", self.logit_chunk)):
            if not value > 0:
                raise ValueError(f"config.rewriter.{name} is {value:g}; expected above 0")

    def denominators(self, completion: Any) -> np.float32:
        """What the losses' sums are divided by, from the `completion` of the whole optimizer step.

        completion: bool [..., n, t], the rows of all microbatches, devices and hosts. A split of
        the rows into microbatches then does not change the gradient.
        """
        mask = np.asarray(completion).reshape(-1, completion.shape[-1])
        _, count = AGGREGATES[self.aggregate]
        return np.float32(count(mask))

    def log_probs(self, policy: Any, trainable: Any, tokens: Tokens) -> Array:
        """Log-probs of the drawn tokens by the update's forward pass, float32 [n, t].

        0 outside the completion. trainable None: those of the base model.
        """
        logp, _ = self._replay(policy, trainable, tokens)
        return logp

    def gradient(self, policy: Any, state: TrainState, batch: TokenBatch) -> tuple[Any, Metrics]:
        """The gradient of a batch, float32 arrays like `state.trainable`, and metrics."""
        grads, metrics, _ = self._accumulate(policy, state.trainable, batch)
        return grads, metrics

    def after_epoch(self, state: TrainState) -> TrainState:
        return state

    @jax.named_scope("recompute")
    def recompute_old(self, policy: Any, trainable: Any, batch: TokenBatch) -> TokenBatch:
        """Return the batch with `old` from the update's program, on weights before the first step.

        The gradient is computed as well: without it the compiler would build another program, whose
        log-probs might differ in the last bit. For several optimizer steps an epoch.
        """
        first = replace(batch, old=batch.tokens.logp)
        grads, _, logp = self._accumulate(policy, trainable, first)
        logp, _ = jax.lax.optimization_barrier((logp, grads))
        return replace(batch, old=logp)

    def flips(self, policy: Any, trainable: Any, tokens: Tokens, keys: Array) -> Array:
        """Which tokens the replay would not have drawn with the sampler's noise, bool [n, t].

        keys: those that `generate` had, one a row. It must have drawn without top_p.
        """

        def chunk(hidden: Array, ids: Array, first: Array) -> Array:
            scores = policy.logits(trainable, hidden) / self.temperature
            numbers = first + jnp.arange(ids.shape[1])
            noise = jax.vmap(lambda number: token_noise(keys, number, scores.shape[-1]))(numbers)
            return jnp.argmax(scores + jnp.swapaxes(noise, 0, 1), axis=-1) != ids

        return self._in_chunks(chunk, policy, trainable, tokens) & tokens.completion

    # -- Replay

    def _replay(self, policy: Any, trainable: Any, tokens: Tokens) -> tuple[Array, Array]:
        """Log-probs of the drawn tokens and entropies of their distributions, each float32 [n, t].

        Both are 0 outside the completion. The entropies have no gradient.
        """

        def chunk(hidden: Array, ids: Array, first: Array) -> tuple[Array, Array]:
            scores = policy.logits(trainable, hidden) / self.temperature
            logs = jax.lax.stop_gradient(jax.nn.log_softmax(scores, axis=-1))
            return chosen_log_probs(scores, ids), -(jnp.exp(logs) * logs).sum(axis=-1)

        logp, entropy = self._in_chunks(chunk, policy, trainable, tokens)
        logp = jax.lax.optimization_barrier(logp)
        mask = tokens.completion
        return jnp.where(mask, logp, 0.0), jnp.where(mask, entropy, 0.0)

    def _in_chunks(self, chunk: Any, policy: Any, trainable: Any, tokens: Tokens) -> Any:
        """Apply chunk(hidden [n, c, D], ids [n, c], number of the first) to all new tokens.

        hidden is what each token was drawn from. Leaves [n, c] of the results become [n, t]. The
        logits of a chunk are computed again in the backward pass, so that no others exist.
        """
        hidden = policy.hidden(trainable, tokens.ids, tokens.mask)
        hidden = hidden[:, tokens.length - 1 : -1]
        ids = tokens.new_ids
        n, count = ids.shape

        # Whole chunks, on a leading axis.
        size = min(self.logit_chunk, count)
        chunks = -(-count // size)
        room = chunks * size - count

        def split(array: Array) -> Array:
            array = jnp.pad(array, ((0, 0), (0, room), *((0, 0),) * (array.ndim - 2)))
            return jnp.moveaxis(array.reshape(n, chunks, size, *array.shape[2:]), 1, 0)

        def join(array: Array) -> Array:
            return jnp.moveaxis(array, 0, 1).reshape(n, chunks * size)[:, :count]

        # A loop of one iteration is replaced by its body (see nn/stack.py).
        body = jax.checkpoint(chunk, prevent_cse=chunks == 1)
        rows = (split(hidden), split(ids), size * jnp.arange(chunks))
        _, results = jax.lax.scan(lambda _, row: (None, body(*row)), None, rows)
        return jax.tree.map(join, results)

    # -- Gradient

    def _accumulate(
        self, policy: Any, trainable: Any, batch: TokenBatch
    ) -> tuple[Any, Metrics, Array]:
        """Gradient over all microbatches, metrics, and log-probs [microbatches, n, t]."""

        def microbatch(grads: Any, rows: TokenBatch) -> tuple[Any, tuple[Any, ...]]:
            loss = partial(self._loss, policy, rows=rows)
            grad, (sums, largest, logp) = jax.grad(loss, has_aux=True)(trainable)
            return jax.tree.map(jnp.add, grads, grad), (sums, largest, logp)

        # Every microbatch has the whole step's denominators.
        count = batch.advantages.shape[0]
        rows = replace(batch, denominators=jnp.full(count, batch.denominators, jnp.float32))

        # Sum over microbatches in float32.
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trainable)
        grads, (sums, largest, logp) = jax.lax.scan(microbatch, zeros, rows)
        sums = jax.tree.map(jnp.sum, sums)
        total = jnp.maximum(batch.tokens.completion.sum(), 1)
        metrics = dict(sums["losses"])
        metrics |= {name: value / total for name, value in sums["tokens"].items()}
        metrics |= {name: jnp.max(value) for name, value in largest.items()}
        return grads, metrics, logp

    def _loss(
        self, policy: Any, trainable: Any, rows: TokenBatch
    ) -> tuple[Array, tuple[dict[str, Metrics], Metrics, Array]]:
        """Loss of a microbatch, its share of the step's sums and maxima, and log-probs [n, t].

        sums: {"losses": shares of the losses, "tokens": sums over tokens, to be averaged}.
        """
        tokens = rows.tokens
        mask = tokens.completion
        with jax.named_scope("policy"):
            logp, entropy = self._replay(policy, trainable, tokens)
        old = jax.lax.stop_gradient(logp) if rows.old is None else rows.old

        # The clipped ratio, with weights for the difference between sampler and replay.
        gap = jnp.where(mask, old - tokens.logp, 0.0)
        difference = jnp.where(mask, logp - old, 0.0)
        ratio = jnp.exp(LOSSES[self.loss](difference, mask))
        low, high = self.clip
        advantages = jnp.clip(rows.advantages, -self.adv_clip_max, self.adv_clip_max)[:, None]
        plain = ratio * advantages
        bounded = jnp.clip(ratio, 1.0 - low, 1.0 + high) * advantages
        weights = jnp.minimum(jnp.exp(gap), self.importance_cap) if self.importance_cap else 1.0
        losses = {"policy_loss": self._aggregate(-weights * jnp.minimum(plain, bounded), rows)}
        loss = losses["policy_loss"]

        # The KL to the base model, by an estimate that is never negative (k3).
        if rows.reference is not None:
            shift = jnp.where(mask, rows.reference - logp, 0.0)
            losses["kl"] = self._aggregate(jnp.exp(shift) - shift - 1.0, rows)
            loss = loss + self.beta * losses["kl"]

        def total(values: Array) -> Array:
            return jnp.where(mask, values, 0.0).sum()

        sums = {
            "losses": {**losses, "loss": loss},
            "tokens": {
                "clipfrac": total(plain > bounded),
                "entropy": total(entropy),
                "gap_mean": total(jnp.abs(gap)),
                "gap_clipped": total(self._capped(gap)),
            },
        }
        largest = {
            "ratio_deviation": jnp.where(mask, jnp.abs(ratio - 1.0), 0.0).max(),
            "gap_max": jnp.abs(gap).max(),
        }
        return loss, (sums, largest, logp)

    def _aggregate(self, values: Array, rows: TokenBatch) -> Array:
        """The rows' share of an aggregate over the whole step, float32 []; values [n, t]."""
        weigh, _ = AGGREGATES[self.aggregate]
        mask = rows.tokens.completion
        return (weigh(mask) * jnp.where(mask, values, 0.0)).sum() / rows.denominators

    def _capped(self, gap: Array) -> Array:
        """Which tokens' weights were cut to the cap, bool [n, t]."""
        if not self.importance_cap:
            return jnp.zeros(gap.shape, bool)
        return jnp.exp(gap) > self.importance_cap


def make_token_grpo(rewriter: Any, train: Any) -> TokenGrpo:
    """Return the objective of config.rewriter and config.train.

    Raises ValueError for unknown names and numbers that make no loss.
    """
    return TokenGrpo(
        loss=rewriter.loss,
        aggregate=rewriter.aggregate,
        clip=tuple(rewriter.clip_range),
        adv_clip_max=train.adv_clip_max,
        beta=train.beta,
        importance_cap=rewriter.importance_cap,
        temperature=rewriter.temperature,
        logit_chunk=rewriter.logit_chunk,
    )
