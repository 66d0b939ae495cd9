"""What all learners have in common, the embedded one, and refusals."""

import copy
import re

import numpy as np
import pytest
import torch

from reward_bridge.learners import augment, make_learner
from reward_bridge.rewards import make_reward
from tests.helpers.pictures import photographs
from tests.helpers.random_detectors import SIZE, make_case, save
from tests.helpers.random_learners import SMALL, make

KINDS = {
    "omniaid": (r"head\.|.*_experts\.", 56),
    "omniaid lora": (r"head\.", 56),
    "omniaid_dino": (r"head\.|.*_experts\.", 56),
    "dino_discriminator": (r"head\.", 42),
    "pickscore": (r"vision_model\.encoder\.layers\.1\.", 48),
    "embedded_detector": ("", 64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_scores_learns_and_can_be_copied(kind, tmp_path):
    pattern, side = KINDS[kind]
    learner, images, prompts = make(kind, tmp_path), photographs(64, 64), ["a cat", "a dog"] * 4
    prepared = learner.prepare(images)
    assert prepared.dtype == torch.uint8
    assert prepared.shape == (8, 3, side, side)
    assert not learner.model.training
    average = copy.deepcopy(learner.model)
    with torch.inference_mode():
        scores = learner.score(average, prepared, prompts)
        alone = torch.cat(
            [learner.score(average, prepared[i : i + 1], prompts[i : i + 1]) for i in range(8)]
        )
    assert scores.dtype == torch.float32
    assert scores.std() > 1e-4
    np.testing.assert_allclose(alone, scores, rtol=1e-4, atol=1e-6)

    learner.model.train()
    torch.manual_seed(0)
    loss, metrics = learner.loss(learner.model, prepared[:4], prepared[4:], prompts[:4])
    loss.backward()
    learning = {name for name, p in learner.model.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in learner.model.named_parameters() if re.match(pattern, n)}
    for name, parameter in learner.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.dtype == torch.float32
    assert loss.shape == ()
    assert 0 <= metrics["accuracy"] <= 1
    assert not any(value.requires_grad for value in metrics.values())
    torch.manual_seed(0)
    assert torch.equal(
        learner.loss(learner.model, prepared[:4], prepared[4:], prompts[:4])[0], loss
    )

    before = [p.clone() for p in learner.model.parameters()]
    torch.optim.Adam([p for p in learner.model.parameters() if p.requires_grad], 1e-3).step()
    for old, (name, new) in zip(before, learner.model.named_parameters(), strict=True):
        assert torch.equal(old, new) or name in learning, name
    changed = sum(
        not torch.equal(o, n) for o, n in zip(before, learner.model.parameters(), strict=True)
    )
    assert changed > 0.8 * len(learning)  # an expert that no picture was routed to stays
    learner.model.eval()
    with torch.inference_mode():
        assert torch.equal(learner.score(average, prepared, prompts), scores)
        assert not torch.equal(learner.score(learner.model, prepared, prompts), scores)
        copy.deepcopy(learner.model).load_state_dict(average.state_dict())


FROZEN = {
    "omniaid": SMALL,
    "omniaid_dino": {**SMALL, "size": SIZE},
    "pickscore": {"divide_by": 26.0},
    "embedded_detector": {},
}


@pytest.mark.parametrize("kind", FROZEN)
def test_before_it_learns_the_score_is_the_frozen_rewards(kind, tmp_path):
    options, images, prompts = FROZEN[kind], photographs(53, 61), ["a cat"] * 8
    learner = make(kind, tmp_path, **options)
    path = {"pickscore": {"path": str(tmp_path)}, "embedded_detector": {}}.get(
        kind, {"path": str(tmp_path / "checkpoint-0.pth")}
    )
    reward = make_reward(kind, "cpu", {**path, **options})
    with torch.inference_mode():
        got, want = (
            learner.score(learner.model, learner.prepare(images), prompts),
            reward(images, prompts),
        )
    np.testing.assert_allclose(got, want, rtol=1e-6 if kind != "embedded_detector" else 0.05)


def test_embedded_detector_learns_from_fresh_weights():
    first, again, other = (
        make_learner("embedded_detector", "cpu", {"init": "fresh", "seed": s}) for s in (1, 1, 2)
    )
    weights = [next(x.model.parameters()) for x in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    real = first.prepare(photographs(64, 64))
    generated = torch.stack([augment.blur(x.float(), 5, 2.0) for x in real]).to(torch.uint8)
    still = make_learner("embedded_detector", "cpu", {"shift": 0, "smoothing": 0.1})
    torch.manual_seed(0)
    loss, _ = still.loss(still.model.train(), real, generated, [""] * 8)
    with torch.no_grad():
        torch.manual_seed(0)
        p = still.score(
            still.model, augment.mirror_and_shift(torch.cat([real, generated]), 0), [""] * 16
        ).double()
    want = (
        -(
            0.9 * p[:8].log()
            + 0.1 * (1 - p[:8]).log()
            + 0.1 * p[8:].log()
            + 0.9 * (1 - p[8:]).log()
        ).mean()
        / 2
    )
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    optimizer = torch.optim.AdamW(first.model.train().parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss, metrics = first.loss(first.model, real, generated, [""] * 8)
        loss.backward()
        optimizer.step()
    assert metrics["accuracy"] >= 0.8
    with torch.inference_mode():
        scores = first.score(first.model.eval(), torch.cat([real, generated]), [""] * 16)
    assert scores[:8].mean() > scores[8:].mean() + 0.3


def test_refusals(tmp_path):
    with pytest.raises(
        ValueError, match=r"there is no learner 'hpsv3'; choose from dino_discriminator, "
    ):
        make_learner("hpsv3", "cpu", {})
    with pytest.raises(ValueError, match=r"unexpected keyword argument 'layer'"):
        make_learner("embedded_detector", "cpu", {"layer": 1})
    with pytest.raises(ValueError, match=r"init 'new'; expected 'shipped' or 'fresh'"):
        make_learner("embedded_detector", "cpu", {"init": "new"})
    with pytest.raises(
        ValueError, match=r"got smoothing 0\.5; expected at least 0 and less than 0\.5"
    ):
        make("omniaid", tmp_path, smoothing=0.5)
    state = {
        key: value for key, value in make_case("omniaid").state.items() if not key.endswith("U_r")
    }
    options = {**save(state, tmp_path), **SMALL}
    with pytest.raises(ValueError, match=r"lacks U_r or V_r of tower\..*set lambda_orth to 0"):
        make_learner("omniaid", "cpu", options)
    learner = make_learner("omniaid", "cpu", {**options, "lambda_orth": 0.0})
    images = learner.prepare(photographs(64, 64))
    assert (
        learner.loss(learner.model.train(), images[:4], images[4:], [""] * 4)[1][
            "orthogonality_loss"
        ]
        == 0
    )
