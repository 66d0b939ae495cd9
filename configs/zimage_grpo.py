"""RealGen-V2's GRPO on Z-Image, with AI-image detectors that learn as rewards.

Each function is an experiment, as in configs/flux_grpo.py. The experiments expect weights and
prompts in models/ and dataset/ of the current folder. docs/training.md names the weights.

guidance_scale is Z-Image's: v = v_prompt + scale (v_prompt - v_empty), two passes a velocity. At 0
there is only one pass. A scale of 4 is a scale of 5 in Stable Diffusion.
"""

from ml_collections import ConfigDict

from realgen_configs.flux_grpo import flux_adv_8xh200
from realgen_jax.config_files import make_preset


def realgen_v2_base_8xh200() -> ConfigDict:
    """RealGen-V2 on the Z-Image base model (its config `zimage_base`).

    576 images of 24 prompts and 2 optimizer steps an epoch. Both OmniAID detectors learn from the
    photographs of RealGen's train.jsonl, one per prompt. As in RealGen-V2, 8 GPUs train; the last
    one holds the rewards too.

    Differences from RealGen-V2:
    - VisualQuality-R1 is served by another program on the last GPU or elsewhere, its instruction is
      ours, and an answer of it without a number is an error instead of a score of 1.
    - 39 steps: the last of their 40 goes from noise level 0 to 0.
    - The time stays in float32. Theirs is float32 in the rollout but bfloat16 in the update, which
      alone moves the ratio by several times clip_range (D48).
    - The guard ratio is centred for each sample, not over the batch (D1). The moving average counts
      optimizer steps (D8). Real and generated images pass the same JPEG codec before the detectors
      see them (D37).
    - Every picture of an evaluation has noise of its own (theirs: seed 42 for all, D43). RealGen's
      benchmark takes 50 steps.

    Command: start VisualQuality-R1 (docs/rewards.md, "Other questions to a chat model"), then
    python scripts/train.py --config configs/zimage_grpo.py:realgen_v2_base_8xh200, with
    XLA_CLIENT_MEM_FRACTION in the environment. scripts/preflight.py computes its value.
    Machine: 8 H200s.
    Time: 20 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_adv_8xh200()
    c.preflight.devices = 8
    c.pretrained.family = "ZImagePipeline"
    c.pretrained.model = "models/Z-Image"
    c.pretrained.remat = "full"

    c.sample.num_steps = 39
    c.evaluate.sample.num_steps = 39
    c.sample.guidance_scale = 4.0
    c.sample.train_batch_size = 24  # 8 GPUs x 3: one prompt per call
    c.sample.num_image_per_prompt = 24
    c.sample.sde_window_range = (0, 20)
    c.sample.test_batch_size = 64

    c.train.cfg_gradient = "both"
    c.train.beta = 1e-5
    c.train.clip_range = 1e-4
    c.train.learning_rate = 4e-4

    c.reward.share_gpu = True
    c.evaluate.sample.guidance_scale = 4.0
    c.evaluate.batch_size = 32
    return c


def realgen_v2_turbo_8xh200() -> ConfigDict:
    """RealGen-V2 on Z-Image-Turbo (its config `zimage_turbo`).

    576 images of 24 prompts and 2 optimizer steps an epoch. Turbo is distilled: it takes 8 steps
    (the last of RealGen's 9 goes from noise level 0 to 0) without guidance, one pass each.

    Differences from RealGen-V2: those of `realgen_v2_base_8xh200`, and the adapter that RealGen can
    merge into the model for training is not used. At a scale above 0 and up to 1, diffusers'
    pipeline takes two passes and RealGen's update one (D50); here both take two.

    Command: start VisualQuality-R1 as for `realgen_v2_base_8xh200`, then
    python scripts/train.py --config configs/zimage_grpo.py:realgen_v2_turbo_8xh200, with
    XLA_CLIENT_MEM_FRACTION in the environment. scripts/preflight.py computes its value.
    Machine: 8 H200s.
    Time: 4 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = realgen_v2_base_8xh200()
    c.pretrained.family = "ZImagePipeline:Z-Image-Turbo"
    c.pretrained.model = "models/Z-Image-Turbo"
    c.sample.num_steps = 8
    c.evaluate.sample.num_steps = 8
    c.sample.guidance_scale = 0.0
    c.sample.sde_window_range = (0, 4)
    c.train.cfg_gradient = ""
    c.evaluate.sample.guidance_scale = 0.0
    return c


EXPERIMENTS = (realgen_v2_base_8xh200, realgen_v2_turbo_8xh200)
PRESETS = {experiment.__name__: experiment for experiment in EXPERIMENTS}


def get_config(preset: str = "realgen_v2_base_8xh200") -> ConfigDict:
    """The config of the experiment that is named after the colon in --config."""
    config = make_preset(PRESETS, preset, __file__)
    config.preset = preset
    return config.lock()
