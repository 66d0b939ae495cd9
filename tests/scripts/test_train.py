"""train.py and sample.py as a user runs them: subprocesses, files, exit codes."""

import json
import os
import re

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from tests.helpers.goldens import PIPELINE, ROOT, TESTS
from tests.helpers.running import call, rows

pytest.importorskip("torch")


def test_a_run_leaves_what_it_promises(whole):
    folder, done = whole
    kinds = [(row["kind"], row["epoch"]) for row in rows(folder)]
    evals, trains = [("eval", e) for e in (0, 2, 4)], [("train", e) for e in (1, 2, 3, 4)]
    assert sorted(kinds) == sorted(evals + trains)
    assert all(
        row["first_ratio_deviation"] == 0.0 for row in rows(folder) if row["kind"] == "train"
    )
    assert json.loads((folder / "config.json").read_text())["train"]["lora_rank"] == 4
    assert sorted(int(f.name) for f in (folder / "checkpoints").iterdir()) == [2, 4]
    pictures = [f"epoch_{e:06}.png" for e in (0, 2, 4)]
    assert {f.name for f in (folder / "samples").glob("*.png")} == {*pictures, "before_after.png"}
    Image.open(folder / "samples" / "before_after.png").verify()
    assert list((folder / "tensorboard").glob("events*"))
    assert (folder / "best" / "pytorch_lora_weights.safetensors").exists()
    assert load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert "preset golden" in done.stdout
    assert "best/, alarms and the early stop go by reward (config.reward.monitor)" in done.stdout
    (warning,) = [line for line in done.stdout.splitlines() if "warning" in line]
    assert "are longer than 16 tokens (config.prompts.max_tokens)" in warning
    assert "configs/flux_grpo.py:flux_dev_8xh200" in done.stdout
    assert not done.stderr.strip(), done.stderr  # no wall of warnings


@pytest.mark.slow
def test_every_program_compiles_once_and_a_run_is_not_overwritten(cache, tmp_path):
    where = [f"--config.run_root={tmp_path}", "--config.run_name=run"]
    first = call("train.py", cache, *where, "--config.num_epochs=2", JAX_LOG_COMPILES="1")
    assert first.returncode == 0, first.stderr
    compiled = re.findall(
        r"Compiling jit\((\w+)\)", first.stderr
    )  # two epochs, two evaluations, each program once
    assert [compiled.count(name) for name in ("sample_call", "update_call", "pictures")] == [
        1,
        1,
        1,
    ]
    again = call("train.py", cache, *where)
    assert again.returncode == 1
    assert "run already holds a run; continue it with --resume" in again.stderr
    other = call("train.py", cache, *where, "--resume", "--config.train.learning_rate=0.5")
    assert "config.train.learning_rate: was 0.001, is now 0.5" in other.stderr
    assert "--allow_config_change resumes anyway" in other.stderr


def test_a_lora_is_evaluated_as_it_was_at_the_end_of_its_run(whole, cache, tmp_path):
    folder, _ = whole
    words = [
        f"--config.pretrained.lora={folder / 'lora'}",
        "--config.num_epochs=0",
        f"--config.run_root={tmp_path}",
    ]
    done = call("train.py", cache, *words, "--config.run_name=eval")
    assert done.returncode == 0, done.stderr
    (found,) = rows(tmp_path / "eval")
    assert found == {**rows(folder)[-1], "epoch": 0}


@pytest.mark.slow
def test_two_hundred_epochs_leak_nothing(cache, tmp_path):
    """The process's memory and the arrays on its device, with evaluations and checkpoints in
    between.
    """
    words = ["--config.num_epochs=220", "--config.eval_freq=20", "--config.save_freq=20"]
    done = call(
        "train.py", cache, f"--config.run_root={tmp_path}", "--config.run_name=long", *words
    )
    assert done.returncode == 0, done.stderr
    lines = [
        json.loads(line) for line in (tmp_path / "long" / "metrics.jsonl").read_text().splitlines()
    ]
    used = {row["epoch"]: row for row in lines if row["kind"] == "train"}
    for where in ("host", "device"):
        early, late = (
            np.median([used[e][f"memory/{where}"] for e in range(*r)])
            for r in ((21, 121), (121, 221))
        )
        print(where, early, late)
        assert late <= 1.02 * early, where


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"data": 1, "fsdp": 2, "tensor": 2}, {"data": 4}])
def test_four_devices_do_what_one_does(whole, cache, tmp_path, mesh):
    folder, _ = whole
    words = [f"--config.run_root={tmp_path}", "--config.run_name=four", "--config.num_epochs=1"]
    words += [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    done = call("train.py", cache, *words, JAX_NUM_CPU_DEVICES="4")
    assert done.returncode == 0, done.stderr
    one, four = ([row for row in rows(f) if row["epoch"] <= 1] for f in (folder, tmp_path / "four"))
    for a, b in zip(
        one, [row for row in four if (row["kind"], row["epoch"]) != ("eval", 1)], strict=True
    ):
        assert a.keys() == b.keys()
        rounding = {"ratio_deviation", "clipfrac", "clipfrac_gt_one", "clipfrac_lt_one"}
        rounding |= {
            key for key in a if key.startswith(("correlation/", "noise/"))
        }  # of JPEG sizes, in whole bytes
        for key in a.keys() - {"kind", "epoch"} - rounding:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key
    assert [row["first_ratio_deviation"] for row in four if row["kind"] == "train"] == [0.0]


@pytest.mark.slow
def test_other_losses_and_full_fine_tuning_run(cache, tmp_path):
    options = [
        "--config.num_epochs=1",
        "--config.train.lora=False",
        "--config.train.kl=mean",
        "--config.train.loss=grpo",
    ]
    options += [
        "--config.sample.sde_type=cps",
        "--config.sample.sde_window_range=(0,3)",
        "--config.sample.same_latent=True",
    ]
    options += ["--config.train.recompute_old=True", "--config.train.learning_rate=1e-3"]
    options += [f"--config.prompts.test={TESTS / 'data' / 'train.txt'}"]
    done = call(
        "train.py", cache, *options, f"--config.run_root={tmp_path}", "--config.run_name=full"
    )
    assert done.returncode == 0, done.stderr
    shared = "warning: 4 of the 4 prompts in config.prompts.test are also in config.prompts.train, "
    assert f"{shared}such as 'a small red boat on calm water'" in done.stdout
    diffusers = pytest.importorskip("diffusers")
    trained = diffusers.FluxTransformer2DModel.from_pretrained(
        tmp_path / "full" / "lora" / "transformer"
    )
    before = diffusers.FluxTransformer2DModel.from_pretrained(PIPELINE / "transformer")
    moved = [
        (a - b).abs().max().item()
        for a, b in zip(trained.parameters(), before.parameters(), strict=True)
    ]
    assert 0 < max(moved) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("calls", "message"),
    [
        # The second update of the epoch sees what the first did.
        (1, "error: epoch 0, update: approx_kl, grad_norm, "),
        (2, "error: epoch 1, rollout (velocity): latents not finite; there is no checkpoint yet"),
    ],
)
def test_an_exploding_run_stops_and_says_where(cache, tmp_path, calls, message):
    words = [
        "--config.train.learning_rate=1e16",
        f"--config.train.gradient_accumulation_steps={calls}",
    ]
    done = call(
        "train.py", cache, *words, f"--config.run_root={tmp_path}", "--config.run_name=boom"
    )
    assert done.returncode == 1
    assert message in done.stderr
    assert "If it happens again, lower config.train.learning_rate" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_other_advantages_and_rewards_that_compare_pictures_run(cache, tmp_path):
    """A bonus is scored in evaluations too; a watched reward is in the epochs' rows only."""
    options = [
        "--config.num_epochs=1",
        "--config.train.advantages=gardo",
        "--config.reward.fn={'embedded_detector': 1.0, 'diversity': 0.5}",
        "--config.reward.batch_size=3",
        "--config.reward.watched=('diversity','jpeg_compressibility')",
    ]
    where = [f"--config.run_root={tmp_path}", "--config.run_name=gardo"]
    done = call("train.py", cache, *where, *options)
    assert done.returncode == 0, done.stderr
    evaluated, trained, _ = rows(tmp_path / "gardo")
    assert trained["diversity"] == trained["reward/diversity"] > 0
    assert trained["jpeg_compressibility"] < 0
    assert "reward/jpeg_compressibility" not in trained
    assert trained["grad_norm"] > 0
    assert evaluated["diversity"] > 0

    # What contradicts is told in one line each, before anything is loaded.
    options += ["--config.train.advantages=pareto", "--config.sample.num_image_per_prompt=16"]
    options += ["--config.sample.test_images_per_prompt=1", "--config.sample.global_std=True"]
    refused = call("train.py", cache, *where[:1], *options)
    lines = refused.stderr.strip().splitlines()
    assert refused.returncode == 1
    assert [line.startswith("error: ") for line in lines] == [True, False, False]
    assert "are not whole groups of 16" in lines[0]
    assert "config.sample.test_images_per_prompt is 1" in lines[1]
    assert "config.train.advantages is 'pareto', which never divides" in lines[2]


def test_a_mistake_is_told_in_one_line_and_leaves_nothing(cache, tmp_path):
    """tests/realgen_jax/training/test_run.py has the others; this is what a user sees."""
    words = ["--config.sample.sde_window_size=9", f"--config.run_root={tmp_path}"]
    done = call("train.py", cache, *words)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: config.sample.sde_window_size 9 does not fit")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_is_not_there_is_told_before_anything_is_loaded(tmp_path):
    """Weights & Biases without a login, and a reward whose server is not there."""
    (tmp_path / "wandb.py").write_text(
        "def init(**_):\n    raise RuntimeError('No API key configured.')\n"
    )
    (tmp_path / "served.py").write_text(
        "from ml_collections import ConfigDict\n"
        "from tests.helpers import golden_config\n"
        "def get_config():\n"
        "    c = golden_config.get_config()\n"
        "    servers = ConfigDict({'servers': ('http://127.0.0.1:9',)})\n"
        "    c.reward.options = ConfigDict({name: servers for name in c.reward.fn})\n"
        "    return c\n"
    )
    runs = f"--config.run_root={tmp_path / 'runs'}"
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    done = call("train.py", tmp_path, runs, "--config.wandb_project=p", PYTHONPATH=path)
    served = call("train.py", tmp_path, runs, config=tmp_path / "served.py", PYTHONPATH=path)
    for process in (done, served):
        assert process.returncode == 1
        assert "Traceback" not in process.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: config.wandb_project is 'p', but Weights & Biases cannot be used"
    )
    assert served.stderr.startswith("error: reward '")
    assert "server http://127.0.0.1:9: ConnectError" in served.stderr
    assert not list((tmp_path / "runs").iterdir())
    assert not (tmp_path / "text").exists()


def config_with(tmp_path, *lines):
    """A config file of its own: the golden one, with these lines run over it."""
    file = tmp_path / "config.py"
    text = [
        "import torch",
        "from tests.helpers import golden_config",
        "from ml_collections import ConfigDict",
        "from reward_bridge.rewards import REWARDS",
        "def get_config():",
        "    c = golden_config.get_config().unlock()",
        *(f"    {line}" for line in lines),
        "    return c.lock()",
    ]
    file.write_text("\n".join(text))
    return file


@pytest.mark.slow
def test_a_run_ends_when_held_out_rewards_fall(cache, tmp_path):
    """Trained on the JPEG size, with the detector held out, which does not care for it."""
    config = config_with(
        tmp_path,
        "c.reward.fn = ConfigDict({'jpeg_compressibility': 1.0})",
        "c.reward.held_out = ('embedded_detector',)",
        "c.train.learning_rate, c.train.beta, c.num_epochs = 0.05, 0.0, 24",
        "c.reward.stop_drop, c.reward.stop_patience = 0.0, 2",
    )
    done = call(
        "train.py", cache, f"--config.run_root={tmp_path}", "--config.run_name=stop", config=config
    )
    assert done.returncode == 0, done.stderr
    found = [row for row in rows(tmp_path / "stop") if row["kind"] == "eval"]
    last = found[-1]
    peak = max(found, key=lambda row: row["embedded_detector"])
    assert 4 <= last["epoch"] < 24
    for row in found[-2:]:
        assert row["embedded_detector"] < peak["embedded_detector"]
        assert row["reward"] > peak["reward"]
    assert f"stopped after {last['epoch']} epochs: embedded_detector fell from 0.99" in done.stdout
    assert (tmp_path / "stop" / "samples" / "before_after.png").exists()
    assert load_file(tmp_path / "stop" / "lora" / "pytorch_lora_weights.safetensors")


def test_a_failing_reward_stops_the_run_and_leaves_it_resumable(whole, cache, tmp_path):
    """It returns NaN in the second epoch, before the first checkpoint; mended, the run is as if
    nothing had been, and as if no epoch had been traced.
    """
    folder, _ = whole
    (tmp_path / "sick.py").write_text(
        "import os\nfrom reward_bridge.rewards.embedded import EmbeddedDetector\n"
        "class Sick(EmbeddedDetector):\n"
        "    calls = 0\n"
        "    def __call__(self, images, prompts):\n"
        "        self.calls += 1\n"
        "        scores = super().__call__(images, prompts)\n"
        "        sick = self.calls == int(os.environ['SICK'])\n"
        "        return scores * float('nan') if sick else scores\n"
    )
    lines = ("REWARDS['embedded_detector'] = 'sick:Sick'",)
    words = [f"--config.run_root={tmp_path}", "--config.run_name=sick"]
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    config = config_with(tmp_path, *lines)
    calls = 2 + 1 + 2 + 1  # the evaluation's two calls and a repeated one, the first epoch's two
    failed = call(
        "train.py",
        cache,
        *words,
        "--config.profile.steps=2",
        config=config,
        SICK=str(calls),
        PYTHONPATH=path,
    )
    assert failed.returncode == 1
    assert failed.stderr.startswith(
        "error: reward 'embedded_detector' returned nan for image 0 ("
    ), failed.stderr
    assert "Traceback" not in failed.stderr
    run = tmp_path / "sick"
    assert [row["epoch"] for row in rows(run) if row["kind"] == "train"] == [1]
    assert not (run / "checkpoints").exists()
    assert list((run / "profile" / "step_2").rglob("*.xplane.pb"))
    done = call(
        "train.py",
        cache,
        *words,
        "--resume",
        "--config.profile.steps=3",
        config=config,
        SICK="0",
        PYTHONPATH=path,
    )
    assert done.returncode == 0, done.stderr
    assert list((run / "profile" / "step_3").rglob("*.xplane.pb"))
    assert rows(run) == rows(folder)
    lora = "lora/pytorch_lora_weights.safetensors"
    assert (run / lora).read_bytes() == (folder / lora).read_bytes()


def test_sampling_with_and_without_a_lora(whole, cache, tmp_path):
    folder, _ = whole

    def sample(name, *words):
        done = call("sample.py", cache, *words, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
        return [np.asarray(Image.open(f)) for f in sorted((tmp_path / name).iterdir())]

    plain = sample("plain", "a red boat", "snow", "--per_prompt=2", "--batch=3")
    assert [p.shape for p in plain] == [(64, 64, 3)] * 4
    one_call = sample("one_call", "a red boat", "snow", "--per_prompt=2")
    # a picture depends on its number, not on its batch, but for what another matrix shape rounds
    # differently
    assert np.abs(np.subtract(plain, one_call, dtype=int)).max() <= 1
    with_lora = sample("lora", "a red boat", "snow", "--per_prompt=2", "--lora", folder / "lora")
    assert any((a != b).any() for a, b in zip(plain, with_lora, strict=True))
    done = call("sample.py", cache, "--out", tmp_path / "none")
    assert done.returncode == 1
    assert "nothing to sample" in done.stderr
    typo = call("sample.py", cache, "snow", "--config.sample.widht=64", "--out", tmp_path / "none")
    assert typo.stderr.startswith("error: the config has no key sample.widht; did you")


@pytest.mark.slow
def test_diffusers_draws_the_same_pictures(whole, cache, tmp_path):
    """The exported LoRA in diffusers' own pipeline, from the same noise, against ours."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    folder, _ = whole
    prompts = ["a red boat on calm water", "snow"]
    done = call(
        "sample.py", cache, *prompts, "--lora", folder / "lora", "--out", tmp_path, "--seed=5"
    )
    assert done.returncode == 0, done.stderr
    ours = [np.asarray(Image.open(f)) for f in sorted(tmp_path.glob("*.png"))]
    noise = [
        jax.random.normal(jax.random.fold_in(jax.random.key(5), i), (16, 64)) for i in range(2)
    ]
    pipe = diffusers.FluxPipeline.from_pretrained(PIPELINE)
    pipe.load_lora_weights(folder / "lora")
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        prompts,
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=3.5,
        max_sequence_length=16,
        latents=torch.from_numpy(np.stack(noise)),
        output_type="np",
    ).images
    base = diffusers.FluxPipeline.from_pretrained(PIPELINE)
    base.set_progress_bar_config(disable=True)
    without = base(
        prompts,
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=3.5,
        max_sequence_length=16,
        latents=torch.from_numpy(np.stack(noise)),
        output_type="np",
    ).images
    assert np.abs(theirs - without).max() > 2 / 255  # the LoRA is felt
    assert np.abs(np.stack(ours) / 255.0 - theirs).max() <= 1.01 / 255
