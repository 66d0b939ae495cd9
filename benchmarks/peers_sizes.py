"""The models and settings that benchmarks/peers.py measures: two families, two sizes each."""

from pathlib import Path
from typing import Any

import diffusers
import torch

from realgen_configs import flux_grpo

# Settings of a call of the larger models: one prompt, 3 pictures of 256 x 256, 4 steps.
MID = {
    "width": 256,
    "height": 256,
    "num_steps": 4,
    "train_batch_size": 3,
    "num_image_per_prompt": 3,
    "num_batches_per_epoch": 1,
    "sde_window_size": 2,
    "test_batch_size": 3,
}


def flux_tiny(_: Path) -> Any:
    """The demo's rollout call.

    2.4 M parameters, 64 pictures of 16 + 16 tokens, 10 steps, a window of 3.
    """
    return flux_grpo.tiny()


def flux_mid(folder: Path) -> Any:
    """A call of one prompt and 3 branches, as RealGen's.

    61 M random parameters, 256 + 64 tokens, 4 steps, a window of 2.
    """
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=256,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(8, 28, 28),
    )
    write_pipeline(folder, "FluxPipeline", transformer, mid_vae(0.3611, 0.1159))

    config = flux_grpo.tiny()
    config.pretrained.model = str(folder)
    config.prompts.max_tokens = 64
    config.sample.update(MID, branches=3, sde_window_range=(0, 4))
    config.evaluate.sample.num_steps = MID["num_steps"]
    return config


def sd3_tiny(folder: Path) -> Any:
    """A call with the demo's numbers of pictures and steps.

    3.7 M random parameters and the demo's autoencoder, 64 pictures of 16 + 93 tokens, 10 steps.
    """
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        pos_embed_max_size=24,
        num_layers=6,
        dual_attention_layers=(0, 1),
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=128,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        qk_norm="rms_norm",
    )
    config = flux_grpo.tiny()
    vae = diffusers.AutoencoderKL.from_pretrained(Path(config.pretrained.model) / "vae")
    write_pipeline(folder, "StableDiffusion3Pipeline", transformer, vae)
    return adv_grpo(config, folder)


def sd3_mid(folder: Path) -> Any:
    """A call of one prompt with 3 pictures.

    58 M random parameters, 256 + 141 tokens, 4 steps. A guided velocity has half as many operations
    again as that of `flux_mid`, but its update needs no reference model. The update keeps the
    projections' outputs, which is faster at this size; PyTorch's side keeps every activation.
    """
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=32,
        pos_embed_max_size=96,
        num_layers=6,
        dual_attention_layers=(0, 1),
        attention_head_dim=64,
        num_attention_heads=8,
        caption_projection_dim=512,
        joint_attention_dim=256,
        pooled_projection_dim=128,
        qk_norm="rms_norm",
    )
    write_pipeline(folder, "StableDiffusion3Pipeline", transformer, mid_vae(1.5305, 0.0609))

    config = flux_grpo.tiny()
    config.pretrained.remat = "dots"
    config.prompts.max_tokens = 64
    config.sample.update(MID)
    config.evaluate.sample.num_steps = MID["num_steps"]
    return adv_grpo(config, folder)


def adv_grpo(config: Any, folder: Path) -> Any:
    """Adv-GRPO's settings for SD3 (arXiv 2511.20256), on the model in `folder`."""
    config.pretrained.model = str(folder)
    config.sample.update(
        guidance_scale=4.5,
        sde_type="cps",
        noise_level=0.8,
        sde_window_size=2,
        sde_window_range=(0, 2),
        branches=1,
        global_std=True,
    )
    config.train.update(
        cfg_gradient="both",
        loss="grpo",
        beta=0.0,
        clip_range=1e-5,
        learning_rate=3e-4,
        lora_rank=32,
        lora_alpha=64.0,
    )
    return config


def mid_vae(scaling: float, shift: float) -> Any:
    """An autoencoder with random weights."""
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=scaling,
        shift_factor=shift,
    )


def write_pipeline(folder: Path, name: str, transformer: Any, vae: Any) -> None:
    """Write what both sides read of a pipeline folder."""
    transformer.save_pretrained(folder / "transformer")
    vae.save_pretrained(folder / "vae")
    schedule = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=name == "FluxPipeline"
    )
    schedule.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(f'{{"_class_name": "{name}"}}')


# By family and size.
SIZES = {
    "flux": {"tiny": flux_tiny, "mid": flux_mid},
    "sd3": {"tiny": sd3_tiny, "mid": sd3_mid},
}
REWARDS = {"tiny": "embedded_detector", "mid": "jpeg_compressibility"}
