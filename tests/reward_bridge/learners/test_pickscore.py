"""PickScore that learns, against the golden and the loss written out."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from reward_bridge.learners import make_learner, pickscore
from tests.helpers.goldens import golden
from tests.helpers.pictures import photographs
from tests.helpers.random_learners import make


def test_pickscore_loss_matches_the_golden():
    io = {
        key: torch.from_numpy(value)
        for key, value in golden("11_adversarial/pickscore.npz").items()
    }
    generated = io["image_generated"].requires_grad_(True)
    loss, metrics = pickscore.preference_loss(
        io["text_features"], io["image_reference"], generated, io["logit_scale"]
    )
    loss.backward()
    assert loss.item() == pytest.approx(io["loss"].item(), rel=1e-5)
    np.testing.assert_allclose(generated.grad, io["grad_image_generated"], rtol=1e-4, atol=1e-6)
    wins = (io["text_features"] * (io["image_reference"] - generated.detach())).sum(1) > 0
    assert metrics["accuracy"].item() == pytest.approx(wins.float().mean().item())


def test_pickscore_learns_that_references_win(tmp_path):
    learner = make("pickscore", tmp_path, divide_by=26.0)
    images, prompts = learner.prepare(photographs(48, 48)), ["cat", "dog", "cat", "owl"]
    with torch.no_grad():
        scores = learner.score(learner.model, images, prompts * 2)
    margin = 26 * (scores[:4] - scores[4:])  # the loss does not know of divide_by
    loss, metrics = learner.loss(learner.model.train(), images[:4], images[4:], prompts)
    assert loss.item() == pytest.approx(F.softplus(-margin).mean().item(), rel=1e-4)
    assert metrics["accuracy"].item() == pytest.approx((margin > 0).float().mean().item())
    optimizer = torch.optim.AdamW([p for p in learner.model.parameters() if p.requires_grad], 1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss, metrics = learner.loss(learner.model, images[:4], images[4:], prompts)
        loss.backward()
        optimizer.step()
    assert metrics["accuracy"] == 1
    with pytest.raises(ValueError, match=r"got pickscore\.layers 3; expected 1 to 2"):
        make_learner("pickscore", "cpu", {"path": str(tmp_path), "layers": 3})
