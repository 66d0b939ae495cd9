"""Scores pictures in background threads, while the next rollout runs."""

import queue
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from reward_bridge.lane import Batch, Lane, Shared
from reward_bridge.reward import GroupReward, Reward, Scores
from reward_bridge.worker import Answer, Pending


class RewardBridge:
    """Scores batches with rewards, each on the device that `devices` names for it.

    Rewards on the same GPU take turns batch by batch, so each waits at most for its neighbours'
    work. Every GPU has its own thread, and so does every reward on the CPU or behind HTTP. Pictures
    are copied to a device once for all of its rewards.

    A reward that raises is retried up to `retries` times. One that runs out of memory continues
    with half the images at a time. A batch fails with a RewardError if a reward still raises, has
    not answered within `deadline` seconds, or returns anything but n finite numbers. Scores are
    never made up. `batch_size` is the maximum number of images that a reward scores at once; 0:
    all.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward | GroupReward],
        devices: Mapping[str, str],
        *,
        deadline: float,
        retries: int,
        batch_size: int = 0,
    ):
        self.rewards = dict(rewards)
        self.devices = {name: devices[name] for name in rewards}
        self.deadline = deadline
        self.batch_sizes = dict.fromkeys(rewards, batch_size)  # halved when memory runs out
        self.seconds = dict.fromkeys(rewards, 0.0)  # time spent on scoring so far
        self._closed = False

        # Rewards on one GPU share a lane; all others have their own.
        names_by_lane: dict[str, list[str]] = {}
        for name, device in self.devices.items():
            key = device if device.startswith("cuda") else name
            names_by_lane.setdefault(key, []).append(name)
        shared = Shared(
            self.rewards, self.devices, deadline, retries, self.batch_sizes, self.seconds
        )
        self._lanes = [Lane(names, shared) for names in names_by_lane.values()]

    def submit(
        self,
        images: Any,
        prompts: Sequence[str],
        only: Sequence[str] | None = None,
        observe: int | None = None,
        group: int = 1,
    ) -> "PendingScores":
        """Queue uint8 images [n, 3, h, w] for scoring and return at once.

        images: a torch.Tensor, a jax.Array or a numpy array. Its computation may still be running,
            and it may be sharded over several devices. If it is sharded over several processes,
            this process scores its own images, and `prompts` must be theirs.
        only: the rewards to run (default: all).
        observe: a seed. Rewards that learn then draw reference pictures with it, score them too
            (`Scores.references`), and keep the pairs for their next update.
        group: consecutive pictures of one prompt. Rewards that compare them (GroupReward) are
            handed whole groups, whatever `batch_size` is.

        Raises ValueError if the numbers of images and prompts differ, RuntimeError after `close`.
        """
        if isinstance(images, np.ndarray):
            images = torch.from_numpy(images)
        count = _images_in_this_process(images)
        if len(prompts) != count:
            raise ValueError(
                f"got {count} images and {len(prompts)} prompts; expected one prompt per image"
            )
        if self._closed:
            raise RuntimeError("the bridge is closed and scores nothing more")

        names = list(self.rewards) if only is None else list(only)
        batch = Batch(images)
        answers: dict[Lane, Answer] = {}
        done: queue.SimpleQueue = queue.SimpleQueue()
        for lane in self._lanes:
            lane_names = [name for name in lane.names if name in names]
            if lane_names:
                answers[lane] = Answer(done)
                job = partial(lane.score, batch, list(prompts), lane_names, observe, group)
                lane.put(job, answers[lane])
        return PendingScores(answers, done, names)

    def learn(self, seeds: Mapping[str, int], deadlines: Mapping[str, float]) -> "PendingLearning":
        """Queue an update of each reward in `seeds`, after the work that is already queued.

        seeds: {reward: seed}. deadlines: {reward: seconds}.
        """
        answers: dict[Lane, Answer] = {}
        done: queue.SimpleQueue = queue.SimpleQueue()
        for lane in self._lanes:
            lane_seeds = {name: seeds[name] for name in lane.names if name in seeds}
            if lane_seeds:
                answers[lane] = Answer(done)
                lane.put(partial(lane.learn, lane_seeds, deadlines), answers[lane])
        return PendingLearning(answers, done, list(seeds))

    @property
    def refused(self) -> dict[str, int]:
        """{reward: pictures that its model refused so far}, of the rewards that count them."""
        counts = {}
        for name, reward in self.rewards.items():
            if hasattr(reward, "refused"):
                counts[name] = reward.refused
        return counts

    def stuck(self) -> list[str]:
        """Rewards that are past their deadline and still running; they block their device."""
        names = [lane.overdue() for lane in self._lanes]
        return [name for name in names if name is not None]

    def close(self, wait: float = 10.0) -> None:
        """Drop queued batches and give running rewards `wait` seconds to finish.

        Results of dropped batches raise RewardError. Call this before the process exits, because a
        thread that is still inside torch can crash it.
        """
        end = time.monotonic() + wait
        self._closed = True
        for lane in self._lanes:
            lane.stop("the bridge was closed before this batch was scored")
        for lane in self._lanes:
            lane.thread.join(max(0.0, end - time.monotonic()))


class _PendingOfRewards(Pending):
    """Waits for the answers of several lanes. names: the rewards that they are about."""

    def __init__(
        self, answers: Mapping[Lane, Answer], done: queue.SimpleQueue, names: Sequence[str]
    ):
        super().__init__(answers, done)
        self._names = names


class PendingScores(_PendingOfRewards):
    """The scores of one submitted batch, once they are available."""

    def result(self) -> Scores:
        """Wait for the scores. Raises RewardError naming the reward that failed or timed out."""
        rewards = {}
        references = {}
        for scores in self._outcomes():
            rewards.update(scores.rewards)
            references.update(scores.references)

        return Scores(
            {name: rewards[name] for name in self._names},
            {name: references[name] for name in self._names if name in references},
        )


class PendingLearning(_PendingOfRewards):
    """The metrics of the rewards' updates, once they are available."""

    def result(self) -> dict[str, dict[str, float]]:
        """Wait for {reward: metrics}. Raises RewardError naming the reward that failed."""
        metrics = {}
        for lane_metrics in self._outcomes():
            metrics.update(lane_metrics)
        return {name: metrics[name] for name in self._names}


def _images_in_this_process(images: Any) -> int:
    """The length of a batch, or of this process's part of it."""
    if isinstance(images, torch.Tensor) or images.is_fully_addressable:
        return images.shape[0]
    shards = [shard for shard in images.addressable_shards if shard.replica_id == 0]
    return sum(len(shard.data) for shard in shards)
