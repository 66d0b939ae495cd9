"""A reward that runs out of memory, and the batch size."""

import numpy as np
import pytest
import torch

from reward_bridge.reward import RewardError
from tests.helpers.bridges import PROMPTS, bridge, images


def full(x, prompts):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 "
            "bytes"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_a_reward_out_of_memory_goes_on_with_half_the_images(error, caplog):
    seen = []

    def small(x, prompts):
        seen.append(len(prompts))
        if len(prompts) > 2:
            raise error
        return x.float().mean((1, 2, 3))

    both = bridge(small)
    scores = both.submit(images(7), list("abcdefg")).result().rewards
    np.testing.assert_allclose(scores["odd"], np.asarray(images(7)).mean((1, 2, 3)))
    assert seen == [7, 4, 2, 2, 2, 1]
    assert "'odd' ran out of memory on 7 images and continues with 4 at a time" in caplog.text
    both.submit(images(4), PROMPTS).result()
    assert seen[6:] == [2, 2]  # it has learnt
    assert both.batch_sizes == {"bright": 0, "odd": 2}


def test_a_reward_that_has_no_room_for_one_image_stops():
    with pytest.raises(
        RewardError, match=r"reward 'odd' failed 2 times; the last error: OutOfMemoryError"
    ):
        bridge(full, retries=1).submit(images(), PROMPTS).result()


def test_rewards_see_no_more_images_than_they_may():
    seen = []
    both = bridge(
        lambda x, p: seen.append((len(p), p[0])) or x.float().mean((1, 2, 3)), batch_size=3
    )
    scores = both.submit(images(7), list("abcdefg")).result().rewards
    assert seen == [(3, "a"), (3, "d"), (1, "g")]
    np.testing.assert_array_equal(scores["odd"], scores["bright"])


def test_a_chunk_with_too_few_scores_is_not_filled_up_by_the_next_one():
    counts = iter([2, 4])
    with pytest.raises(RewardError, match=r"'odd' returned shape \(2,\); expected \(3,\)"):
        bridge(lambda x, p: torch.ones(next(counts)), batch_size=3).submit(
            images(6), list("abcdef")
        ).result()
