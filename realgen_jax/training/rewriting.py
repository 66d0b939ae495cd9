"""The stage that trains the rewriter: a language model whose rewrites the frozen image model draws.

An epoch has P prompts, N rewrites of each and M pictures of each rewrite, in this order. Pictures
are scored against the user's prompt, and the rewrites of a prompt are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array

from realgen_jax.hosts import fetch, process_index, put
from realgen_jax.objectives.token_grpo import TokenBatch
from realgen_jax.profiling.step_traces import phase
from realgen_jax.rewriter.embeddings import FreshTexts
from realgen_jax.rewriter.files import RewriterSettings, model_digest, write_rewriter
from realgen_jax.rewriter.generate import Tokens
from realgen_jax.rewriter.records import keep_records
from realgen_jax.rewriter.texts import (
    TextSettings,
    drawn,
    statistics,
    text_scores,
    text_settings,
)
from realgen_jax.rewriter.writer import Rewrite, read_answers
from realgen_jax.sharding import batch_sharding, local_slots
from realgen_jax.training.log import NoLog, RunLog
from realgen_jax.training.preemption import Preemption
from realgen_jax.training.rewriter_programs import RewriterPrograms, make_rewriter_programs
from realgen_jax.training.run import EVALUATION, TRAINING, Run
from realgen_jax.training.saving import stop_if_not_finite
from realgen_jax.training.scoring import BatchScores, scores_of_all, submit, weighted_mean
from realgen_jax.training.stage import (
    Call,
    Drawn,
    Sampled,
    epoch_rewards,
    optimizer_steps,
    wait_for,
)
from realgen_jax.update import TrainState

SHOWN = 16  # prompts of an evaluation whose pictures are kept beside their rewrites
UNUSABLE_EPOCHS = 3  # so many epochs in a row above config.rewriter.max_unusable end the run

ADVICE = (
    "a rewrite must end before config.rewriter.max_new_tokens, be one paragraph of printable text, "
    "and fit into config.prompts.max_tokens: see config.rewriter.system and .temperature"
)


class RewriteError(RuntimeError):
    """The language model's rewrites cannot be drawn. The message shows some and gives advice."""


@dataclass(frozen=True)
class Rewrites:
    """Rewrites of prompts, in the order of `prompts`, which has each prompt once per rewrite.

    texts: what the language model wrote. usable: bool [n], whether it can be drawn. tokens: leaves
    on the mesh. keys: of the sampler's noise. finite: bool [], whether all logits are finite.
    """

    prompts: Sequence[str]
    texts: Sequence[str]
    usable: np.ndarray
    tokens: Tokens
    keys: Array
    finite: Array

    @property
    def drawn(self) -> list[str]:
        """The texts to draw: the prompt itself where the rewrite is not usable."""
        return drawn(self.prompts, self.texts, self.usable)


@dataclass(frozen=True)
class RewriterStage:
    """config.stage rewriter, a Stage (stage.py)."""

    run: Run
    programs: RewriterPrograms
    texts: TextSettings

    output = "rewriter"

    @property
    def prompts(self) -> int:
        return self.run.config.rewriter.prompts_per_epoch

    @property
    def evaluate(self) -> Any:
        return self.programs.evaluate

    def sample(
        self,
        state: TrainState,
        epoch: int,
        rows: np.ndarray,
        seeds: Sequence[int],
        preemption: Preemption,
        seconds: dict[str, float],
    ) -> Sampled | None:
        run = self.run
        settings = run.config.rewriter
        text_key, picture_key = jax.random.split(jax.random.fold_in(run.key(TRAINING), epoch))

        # Rewrite: the noise of rewrite n of prompt p has a key of its own.
        with phase("rewrite", seconds):
            size = settings.rewrites_per_prompt
            prompts = [run.prompts[row] for row in rows for _ in range(size)]
            rewrites = self._rewrite(
                state.trainable, prompts, rewrite_keys(text_key, len(rows), size)
            )
        self._stop_if_not_finite(epoch, "rollout", rewrites)
        self._stop_if_none_usable(epoch, rewrites)

        # Draw and score; the text encoders and the rewards work on other calls meanwhile.
        with phase("sample", seconds):
            calls = self._draw(rewrites, picture_key, seeds)
            interrupted = wait_for(calls, preemption)
        if interrupted:
            return None
        return Sampled(calls, rewrites)

    def groups(self, sampled: Sampled, scores: BatchScores) -> dict[str, np.ndarray]:
        """A rewrite's score is the mean of its pictures'; the text rewards judge the rewrite."""
        groups = {name: values.mean(axis=-1) for name, values in self._by_rewrite(scores).items()}
        for name, values in self._text_scores(sampled.own).items():
            groups[name] = values.reshape(self.prompts, -1)
        return groups

    def columns(
        self,
        state: TrainState,
        epoch: int,
        sampled: Sampled,
        reward: np.ndarray,
        log: RunLog | NoLog,
        history: dict[str, Any],
        first: bool,
    ) -> dict[str, float]:
        rewrites = sampled.own
        settings = self.run.config.rewriter
        unusable = 1.0 - float(rewrites.usable.mean())
        columns = {"text/unusable": unusable}
        columns |= self._statistics(rewrites, settings.rewrites_per_prompt)
        columns["gap_flips"] = self._flips(state, rewrites)

        # Too many that cannot be drawn, for several epochs in a row, end the run.
        above = history.get("unusable_epochs", 0) + 1 if unusable > settings.max_unusable else 0
        history["unusable_epochs"] = above
        if above >= UNUSABLE_EPOCHS:
            raise RewriteError(
                f"for {above} epochs more than {settings.max_unusable:.0%} of the rewrites could "
                f"not be drawn (config.rewriter.max_unusable), now {unusable:.0%}; {ADVICE}; "
                f"{examples(rewrites)}"
            )
        return columns

    def update(
        self,
        state: TrainState,
        sampled: Sampled,
        advantages: np.ndarray,
        kl_weights: np.ndarray | None,
        epoch: int,
    ) -> tuple[TrainState, list[dict[str, np.ndarray]]]:
        train = self.run.config.train
        model = self.run.rewriter.model
        batches = self._batches(sampled.own.tokens, advantages)

        # What the update compares with: the base model, and the policy as it is now.
        several = len(batches) * train.num_inner_epochs > 1
        prepared = []
        for batch in batches:
            if train.beta > 0:
                batch = self.programs.reference(model, batch)
            if several or train.recompute_old:
                batch = self.programs.recompute(model, state.trainable, batch)
            prepared.append(batch)

        return optimizer_steps(self.run, self.programs.update, model, state, prepared, epoch)

    def draw(self, trainable: Any, prompts: Sequence[str]) -> Drawn:
        """Evaluations draw the likeliest rewrite of each prompt."""
        different = list(dict.fromkeys(prompts))
        rewrites = self._rewrite(trainable, different, None)
        rows = np.array([different.index(prompt) for prompt in prompts])
        texts = [rewrites.drawn[row] for row in rows]
        scores = {name: values[rows] for name, values in self._text_scores(rewrites).items()}
        details = self._statistics(rewrites, 1)
        details["text/unusable"] = 1.0 - float(rewrites.usable.mean())
        cache = self._embedded(texts)
        return Drawn(texts, cache, self.run.rewriter.frozen, scores, details, own=rewrites)

    def after_evaluation(self, epoch: int, trainable: Any, evaluation: Any) -> dict[str, float]:
        """Record the rewrites, and measure whether rewrites differ by more than their pictures."""
        self._stop_if_not_finite(epoch, "evaluation", evaluation.drawn.own)
        self._record(epoch, evaluation)
        return self._signal(epoch, trainable)

    def export(self, folder: Path, trainable: Any) -> None:
        model = self.run.rewriter.model
        model.trainable.save(model, folder, trainable)
        if process_index() == 0:
            write_rewriter(folder, exported_settings(self.run.config.rewriter))

    # -- Rewrites

    def _rewrite(self, trainable: Any, prompts: Sequence[str], keys: Array | None) -> Rewrites:
        """Rewrite prompts; without keys, each token is the likeliest.

        Greedy rewrites may be any number; they run in calls of an epoch's rewrites.
        """
        run = self.run
        settings = run.config.rewriter
        rewriter = run.rewriter
        size = settings.prompts_per_epoch * settings.rewrites_per_prompt
        program = self.programs.answer if keys is None else self.programs.rewrite
        ids, mask = rewriter.tokenizer.encode(prompts, settings.max_prompt_tokens)

        parts = []
        finite = []
        for start in range(0, len(prompts), size):
            # The last call is filled up with prompts from the start.
            rows = np.arange(start, start + size) % len(prompts)
            sharding = batch_sharding(rewriter.model.mesh)
            inputs = [put(array[rows], sharding) for array in (ids, mask)]
            noise = rewrite_keys(run.key(EVALUATION), size, 1) if keys is None else keys
            tokens, is_finite = program(rewriter.model, trainable, *inputs, noise)
            parts.append(tokens)
            finite.append(is_finite)

        window = rewriter.encoders.window
        rewrites: list[Rewrite] = []
        for tokens in parts:
            count = min(size, len(prompts) - len(rewrites))
            rewrites += read_answers(
                tokens, count, rewriter.tokenizer, self.texts.answer_tag, window.fits
            )
        texts = [rewrite.text for rewrite in rewrites]
        good = np.array([rewrite.usable for rewrite in rewrites])
        return Rewrites(prompts, texts, good, parts[0], keys, np.all(finite))

    def _stop_if_not_finite(self, epoch: int, phase: str, rewrites: Rewrites) -> None:
        logits = 0.0 if rewrites.finite else float("nan")
        stop_if_not_finite({"logits": logits}, epoch, f"{phase} (language model)", self.run)

    def _stop_if_none_usable(self, epoch: int, rewrites: Rewrites) -> None:
        if not rewrites.usable.any():
            raise RewriteError(
                f"epoch {epoch}: no rewrite can be drawn; {ADVICE}; {examples(rewrites)}"
            )

    def _text_scores(self, rewrites: Rewrites) -> dict[str, np.ndarray]:
        """{text reward: float32 [n]} of those in config.rewriter.text_rewards, in order."""
        return text_scores(self.texts, rewrites.prompts, rewrites.texts, rewrites.usable)

    def _statistics(self, rewrites: Rewrites, group: int) -> dict[str, float]:
        figures = statistics(self.texts, rewrites.prompts, rewrites.texts, group)
        return {f"text/{name}": value for name, value in figures.items()}

    # -- Pictures

    def _draw(self, rewrites: Rewrites, key: Array, seeds: Sequence[int]) -> list[Call]:
        """Draw and score an epoch's pictures; all texts are encoded in the background, in order."""
        run = self.run
        layout = run.recipe.layout
        images = run.config.rewriter.images_per_rewrite
        rows = np.arange(layout.calls * layout.images).reshape(layout.calls, -1)
        texts = [[rewrites.drawn[row // images] for row in call] for call in rows]
        pending = [self._encode(call) for call in texts]

        calls = []
        for number, call in enumerate(rows):
            prompts = [rewrites.prompts[row // images] for row in call]
            pictures, finite = self.programs.draw(
                run.model,
                run.rewriter.frozen,
                run.cond(texts[number], run.config.sample.guidance_scale, pending[number]()),
                key,
                put(self._noise_numbers(call), batch_sharding(run.model.mesh)),
            )
            names = epoch_rewards(run.config.reward)
            scores = submit(run.scorer, pictures, prompts, names, seeds[number], layout.group)
            calls.append(Call(scores, finite))
        return calls

    def _noise_numbers(self, pictures: np.ndarray) -> np.ndarray:
        """The numbers of the pictures' noise; with same_latent, all rewrites of a prompt share it.

        pictures: int [n], numbered by prompt, rewrite and picture.
        """
        settings = self.run.config.rewriter
        if not self.run.config.sample.same_latent:
            return pictures.astype(np.int32)
        return common_numbers(pictures, settings.rewrites_per_prompt, settings.images_per_rewrite)

    def _encode(self, texts: Sequence[str]) -> Any:
        """Start encoding this process's part of a call; returns a function that waits for it."""
        rewriter = self.run.rewriter
        own = [texts[slot] for slot in local_slots(self.run.model.mesh, len(texts))]
        pending = rewriter.encoders.encode(own)
        return lambda: FreshTexts(self.run.cache, own, pending.result())

    def _embedded(self, texts: Sequence[str]) -> FreshTexts:
        """The embeddings of any number of texts, in this process."""
        different = list(dict.fromkeys(texts))
        arrays = self.run.rewriter.encoders.encode(different).result()
        return FreshTexts(self.run.cache, different, arrays)

    # -- Figures

    def _by_rewrite(self, scores: BatchScores) -> dict[str, np.ndarray]:
        """{reward: float32 [prompts, rewrites, pictures]}."""
        settings = self.run.config.rewriter
        shape = (-1, settings.rewrites_per_prompt, settings.images_per_rewrite)
        return {name: values.reshape(shape) for name, values in scores.rewards.items()}

    def _flips(self, state: TrainState, rewrites: Rewrites) -> float:
        """Share of tokens that replay would not have drawn with the sampler's noise."""
        model = self.run.rewriter.model
        return float(self.programs.flips(model, state.trainable, rewrites.tokens, rewrites.keys))

    def _signal(self, epoch: int, trainable: Any) -> dict[str, float]:
        """{"signal/rewrites": share of the reward's variance that is between rewrites}.

        Of one call: N rewrites with two pictures each, of as many test prompts as fit. Absent if
        not even one prompt fits. Rewrites and pictures are kept for the report's page.
        """
        run = self.run
        layout = run.recipe.layout
        size = run.config.rewriter.rewrites_per_prompt
        count = layout.images // (2 * size)
        if count == 0 or layout.images % (2 * size) or self.prompts < count:
            return {}

        # As many prompts as an epoch has, so that the program is the same; some are drawn.
        key = jax.random.fold_in(run.key(EVALUATION), 1)
        wanted = [run.test_prompts[row % len(run.test_prompts)] for row in range(self.prompts)]
        prompts = [prompt for prompt in wanted for _ in range(size)]
        rewrites = self._rewrite(trainable, prompts, rewrite_keys(key, self.prompts, size))
        rows = np.arange(layout.images)
        texts = [rewrites.drawn[row // 2] for row in rows]
        numbers = common_numbers(rows, size, 2)
        pictures, _ = self.programs.draw(
            run.model,
            run.rewriter.frozen,
            run.cond(texts, run.config.sample.guidance_scale, self._encode(texts)()),
            key,
            put(numbers, batch_sharding(run.model.mesh)),
        )
        asked = [prompts[row // 2] for row in rows]
        batch = submit(run.scorer, pictures, asked, list(run.config.reward.fn), group=2 * size)
        scores = scores_of_all([batch], layout.images).rewards
        reward = weighted_mean(scores, run.config.reward.fn).reshape(count, size, 2)
        drawn_pictures = fetch(pictures)[::2]
        if process_index() == 0:
            shown = slice(0, count * size)
            keep_records(
                run.folder,
                epoch,
                "train",
                prompts[shown],
                rewrites.texts[shown],
                rewrites.usable[shown],
                reward.mean(axis=2).reshape(-1),
                drawn_pictures,
            )
        share = signal_share(reward)
        return {} if share is None else {"signal/rewrites": share}

    def _record(self, epoch: int, evaluation: Any) -> None:
        """Keep an evaluation's rewrites and the first pictures (rewriter/records.py)."""
        if process_index():
            return
        rewrites = evaluation.drawn.own
        first = [evaluation.prompts.index(prompt) for prompt in rewrites.prompts]
        copies = self.run.config.sample.test_images_per_prompt
        rewards = evaluation.scores["reward"].reshape(-1, copies).mean(axis=1)
        keep_records(
            self.run.folder,
            epoch,
            "eval",
            rewrites.prompts,
            rewrites.texts,
            rewrites.usable,
            rewards[np.array(first) // copies],
            evaluation.pictures[first[:SHOWN]],
        )

    # -- Update

    def _batches(self, tokens: Tokens, advantages: np.ndarray) -> list[TokenBatch]:
        """The microbatches of each optimizer step, stacked."""
        config = self.run.config
        mesh = self.run.rewriter.model.mesh
        rows = config.rewriter.microbatch
        steps = advantages.size // (rows * config.train.gradient_accumulation_steps)
        host = jax.tree.map(fetch, tokens)

        def split(leaf: np.ndarray) -> np.ndarray:
            return leaf.reshape(steps, -1, rows, *leaf.shape[1:])

        host = jax.tree.map(split, host)
        parts = split(advantages.reshape(-1))
        sharding = batch_sharding(mesh, axis=1)
        batches = []
        for step in range(steps):
            own = jax.tree.map(lambda leaf, step=step: leaf[step], host)
            batches.append(
                TokenBatch(
                    tokens=jax.tree.map(lambda leaf: put(leaf, sharding), own),
                    advantages=put(parts[step], sharding),
                    reference=None,
                    old=None,
                    denominators=self.run.recipe.objective.denominators(own.completion),
                )
            )
        return batches


def exported_settings(rewriter: Any) -> RewriterSettings:
    """What a trained rewriter is used with later; rewriter: config.rewriter."""
    return RewriterSettings(
        base=str(Path(rewriter.path).absolute()),
        base_digest=model_digest(rewriter.path),
        system=rewriter.system,
        thinking=rewriter.thinking,
        answer_tag=rewriter.answer_tag,
        max_prompt_tokens=rewriter.max_prompt_tokens,
        max_new_tokens=rewriter.max_new_tokens,
        temperature=rewriter.temperature,
        min_words=rewriter.min_words,
        max_words=rewriter.max_words,
        dtype=rewriter.dtype,
    )


def examples(rewrites: Rewrites, count: int = 3) -> str:
    """The first rewrites that cannot be drawn, for an error message."""
    rows = np.flatnonzero(~rewrites.usable)[:count]
    return "for example " + ", ".join(repr(rewrites.texts[row][:200]) for row in rows)


def rewrite_keys(key: Array, prompts: int, rewrites: int) -> Array:
    """A key for each rewrite, [prompts x rewrites], folded from prompt and rewrite number."""
    return _fold_all(key, np.arange(prompts), np.arange(rewrites))


def common_numbers(pictures: np.ndarray, rewrites: int, images: int) -> np.ndarray:
    """Numbers of noise that all rewrites of a prompt share, int32 [n].

    pictures: int [n], numbered by prompt, rewrite and picture.
    """
    prompt = pictures // (rewrites * images)
    return (prompt * images + pictures % images).astype(np.int32)


@jax.jit
def _fold_all(key: Array, prompts: Array, rewrites: Array) -> Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, prompts)
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, rewrites).reshape(-1)


def signal_share(rewards: np.ndarray) -> float | None:
    """Variance between rewrites over that of single pictures, from [prompts, rewrites, pictures].

    Both are estimated without bias within each prompt (one-way analysis of variance), and the first
    is at least 0. None if the rewards do not differ.
    """
    pictures = rewards.shape[-1]
    within = rewards.var(axis=-1, ddof=1).mean()
    of_means = rewards.mean(axis=-1).var(axis=-1, ddof=1).mean()
    between = max(of_means - within / pictures, 0.0)
    total = between + within
    return float(between / total) if total > 0 else None


def make_rewriting(run: Run) -> RewriterStage:
    """Return the stage of a run. Nothing is compiled yet."""
    rewriter = run.rewriter
    tokenizer = rewriter.tokenizer
    programs = make_rewriter_programs(
        run.recipe, rewriter.model, run.model, tokenizer.ends, tokenizer.pad
    )
    return RewriterStage(run, programs, text_settings(run.config.rewriter))
