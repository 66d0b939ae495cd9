"""Scores pictures in threads of its own, so that the next rollout runs meanwhile; a failing reward stops the step."""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import numpy as np
import torch


class Reward(Protocol):
    """Higher is better. A reward may be any callable of this form; `name` is its key in the config."""

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """uint8 [n, 3, h, w] and n prompts -> float32 [n]."""


@runtime_checkable
class TrainableReward(Reward, Protocol):
    """A reward that learns from what it scored (reward_bridge/adversary.py). A frozen one has none of this."""

    def draw(self, prompts: Sequence[str], seed: int, height: int, width: int) -> torch.Tensor:
        """Reference pictures for generated ones of this size: uint8 [n, 3, s, s]."""

    def observe(self, real: torch.Tensor, generated: torch.Tensor, prompts: Sequence[str]) -> None:
        """Keep n pairs until the next update."""

    def update(self, seed: int) -> dict[str, float]:
        """Learn from what was observed since the last one; its metrics."""


class RewardError(RuntimeError):
    """A reward failed for good. The step that asked for it must not be trained on."""

    image: int | None = None  # of the batch, where it is about one


class RewardBridge:
    """Scores batches with rewards, each on the device that `devices` names for it.

    Rewards on one GPU take turns, batch by batch, so that none waits for more than its neighbours' work; every GPU,
    and every reward on the CPU or behind HTTP, has a thread of its own. Pictures reach a device once for all its
    rewards.

    A reward that raises is tried `retries` more times, one that runs out of memory goes on with half the images at a
    time. One that still raises, has not answered `deadline` seconds after it was first asked, or returns anything but n
    finite numbers ends the batch with a RewardError. Nothing is made up in its place. `batch_size` is the most images a
    reward sees at once; 0: all.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        devices: Mapping[str, str],
        *,
        deadline: float,
        retries: int,
        batch_size: int = 0,
    ):
        self.rewards, self.devices = dict(rewards), {name: devices[name] for name in rewards}
        self.deadline, self.retries = deadline, retries
        self.batch_sizes = dict.fromkeys(rewards, batch_size)  # halved where memory runs out
        self.seconds = dict.fromkeys(rewards, 0.0)  # of scoring, so far
        self._closed = False
        lane = {
            name: device if device.startswith("cuda") else name
            for name, device in self.devices.items()
        }
        self._lanes = {
            key: _Lane(self, [name for name in rewards if lane[name] == key])
            for key in dict.fromkeys(lane.values())
        }

    def submit(
        self,
        images: "torch.Tensor | jax.Array",  # noqa: F821
        prompts: Sequence[str],
        only: Sequence[str] | None = None,
        observe: int | None = None,
    ) -> "PendingScores":
        """Queue uint8 images [n, 3, h, w]; `only` names the rewards to run (default: all). Returns at once.

        `observe`: have rewards that learn observe the batch, beside references drawn with this seed, which they score
        too, as "NAME/references".

        The images may still be computed, and may be spread over several devices. Of an array that is spread over
        several processes, this one's images are scored, and theirs are the prompts.
        """
        count = images.shape[0]
        if not isinstance(images, torch.Tensor) and not images.is_fully_addressable:
            count = sum(
                len(shard.data) for shard in images.addressable_shards if shard.replica_id == 0
            )
        if len(prompts) != count:
            raise ValueError(
                f"got {count} images and {len(prompts)} prompts; expected as many of each"
            )
        if self._closed:
            raise RuntimeError("the bridge was closed; it scores nothing more")
        names, shared = list(self.rewards) if only is None else list(only), _Images(images)
        answers, done = {}, queue.SimpleQueue()
        for lane in self._lanes.values():
            if wanted := [name for name in lane.names if name in names]:
                answers[lane] = _Answer(done)
                lane.queue.put(
                    (partial(lane.score, shared, list(prompts), wanted, observe), answers[lane])
                )
        if observe is not None:
            names += [
                f"{name}/references"
                for name in names
                if isinstance(self.rewards[name], TrainableReward)
            ]
        return PendingScores(answers, done, names)

    def learn(self, seeds: Mapping[str, int], deadlines: Mapping[str, float]) -> "PendingScores":
        """Have rewards update themselves, each with its seed, after what is queued; the result is their metrics."""
        answers, done = {}, queue.SimpleQueue()
        for lane in self._lanes.values():
            if wanted := {name: seeds[name] for name in lane.names if name in seeds}:
                answers[lane] = _Answer(done)
                lane.queue.put((partial(lane.learn, wanted, deadlines), answers[lane]))
        return PendingScores(answers, done, list(seeds))

    def stuck(self) -> list[str]:
        """Rewards that are past their deadline and still have not answered: their device scores nothing more."""
        return [name for lane in self._lanes.values() if (name := lane.overdue())]

    def close(self, wait: float = 10.0) -> None:
        """Drop what is queued, whose results then raise, and give the rewards at work `wait` seconds to finish. For the
        end of the process, which a thread that is still inside torch can crash.
        """
        end, self._closed = time.monotonic() + wait, True
        for lane in self._lanes.values():
            lane.stop()
        for lane in self._lanes.values():
            lane.thread.join(max(0.0, end - time.monotonic()))


class _Answer:
    """What a lane finds: {reward: scores or metrics}, the error instead, or None for as long as neither is there.

    No Future: an interrupt can leave its lock held, and whoever asks for it next then waits for ever. Here the caller's
    thread takes no lock but those inside SimpleQueue, which no interrupt divides.
    """

    def __init__(self, done: queue.SimpleQueue):
        self.found: dict[str, np.ndarray] | BaseException | None = None
        self._done = done

    def set(self, found: dict[str, np.ndarray] | BaseException) -> None:
        self.found = found
        self._done.put(None)


class PendingScores:
    """The scores of one submitted batch, once they are there. `done` wakes who waits, once for each answer."""

    def __init__(
        self, answers: Mapping["_Lane", _Answer], done: queue.SimpleQueue, names: Sequence[str]
    ):
        self._answers, self._done, self._names = answers, done, names

    def result(self) -> dict[str, np.ndarray]:
        """{reward: float32 [n]}. Raises RewardError naming the reward that failed or ran past its deadline; what of
        the batch is still queued is then dropped.
        """
        try:
            self.raise_if_failed()
            while any(answer.found is None for answer in self._answers.values()):
                with contextlib.suppress(queue.Empty):
                    self._done.get(timeout=0.05)
                self.raise_if_failed()
        except BaseException:
            for answer in self._answers.values():
                if answer.found is None:
                    answer.set(
                        RewardError("this batch was dropped: waiting for its scores was given up")
                    )
            raise
        scores = {
            name: score for answer in self._answers.values() for name, score in answer.found.items()
        }
        return {name: scores[name] for name in self._names}

    def raise_if_failed(self) -> None:
        """As `result`, without waiting."""
        for lane, answer in self._answers.items():
            found = answer.found
            if isinstance(found, BaseException):
                raise found
            if found is None:
                lane.check_deadline()


class _Images:
    """A batch that is brought to each device once, when the first of its rewards asks for it."""

    def __init__(self, images: "torch.Tensor | jax.Array"):  # noqa: F821
        self._images, self._lock, self._on = images, threading.Lock(), {}

    def wait(self) -> None:
        if not isinstance(self._images, torch.Tensor):
            self._images.block_until_ready()

    def on(self, device: str) -> torch.Tensor:
        with self._lock:
            if device not in self._on:
                if isinstance(self._images, torch.Tensor):
                    self._on[device] = self._images.to(device)
                else:
                    from reward_bridge.dlpack import (
                        gather,
                    )  # here, so that a server of rewards runs without jax

                    self._on[device] = gather(self._images, device)
            return self._on[device]


class _Lane:
    """One thread and its queue of batches."""

    def __init__(self, bridge: RewardBridge, names: Sequence[str]):
        self.bridge, self.names = bridge, names
        self.queue: queue.SimpleQueue = queue.SimpleQueue()
        # the reward at work, when its deadline passes, the complaint
        self._running: tuple[str, float, str] | None = None
        # a daemon: a reward that hangs must not keep the process from ending
        self.thread = threading.Thread(
            target=self._work, name=f"reward-bridge {', '.join(names)}", daemon=True
        )
        self.thread.start()

    def overdue(self) -> str | None:
        """The reward at work, where it is past its deadline."""
        running = self._running
        return running[0] if running is not None and time.monotonic() > running[1] else None

    def check_deadline(self) -> None:
        running = self._running
        if running is not None and self.overdue():
            raise RewardError(
                f"reward {running[0]!r} {running[2]}; is its device busy, or the deadline too short for this batch?"
            )

    def stop(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                work = self.queue.get_nowait()
                if work is not None and work[-1].found is None:
                    work[-1].set(RewardError("the bridge was closed before this batch was scored"))
        self.queue.put(None)

    def _work(self) -> None:
        while (work := self.queue.get()) is not None:
            job, answer = work
            if answer.found is not None:  # nobody waits for it any more
                continue
            try:
                answer.set(job())
            except BaseException as error:  # handed to whoever waits for the scores
                answer.set(error)
            self._running = None
            del work, job, answer  # a waiting thread must not hold a batch's memory

    def score(
        self, images: _Images, prompts: list[str], names: Sequence[str], observe: int | None
    ) -> dict:
        """{reward: float32 [n]}, those of references too where rewards that learn are to observe the batch."""
        images.wait()  # a reward's deadline does not count the rollout
        scores = {name: self._score(name, images, prompts) for name in names}
        for name in names if observe is not None else ():
            reward, generated = self.bridge.rewards[name], images.on(self.bridge.devices[name])
            if isinstance(reward, TrainableReward):
                real = reward.draw(prompts, observe, *generated.shape[2:])
                scores[f"{name}/references"] = self._score(name, _Images(real), prompts)
                reward.observe(real, generated, prompts)
        return scores

    def learn(
        self, seeds: Mapping[str, int], deadlines: Mapping[str, float]
    ) -> dict[str, dict[str, float]]:
        """{reward: metrics of its update}. No second try: the first one has changed it already."""
        found = {}
        for name, seed in seeds.items():
            late = f"has not finished learning for {deadlines[name]:g} s (config.reward.adversarial.{name}.deadline)"
            self._running = (name, time.monotonic() + deadlines[name], late)
            try:
                found[name] = self.bridge.rewards[name].update(seed)
            except Exception as error:
                raise RewardError(f"reward {name!r} failed to learn: {error!r}") from error
        return found

    def _score(self, name: str, images: _Images, prompts: list[str]) -> np.ndarray:
        """One reward's scores of a batch: retried, and checked."""
        late = f"has not answered for {self.bridge.deadline:g} s (config.reward.deadline)"
        self._running = (name, time.monotonic() + self.bridge.deadline, late)
        for attempt in range(self.bridge.retries + 1):
            start = time.monotonic()
            try:
                scores = self._in_chunks(name, images.on(self.bridge.devices[name]), prompts)
                break
            except RewardError:
                raise
            except (Exception, SystemExit) as error:  # no reward ends the run without a word
                if attempt == self.bridge.retries or self.overdue():
                    raise RewardError(
                        f"reward {name!r} failed {attempt + 1} times; the last time: {error!r}"
                    ) from error
            finally:
                self.bridge.seconds[name] += time.monotonic() - start
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            error = RewardError(
                f"reward {name!r} returned {scores[bad]} for image {bad} ({prompts[bad]!r})"
            )
            error.image = bad
            raise error
        return scores

    def _in_chunks(self, name: str, pixels: torch.Tensor, prompts: list[str]) -> np.ndarray:
        """As many images at once as the reward's batch size says, half of that from where memory runs out."""
        scores = np.empty(len(prompts), np.float32)
        start = 0
        while start < len(prompts):
            rows = slice(start, start + (self.bridge.batch_sizes[name] or len(prompts)))
            chunk = prompts[rows]
            try:
                with torch.inference_mode():
                    found = self.bridge.rewards[name](pixels[rows], chunk)
                found = (
                    torch.as_tensor(found).to("cpu", torch.float32).numpy()
                )  # a GPU's errors surface here
            except Exception as error:
                if not _out_of_memory(error) or len(chunk) == 1:
                    raise
                found = None  # the memory that the error's traceback holds is free after this block only
            if found is None:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self.bridge.batch_sizes[name] = (len(chunk) + 1) // 2
                logging.getLogger(__name__).warning(
                    "reward %r ran out of memory on %d images and goes on with %d at a time; "
                    "config.reward.batch_size sets that from the start",
                    name, len(chunk), self.bridge.batch_sizes[name],
                )  # fmt: skip
                continue
            if found.shape != (len(chunk),):
                raise RewardError(
                    f"reward {name!r} returned shape {found.shape}; expected ({len(chunk)},), one per image"
                )
            scores[rows] = found
            start += len(chunk)
        return scores


def _out_of_memory(error: Exception) -> bool:
    """torch has a class for a full GPU only; the CPU's allocator and cuBLAS tell it in words."""
    words = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        word in str(error) for word in words
    )


def resolve(device: str) -> str:
    """A torch device by name; "auto" is the last GPU that torch sees, or the CPU where it sees none.

    Raises ValueError for a GPU that is not there.
    """
    count = torch.cuda.device_count()
    if device == "auto":
        return f"cuda:{count - 1}" if count else "cpu"
    kind, _, index = device.partition(":")
    if kind == "cuda":
        if int(index or 0) >= count:
            raise ValueError(
                f"there is no device {device!r}: torch sees {count} CUDA devices on this machine"
            )
        return f"cuda:{int(index or 0)}"
    if device != "cpu":
        raise ValueError(f"got device {device!r}; expected auto, cpu, or a GPU such as cuda:0")
    return device
