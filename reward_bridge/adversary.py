"""Rewards that learn while the generator does, from reference pictures against what it makes (RealGen-V2, Adv-GRPO).

A fixed detector is fooled sooner or later; one that is shown the pictures that fool it is not fooled by them again. The
machinery is here, what differs between the kinds is a learner's (reward_bridge/learners/).
"""

import copy
import hashlib
import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import distributed

from reward_bridge.learners import Learner
from reward_bridge.references import References, recode
from reward_bridge.references import load as load_picture

# torch's, which dropout and augmentation draw from; one learner at a time seeds it
_GLOBAL_GENERATOR = threading.Lock()


@dataclass(frozen=True)
class Settings:
    """config.reward.adversarial.NAME. Sizes count pairs of a real and a generated picture, on one replica."""

    options: Mapping[str, Any]
    schedule: str
    threshold: float
    margin: float
    learn_epochs: int
    cycle: int
    patience: int
    min_rise: float
    always_first: bool
    skip_generator: bool
    optimizer: str
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    batch_size: int
    history_batch_size: int
    history_size: int
    max_passes: int
    target_accuracy: float
    ema_decay: float
    codec: str
    quality: int
    deadline: float

    @classmethod
    def read(cls, name: str, given: Mapping[str, Any]) -> "Settings":
        """Raises ValueError naming keys that are missing, unknown, or hold what they cannot."""
        where, known = f"config.reward.adversarial.{name}", {field.name for field in fields(cls)}
        if given.keys() != known:
            wrong = [f"lacks {key}" for key in sorted(known - given.keys())]
            wrong += [f"has {key}, which there is not" for key in sorted(given.keys() - known)]
            raise ValueError(
                f"{where} {', '.join(wrong)}; configs/flux_grpo.py, adversary(), has all keys"
            )
        settings = cls(**{**given, "betas": tuple(given["betas"])})
        for key, choices in (
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("codec", ("none", "jpeg")),
        ):
            if getattr(settings, key) not in choices:
                raise ValueError(
                    f"{where}.{key} is {getattr(settings, key)!r}; choose from {', '.join(choices)}"
                )
        for key, least in (
            ("max_passes", 1),
            ("cycle", 1),
            ("patience", 1),
            ("batch_size", 0),
            ("history_size", 0),
        ):
            if getattr(settings, key) < least:
                raise ValueError(
                    f"{where}.{key} is {getattr(settings, key)}; expected {least} or more"
                )
        if not 0 <= settings.ema_decay < 1:
            raise ValueError(
                f"{where}.ema_decay is {settings.ema_decay}; expected 0 (the weights themselves) to below 1"
            )
        return settings


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def _plateau(
    s: Settings, epoch: int, generated: float, references: float, memory: dict[str, float]
) -> bool:
    best = memory.get("best", -math.inf)
    memory["waited"] = 0 if generated > best + s.min_rise else memory.get("waited", 0) + 1
    memory["best"] = max(best, generated)
    if memory["waited"] < s.patience:
        return False
    memory.clear()  # the reward is another one from here on
    return True


# Whether to learn in this epoch, by its mean rewards of generated and of reference pictures. `memory` is kept.
SCHEDULES: dict[str, Callable[[Settings, int, float, float, dict[str, float]], bool]] = {
    "threshold": lambda s, epoch, generated, references, memory: generated > s.threshold,
    "margin": lambda s, epoch, generated, references, memory: references - generated < s.margin,
    "every": lambda s, epoch, generated, references, memory: epoch % s.cycle < s.learn_epochs,
    "plateau": _plateau,
}


class History:
    """At most `size` pairs of earlier epochs, uint8 in host memory; once full, a new one replaces any at random."""

    def __init__(self, size: int):
        self.size, self.pairs = size, []

    def add(self, real: np.ndarray, generated: np.ndarray, prompts: Sequence[str]) -> None:
        for pair in zip(real, generated, prompts, strict=True):
            if len(self.pairs) < self.size:
                self.pairs.append(pair)
            elif self.size:
                self.pairs[int(torch.randint(self.size, ()))] = pair

    def draw(self, count: int) -> tuple[list[np.ndarray], list[np.ndarray], list[str]]:
        """`count` pairs with replacement, none while there are none."""
        rows = torch.randint(len(self.pairs), (count,)).tolist() if self.pairs else []
        return tuple([self.pairs[row][part] for row in rows] for part in range(3))


class Adversary:
    """A reward, given by the moving average of a learner's weights, that can learn.

    Used from one thread at a time. `group`: the torch.distributed group of its replicas, one a process, over which
    gradients are averaged; they must hold the same weights from first to last, which is checked after every update.
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
        self.name, self.learner, self.settings, self.references = (
            name,
            learner,
            settings,
            references,
        )
        self.device, self.group = device, group
        frozen = {
            id(p): p
            for p in [*learner.model.parameters(), *learner.model.buffers()]
            if not p.requires_grad
        }
        self.average = copy.deepcopy(learner.model, frozen).requires_grad_(
            False
        )  # shares what does not learn
        self.learning = {n: p for n, p in learner.model.named_parameters() if p.requires_grad}
        options = {
            "lr": settings.learning_rate,
            "betas": settings.betas,
            "weight_decay": settings.weight_decay,
        }
        self.optimizer = OPTIMIZERS[settings.optimizer](self.learning.values(), **options)
        self.history, self.memory, self.steps = History(settings.history_size), {}, 0
        self._seen: list[tuple[torch.Tensor, torch.Tensor, list[str]]] = []

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return self.learner.score(self.average, self._kept(images), prompts)

    def _kept(self, images: torch.Tensor) -> torch.Tensor:
        return recode(self.learner.prepare(images), self.settings.codec, self.settings.quality)

    def draw(self, prompts: Sequence[str], seed: int, height: int, width: int) -> torch.Tensor:
        """Reference pictures of these prompts: uint8 [n, 3, s, s], of the generated ones' aspect before they shrink."""
        files = self.references.draw(prompts, seed)
        one = {
            file: self.learner.prepare(load_picture(file, height, width)[None].to(self.device))
            for file in {*files}
        }
        return torch.cat([one[file] for file in files])

    def observe(self, real: torch.Tensor, generated: torch.Tensor, prompts: Sequence[str]) -> None:
        """Keep n pairs for this epoch's update."""
        self._seen.append(
            (self._kept(real).cpu().numpy(), self._kept(generated).cpu().numpy(), list(prompts))
        )

    def due(self, epoch: int, generated: float, references: float) -> bool:
        """Whether to learn from this epoch (from 0), given the mean rewards over all replicas. Call once an epoch."""
        due = SCHEDULES[self.settings.schedule](
            self.settings, epoch, generated, references, self.memory
        )
        return due or (epoch == 0 and self.settings.always_first)

    def forget(self) -> None:
        """Drop what was observed: nothing is learnt from this epoch."""
        self._seen.clear()

    def update(self, seed: int) -> dict[str, float]:
        """Learn from the pairs that were observed, and from as many earlier ones as the settings say.

        Passes go on until the mean accuracy of one (measured while learning) reaches its target. Returns the last
        pass's means, the numbers of passes and steps, and how many pairs the history holds.
        """
        s, (real, generated, prompts) = self.settings, self._epoch()
        metrics: dict[str, float] = {}
        with _GLOBAL_GENERATOR, torch.random.fork_rng(devices=_gpus(self.device)):
            torch.manual_seed(seed)
            self.learner.model.train()
            for passes in range(1, s.max_passes + 1):
                found = []
                for rows in torch.randperm(len(prompts)).split(s.batch_size or len(prompts)):
                    old = self.history.draw(s.history_batch_size)
                    found.append(
                        self._step(
                            self._tensor([*real[rows.numpy()], *old[0]]),
                            self._tensor([*generated[rows.numpy()], *old[1]]),
                            [*(prompts[row] for row in rows.tolist()), *old[2]],
                        )
                    )
                means = torch.tensor(
                    [[step[key] for key in found[0]] for step in found], dtype=torch.float64
                ).mean(0)
                self._mean_over_replicas([means])
                metrics = dict(zip(found[0], means.tolist(), strict=True)) | {"passes": passes}
                if metrics["accuracy"] >= s.target_accuracy:
                    break
            self.learner.model.eval()
            self.history.add(real, generated, prompts)
        self.forget()
        self._check_replicas()
        return metrics | {"steps": self.steps, "history": len(self.history.pairs)}

    def _epoch(self) -> tuple[np.ndarray, np.ndarray, list[str]]:
        real, generated, prompts = zip(*self._seen, strict=True)
        return (
            np.concatenate(real),
            np.concatenate(generated),
            [prompt for part in prompts for prompt in part],
        )

    def _tensor(self, pictures: Sequence[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(pictures)).to(self.device)

    def _step(
        self, real: torch.Tensor, generated: torch.Tensor, prompts: Sequence[str]
    ) -> dict[str, float]:
        loss, metrics = self.learner.loss(self.learner.model, real, generated, prompts)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of {self.name!r} is {loss.item()} after {self.steps} steps of learning"
            )
        self.optimizer.zero_grad()
        loss.backward()
        self._mean_over_replicas([p.grad for p in self.learning.values() if p.grad is not None])
        self.optimizer.step()
        decay = min((1 + self.steps) / (10 + self.steps), self.settings.ema_decay)
        self.steps += 1
        with torch.no_grad():
            for name, average in self.average.named_parameters():
                if name in self.learning:
                    average.lerp_(self.learning[name], 1 - decay)
        return {"loss": loss.item(), **{key: float(value) for key, value in metrics.items()}}

    def _mean_over_replicas(self, tensors: Sequence[torch.Tensor]) -> None:
        if self.group is not None:
            for tensor in tensors:
                distributed.all_reduce(tensor, group=self.group)
                tensor /= distributed.get_world_size(self.group)

    def _check_replicas(self) -> None:
        if self.group is None:
            return
        digest = hashlib.sha256()
        for parameter in self.average.parameters():
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
        everyone = [torch.empty_like(own) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(everyone, own, group=self.group)
        if different := [i for i, other in enumerate(everyone) if not torch.equal(other, own)]:
            raise RuntimeError(
                f"the replicas of {self.name!r} differ: processes {different} from this one"
            )

    def state(self) -> bytes:
        """Everything that learning has changed, as safetensors."""
        learnt = dict(self.average.named_parameters())
        tensors = {f"model/{name}": p.detach() for name, p in self.learning.items()}
        tensors |= {f"average/{name}": learnt[name] for name in self.learning}
        for i, kept in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{key}": value for key, value in kept.items()}
        if self.history.pairs:
            real, generated, _ = zip(*self.history.pairs, strict=True)
            tensors |= {"history/real": torch.from_numpy(np.stack(real))}
            tensors |= {"history/generated": torch.from_numpy(np.stack(generated))}
        meta = {
            "steps": self.steps,
            "memory": self.memory,
            "prompts": [prompt for _, _, prompt in self.history.pairs],
        }
        tensors["meta"] = torch.frombuffer(bytearray(json.dumps(meta).encode()), dtype=torch.uint8)
        return save({key: value.contiguous() for key, value in tensors.items()})

    def restore(self, state: bytes, with_history: bool = True) -> None:
        """Be as when `state` was taken; without its history where that is another replica's.

        Raises ValueError where the state is that of another model.
        """
        tensors = load(state)
        meta = json.loads(bytes(tensors["meta"].tolist()))
        found = {key.removeprefix("model/") for key in tensors if key.startswith("model/")}
        if found != self.learning.keys():
            odd = sorted(found ^ self.learning.keys())
            raise ValueError(
                f"the checkpoint's {self.name!r} learnt other weights than this config's, such as {odd[0]}"
            )
        learnt, kept = dict(self.average.named_parameters()), {}
        with torch.no_grad():
            for name, parameter in self.learning.items():
                parameter.copy_(tensors[f"model/{name}"])
                learnt[name].copy_(tensors[f"average/{name}"])
        for key, value in tensors.items():
            if key.startswith("optimizer/"):
                _, i, name = key.split("/")
                kept.setdefault(int(i), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": kept})
        self.steps, self.memory = meta["steps"], meta["memory"]
        if with_history and "history/real" in tensors:
            pictures = (tensors[f"history/{part}"].numpy() for part in ("real", "generated"))
            self.history.pairs = list(zip(*pictures, meta["prompts"], strict=True))[
                : self.settings.history_size
            ]


def join(
    tell: Callable[[str, str | None], str],
    host: str,
    process: int,
    processes: int,
    names: Sequence[str],
) -> dict[str, Any]:
    """A torch.distributed group of all processes for each name, over gloo. All of them must call it.

    `tell(key, text)` gives every process what process 0 says; `host` is where the others reach that one.
    """
    store = None
    if process == 0:
        store = distributed.TCPStore(
            "0.0.0.0", 0, processes, is_master=True, wait_for_workers=False
        )
        tell("rewards/port", str(store.port))
    else:
        store = distributed.TCPStore(
            host, int(tell("rewards/port", None)), processes, is_master=False
        )
    distributed.init_process_group("gloo", store=store, rank=process, world_size=processes)
    return {
        name: distributed.new_group() for name in names
    }  # one each: they learn in threads of their own


def _gpus(device: str) -> list[str]:
    return [device] if device.startswith("cuda") else []
