"""The threads of a RewardBridge: one lane for each GPU and for each reward that runs elsewhere."""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reward_bridge.devices import is_out_of_memory
from reward_bridge.groups import check_groups
from reward_bridge.reward import GroupReward, Reward, RewardError, Scores, TrainableReward
from reward_bridge.worker import Worker


@dataclass(frozen=True)
class Shared:
    """What all lanes of a bridge share. The dicts belong to the bridge and change during a run."""

    rewards: dict[str, Reward | GroupReward]
    devices: dict[str, str]
    deadline: float  # seconds for one reward and one batch
    retries: int  # further attempts after a failure
    batch_sizes: dict[str, int]  # most images a reward scores at once; 0: the whole batch
    seconds: dict[str, float]  # time each reward has spent on scoring so far


class Batch:
    """A batch of images, copied to each device once, when the first reward there needs it.

    `images`: torch.Tensor or jax.Array, uint8 [n, 3, h, w].
    """

    def __init__(self, images: Any):
        self._images = images
        self._lock = threading.Lock()
        self._by_device: dict[str, torch.Tensor] = {}

    def wait(self) -> None:
        """Wait until the images are computed."""
        if not isinstance(self._images, torch.Tensor):
            self._images.block_until_ready()

    def on(self, device: str) -> torch.Tensor:
        """The images on a torch device."""
        with self._lock:
            if device not in self._by_device:
                self._by_device[device] = self._copy_to(device)
            return self._by_device[device]

    def _copy_to(self, device: str) -> torch.Tensor:
        if isinstance(self._images, torch.Tensor):
            return self._images.to(device)

        # Imported here so that a reward server runs without jax.
        from reward_bridge.dlpack import gather

        return gather(self._images, device)


class Lane(Worker):
    """A worker that runs the jobs of its rewards."""

    def __init__(self, names: Sequence[str], shared: Shared):
        self.names = list(names)
        self._shared = shared
        super().__init__(f"reward-bridge {', '.join(names)}")

    # -- The jobs

    def score(
        self,
        batch: Batch,
        prompts: list[str],
        names: Sequence[str],
        seed: int | None,
        group: int = 1,
    ) -> Scores:
        """Score a batch with the named rewards.

        group: consecutive pictures of one prompt, for rewards that compare them. With a `seed`,
        rewards that learn also draw reference pictures, score them and observe the pairs.
        """
        batch.wait()  # so that deadlines start after the rollout
        rewards = {name: self._score_reward(name, batch, prompts, group) for name in names}
        references: dict[str, np.ndarray] = {}
        if seed is None:
            return Scores(rewards, references)

        for name in names:
            reward = self._shared.rewards[name]
            if isinstance(reward, TrainableReward):
                generated = batch.on(self._shared.devices[name])
                height, width = generated.shape[2:]
                real = reward.draw(prompts, seed, height, width)
                references[name] = self._score_reward(name, Batch(real), prompts, 1)
                reward.observe(real, generated, prompts)
        return Scores(rewards, references)

    def learn(
        self, seeds: Mapping[str, int], deadlines: Mapping[str, float]
    ) -> dict[str, dict[str, float]]:
        """Update rewards with their seeds: {reward: metrics}.

        A failed update is not repeated: the first attempt may have changed the weights.
        """
        metrics = {}
        for name, seed in seeds.items():
            self.begin(
                name,
                deadlines[name],
                f"reward {name!r} did not finish learning within {deadlines[name]:g} s "
                f"(config.reward.adversarial.{name}.deadline)",
            )
            try:
                metrics[name] = self._shared.rewards[name].update(seed)
            except Exception as error:
                raise RewardError(f"reward {name!r} failed to learn: {error!r}") from error
        return metrics

    # -- One reward, one batch

    def _score_reward(self, name: str, batch: Batch, prompts: list[str], group: int) -> np.ndarray:
        """One reward's scores of a batch, float32 [n], with retries. Raises RewardError."""
        shared = self._shared
        unit = 1  # pictures that are scored together
        if isinstance(shared.rewards[name], GroupReward):
            check_groups(name, prompts, group)
            unit = group

        self.begin(
            name,
            shared.deadline,
            f"reward {name!r} did not answer within {shared.deadline:g} s (config.reward.deadline)",
        )

        def attempt() -> np.ndarray:
            start = time.monotonic()
            try:
                pixels = batch.on(shared.devices[name])
                return self._score_in_chunks(name, pixels, prompts, unit)
            finally:
                shared.seconds[name] += time.monotonic() - start

        scores = self.retry(f"reward {name!r}", attempt, shared.retries)
        _raise_if_not_finite(name, scores, prompts)
        return scores

    def _score_in_chunks(
        self, name: str, pixels: torch.Tensor, prompts: list[str], unit: int
    ) -> np.ndarray:
        """Score uint8 pixels [n, 3, h, w] in chunks of the reward's batch size: float32 [n].

        A chunk is a multiple of `unit` pictures, one unit or more. If memory runs out, the
        remaining images are scored in chunks of half the size.
        """
        shared = self._shared
        scores = np.empty(len(prompts), np.float32)
        start = 0
        while start < len(prompts):
            size = shared.batch_sizes[name] or len(prompts)
            size = max(unit, size - size % unit)
            rows = slice(start, start + size)
            chunk = self._score_chunk(name, pixels[rows], prompts[rows], unit)
            if chunk is None:
                self._halve_batch_size(name, len(prompts[rows]))
                continue

            scores[rows] = chunk
            start += len(chunk)
        return scores

    def _score_chunk(
        self, name: str, pixels: torch.Tensor, prompts: list[str], unit: int
    ) -> np.ndarray | None:
        """Scores of one call of the reward, float32 [n], or None if memory ran out."""
        reward = self._shared.rewards[name]
        try:
            with torch.inference_mode():
                if isinstance(reward, GroupReward):
                    scores = reward.score_groups(pixels, prompts, unit)
                else:
                    scores = reward(pixels, prompts)
            # GPU errors surface here, at the synchronising copy.
            scores = torch.as_tensor(scores).to("cpu", torch.float32).numpy()
        except Exception as error:
            if not is_out_of_memory(error) or len(prompts) == unit:
                raise
            return None

        if scores.shape != (len(prompts),):
            raise RewardError(
                f"reward {name!r} returned shape {scores.shape}; expected ({len(prompts)},), one "
                "score per image"
            )
        return scores

    def _halve_batch_size(self, name: str, images: int) -> None:
        # The caller has dropped the error's traceback, which kept the chunk's memory alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._shared.batch_sizes[name] = (images + 1) // 2
        logging.getLogger(__name__).warning(
            "reward %r ran out of memory on %d images and continues with %d at a time; "
            "config.reward.batch_size sets this from the start",
            name,
            images,
            self._shared.batch_sizes[name],
        )


def _raise_if_not_finite(name: str, scores: np.ndarray, prompts: Sequence[str]) -> None:
    """Raise RewardError naming the first image whose score is NaN or infinite."""
    bad = np.flatnonzero(~np.isfinite(scores))
    if not len(bad):
        return
    image = int(bad[0])
    error = RewardError(
        f"reward {name!r} returned {scores[image]} for image {image} ({prompts[image]!r})"
    )
    error.image = image
    raise error
