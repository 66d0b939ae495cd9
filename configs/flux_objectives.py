"""Other objectives than GRPO-Guard on FLUX.1-dev: DiffusionNFT, AWM and MixGRPO.

Each function is an experiment, as in configs/flux_grpo.py. Model, prompts, rewards and GPUs are
those of `flux_dev_8xh200` there, the objective's numbers are published ones. docs/training.md has a
table of what each needs.

DiffusionNFT and AWM need no long rollouts: their pictures have 512 pixels and 10 steps, and
evaluations 1024 pixels and 28 steps.
"""

from ml_collections import ConfigDict

from realgen_configs.flux_grpo import flux_dev_8xh200
from realgen_jax.config_files import make_preset


def decoupled() -> ConfigDict:
    """What the experiments share that sample without noise: 672 pictures, one optimizer step."""
    c = flux_dev_8xh200()
    c.num_epochs = 300
    c.save_freq = 5
    c.eval_freq = 20
    c.sample.width = 512
    c.sample.height = 512
    c.evaluate.sample.width = 1024
    c.evaluate.sample.height = 1024
    c.sample.num_steps = 10
    c.sample.train_batch_size = 56  # 7 GPUs x 8: four prompts per call
    c.sample.num_image_per_prompt = 14
    c.sample.num_batches_per_epoch = 12
    c.train.gradient_accumulation_steps = 12

    # There is no window.
    c.sample.branches = 1
    c.sample.sde_window_size = 3
    c.sample.sde_window_range = (0, 8)

    c.train.beta = 0.0
    c.train.learning_rate = 3e-4
    c.train.ema_update_interval = 1
    return c


def flux_nft_8xh200() -> ConfigDict:
    """DiffusionNFT (arXiv 2509.16117) on FLUX.1-dev, with Flow-Factory's numbers.

    672 images of 48 prompts and 1 optimizer steps an epoch. DiffusionNFT itself has no config for
    FLUX; these are the numbers of X-GenGroup/Flow-Factory at a0b2bc5: guidance 3.5, two noise
    levels with sigma 0.3 or more for each picture, 48 prompts, advantages by the group's standard
    deviation, C 5, b 1, no KL, LoRA 64/128, learning rate 3e-4.

    Differences from Flow-Factory: our rewards and prompts; 7 GPUs train and the last one holds the
    rewards, so groups have 14 images instead of 16; rollouts have 512 pixels and 10 steps, theirs
    384 and 8. A later version of their file has guidance 1. The decay of the old policy counts
    optimizer steps from 1, theirs counts epochs from 0. Our LoRA covers the feed-forward layers
    too.

    Command: python scripts/train.py --config configs/flux_objectives.py:flux_nft_8xh200
    Machine: 8 H200s; 7 train, the last one holds the rewards.
    Time: 1.4 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = decoupled()
    c.train.loss = "nft"
    c.train.adv_clip_max = 5.0
    c.train.nft.mix = 1.0
    c.train.nft.sigmas = 2
    c.train.nft.draw = "strata"
    c.train.nft.least_sigma = 0.3
    c.train.nft.old_rate = 0.001
    c.train.nft.old_most = 0.5
    return c


def flux_awm_8xh200() -> ConfigDict:
    """Advantage-weighted matching (arXiv 2509.25050) on FLUX.1-dev, with Flow-Factory's numbers.

    672 images of 48 prompts and 1 optimizer steps an epoch. The numbers are those of
    X-GenGroup/Flow-Factory at a0b2bc5: 512 pixels, 10 steps, guidance 3.5, four noise levels with
    sigma 0.3 or more, the weighting ghuber, advantages by the global standard deviation and clipped
    to 1, no KL to the base model, KL 0.1 to the average of the weights, LoRA 64/128, learning rate
    3e-4.

    Differences from Flow-Factory: our rewards and prompts; 7 GPUs train and the last one holds the
    rewards, so groups have 14 images instead of 16; evaluations take 28 steps, theirs 20. Our LoRA
    covers the feed-forward layers too.

    Command: python scripts/train.py --config configs/flux_objectives.py:flux_awm_8xh200
    Machine: 8 H200s; 7 train, the last one holds the rewards.
    Time: 2 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = decoupled()
    c.sample.global_std = True
    c.train.loss = "awm"
    c.train.adv_clip_max = 1.0
    c.train.awm.weighting = "ghuber"
    c.train.awm.advantage_max = 1.0
    c.train.awm.clip_range = 1.0
    c.train.awm.beta_ema = 0.1
    c.train.awm.sigmas = 4
    c.train.awm.fraction = 1.0
    c.train.awm.least_sigma = 0.3
    c.train.awm.old_rate = 0.001  # 0.3 is reached after 300 epochs
    c.train.awm.old_most = 0.3
    return c


def flux_mix_8xh200() -> ConfigDict:
    """MixGRPO (arXiv 2507.21802) on FLUX.1-dev: a window of 4 noisy steps that moves on.

    336 images of 28 prompts and 4 optimizer steps an epoch. The numbers are those of
    Tencent-Hunyuan/MixGRPO at e5cdd6a: 720 pixels, 25 steps, noise 0.7, a window that moves one
    step every 25 epochs and returns at step 23, 12 images a prompt from the same noise, the plain
    ratio with clip 1e-4, the weighted sum of each reward's advantages, no KL.

    Differences from MixGRPO: our rewards and prompts; 7 GPUs train and the last one holds the
    rewards, so an epoch has 28 prompts, theirs on 32 GPUs 32. A LoRA is trained with the learning
    rate of `flux_dev_8xh200`; MixGRPO trains all weights with 1e-5. The noise levels are FLUX's
    own; theirs are shifted by 3. An optimizer step sees all pictures of its prompts, theirs 3 of 12
    of every prompt. The window keeps its size at the end and turns back earlier.

    Command: python scripts/train.py --config configs/flux_objectives.py:flux_mix_8xh200
    Machine: 8 H200s; 7 train, the last one holds the rewards.
    Time: 2.8 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_dev_8xh200()
    c.num_epochs = 300
    c.save_freq = 5
    c.eval_freq = 20
    c.pretrained.remat = "full"
    c.sample.width = 720
    c.sample.height = 720
    c.evaluate.sample.width = 1024
    c.evaluate.sample.height = 1024
    c.sample.num_steps = 25
    c.sample.noise_level = 0.7
    c.sample.sde_window_size = 4
    c.sample.sde_window_range = (0, 23)
    c.sample.sde_window.strategy = "progressive"
    c.sample.sde_window.epochs = 25
    c.sample.branches = 1
    c.sample.same_latent = True
    c.sample.train_batch_size = 84  # 7 GPUs x 12: seven prompts per call
    c.sample.num_image_per_prompt = 12
    c.sample.num_batches_per_epoch = 4

    c.train.loss = "grpo"
    c.train.advantages = "mixgrpo"
    c.train.beta = 0.0
    c.train.clip_range = 1e-4
    c.train.adv_clip_max = 5.0
    c.train.gradient_accumulation_steps = 1
    return c


EXPERIMENTS = (flux_nft_8xh200, flux_awm_8xh200, flux_mix_8xh200)
PRESETS = {experiment.__name__: experiment for experiment in EXPERIMENTS}


def get_config(preset: str = "flux_nft_8xh200") -> ConfigDict:
    """The config of the experiment that is named after the colon in --config."""
    config = make_preset(PRESETS, preset, __file__)
    config.preset = preset
    return config.lock()
