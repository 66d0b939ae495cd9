"""Scores pictures with every reward in a thread of its own, so that the next rollout runs meanwhile."""

import contextlib
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np
import torch

from reward_bridge.dlpack import shards_to_torch


class Reward(Protocol):
    """Higher is better. A reward may be any callable of this form; `name` is its key in the config."""

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """uint8 [n, 3, h, w] and n prompts -> float32 [n]."""


class RewardError(RuntimeError):
    """A reward failed for good. The step that asked for it must not be trained on."""


class PendingScores:
    """The scores of one submitted batch, once they are there."""

    def __init__(self, bridge: "RewardBridge"):
        self._bridge, self._future = bridge, Future()

    def result(self) -> dict[str, np.ndarray]:
        """{reward: float32 [n]}. Raises RewardError naming the reward that failed or ran past its deadline."""
        while True:
            try:
                return self._future.result(timeout=0.05)
            except TimeoutError:
                self._bridge.check_deadline()


class RewardBridge:
    """Runs rewards on `device`, in the order of `rewards`, one submitted batch after the other.

    A reward that raises is tried `retries` more times; one that then still raises, runs past `deadline` seconds, or
    returns anything but n finite numbers ends the batch with a RewardError. Nothing is made up in its place.
    """

    def __init__(self, rewards: Mapping[str, Reward], device: str, *, deadline: float, retries: int):
        self._rewards, self._device = dict(rewards), torch.device(device)
        self._deadline, self._retries = deadline, retries
        self._running: tuple[str, float] | None = None  # the reward at work and when its deadline passes
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        # a daemon: a reward that hangs must not keep the process from ending
        self._thread = threading.Thread(target=self._work, name="reward-bridge", daemon=True)
        self._thread.start()

    def submit(self, images: "jax.Array", prompts: Sequence[str], only: Sequence[str] | None = None) -> PendingScores:  # noqa: F821
        """Queue uint8 images [n, 3, h, w]; `only` names the rewards to run (default: all). Returns at once.

        The images may still be computed, and may be spread over several devices.
        """
        if len(prompts) != images.shape[0]:
            raise ValueError(f"got {images.shape[0]} images and {len(prompts)} prompts; expected as many of each")
        pending = PendingScores(self)
        names = list(self._rewards) if only is None else list(only)
        self._queue.put((images, list(prompts), names, pending._future))
        return pending

    def close(self, wait: float = 10.0) -> None:
        """Drop what is queued and give the reward at work `wait` seconds to finish. For the end of the process, which
        a thread that is still inside torch can crash.
        """
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._queue.put(None)
        self._thread.join(wait)

    def check_deadline(self) -> None:
        running = self._running
        if running is not None and time.monotonic() > running[1]:
            raise RewardError(
                f"reward {running[0]!r} has not answered for {self._deadline:g} s (config.reward.deadline); "
                "is its device busy, or the deadline too short for this batch?"
            )

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            images, prompts, names, future = work
            try:
                images.block_until_ready()  # a reward's deadline does not count the rollout
                shards = shards_to_torch(images)
                pixels = shards[0] if len(shards) == 1 else torch.cat([s.to(self._device) for s in shards])
                pixels = pixels.to(self._device)
                future.set_result({name: self._score(name, pixels, prompts) for name in names})
            except BaseException as error:  # handed to whoever waits for the scores
                future.set_exception(error)
            self._running = None

    def _score(self, name: str, pixels: torch.Tensor, prompts: list[str]) -> np.ndarray:
        for attempt in range(self._retries + 1):
            self._running = (name, time.monotonic() + self._deadline)
            try:
                with torch.inference_mode():
                    scores = self._rewards[name](pixels, prompts)
                scores = torch.as_tensor(scores).to("cpu", torch.float32).numpy()  # a GPU's errors surface here
                break
            except Exception as error:
                if attempt == self._retries:
                    raise RewardError(
                        f"reward {name!r} failed {attempt + 1} times; the last time: {error!r}"
                    ) from error
        if scores.shape != (len(prompts),):
            raise RewardError(
                f"reward {name!r} returned shape {scores.shape}; expected ({len(prompts)},), one per image"
            )
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise RewardError(f"reward {name!r} returned {scores[bad]} for image {bad} ({prompts[bad]!r})")
        return scores
