"""Rewards that learn from reference pictures while the generator trains (RealGen-V2, Adv-GRPO).

A frozen detector is fooled sooner or later. One that is trained on the pictures that fool it keeps
up. This module has what all such rewards share; what differs is in a learner
(reward_bridge/learners/).
"""

import copy
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import distributed, nn

from reward_bridge.adversary_settings import OPTIMIZERS, SCHEDULES, Memory, Settings
from reward_bridge.history import History, Pairs
from reward_bridge.learners import Learner
from reward_bridge.references import References, recode
from reward_bridge.reward import Reward, RewardError

# Dropout and augmentation draw from torch's global generator, which one learner at a time may seed.
_GLOBAL_GENERATOR = threading.Lock()


class Adversary:
    """A reward that learns. The moving average of a learner's weights gives the scores.

    Not thread-safe: use it from one thread at a time.

    group: the torch.distributed group of its replicas, one per process, or None. Gradients are
        averaged over it. The replicas must always hold the same weights, which is checked after
        every update.
    """

    def __init__(
        self,
        name: str,
        learner: Learner,
        settings: Settings,
        references: References,
        device: str,
        group: Any,
    ):
        self.name = name
        self.learner = learner
        self.settings = settings
        self.references = references
        self.device = device
        self.group = group

        self.average = _copy(learner.model)

        named = learner.model.named_parameters()
        self.learning = {key: parameter for key, parameter in named if parameter.requires_grad}
        self.optimizer = OPTIMIZERS[settings.optimizer](
            self.learning.values(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.history = History(settings.history_size)
        self.memory: Memory = {}  # of the schedule
        self.steps = 0
        self._observed: list[Pairs] = []

    # -- Scoring

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Score uint8 images [n, 3, h, w]: float32 [n]."""
        return self.learner.score(self.average, self._prepare(images), prompts)

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Apply the resize and the codec of real and generated pictures: uint8 [n, 3, s, s]."""
        images = self.learner.prepare(images)
        return recode(images, self.settings.codec, self.settings.quality)

    def frozen_copy(self) -> Reward:
        """A reward with the weights of now, before this one has learned, which keeps them."""
        weights = _copy(self.learner.model)

        def score(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
            return self.learner.score(weights, self._prepare(images), prompts)

        return score

    # -- An epoch: draw references, observe pairs, then learn from them or drop them

    def draw(self, prompts: Sequence[str], seed: int, height: int, width: int) -> torch.Tensor:
        """Reference pictures for these prompts: uint8 [n, 3, s, s].

        They are cropped to the aspect ratio of the generated pictures, height x width, and resized.
        Raises RewardError naming a file that cannot be read any more.
        """
        files = self.references.draw(prompts, seed)
        pictures = {}
        for file in set(files):
            try:
                picture = self.references.load(file, height, width)
            except (ValueError, OSError) as error:
                raise RewardError(f"a reference has changed since the start: {error}") from error
            pictures[file] = self.learner.prepare(picture[None].to(self.device))
        return torch.cat([pictures[file] for file in files])

    def observe(self, real: torch.Tensor, generated: torch.Tensor, prompts: Sequence[str]) -> None:
        """Store n pairs for this epoch's update."""
        self._observed.append(
            Pairs(
                self._prepare(real).cpu().numpy(),
                self._prepare(generated).cpu().numpy(),
                list(prompts),
            )
        )

    def due(self, epoch: int, generated: float, references: float) -> bool:
        """Whether to learn in this epoch (from 0). Call it once per epoch.

        generated, references: mean rewards over all replicas.
        """
        schedule = SCHEDULES[self.settings.schedule]
        due = schedule(self.settings, epoch, generated, references, self.memory)
        due = due or (epoch == 0 and self.settings.always_first)
        if due:
            self.memory.clear()
        return due

    def forget(self) -> None:
        """Drop the observed pairs without learning from them."""
        self._observed.clear()

    def update(self, seed: int) -> dict[str, float]:
        """Learn from the observed pairs, mixed with pairs from the history.

        Passes over the pairs continue until a pass reaches the target accuracy, measured while
        learning, or `max_passes`. Returns the last pass's mean metrics, the number of passes and of
        steps, and the size of the history.
        """
        pairs = self._all_observed()
        gpus = [self.device] if self.device.startswith("cuda") else []
        with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=gpus):
            torch.manual_seed(seed)
            self.learner.model.train()
            metrics = self._train(pairs)
            self.learner.model.eval()
            self.history.add(pairs.real, pairs.generated, pairs.prompts)

        self.forget()
        self._check_replicas()
        return {**metrics, "steps": self.steps, "history": len(self.history.pairs)}

    def _all_observed(self) -> Pairs:
        real = np.concatenate([pairs.real for pairs in self._observed])
        generated = np.concatenate([pairs.generated for pairs in self._observed])
        prompts = []
        for pairs in self._observed:
            prompts += pairs.prompts
        return Pairs(real, generated, prompts)

    # -- Learning

    def _train(self, pairs: Pairs) -> dict[str, float]:
        """Make passes until one reaches the target accuracy. Returns the last pass's metrics."""
        metrics: dict[str, float] = {}
        for passes in range(1, self.settings.max_passes + 1):
            metrics = self._train_pass(pairs)
            metrics["passes"] = passes
            if metrics["accuracy"] >= self.settings.target_accuracy:
                break
        return metrics

    def _train_pass(self, pairs: Pairs) -> dict[str, float]:
        """One step per batch, in random order. Returns the mean metrics over all replicas."""
        count = len(pairs.prompts)
        steps = []
        for rows in torch.randperm(count).split(self.settings.batch_size or count):
            steps.append(self._step(*self._batch(pairs, rows)))

        names = list(steps[0])
        values = [[step[name] for name in names] for step in steps]
        means = torch.tensor(values, dtype=torch.float64).mean(0)
        self._mean_over_replicas([means])
        return dict(zip(names, means.tolist(), strict=True))

    def _batch(
        self, pairs: Pairs, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """These rows and some pairs of the history: real, generated [m, 3, s, s], m prompts."""
        real, generated, prompts = self.history.draw(self.settings.history_batch_size)
        real = [*pairs.real[rows.numpy()], *real]
        generated = [*pairs.generated[rows.numpy()], *generated]
        prompts = [*(pairs.prompts[row] for row in rows.tolist()), *prompts]
        return self._to_device(real), self._to_device(generated), prompts

    def _to_device(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(pictures)).to(self.device)

    def _step(
        self, real: torch.Tensor, generated: torch.Tensor, prompts: Sequence[str]
    ) -> dict[str, float]:
        """One optimizer step. Raises FloatingPointError if the loss is not finite."""
        loss, metrics = self.learner.loss(self.learner.model, real, generated, prompts)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of {self.name!r} is {loss.item()} after {self.steps} steps of learning"
            )

        self.optimizer.zero_grad()
        loss.backward()
        gradients = [weight.grad for weight in self.learning.values() if weight.grad is not None]
        self._mean_over_replicas(gradients)
        self.optimizer.step()

        self._update_average()
        return {"loss": loss.item(), **{key: float(value) for key, value in metrics.items()}}

    def _update_average(self) -> None:
        """Move the average towards the weights, faster in early steps."""
        decay = min((1 + self.steps) / (10 + self.steps), self.settings.ema_decay)
        self.steps += 1
        with torch.no_grad():
            for name, average in self.average.named_parameters():
                if name in self.learning:
                    average.lerp_(self.learning[name], 1 - decay)

    # -- Replicas in other processes

    def _mean_over_replicas(self, tensors: Sequence[torch.Tensor]) -> None:
        """Average tensors over all replicas, in place."""
        if self.group is None:
            return
        for tensor in tensors:
            distributed.all_reduce(tensor, group=self.group)
            tensor /= distributed.get_world_size(self.group)

    def _check_replicas(self) -> None:
        """Raise RuntimeError if the replicas' average weights differ."""
        if self.group is None:
            return

        digest = hashlib.sha256()
        for parameter in self.average.parameters():
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)

        processes = distributed.get_world_size(self.group)
        digests = [torch.empty_like(own) for _ in range(processes)]
        distributed.all_gather(digests, own, group=self.group)
        different = [i for i, other in enumerate(digests) if not torch.equal(other, own)]
        if different:
            raise RuntimeError(
                f"the replicas of {self.name!r} differ: those of processes {different} have other "
                "weights than this one"
            )

    # -- Checkpoints

    def state(self) -> bytes:
        """Everything that learning has changed, as safetensors."""
        average = dict(self.average.named_parameters())
        tensors = {}
        for name, parameter in self.learning.items():
            tensors[f"model/{name}"] = parameter.detach()
        for name in self.learning:
            tensors[f"average/{name}"] = average[name]
        for index, values in self.optimizer.state_dict()["state"].items():
            for key, value in values.items():
                tensors[f"optimizer/{index}/{key}"] = value

        pairs = self.history.pairs
        if pairs:
            real = np.stack([pair[0] for pair in pairs])
            generated = np.stack([pair[1] for pair in pairs])
            tensors["history/real"] = torch.from_numpy(real)
            tensors["history/generated"] = torch.from_numpy(generated)

        meta = {
            "steps": self.steps,
            "memory": self.memory,
            "prompts": [pair[2] for pair in pairs],
        }
        tensors["meta"] = torch.frombuffer(bytearray(json.dumps(meta).encode()), dtype=torch.uint8)
        return save({key: value.contiguous() for key, value in tensors.items()})

    def restore(self, state: bytes, with_history: bool = True) -> None:
        """Restore a `state`, without its history if that belongs to another replica.

        Raises ValueError if the state belongs to another model.
        """
        tensors = load(state)
        self._check_names(tensors)
        meta = json.loads(bytes(tensors["meta"].tolist()))

        # The weights and their average.
        average = dict(self.average.named_parameters())
        with torch.no_grad():
            for name, parameter in self.learning.items():
                parameter.copy_(tensors[f"model/{name}"])
                average[name].copy_(tensors[f"average/{name}"])

        # The optimizer.
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, index, name = key.split("/")
                moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})

        # The schedule and the history.
        self.steps = meta["steps"]
        self.memory = meta["memory"]
        if with_history and "history/real" in tensors:
            real = tensors["history/real"].numpy()
            generated = tensors["history/generated"].numpy()
            pairs = list(zip(real, generated, meta["prompts"], strict=True))
            self.history.pairs = pairs[: self.settings.history_size]

    def _check_names(self, tensors: dict[str, torch.Tensor]) -> None:
        saved = {key.removeprefix("model/") for key in tensors if key.startswith("model/")}
        different = sorted(saved ^ self.learning.keys())
        if different:
            raise ValueError(
                f"in the checkpoint, {self.name!r} has trained other weights than this config "
                f"trains, such as {different[0]}"
            )


def _copy(model: nn.Module) -> nn.Module:
    """A frozen copy with its own trained weights, which shares all others.

    Trained are the weights that require gradients.
    """
    tensors = [*model.parameters(), *model.buffers()]
    shared = {id(tensor): tensor for tensor in tensors if not tensor.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False)


def join(
    tell: Callable[[str, str | None], str],
    host: str,
    process: int,
    processes: int,
    names: Sequence[str],
) -> dict[str, Any]:
    """A torch.distributed group (gloo) of all processes for each name. All processes must call it.

    tell: `tell(key, text)` returns the text of process 0 in every process; others pass None.
    host: the address at which the others reach process 0.
    """
    if process == 0:
        store = distributed.TCPStore(
            "0.0.0.0", 0, processes, is_master=True, wait_for_workers=False
        )
        tell("rewards/port", str(store.port))
    else:
        port = int(tell("rewards/port", None))
        store = distributed.TCPStore(host, port, processes, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=process, world_size=processes)

    # One group each, because they learn in separate threads.
    return {name: distributed.new_group() for name in names}
