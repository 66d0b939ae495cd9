"""Rewards that learn: goldens of the references, losses written out, and what all of them must hold to."""

import colorsys
import copy
import math
import re

import numpy as np
import pytest

from tests.helpers.goldens import GOLDENS, golden
from tests.helpers.tiny_clips import write_folder
from tests.reward_bridge.rewards.test_rewards_detectors import (
    HEADS,
    SIZE,
    make_case,
    photographs,
    save,
)

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch.nn import functional as F  # noqa: E402

from reward_bridge.learners import augment, dino_discriminator, make_learner, omniaid, pickscore  # noqa: E402
from reward_bridge.rewards import make_reward  # noqa: E402
from reward_bridge.weights import rename  # noqa: E402

SMALL = {**HEADS, "resize_first": 56}


def make(kind, folder, **options):
    """A tiny learner of each kind on random weights; a kind's second word picks LoRA files."""
    name = kind.split()[0]
    if name.startswith("omniaid"):
        case = make_case(name, lora="lora" in kind)
        if name == "omniaid_dino":
            options = {"size": SIZE, **options}
        torch.manual_seed(7)
        for key in case.state:  # as the SVD leaves them
            if key.endswith(("U_r", "V_r")):
                basis = torch.linalg.qr(torch.randn(32, 32)).Q[:, :29]
                case.state[key] = basis if key.endswith("U_r") else basis.T.contiguous()
        options = {**save(case.state, folder), **SMALL, **options}
    elif name == "dino_discriminator":
        options = {"path": str(write_dinov2(folder)), "size": 42, "patches": 5, **options}
    elif name == "pickscore":
        write_folder(folder)
        options = {"path": str(folder), **options}
    return make_learner(name, "cpu", options)


def write_dinov2(folder):
    torch.manual_seed(3)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "mlp_ratio": 2,
        "image_size": 42,
    }
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, patch_size=14)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


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
    """Beside e0: 3 e1 and (e0 + e1) / 2 overlap by 0, 1/sqrt 2 and 1/sqrt 2; e0 and 2 e0 by 1, three times."""
    e0, e1 = torch.eye(3)[:, :1], torch.eye(3)[:, 1:2]
    assert omniaid._overlap(e0, [3 * e1, (e0 + e1) / 2]).item() == pytest.approx(2**0.5)
    assert omniaid._overlap(e0, [e0, 2 * e0]).item() == pytest.approx(3.0)


@pytest.mark.parametrize("kind", ["omniaid", "omniaid_dino"])
def test_dropout_and_checkpointing(kind, tmp_path):
    """Dropout acts in train mode and on the experts alone; recomputing activations changes no gradient."""
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
    linear = next(m for m in model.modules() if isinstance(m, omniaid.MoELinear))
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


def test_dino_head_matches_the_golden():
    """Loss, gradients, one step of Adam, reward. The loss is of raw features there, the reward of normalised ones."""
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


def test_augmentation_by_hand():
    x = photographs(12, 10)[0].float() / 255
    for pixel, turned in zip(
        x.flatten(1).T[:20], augment.turn_hue(x, 0.3).flatten(1).T, strict=False
    ):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel.tolist())
        np.testing.assert_allclose(
            turned, colorsys.hsv_to_rgb((hue + 0.3) % 1, saturation, value), atol=1e-5
        )
    np.testing.assert_allclose(
        augment.turn_hue(torch.full((3, 2, 2), 0.4), 0.3), torch.full((3, 2, 2), 0.4)
    )

    point = torch.zeros(1, 7, 7)
    point[0, 3, 3] = 1
    g = [math.exp(-(i**2) / (2 * 0.8**2)) for i in range(-2, 3)]
    spread = augment.blur(point, 5, 0.8)[0]
    np.testing.assert_allclose(spread[1:6, 1:6], np.outer(g, g) / sum(g) ** 2, rtol=1e-5)
    assert spread.sum().item() == pytest.approx(1)
    np.testing.assert_allclose(
        augment.blur(torch.ones(3, 4, 4), 3, 2.0), torch.ones(3, 4, 4), rtol=1e-6
    )

    np.testing.assert_allclose(
        augment.grey(torch.eye(3)[:, :, None])[0, :, 0], [0.299, 0.587, 0.114], rtol=1e-6
    )
    np.testing.assert_allclose(augment.jitter(x, 0, 0, 0, 0), x, atol=1e-6)
    torch.manual_seed(0)
    for _ in range(20):  # of one even grey only the brightness can change, by 10 % at most
        value = augment.jitter(torch.full((3, 2, 2), 0.5), 0.1, 0.1, 0.1, 0.05)
        assert 0.45 - 1e-6 <= value.min() <= value.max() <= 0.55 + 1e-6
        assert value.max() - value.min() < 1e-6


def test_pictures_are_augmented_each_for_itself():
    picture = photographs(16, 16)[:1]
    torch.manual_seed(0)
    many = augment.augment(picture.expand(64, -1, -1, -1))
    assert many.dtype == torch.float32
    assert many.max() > 1  # still in 0..255
    same = sum(
        torch.allclose(x, y, atol=1e-3)
        for x in many
        for y in (picture[0].float(), picture[0].flip(-1).float())
    )
    assert 5 < same < 30  # a quarter of 64 is neither blurred nor recoloured
    assert 40 < len({x.numpy().tobytes() for x in many}) < 64
    moved = augment.mirror_and_shift(picture.expand(64, -1, -1, -1), 2)
    assert moved.dtype == torch.uint8
    assert moved.shape == (64, 3, 16, 16)
    inside = picture[0, :, 2:14, 2:14]
    found = {
        (top, left, flip)
        for x in moved
        for top in range(5)
        for left in range(5)
        for flip in (0, 1)
        if torch.equal((x.flip(-1) if flip else x)[:, top : top + 12, left : left + 12], inside)
    }
    assert len(found) > 25
    assert {flip for *_, flip in found} == {0, 1}


def test_refusals(tmp_path):
    with pytest.raises(
        ValueError, match=r"no reward 'hpsv3' that can learn; choose from dino_discriminator, "
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
