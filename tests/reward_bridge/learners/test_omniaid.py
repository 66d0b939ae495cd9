"""OmniAID that learns: losses and gradients against the golden and written out."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from reward_bridge.learners import make_learner, omniaid
from reward_bridge.rewards.mixture import MoELinear
from reward_bridge.weights import rename
from tests.helpers.goldens import GOLDENS, golden
from tests.helpers.pictures import photographs
from tests.helpers.random_detectors import HEADS
from tests.helpers.random_learners import make


def test_omniaid_losses_and_gradients_match_the_golden():
    io = {
        key: torch.from_numpy(value)
        for key, value in golden("10_rewards/omniaid_clip/io.npz").items()
    }
    path = GOLDENS / "10_rewards" / "omniaid_clip" / "model.safetensors"
    learner = make_learner("omniaid", "cpu", {"path": str(path), **HEADS, "dropout": 0.0})
    model = learner.model.train()
    features = model.routing_features(io["pixel_values"])
    got = {
        "classification_loss": omniaid.soft_cross_entropy(
            model.classify(io["pixel_values"], features), True, 0.05
        ),
        "orth_loss": omniaid.orthogonality_loss(model, learner.bases),
        "balance_loss": omniaid.balance_loss(model.router(features), 2),
    }
    got["overall_loss"] = (
        got["classification_loss"] + 1e-3 * got["orth_loss"] + 0.01 * got["balance_loss"]
    )
    got["overall_loss"].backward()
    for name in got:
        np.testing.assert_allclose(got[name].detach(), io[name], rtol=1e-5, err_msg=name)
    grads = {
        key.removeprefix("grad/"): value for key, value in io.items() if key.startswith("grad/")
    }
    assert len(grads) == 5
    for name, want in rename(grads, omniaid.CLIP_TABLE, "golden").items():
        got = model.get_parameter(name).grad
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5 * want.abs().max(), err_msg=name)


def test_omniaid_loss_is_of_both_kinds_of_pictures_alike(tmp_path):
    learner = make(
        "omniaid", tmp_path, dropout=0.0, augment=False, lambda_orth=0.5, lambda_balance=0.2
    )
    images = learner.prepare(photographs(64, 64))
    model = learner.model.train()
    loss, metrics = learner.loss(model, images[:4], images[4:], [""] * 4)
    with torch.no_grad():
        logs = model(learner.reward.pixels(images)).log_softmax(-1)
        features = model.routing_features(learner.reward.pixels(images))
        routed = [model.router(x) for x in features.chunk(2)]
    (real_real, real_fake), (fake_real, fake_fake) = (
        logs[:4].mean(0).tolist(),
        logs[4:].mean(0).tolist(),
    )
    want = -(0.95 * real_real + 0.05 * real_fake + 0.05 * fake_real + 0.95 * fake_fake) / 2
    assert metrics["classification_loss"].item() == pytest.approx(want, rel=1e-5)
    balance = 0.0
    for x in routed:
        hits = np.zeros(3)
        for row in x:
            hits[np.argsort(-row.numpy())[:2]] += 1 / 4
        balance += 3 * (hits * x.softmax(-1).mean(0).numpy()).sum() / 2
    assert metrics["balance_loss"].item() == pytest.approx(balance, rel=1e-5)
    orthogonality = metrics["orthogonality_loss"].item()
    assert loss.item() == pytest.approx(want + 0.5 * orthogonality + 0.2 * balance, rel=1e-5)
    accuracy = ((logs[:4, 0] > logs[:4, 1]).sum() + (logs[4:, 0] < logs[4:, 1]).sum()) / 8
    assert metrics["accuracy"].item() == pytest.approx(accuracy.item())
    # swapped pictures: no longer the same loss
    assert learner.loss(model, images[4:], images[:4], [""] * 4)[0].item() != pytest.approx(
        loss.item(), rel=1e-3
    )


def test_orthogonality_by_hand():
    """With main direction e0: 3 e1 and (e0 + e1) / 2 overlap by 0, 1/sqrt 2 and 1/sqrt 2; e0 and
    2 e0 by 1, three times.
    """
    e0, e1 = torch.eye(3)[:, :1], torch.eye(3)[:, 1:2]
    assert omniaid._overlap(e0, [3 * e1, (e0 + e1) / 2]).item() == pytest.approx(2**0.5)
    assert omniaid._overlap(e0, [e0, 2 * e0]).item() == pytest.approx(3.0)


@pytest.mark.parametrize("kind", ["omniaid", "omniaid_dino"])
def test_dropout_and_checkpointing(kind, tmp_path):
    """Dropout acts in train mode, on the experts alone; checkpointing changes no gradient."""
    grads = []
    for checkpointing in (True, False):
        learner = make(
            kind, tmp_path, gradient_checkpointing=checkpointing, dropout=0.5, augment=False
        )
        images = learner.prepare(photographs(64, 64))
        torch.manual_seed(5)
        learner.loss(learner.model.train(), images[:4], images[4:], [""] * 4)[0].backward()
        grads.append(
            {name: p.grad for name, p in learner.model.named_parameters() if p.requires_grad}
        )
    for name, grad in grads[0].items():
        np.testing.assert_allclose(grad, grads[1][name], rtol=1e-4, atol=1e-7, err_msg=name)

    pixels, model = learner.reward.pixels(images), learner.model
    linear = next(m for m in model.modules() if isinstance(m, MoELinear))
    with torch.no_grad():
        scores = model.eval()(pixels)
        assert torch.equal(model(pixels), scores)
        x = torch.randn(8, 4, 32)
        exact = linear(x)
        linear.train()
        assert not torch.equal(linear(x), linear(x))
        linear.gates = torch.zeros_like(linear.gates)
        without_experts = linear(x)
        assert torch.equal(without_experts, linear(x))
        np.testing.assert_allclose(without_experts, F.linear(x, linear.weight_main, linear.bias))
        assert not torch.allclose(exact, without_experts)
    assert not model.train().feature_extractor.training
