"""scripts/export.py as users call it; realgen_jax/models/test_exporting.py has the values."""

import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.bfl_names import bfl_transformer
from tests.helpers.lora_names import (
    DOWN_UP,
    assert_close,
    comfyui_merges,
    factors,
    family_model,
    merged,
    named,
)
from tests.helpers.running import call


def test_a_lora_of_sd_scripts_for_comfyui(cache, tmp_path):
    model, weights = family_model("flux")
    single = bfl_transformer(weights, model.config)
    pairs = factors(single)
    lora = tmp_path / "lora.safetensors"
    save_file(named(pairs, "lora_unet_", *DOWN_UP, flat=True, alpha=2), lora)
    out = tmp_path / "new" / "comfyui.safetensors"
    done = call("export.py", cache, f"--lora={lora}", "--format=comfyui", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"written to {out}\n"
    assert_close(comfyui_merges(single, out), merged(single, pairs, alpha=2))


@pytest.mark.slow
def test_merged_weights(cache, tmp_path):
    model, weights = family_model("flux")
    pairs = factors(weights)
    lora = tmp_path / "lora.safetensors"
    save_file(named(pairs, "lora_transformer_", *DOWN_UP, flat=True), lora)
    flags = (f"--lora={lora}", "--merge", "--dtype=float32")
    for form, file in (("comfyui", ""), ("diffusers", "diffusion_pytorch_model.safetensors")):
        out = tmp_path / form
        done = call("export.py", cache, *flags, f"--format={form}", f"--out={out}")
        assert done.returncode == 0, done.stderr
        want = merged(weights, pairs)
        if form == "comfyui":
            want = bfl_transformer(want, model.config)
        assert_close(load_file(out / file), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out=x"], "nothing to export: give --lora, or --merge for weights alone"),
        (["--lora=none"], "nothing to write: give --out"),
        (["--lora=none", "--out=x"], "none does not exist; expected a LoRA file or folder"),
        (["--lora=none", "--out=."], "--out is '.', which exists; expected a new path"),
        (
            ["--merge", "--format=peft", "--out=x"],
            "--format is 'peft', which is for LoRAs; with --merge, choose one of diffusers, comfy",
        ),
        (["--merge", "--out=x", "--config.pretrained.model=none"], "holds no model_index.json"),
    ],
)
def test_what_cannot_be_written_is_one_line(flags, message, cache):
    done = call("export.py", cache, *flags)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
