"""The compiled programs of the stage that trains the rewriter."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from realgen_jax.models.language import LanguageModel
from realgen_jax.models.model import Model, decode_rows, sample_rows
from realgen_jax.objectives.token_grpo import TokenBatch
from realgen_jax.rewriter.generate import generate
from realgen_jax.rollout import compiler_options, decoder_options
from realgen_jax.sharding import replicated
from realgen_jax.training.programs import Recipe, abstract_state
from realgen_jax.update import TrainState, update


@dataclass(frozen=True)
class RewriterPrograms:
    """The jitted calls of a run, each traced once.

    rewrite(language model, trainable, ids, mask, keys) -> Tokens, finite bool []
    answer: the same with the likeliest token each time
    flips(language model, trainable, tokens, keys) -> float32 []
    reference, recompute: (language model[, trainable], batch) -> batch
    update(language model, state, batch) -> state, metrics; the state is donated
    draw(image model, frozen, cond, key, ids int32 [n]) -> pictures uint8 [n, 3, H, W], finite []
    evaluate(image model, frozen, cond, key, ids int32 [n]) -> pictures uint8 [n, 3, H, W]
    """

    rewrite: Callable
    answer: Callable
    flips: Callable
    reference: Callable
    recompute: Callable
    update: Callable
    draw: Callable
    evaluate: Callable


def make_rewriter_programs(
    recipe: Recipe, language: LanguageModel, model: Model, ends: tuple[int, ...], pad: int
) -> RewriterPrograms:
    """Return the programs of a recipe; both models may be abstract.

    ends, pad: token ids. Nothing is compiled before the first call.
    """
    settings = recipe.config.rewriter
    evaluation = recipe.config.evaluate.sample
    objective = recipe.objective
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(recipe, language))

    def update_call(
        model: LanguageModel, state: TrainState, batch: TokenBatch
    ) -> tuple[TrainState, Any]:
        return update(recipe.objective, recipe.optimizer, recipe.ema, model, state, batch)

    def reference_call(model: LanguageModel, batch: TokenBatch) -> TokenBatch:
        """One microbatch after the other."""
        rows = jax.lax.map(partial(objective.log_probs, model, None), batch.tokens)
        return replace(batch, reference=rows)

    def recompute_call(model: LanguageModel, trainable: Any, batch: TokenBatch) -> TokenBatch:
        return objective.recompute_old(model, trainable, batch)

    def flips_call(model: LanguageModel, trainable: Any, tokens: Any, keys: Array) -> Array:
        flipped = objective.flips(model, trainable, tokens, keys)
        return flipped.sum() / jnp.maximum(tokens.completion.sum(), 1)

    def draw(model: Model, frozen: Any, cond: Any, key: Array, ids: Array) -> tuple[Array, Array]:
        tokens = sample_rows(model, frozen, cond, key, ids, recipe.config.sample.num_steps, "euler")
        return decode_rows(model, tokens), jnp.isfinite(tokens).all()

    dtype, mesh = language.config.dtype, language.mesh
    jit = partial(jax.jit, compiler_options=compiler_options(dtype, mesh))
    decode = partial(jax.jit, compiler_options=decoder_options(dtype, mesh))
    rewrite = partial(generate, steps=settings.max_new_tokens, ends=ends, pad=pad)
    return RewriterPrograms(
        rewrite=decode(partial(rewrite, temperature=settings.temperature)),
        answer=decode(partial(rewrite, temperature=0.0)),
        flips=jit(flips_call),
        reference=jit(reference_call),
        recompute=jit(recompute_call),
        update=jit(update_call, donate_argnums=1, out_shardings=(shardings, replicated(mesh))),
        draw=jax.jit(
            draw,
            compiler_options=compiler_options(model.config.dtype, model.mesh, model.offload),
        ),
        evaluate=model.sampler(evaluation.num_steps, evaluation.solver),
    )
