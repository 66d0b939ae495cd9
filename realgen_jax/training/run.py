"""The set-up of a run: checks before anything is loaded, and the model, rewards and data."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from realgen_jax.advantages import advantage_problems
from realgen_jax.checkpoint import Checkpoints
from realgen_jax.hosts import process_count, start_devices
from realgen_jax.models.formats import DIFFUSERS, TRANSFORMERS
from realgen_jax.models.guidance import GRADIENTS
from realgen_jax.models.language import (
    LanguageModel,
    abstract_language_model,
    load_language_model,
)
from realgen_jax.models.loading import (
    EVALUATIONS,
    abstract_model,
    load_model,
    missing_model,
    rollout_sizes,
    size_of,
    sizes_on_disk,
    with_size,
)
from realgen_jax.models.model import Model
from realgen_jax.models.trainable import Trainable, make_trainable, with_lora_file
from realgen_jax.rewriter.problems import rewriter_problems
from realgen_jax.rewriter.writer import Tokenizer
from realgen_jax.sharding import abstract_mesh, make_mesh
from realgen_jax.text_cache import TextCache
from realgen_jax.training.kl_gate import gate_problems
from realgen_jax.training.learning import LearningReward
from realgen_jax.training.monitor import monitor_problems, monitored
from realgen_jax.training.programs import Recipe, check_mesh, check_model, first_state, make_recipe
from realgen_jax.training.scoring import Pending, Scorer
from realgen_jax.update import TrainState

# Streams of the run's root key: every random number comes from one of them.
EVALUATION, TRAINING, FIRST_WEIGHTS, LEARNING = range(4)


class Metric(Protocol):
    """A check on a whole set of pictures; lower is better."""

    least: int  # the smallest number of pictures for which it is defined

    def __call__(self, pictures: np.ndarray) -> float:
        """Return its value for uint8 pictures [n, 3, H, W]."""


class TextWindow(Protocol):
    """What an image model reads of a text; reward_bridge.encoders.TextWindow implements it."""

    def fits(self, texts: Sequence[str]) -> Sequence[bool]:
        """Return whether the model reads each text to its end."""


class Encoders(Protocol):
    """The image model's text encoders; reward_bridge.encoders.TextEncoders implements it."""

    window: TextWindow

    def encode(self, texts: Sequence[str]) -> Pending:
        """Encode texts in the background; the result is {array: [n, ...]}, as in a TextCache."""

    def close(self) -> None:
        """Stop encoding."""


@dataclass(frozen=True)
class Rewriter:
    """What config.stage rewriter has besides: the language model, and the ways in and out.

    frozen: adapters of the image model, from config.pretrained.lora, or None.
    """

    model: LanguageModel
    frozen: Any
    tokenizer: Tokenizer
    encoders: Encoders


@dataclass(frozen=True)
class Run:
    """Everything that stays the same from the first epoch to the last.

    digests: {key of the config: digest of what it names}. models, plans: for each size of the
    rollouts' pictures, the model and the objective's rollout plan. evaluated: the model for the
    pictures of evaluations. All models have the same weights in memory. learning: the rewards that
    learn. metrics: those for which an evaluation has enough pictures. scored_prompts,
    scored_test_prompts: the texts by which the prompts' pictures are scored. rewriter: of
    config.stage rewriter.
    """

    config: ConfigDict
    digests: Mapping[str, str]
    folder: Path
    recipe: Recipe
    models: Sequence[Model]
    plans: Sequence[Any]
    evaluated: Model
    cache: TextCache
    prompts: Sequence[str]
    test_prompts: Sequence[str]
    scorer: Scorer
    learning: Mapping[str, LearningReward]
    metrics: Mapping[str, Metric]
    checkpoints: Checkpoints
    scored_prompts: Sequence[str]
    scored_test_prompts: Sequence[str]
    rewriter: Rewriter | None = None

    @property
    def trained_model(self) -> Model | LanguageModel:
        """The model that is trained."""
        return self.rewriter.model if self.rewriter else self.model

    @property
    def model(self) -> Model:
        """The model, where the size of pictures does not matter."""
        return self.models[0]

    def rollout_of(self, epoch: int) -> tuple[Model, Any]:
        """Return the model and the plan of an epoch's rollouts. epoch: counted from 0."""
        number = epoch % len(self.models)
        return self.models[number], self.plans[number]

    @property
    def monitor(self) -> str:
        """What judges the run: "reward", a held-out reward or a metric."""
        return monitored(self.config.reward, list(self.metrics))

    def cond(self, texts: Sequence[str], guidance: float, cache: Any = None) -> Any:
        """The conditioning of these texts, one per slot, on the mesh.

        cache: has their embeddings, as a TextCache; None: the run's own.
        """
        gradient = self.config.train.cfg_gradient or GRADIENTS[0]
        return self.model.cond(cache or self.cache, texts, guidance, gradient)

    def key(self, stream: int) -> jax.Array:
        """The root key of a stream."""
        return jax.random.fold_in(jax.random.key(self.config.seed), stream)


def set_up(
    config: ConfigDict,
    folder: Path,
    *,
    digests: Mapping[str, str],
    cache: TextCache,
    prompts: Sequence[str],
    test_prompts: Sequence[str],
    scorer: Scorer,
    learning: Mapping[str, LearningReward],
    metrics: Mapping[str, Metric],
    scored_prompts: Sequence[str],
    scored_test_prompts: Sequence[str],
    tokenizer: Tokenizer | None = None,
    encoders: Encoders | None = None,
) -> tuple[Run, TrainState]:
    """Load the models and create the initial state; nothing is compiled yet.

    JAX starts here, so anything that shares its devices (rewards, text encoders) must be loaded
    before.
    """
    metrics = defined_metrics(metrics, config, len(test_prompts))
    recipe = make_recipe(config)
    mesh = make_mesh(**config.mesh, devices=start_devices())
    check_mesh(recipe, mesh, process_count())
    models = _load_models(config, mesh, recipe.trainable)
    plans = []
    rewriter = None
    if config.stage == "rewriter":
        models, frozen = _with_frozen_lora(models, config.pretrained.lora)
        language = load_language_model(config.rewriter, mesh, recipe.trainable)
        rewriter = Rewriter(language, frozen, tokenizer, encoders)
    else:
        steps = config.sample.num_steps
        plans = [recipe.objective.make_plan(model.sigmas(steps)) for model in models]

    run = Run(
        config=config,
        digests=digests,
        folder=folder,
        recipe=recipe,
        models=models,
        plans=plans,
        evaluated=_evaluated_model(config, models),
        cache=cache,
        prompts=prompts,
        test_prompts=test_prompts,
        scorer=scorer,
        learning=learning,
        metrics=metrics,
        checkpoints=Checkpoints(folder / "checkpoints", config.num_checkpoint_limit),
        scored_prompts=scored_prompts,
        scored_test_prompts=scored_test_prompts,
        rewriter=rewriter,
    )
    key = run.key(FIRST_WEIGHTS)
    return run, first_state(recipe, run.trained_model, key, _start_file(config))


def _start_file(config: ConfigDict) -> str:
    """The adapters that training starts from; "" for none."""
    is_rewriter = config.stage == "rewriter"
    return config.rewriter.adapter if is_rewriter else config.pretrained.lora


def _with_frozen_lora(models: list[Model], file: str) -> tuple[list[Model], Any]:
    """The image models with the adapters of a file, which are not trained; None: there are none."""
    if not file:
        return models, None
    first, frozen = with_lora_file(models[0], file)
    return [first, *(model.with_trainable(first.trainable) for model in models[1:])], frozen


def _load_models(config: ConfigDict, mesh: Mesh, trainable: Trainable) -> list[Model]:
    """Load the model once, for each size of the rollouts' pictures."""
    models: list[Model] = []
    for key, size in rollout_sizes(config.sample).items():
        if models:
            models.append(with_size(models[0], config.pretrained, size, key))
        else:
            models.append(load_model(config.pretrained, size, mesh, trainable, key))
    return models


def _evaluated_model(config: ConfigDict, models: Sequence[Model]) -> Model:
    """The model for the pictures of evaluations: that of rollouts of the same size, if any."""
    size = size_of(config.evaluate.sample)
    for own_size, model in zip(rollout_sizes(config.sample).values(), models, strict=True):
        if own_size == size:
            return model
    return with_size(models[0], config.pretrained, size, EVALUATIONS)


def defined_metrics(
    metrics: Mapping[str, Metric], config: ConfigDict, test_prompts: int
) -> dict[str, Metric]:
    """Return the metrics for which an evaluation has enough pictures.

    Raises ValueError if the one that is to be monitored is not among them.
    """
    pictures = test_prompts * config.sample.test_images_per_prompt
    defined = {name: metric for name, metric in metrics.items() if metric.least <= pictures}
    monitor = config.reward.monitor
    if monitor in metrics and monitor not in defined:
        raise ValueError(
            f"config.reward.monitor is {monitor!r}, which needs {metrics[monitor].least} pictures; "
            f"an evaluation has {pictures} (config.prompts.test, "
            "config.sample.test_images_per_prompt)"
        )
    return defined


def check(config: ConfigDict, reward_problems: Sequence[str] = ()) -> None:
    """Raise ValueError with one line for each missing or invalid part of the config.

    This reads no weights and starts no device. reward_problems: lines about the rewards.
    """
    problems = _missing_files(config)
    problems += reward_problems
    problems += _wrong_values(config)
    if problems:
        raise ValueError("\n".join(problems))


def check_shapes(config: ConfigDict, devices: int) -> None:
    """Raise ValueError for sizes that do not divide evenly or fit together on `devices` devices.

    Group and call sizes, mesh, sizes of pictures, LoRA and SDE window are checked by shape: no
    weight is read and no device is started.
    """
    recipe = make_recipe(config)
    mesh = abstract_mesh(**config.mesh, devices=devices)
    check_mesh(recipe, mesh, process_count())
    for key, size in rollout_sizes(config.sample).items():
        model = abstract_model(config.pretrained, size, mesh, recipe.trainable, key)
        check_model(recipe, model)
    abstract_model(config.pretrained, size_of(config.evaluate.sample), mesh, key=EVALUATIONS)
    trained: Model | LanguageModel = model
    if config.stage == "rewriter":
        trained = abstract_language_model(config.rewriter, mesh, recipe.trainable)
    recipe.trainable.abstract(trained)
    start = _start_file(config)
    if start:
        recipe.trainable.check_modules(trained, start)


def _missing_files(config: ConfigDict) -> list[str]:
    problems = []
    if not sizes_on_disk(config.pretrained):
        problems.append(missing_model(config.pretrained))
    for name in ("train", "test"):
        if not Path(config.prompts[name]).is_file():
            problems.append(
                f"config.prompts.{name} is {config.prompts[name]!r}, which does not exist; "
                "expected one prompt a line (.txt) or .jsonl. RealGen's own files come with its "
                "repository, under dataset/realgen"
            )
    return problems


def _wrong_values(config: ConfigDict) -> list[str]:
    problems = []
    if not config.reward.fn:
        problems.append("config.reward.fn is empty; expected {reward: weight}, to train on")
    problems += monitor_problems(config.reward)
    problems += advantage_problems(config)
    problems += gate_problems(config)
    problems += rewriter_problems(config)
    start = _start_file(config)
    if start:
        try:
            form = TRANSFORMERS if config.stage == "rewriter" else DIFFUSERS
            make_trainable(config.train).check_file(start, form)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if reports(config) and config.evaluate.arena.protocol == "realgen":
        problems.append(
            "config.evaluate.arena.protocol is 'realgen', which compares with photographs, and the "
            "report of a run has none; set config.evaluate.after_training=False, and call "
            "scripts/evaluate.py --photographs afterwards"
        )
    train = config.train
    batches = config.sample.num_batches_per_epoch
    if config.stage == "rewriter":
        batches = config.rewriter.prompts_per_epoch * config.rewriter.rewrites_per_prompt
        batches //= config.rewriter.microbatch
    steps = batches // train.gradient_accumulation_steps
    steps *= config.num_epochs * train.num_inner_epochs
    if 0 < steps < train.ema_update_interval:
        problems.append(
            f"config.train.ema_update_interval is {train.ema_update_interval}, but the run has "
            f"{steps} optimizer steps, so that its average, the weights that it leaves, would "
            f"never change; expected {steps} or less"
        )
    late = [epoch for epoch in config.profile.steps if epoch > config.num_epochs]
    if late:
        problems.append(
            f"config.profile.steps has {', '.join(map(repr, late))}; expected epochs of this run, "
            f"1 to {config.num_epochs} (config.num_epochs): --config.profile.steps=3,5"
        )
    if config.wandb_project and importlib.util.find_spec("wandb") is None:
        problems.append(
            "config.wandb_project is set, but wandb is not installed: pip install wandb"
        )
    return problems


def reports(config: ConfigDict) -> bool:
    """Return whether this run ends with the RealBench report."""
    return config.evaluate.after_training and process_count() == 1
