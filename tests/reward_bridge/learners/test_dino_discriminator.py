"""The discriminator on DINOv2 features, against the golden and the plain backbone."""

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

from reward_bridge.learners import dino_discriminator, make_learner
from tests.helpers.goldens import golden
from tests.helpers.pictures import photographs
from tests.helpers.random_learners import make, write_dinov2


def test_dino_head_matches_the_golden():
    """Loss, gradients, one step of Adam, reward.

    In the source, the loss is of raw features and the reward of normalised ones.
    """
    io = {
        key: torch.from_numpy(value)
        for key, value in golden("11_adversarial/dino_patch.npz").items()
    }
    head = dino_discriminator.make_head(24, 0)

    def named(prefix):
        return {
            k.removeprefix(f"{prefix}/layers."): v
            for k, v in io.items()
            if k.startswith(f"{prefix}/")
        }

    head.load_state_dict(named("head"))
    whole, patches = dino_discriminator.logits(
        head, dino_discriminator.unit(io["features_fake"]), io["reward_patch_index"]
    )
    np.testing.assert_allclose(whole.detach(), io["reward_cls"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(patches.detach(), io["reward_patch"], rtol=1e-5, atol=1e-6)
    reward = dino_discriminator.discriminator_reward(
        head, dino_discriminator.unit(io["features_fake"]), io["reward_patch_index"], 0.3
    )
    np.testing.assert_allclose(reward.detach(), io["reward"], rtol=1e-5, atol=1e-6)
    loss, metrics = dino_discriminator.hinge_loss(
        head,
        (io["features_real"], io["features_fake"]),
        (io["patch_index_real"], io["patch_index_fake"]),
        0.3,
    )
    assert loss.item() == pytest.approx(io["loss"].item(), rel=1e-6)
    assert metrics["accuracy"].item() == pytest.approx(io["accuracy"].item())
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-4, betas=(0.5, 0.999))
    loss.backward()
    for name, want in named("grad").items():
        np.testing.assert_allclose(
            head.get_parameter(name).grad, want, rtol=1e-3, atol=1e-7, err_msg=name
        )
    optimizer.step()
    for name, want in named("head_after").items():  # of the largest array the first rows are kept
        found = head.get_parameter(name).detach()[: len(want)]
        np.testing.assert_allclose(found, want, atol=2.5e-5, rtol=0, err_msg=name)


def test_dino_features_are_the_models_and_normalised_for_both(tmp_path):
    write_dinov2(tmp_path)
    backbone = transformers.Dinov2Model.from_pretrained(tmp_path).eval()
    images = photographs(42, 42)
    mean, std = (
        torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    with torch.no_grad():
        want = backbone((images / 255 - mean) / std).last_hidden_state
    for normalize in (True, False):
        learner = make("dino_discriminator", tmp_path, normalize=normalize)
        got = learner.features(learner.model.train(), images)
        np.testing.assert_allclose(
            got, F.normalize(want, dim=-1) if normalize else want, rtol=1e-3, atol=1e-5
        )
        with torch.no_grad():
            index = torch.stack([dino_discriminator.patches_of(x, 0, 9, 5) for x in images])
            whole, patches = dino_discriminator.logits(learner.model.head, got, index)
            score = learner.score(learner.model.eval(), images, [""] * 8)
        np.testing.assert_allclose(score, 0.7 * whole + 0.3 * patches.mean(1), rtol=1e-4, atol=1e-6)


def test_the_patches_of_a_score_follow_from_picture_and_seed(tmp_path):
    pictures = photographs(42, 42)
    drawn = [dino_discriminator.patches_of(x, 1, 1000, 64).tolist() for x in pictures]
    assert len({tuple(x) for x in drawn}) == 8
    torch.manual_seed(123)  # the global generator has no say, nor has the company
    assert [
        dino_discriminator.patches_of(x, 1, 1000, 64).tolist() for x in pictures.flip(0)
    ] == drawn[::-1]
    assert dino_discriminator.patches_of(pictures[0], 2, 1000, 64).tolist() != drawn[0]
    changed = pictures[0].clone()
    changed[0, 0, 0] += 1
    assert dino_discriminator.patches_of(changed, 1, 1000, 64).tolist() != drawn[0]

    first, second, other = (make("dino_discriminator", tmp_path, seed=seed) for seed in (1, 1, 2))
    with torch.inference_mode():
        scores = [x.score(x.model, pictures, [""] * 8) for x in (first, second, other)]
        assert torch.equal(scores[0], scores[1])
        assert not torch.allclose(scores[0], scores[2])
        other.model.load_state_dict(first.model.state_dict())  # the patches alone differ
        patched = other.score(other.model, pictures, [""] * 8)
    assert not torch.equal(patched, scores[0])


def test_dino_reads_published_names_and_refuses_what_does_not_fit(tmp_path):
    model = dino_discriminator.load_dinov2(str(write_dinov2(tmp_path)), "dino_discriminator.path")
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in (
            ("q_proj", "attention.query"),
            ("k_proj", "attention.key"),
            ("v_proj", "attention.value"),
        ):
            key = key.replace(ours, theirs)
        state[key.replace("o_proj", "output.dense")] = value
    assert "encoder.layer.1.attention.attention.query.weight" in state
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    again = dino_discriminator.load_dinov2(str(tmp_path), "dino_discriminator.path").state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"size 40; expected a multiple of the patch size 14"):
        make_learner("dino_discriminator", "cpu", {"path": str(tmp_path), "size": 40})
    torch.save(
        {k: v for k, v in state.items() if k != "layernorm.bias"}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(ValueError, match=r"1 keys missing, such as 'layernorm\.bias'"):
        make_learner("dino_discriminator", "cpu", {"path": str(tmp_path), "size": 42})
