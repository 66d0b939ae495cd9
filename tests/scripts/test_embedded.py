"""The model and the rewards that ship with the package, and the demo that trains them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from realgen_jax.config_files import load_config
from realgen_jax.nn.tokens import unpack
from tests.helpers.goldens import ROOT, golden

torch = pytest.importorskip("torch")

from torch.nn import functional as F  # noqa: E402

from reward_bridge.learners import make_learner  # noqa: E402
from reward_bridge.learners.dino_discriminator import hinge_loss, logits  # noqa: E402
from reward_bridge.metrics import EmbeddedFrechet, frechet_distance, make_metric  # noqa: E402
from reward_bridge.rewards import make_reward  # noqa: E402

EMBEDDED = ROOT / "realgen_jax" / "embedded"
CHECKS = ("embedded_detector", "embedded_held_out", "embedded_prompt_accuracy", "embedded_frechet")
SUBJECTS = json.loads((ROOT / "reward_bridge" / "embedded" / "subjects.json").read_text())


@pytest.fixture(scope="module")
def photographs():
    """Four crops of each photograph, as training saw them (none of these four): uint8 [64, 3, 64,
    64].
    """
    return torch.from_numpy(golden("photographs.npz")["pixels"])


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Two pictures of each test prompt by the embedded model: uint8 [64, 3, 64, 64] and the
    prompts.
    """
    out = tmp_path_factory.mktemp("pictures")
    file = EMBEDDED / "prompts_test.txt"
    command = [
        sys.executable,
        ROOT / "scripts" / "sample.py",
        "--prompts",
        file,
        "--per_prompt=2",
        "--batch=64",
        "--out",
        out,
    ]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    pictures = [np.asarray(Image.open(f)).transpose(2, 0, 1) for f in sorted(out.iterdir())]
    return torch.from_numpy(np.stack(pictures)), [
        p for p in file.read_text().splitlines() for _ in range(2)
    ]


def test_the_package_stays_small():
    folders = (EMBEDDED, ROOT / "reward_bridge" / "embedded")
    files = [f for folder in folders for f in folder.rglob("*")]
    assert sum(f.stat().st_size for f in files if f.is_file() and not f.is_symlink()) < 29e6
    for name in ("flux_tiny", "sd3_tiny", "flux_words"):
        (weights,) = (EMBEDDED / name / "transformer").glob("*.safetensors")
        assert 1.5e6 < weights.stat().st_size / 2 < 3e6


@pytest.mark.parametrize(
    ("folder", "most"),
    [(EMBEDDED / "sd3_tiny", 6e6), (ROOT / "reward_bridge" / "embedded" / "dino", 1e6)],
)
def test_the_folders_of_sd3_and_of_its_reward_stay_small(folder, most):
    """SD3's autoencoder is that of FLUX, by links."""
    files = [f for f in folder.rglob("*") if f.is_file() and not f.is_symlink()]
    assert most / 2 < sum(f.stat().st_size for f in files) < most


def test_photographs_are_told_from_the_models_pictures(photographs, generated):
    pictures, prompts = generated
    captions = [f"a photo of {subject}" for subject in SUBJECTS for _ in range(4)]
    for name in ("embedded_detector", "embedded_held_out"):
        score = make_reward(name, "cpu", {})
        assert score(photographs, captions).mean() > 0.7
        assert score(pictures, prompts).mean() < 0.5
    accuracy = make_reward("embedded_prompt_accuracy", "cpu", {})
    assert accuracy(photographs, captions).mean() > 0.95
    assert accuracy(photographs, captions[::-1]).mean() < 0.1
    with pytest.raises(
        ValueError,
        match=r"prompt 'a dog' names 0 of the embedded subjects; expected one of: an astro",
    ):
        accuracy(photographs, ["a dog"] * 64)
    clip = make_reward(
        "clip_score", "cpu", {"path": str(ROOT / "reward_bridge" / "embedded" / "clip")}
    )
    assert clip(photographs, captions).mean() > clip(photographs, captions[::-1]).mean() + 1
    frechet = EmbeddedFrechet("cpu")
    assert (
        frechet(photographs.numpy())
        < frechet(pictures.numpy())
        < frechet((photographs // 2).numpy())
    )


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4, 4))
    cov = a @ a.T
    assert frechet_distance(np.zeros(4), cov, np.zeros(4), cov) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(np.zeros(4), np.eye(4), np.full(4, 2.0), np.eye(4)) == pytest.approx(16)
    assert frechet_distance(
        np.zeros(2), np.diag([4.0, 9.0]), np.zeros(2), np.diag([1.0, 1.0])
    ) == pytest.approx(1 + 4)
    with pytest.raises(ValueError, match="there is no metric 'fid'; choose from embedded_frechet"):
        make_metric("fid", "cpu", {})


def test_diffusers_loads_the_pipeline(generated):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.FluxPipeline.from_pretrained(EMBEDDED / "flux_tiny", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    import jax

    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (16, 64))
    theirs = pipe(
        generated[1][:1],
        height=64,
        width=64,
        num_inference_steps=10,
        guidance_scale=3.5,
        max_sequence_length=16,
        latents=torch.from_numpy(np.array(noise)[None]),
        output_type="np",
    ).images[0]
    ours = generated[0][0].permute(1, 2, 0).numpy() / 255
    assert np.abs(theirs - ours).max() <= 1.01 / 255


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """A picture of each test prompt by the guided SD3: uint8 [32, 3, 64, 64] and the prompts."""
    out = tmp_path_factory.mktemp("guided")
    file = EMBEDDED / "prompts_test.txt"
    command = [sys.executable, ROOT / "scripts" / "sample.py", "--prompts", file, "--out", out]
    command += ["--config", ROOT / "configs" / "embedded.py:tiny_sd3", "--batch=32"]
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
    pictures = [np.asarray(Image.open(f)).transpose(2, 0, 1) for f in sorted(out.iterdir())]
    return torch.from_numpy(np.stack(pictures)), file.read_text().splitlines()


def test_every_prompt_is_recognised_in_sd3s_picture(guided):
    accuracy = make_reward("embedded_prompt_accuracy", "cpu", {})
    assert accuracy(*guided).mean() >= 0.97


def test_diffusers_draws_sd3s_pictures(guided):
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        EMBEDDED / "sd3_tiny", dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    import jax

    config = load_config(f"{ROOT}/configs/embedded.py:tiny_sd3")
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), 0), (16, 64))
    theirs = pipe(
        guided[1][:1],
        height=64,
        width=64,
        num_inference_steps=config.evaluate.sample.num_steps,
        guidance_scale=config.evaluate.sample.guidance_scale,
        max_sequence_length=config.prompts.max_tokens,
        latents=torch.from_numpy(np.array(unpack(noise[None], 4, 4)).transpose(0, 3, 1, 2)),
        output_type="np",
    ).images[0]
    ours = guided[0][0].permute(1, 2, 0).numpy() / 255
    assert np.abs(theirs - ours).max() <= 1.01 / 255


def test_the_discriminator_on_the_embedded_dino_learns_sharpness(photographs):
    """A hundred steps tell photographs from blurred ones, by both kinds of tokens."""
    path = str(ROOT / "reward_bridge" / "embedded" / "dino")
    learner = make_learner("dino_discriminator", "cpu", {"path": path, "size": 64})
    blurred = F.avg_pool2d(photographs.float(), 3, 1, 1, count_include_pad=False).byte()
    features = learner.features(learner.model, torch.cat([photographs, blurred]))
    pairs = torch.stack([features[:64], features[64:]])

    head = learner.model.head
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    index = torch.arange(64).expand(32, 64)
    for _ in range(100):
        loss, _ = hinge_loss(head, pairs[:, ::2], (index, index), 0.3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # Crops that were not trained on.
    with torch.no_grad():
        for tokens in zip(*(logits(head, half[1::2], index) for half in pairs), strict=True):
            sharp, soft = tokens
            assert sharp.mean() > soft.mean() + 0.5


def demo(tmp_path, *words, preset="tiny"):
    """train.py as README names it: (evaluations by epoch, standard output)."""
    config = f"{ROOT}/configs/flux_grpo.py:{preset}"
    command = [sys.executable, ROOT / "scripts" / "train.py", "--config", config, *words]
    command += [f"--config.run_root={tmp_path}", "--config.run_name=demo"]
    done = subprocess.run(
        [str(w) for w in command], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    rows = [
        json.loads(line) for line in (tmp_path / "demo" / "metrics.jsonl").read_text().splitlines()
    ]
    ratios = [row["first_ratio_deviation"] for row in rows if "first_ratio_deviation" in row]
    assert not any(ratios)
    assert ratios or preset == "tiny_awm"  # whose ratios are 1 by definition
    return {row["epoch"]: row for row in rows if row["kind"] == "eval"}, done.stdout


def test_a_short_demo_learns(tmp_path):
    evals, stdout = demo(tmp_path, "--config.num_epochs=3")
    assert evals[3]["embedded_detector"] > evals[0]["embedded_detector"] + 0.02
    assert evals[3]["embedded_prompt_accuracy"] >= 0.95
    page = tmp_path / "demo" / "report" / "index.html"
    assert stdout.splitlines()[-1] == f"report: {page}"
    assert all(
        f'<section id="{part}">' in page.read_text() for part in ("curves", "pairs", "arena")
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "seed"), [("tiny", 0), ("tiny", 1), ("tiny", 2), ("tiny_awm", 0)]
)
def test_the_demo_reaches_its_figures(tmp_path, preset, seed):
    """The reward rises and nothing that is not trained on pays for it."""
    evals, stdout = demo(tmp_path, f"--config.seed={seed}", preset=preset)
    start, end = evals[0], evals[max(evals)]
    print({name: (start[name], end[name]) for name in CHECKS})
    assert end["embedded_detector"] >= start["embedded_detector"] + 0.15
    assert end["embedded_held_out"] >= start["embedded_held_out"] + 0.05
    assert end["embedded_prompt_accuracy"] >= 0.95
    assert end["embedded_frechet"] <= start["embedded_frechet"]
    assert "warning" not in stdout


@pytest.mark.slow
def test_a_detector_that_learns_is_not_fooled(tmp_path):
    """Nothing but the detector keeps the generator near the photographs: frozen it is fooled,
    learning it is not. benchmarks/adversarial.py has three seeds of the whole preset.
    """
    found = {}
    for name, words in (("learning", []), ("frozen", ["--config.reward.adversarial={}"])):
        words += ["--config.evaluate.after_training=False"]
        (tmp_path / name).mkdir()
        evals, _ = demo(tmp_path / name, *words, preset="tiny_adversarial")
        found[name] = evals[max(evals)]
        start = evals[0]
    print({name: {check: end[check] for check in CHECKS} for name, end in found.items()})
    learning, frozen = found["learning"], found["frozen"]
    assert learning["embedded_frechet"] < start["embedded_frechet"]
    assert learning["embedded_frechet"] < frozen["embedded_frechet"] / 2
    assert learning["embedded_prompt_accuracy"] >= max(0.99, frozen["embedded_prompt_accuracy"])
    assert learning["clip_score"] > max(start["clip_score"], frozen["clip_score"])
    assert (
        learning["embedded_held_out"] > start["embedded_held_out"] + 0.05
    )  # neither run trains this one


@pytest.mark.slow
def test_references_of_another_style_are_followed(tmp_path):
    evals, _ = demo(tmp_path, "--config.evaluate.after_training=False", preset="tiny_soft")
    print(
        {
            epoch: (row["embedded_sharpness"], row["embedded_prompt_accuracy"])
            for epoch, row in evals.items()
        }
    )
    assert evals[60]["embedded_sharpness"] < 0.92 * evals[0]["embedded_sharpness"]
    assert evals[60]["embedded_prompt_accuracy"] >= 0.95
