"""train.py and sample.py as a user runs them: subprocesses, files, exit codes."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file

from tests.helpers.goldens import PIPELINE
from tests.helpers.running import ROOT, call, rows

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
    assert "configs/flux_grpo.py:flux_dev_8xh200" in done.stdout
    assert not done.stderr.strip(), done.stderr  # no wall of warnings


def test_every_program_compiles_once_and_a_run_is_not_overwritten(cache, tmp_path):
    where = [f"--config.run_root={tmp_path}", "--config.run_name=run"]
    first = call("train.py", cache, *where, "--config.num_epochs=2", JAX_LOG_COMPILES="1")
    assert first.returncode == 0, first.stderr
    compiled = re.findall(
        r"Compiling jit\((\w+)\)", first.stderr
    )  # two epochs, two evaluations, each program once
    assert [compiled.count(name) for name in ("sample_call", "update", "run")] == [1, 1, 1]
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
    """The process's memory and the arrays on its device, with evaluations and checkpoints in between."""
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
    done = call(
        "train.py", cache, *options, f"--config.run_root={tmp_path}", "--config.run_name=full"
    )
    assert done.returncode == 0, done.stderr
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


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (
            1,
            "error: epoch 0, update: approx_kl, grad_norm, ",
        ),  # the second update of the epoch sees what the first did
        pytest.param(
            2,
            "error: epoch 1, rollout (velocity): latents not finite; there is no checkpoint yet",
            marks=pytest.mark.slow,
        ),
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


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--config.train.lerning_rate=1"], ["the config has no key 'lerning_rate'\nDid you mean \"learning_rate\""]),
        (["--config.num_epochs=many"], ["invalid literal for int"]),
        (["--config.sample.sde_window_size=9"], ["a window of 9 steps does not fit sde_window_range"]),
        (["--config.sample.train_batch_size=6"], ["cannot be divided into groups of num_image_per_prompt 4"]),
        (["--config.train.gradient_accumulation_steps=3"], ["must be a multiple of gradient_accumulation_steps 3"]),
        (["--config.sample.resolution=72"], ["config.sample.resolution is 72; expected a multiple of 16"]),
        (["--config.pretrained.lora=nowhere"], ["nowhere does not exist; expected a LoRA file or folder"]),
        (["--config.pretrained.dtype=bf16"], ["config.pretrained.dtype is 'bf16'; choose one of float32, bfloat16"]),
        (["--config.reward.device=cuda:7"], ["there is no device 'cuda:7': torch sees 0 CUDA devices"]),
        (
            ["--config.prompts.train=nowhere.txt", "--config.pretrained.model=nowhere", "--config.pretrained.lora=x",
             "--config.train.lora=False", "--config.eval_freq=0", "--config.evaluate.after_training=True",
             "--config.evaluate.arena.protocol=realgen"],
            ["config.prompts.train is 'nowhere.txt', which does not exist", "which holds no model_index.json",
             "config.train.lora=False trains all weights", "eval_freq 0 and save_freq 2 must be 1 or more epochs",
             "config.evaluate.arena.protocol is 'realgen', which compares with photographs"],
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named_in_one_line_and_leave_nothing(cache, tmp_path, words, messages):
    done = call("train.py", cache, *words, f"--config.run_root={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: "), done.stderr
    for message in messages:
        assert message in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_reward_has_a_device(monkeypatch):
    from realgen_jax.training.run import reward_devices

    reward = ConfigDict({"fn": {"a": 1.0, "b": 1.0}, "held_out": ("c", "d"), "device": "auto"})
    reward.devices, reward.options = (
        ConfigDict({"b": "cuda:0"}),
        ConfigDict({"c": {"servers": ("http://x:1",)}}),
    )
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert reward_devices(reward) == {"a": "cuda:3", "b": "cuda:0", "c": "cpu", "d": "cuda:3"}
    reward.devices.e = "cpu"
    with pytest.raises(
        ValueError, match=r"config\.reward\.devices names e, which is no reward of this run"
    ):
        reward_devices(reward)


def test_an_evaluation_finds_rewards_that_look_at_the_batch(monkeypatch):
    """Correlation and repeatability, of pictures 0, 1, ... and rewards made up; the last call is filled up."""
    import jax.numpy as jnp
    import torch

    from realgen_jax.sharding import make_mesh
    from realgen_jax.training.evaluation import evaluate
    from reward_bridge.bridge import RewardBridge

    value = lambda x, p: x[:, 0, 0, 0].float()  # noqa: E731
    rewards = {
        "value": value,
        "minus": lambda x, p: -value(x, p),
        "company": lambda x, p: value(x, p) - value(x, p).mean(),
        "same": lambda x, p: torch.ones(len(p)),
    }
    sample = {"test_images_per_prompt": 2, "test_batch_size": 4}
    config = ConfigDict(
        {
            "sample": sample,
            "reward": {"fn": {"value": 2.0}, "held_out": ("minus", "company", "same")},
        }
    )
    run = SimpleNamespace(
        config=config,
        test_prompts=["a", "b", "c"],
        pipe=SimpleNamespace(mesh=make_mesh(1, 1, 1, devices=jax.devices()[:1])),
        bridge=RewardBridge(rewards, dict.fromkeys(rewards, "cpu"), deadline=20, retries=0),
        metrics={"pictures": len},
        cond=lambda prompts: prompts,
        key=lambda stream: None,
    )

    def draw(trainable, cond, key, ids):
        return jnp.broadcast_to(ids[:, None, None, None], (4, 3, 2, 2)).astype("uint8")

    found = evaluate(run, SimpleNamespace(evaluate=draw), None)
    assert found.prompts == ["a", "a", "b", "b", "c", "c"]
    assert found.scores["value"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found.means["value"] == found.means["reward"] == 2.5
    assert (found.means["prompt_std"], found.means["pictures"]) == (0.5, 6)
    assert found.correlation["minus"] == pytest.approx(-1)
    assert "same" not in found.correlation  # it has no spread
    noise = {name: float(found.details[f"noise/{name}"]) for name in rewards}
    assert noise == {"value": 0, "minus": 0, "company": pytest.approx(1 / 2**0.5), "same": 0}


def test_held_out_rewards_end_a_run_after_as_many_falls_as_allowed(monkeypatch):
    from realgen_jax.training.evaluation import fallen

    def evaluations(*rows, drop=0.1, patience=2):
        """How many evaluations (held-out score, reward) until the run ends, None where it does not."""
        reward, peaks = (
            ConfigDict({"held_out": ("h",), "stop_drop": drop, "stop_patience": patience}),
            {},
        )
        for count, (held_out, trained) in enumerate(rows, start=1):
            peaks = json.loads(json.dumps(peaks))  # as a checkpoint keeps it
            if reasons := fallen(peaks, {"h": held_out, "reward": trained}, reward):
                assert reasons[0].startswith("h fell from 0.5 to ")
                return count
        return None

    assert evaluations((0.5, 0.1), (0.35, 0.2), (0.35, 0.2)) == 3
    assert (
        evaluations((0.5, 0.1), (0.35, 0.2), (0.45, 0.2), (0.35, 0.2), (0.3, 0.3)) == 5
    )  # twice in a row
    assert evaluations((0.4, 0.1), (0.5, 0.2), (0.35, 0.3), (0.35, 0.3)) == 4  # since its best
    assert evaluations((0.5, 0.1), (0.35, 0.1), (0.35, 0.05)) is None  # the reward does not rise
    assert evaluations((0.5, 0.1), (0.45, 0.2), (0.41, 0.2)) is None  # by less than the drop
    assert evaluations((0.5, 0.1), (0.1, 0.2), (0.1, 0.2), patience=0) is None  # never


def test_the_big_preset_says_what_is_missing():
    command = [
        sys.executable,
        ROOT / "scripts" / "train.py",
        "--config",
        f"{ROOT}/configs/flux_grpo.py:flux_dev_8xh200",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1
    assert "hf download black-forest-labs/FLUX.1-dev" in done.stderr
    assert "--config.pretrained.model=" in done.stderr
    assert "config.prompts.train is 'dataset/realgen/train.txt'" in done.stderr
    assert (
        "config.reward.options.forensic_chat.path is 'models/forensic_chat', which does not exist"
        in done.stderr
    )
    unknown = subprocess.run(
        [*command[:-1], f"{ROOT}/configs/flux_grpo.py:flux"], capture_output=True, text=True
    )
    assert "has no preset 'flux'; choose from tiny, tiny_adversarial" in unknown.stderr


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


def test_a_run_ends_when_held_out_rewards_fall(cache, tmp_path):
    """Trained on the pictures' JPEG size, with the detector held out, which does not care for it."""
    config = config_with(
        tmp_path,
        "c.reward.fn, c.reward.held_out = ConfigDict({'jpeg_compressibility': 1.0}), ('embedded_detector',)",
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
    """It returns NaN in the second epoch, before the first checkpoint; mended, the run is as if nothing had been, and
    as if no epoch had been traced.
    """
    folder, _ = whole
    (tmp_path / "sick.py").write_text(
        "import os\nfrom reward_bridge.rewards.embedded import EmbeddedDetector\n"
        "class Sick(EmbeddedDetector):\n"
        "    calls = 0\n"
        "    def __call__(self, images, prompts):\n"
        "        self.calls += 1\n"
        "        scores = super().__call__(images, prompts)\n"
        "        return scores * float('nan') if self.calls == int(os.environ['SICK']) else scores\n"
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
    # a picture depends on its number, not on its batch, but for what another matrix shape rounds differently
    assert np.abs(np.subtract(plain, one_call, dtype=int)).max() <= 1
    with_lora = sample("lora", "a red boat", "snow", "--per_prompt=2", "--lora", folder / "lora")
    assert any((a != b).any() for a, b in zip(plain, with_lora, strict=True))
    done = call("sample.py", cache, "--out", tmp_path / "none")
    assert done.returncode == 1
    assert "nothing to sample" in done.stderr
    typo = call(
        "sample.py", cache, "snow", "--config.sample.resolutoin=64", "--out", tmp_path / "none"
    )
    assert typo.stderr.startswith("error: the config has no key 'resolutoin'")


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
        prompts, height=64, width=64, num_inference_steps=4, guidance_scale=3.5, max_sequence_length=16,
        latents=torch.from_numpy(np.stack(noise)), output_type="np",
    ).images  # fmt: skip
    base = diffusers.FluxPipeline.from_pretrained(PIPELINE)
    base.set_progress_bar_config(disable=True)
    without = base(
        prompts, height=64, width=64, num_inference_steps=4, guidance_scale=3.5, max_sequence_length=16,
        latents=torch.from_numpy(np.stack(noise)), output_type="np",
    ).images  # fmt: skip
    assert np.abs(theirs - without).max() > 2 / 255  # the LoRA is felt
    assert np.abs(np.stack(ours) / 255.0 - theirs).max() <= 1.01 / 255
