"""The threads of a RewardBridge: one lane for each GPU and for each reward that runs elsewhere."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from reward_bridge.groups import check_groups
from reward_bridge.reward import GroupReward, Reward, RewardError, Scores, TrainableReward

# Out-of-memory messages of the CPU allocator and of cuBLAS: torch has no exception class for them.
OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Shared:
    """What all lanes of a bridge share. The dicts belong to the bridge and change during a run."""

    rewards: dict[str, Reward | GroupReward]
    devices: dict[str, str]
    deadline: float  # seconds for one reward and one batch
    retries: int  # further attempts after a failure
    batch_sizes: dict[str, int]  # most images a reward scores at once; 0: the whole batch
    seconds: dict[str, float]  # time each reward has spent on scoring so far


@dataclass(frozen=True)
class Running:
    """The reward that a lane is running."""

    name: str
    end: float  # its deadline, in time.monotonic()
    complaint: str  # what to report if it misses the deadline


class Answer:
    """The outcome of one job: a result, an error, or None while the job is not done.

    This is not a Future, because an interrupt can leave a Future's lock held, and the next caller
    then waits forever. Here the calling thread only takes locks inside SimpleQueue, whose
    operations an interrupt cannot split.
    """

    def __init__(self, done: queue.SimpleQueue):
        self.outcome: Any = None
        self._done = done

    def set(self, outcome: Any) -> None:
        self.outcome = outcome
        self._done.put(None)


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


class Lane:
    """A thread that runs the jobs of its rewards one after another."""

    def __init__(self, names: Sequence[str], shared: Shared):
        self.names = list(names)
        self._shared = shared
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._running: Running | None = None

        # A daemon thread: a reward that hangs must not keep the process alive.
        self.thread = threading.Thread(
            target=self._work, name=f"reward-bridge {', '.join(names)}", daemon=True
        )
        self.thread.start()

    # -- Called from other threads

    def put(self, job: Callable[[], Any], answer: Answer) -> None:
        """Queue a job; its result or error goes to `answer`."""
        self._jobs.put((job, answer))

    def overdue(self) -> str | None:
        """The running reward's name if it is past its deadline."""
        running = self._running
        if running is None or time.monotonic() <= running.end:
            return None
        return running.name

    def raise_if_overdue(self) -> None:
        """Raise RewardError if the running reward is past its deadline."""
        running = self._running
        if running is not None and self.overdue():
            raise RewardError(
                f"reward {running.name!r} {running.complaint}; its device may be busy, or the "
                "deadline too short for this batch"
            )

    def stop(self) -> None:
        """Drop the queued jobs and end the thread after the current one."""
        with contextlib.suppress(queue.Empty):
            while True:
                queued = self._jobs.get_nowait()
                if queued is None:
                    continue
                _, answer = queued
                if answer.outcome is None:
                    answer.set(RewardError("the bridge was closed before this batch was scored"))
        self._jobs.put(None)

    # -- The thread itself

    def _work(self) -> None:
        while (queued := self._jobs.get()) is not None:
            job, answer = queued
            if answer.outcome is not None:  # the caller has given up on it
                continue
            try:
                answer.set(job())
            except BaseException as error:  # raised again in the thread that waits for the scores
                answer.set(error)
            self._running = None
            del queued, job, answer  # an idle thread must not keep a batch in memory

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
            self._running = Running(
                name,
                time.monotonic() + deadlines[name],
                f"did not finish learning within {deadlines[name]:g} s "
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

        self._running = Running(
            name,
            time.monotonic() + shared.deadline,
            f"did not answer within {shared.deadline:g} s (config.reward.deadline)",
        )
        for attempt in range(1, shared.retries + 2):
            start = time.monotonic()
            try:
                pixels = batch.on(shared.devices[name])
                scores = self._score_in_chunks(name, pixels, prompts, unit)
                break
            except RewardError:
                raise
            except (Exception, SystemExit) as error:  # a reward must not end the run silently
                if attempt > shared.retries or self.overdue():
                    raise RewardError(
                        f"reward {name!r} failed {attempt} times; the last error: {error!r}"
                    ) from error
            finally:
                shared.seconds[name] += time.monotonic() - start

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
            if not _is_out_of_memory(error) or len(prompts) == unit:
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


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in OUT_OF_MEMORY)
