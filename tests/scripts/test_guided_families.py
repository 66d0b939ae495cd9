"""SD3 and Z-Image through the real programs: killed and resumed, exported, drawn by diffusers."""

import signal

import jax
import numpy as np
import pytest
from PIL import Image

from realgen_jax.nn.tokens import unpack
from tests.helpers.goldens import GOLDENS
from tests.helpers.running import GOLDEN, begin, call, command, epochs_done, rows, until

pytest.importorskip("torch")

FAMILIES = ("sd3", "zimage")
PIPELINES = {"sd3": GOLDENS / "12_sd3" / "pipeline", "zimage": GOLDENS / "13_zimage" / "pipeline"}
LORA = "lora/pytorch_lora_weights.safetensors"
slow = pytest.mark.slow


def options(tmp_path, name, *words):
    return (f"--config.run_root={tmp_path}", f"--config.run_name={name}", *words)


def train(family, cache, tmp_path, name, *words):
    config = f"{GOLDEN}:{family}"
    done = call("train.py", cache, *options(tmp_path, name, *words), config=config)
    assert done.returncode == 0, done.stderr
    return tmp_path / name


@slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_run_goes_on_to_the_bit(family, cache, tmp_path):
    shorter = ("--config.num_epochs=3", "--config.save_freq=1", "--config.eval_freq=3")
    whole = train(family, cache, tmp_path, "whole", *shorter)
    train_rows = [row for row in rows(whole) if row["kind"] == "train"]
    assert train_rows[0]["first_ratio_deviation"] == 0
    assert any(row["ratio_deviation"] > 0 for row in train_rows)

    # Kill the other run once it has finished an epoch.
    config = f"{GOLDEN}:{family}"
    words = options(tmp_path, "parts", *shorter)
    output = tmp_path / "output.txt"
    process = begin(command("train.py", cache, *words, config=config), output)
    until(lambda: epochs_done(tmp_path / "parts") >= 1, process, output)
    process.send_signal(signal.SIGKILL)
    process.wait()
    parts = train(family, cache, tmp_path, "parts", *shorter, "--resume")

    assert rows(parts) == rows(whole)
    assert (parts / LORA).read_bytes() == (whole / LORA).read_bytes()


@slow
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_draws_the_same_pictures(family, cache, tmp_path):
    """The exported LoRA in diffusers' own pipeline, from the same noise, against ours."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    folder = train(family, cache, tmp_path, "run", "--config.num_epochs=3")
    prompts = ["a red boat on calm water", "snow"]
    words = (*prompts, "--lora", folder / "lora", "--out", tmp_path / "pictures", "--seed=5")
    done = call("sample.py", cache, *words, config=f"{GOLDEN}:{family}")
    assert done.returncode == 0, done.stderr
    ours = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "pictures").glob("*.png"))]

    # Our noise as NCHW latents.
    key = jax.random.key(5)
    noise = [jax.random.normal(jax.random.fold_in(key, i), (16, 64)) for i in range(2)]
    latents = np.asarray(unpack(np.stack(noise), 4, 4)).transpose(0, 3, 1, 2)

    def draw(lora):
        pipe = diffusers.DiffusionPipeline.from_pretrained(PIPELINES[family], dtype=torch.float32)
        if lora:
            pipe.load_lora_weights(folder / "lora")
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            list(prompts),
            height=64,
            width=64,
            num_inference_steps=4,
            latents=torch.from_numpy(latents.copy()),
            output_type="np",
            **GUIDANCE[family],
        ).images

    theirs = draw(lora=True)
    assert np.abs(theirs - draw(lora=False)).max() > 2 / 255  # the LoRA is felt
    assert np.abs(np.stack(ours) / 255.0 - theirs).max() <= 1.01 / 255


@slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_export_a_folder_that_diffusers_loads(family, cache, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    words = (
        "--config.num_epochs=1",
        "--config.train.lora=False",
        "--config.train.learning_rate=1e-4",
    )
    folder = train(family, cache, tmp_path, "run", *words)
    exported = folder / "lora" / "transformer"
    cls = {"sd3": diffusers.SD3Transformer2DModel, "zimage": diffusers.ZImageTransformer2DModel}
    tuned = cls[family].from_pretrained(exported, torch_dtype=torch.float32).state_dict()
    start = (
        cls[family]
        .from_pretrained(PIPELINES[family] / "transformer", torch_dtype=torch.float32)
        .state_dict()
    )
    assert tuned.keys() == start.keys()
    moved = {name for name in start if not torch.equal(tuned[name], start[name])}

    # The position table of SD3 is no weight: the used rows are written back as they were. Some
    # weights cannot learn.
    still = sorted(start.keys() - moved)
    assert all(any(word in name for word in STILL[family]) for name in still), still


GUIDANCE = {
    "sd3": {"guidance_scale": 4.5, "max_sequence_length": 16},
    "zimage": {"guidance_scale": 4.0, "max_sequence_length": 96},
}
# Of SD3: the fixed table, and what only the last block's text queries would use.
STILL = {"sd3": ("pos_embed.pos_embed", "3.attn.add_q_proj", "3.attn.norm_added_q"), "zimage": ()}
