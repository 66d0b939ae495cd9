"""Training on one GPU with 24, 40 or 80 GB (docs/clusters.md, "Small cards").

Each function is an experiment, as in configs/flux_grpo.py: that of a larger machine with fewer
pictures an epoch and, where its weights do not fit, quantised ones. The memory in "Peak" is that of
XLA's compiler for the card, `scripts/preflight.py --compile_for=CARD`; nothing was measured.
"""

from ml_collections import ConfigDict

from realgen_configs.flux_grpo import flux_dev_1xh200
from realgen_configs.sd3_grpo import adv_dino_1xh200
from realgen_jax.config_files import make_preset


def flux_dev_1x24gb() -> ConfigDict:
    """FLUX.1-dev with weights in nf4, at 512 pixels, with the rewards on the CPU.

    144 images of 12 prompts and 2 optimizer steps an epoch. Other than in `flux_dev_1xh200`:
    512 pixels, 14 steps, a window of 3, groups of 12, a LoRA of rank 32, and two rewards that a CPU
    scores while the GPU samples.

    Command: python scripts/train.py --config configs/small_cards.py:flux_dev_1x24gb
    Machine: 1 RTX 4090, and 32 GB of host memory.
    Time: 18 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_dev_1xh200()
    c.pretrained.quantization = "nf4"
    c.pretrained.remat = "full"
    c.sample.width = 512
    c.sample.height = 512
    c.sample.num_steps = 14
    c.sample.sde_window_size = 3
    c.sample.sde_window_range = (0, 9)
    c.sample.train_batch_size = 6
    c.sample.num_image_per_prompt = 12
    c.sample.num_batches_per_epoch = 24
    c.sample.test_batch_size = 4
    c.evaluate.sample.width = 512
    c.evaluate.sample.height = 512
    c.evaluate.batch_size = 4
    c.train.lora_rank = 32
    c.train.lora_alpha = 64.0
    c.train.gradient_accumulation_steps = 12
    light_rewards(c)
    c.reward.device = "cpu"
    c.reward.options.longclip = ConfigDict({"path": "models/longclip"})
    return c


def flux_dev_1x24gb_offload() -> ConfigDict:
    """FLUX.1-dev with weights in bfloat16 in host memory, at RealGen's 1024 pixels.

    168 images of 8 prompts and 2 optimizer steps an epoch, in calls of 3 images as in
    `flux_dev_1xh200`, with two rewards on the CPU. Each pass copies 16 GiB of weights to the GPU.

    Command: python scripts/train.py --config configs/small_cards.py:flux_dev_1x24gb_offload, with
    XLA_CLIENT_MEM_FRACTION in the environment. scripts/preflight.py computes its value.
    Machine: 1 RTX 4090, and 64 GB of host memory.
    Time: 2.7 hours an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_dev_1xh200()
    c.pretrained.offload = True
    c.pretrained.remat = "full"
    c.train.offload = True
    eight_prompts(c)
    light_rewards(c)
    c.reward.device = "cpu"
    return c


def flux_dev_1x40gb() -> ConfigDict:
    """FLUX.1-dev with weights in int8, at RealGen's 1024 pixels, two rewards on the same GPU.

    168 images of 8 prompts and 2 optimizer steps an epoch, in calls of 3 images as in
    `flux_dev_1xh200`.

    Command: python scripts/train.py --config configs/small_cards.py:flux_dev_1x40gb, with
    XLA_CLIENT_MEM_FRACTION in the environment. scripts/preflight.py computes its value.
    Machine: 1 L40S, or an A100 with 40 GB.
    Time: 73 minutes an epoch on an L40S by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_dev_1xh200()
    c.pretrained.quantization = "int8"
    c.pretrained.remat = "attention"
    eight_prompts(c)
    light_rewards(c)
    c.reward.share_gpu = True
    return c


def flux_dev_1x80gb() -> ConfigDict:
    """`flux_dev_1xh200` on a GPU with 80 GB, all three rewards included. Weights in bfloat16.

    168 images of 8 prompts and 2 optimizer steps an epoch. It keeps the outputs of attention, not
    those of all projections.

    Command: python scripts/train.py --config configs/small_cards.py:flux_dev_1x80gb, with
    XLA_CLIENT_MEM_FRACTION in the environment. scripts/preflight.py computes its value.
    Machine: 1 H100, or an A100 with 80 GB.
    Time: 27 minutes an epoch on an H100 by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_dev_1xh200()
    c.pretrained.remat = "attention"
    eight_prompts(c)
    c.reward.share_gpu = True
    return c


def adv_dino_1x24gb() -> ConfigDict:
    """`adv_dino_1xh200`, Adv-GRPO on SD3.5-medium, with a quarter of its prompts.

    192 images of 12 prompts and 2 optimizer steps an epoch, one prompt per call. Weights in
    bfloat16; the discriminator and PickScore are on the same GPU.

    Command: python scripts/train.py --config configs/small_cards.py:adv_dino_1x24gb, with
    XLA_CLIENT_MEM_FRACTION in the environment. scripts/preflight.py computes its value.
    Machine: 1 RTX 4090. `adv_dino_1xh200` fits 80 GB.
    Time: 3.6 minutes an epoch of the generator by scripts/preflight.py, at 40 % of the peak; not
    measured.
    """
    c = adv_dino_1xh200()
    c.sample.num_batches_per_epoch = 12
    c.sample.test_batch_size = 16
    c.train.gradient_accumulation_steps = 6
    return c


def eight_prompts(c: ConfigDict) -> None:
    """Set an epoch of 8 prompts with 21 images each, in calls of 3."""
    c.sample.num_batches_per_epoch = 56
    c.sample.test_batch_size = 4
    c.train.gradient_accumulation_steps = 28
    c.evaluate.batch_size = 4


def light_rewards(c: ConfigDict) -> None:
    """Take RealGen's rewards without the language model of 7 B weights, which needs 16 GB."""
    del c.reward.fn.forensic_chat
    del c.reward.options.forensic_chat
    c.evaluate.scores = ("omniaid", "longclip")
    c.evaluate.detectors = ("omniaid",)


EXPERIMENTS = (
    flux_dev_1x24gb,
    flux_dev_1x24gb_offload,
    flux_dev_1x40gb,
    flux_dev_1x80gb,
    adv_dino_1x24gb,
)
PRESETS = {experiment.__name__: experiment for experiment in EXPERIMENTS}


def get_config(preset: str = "flux_dev_1x24gb") -> ConfigDict:
    """The config of the experiment that is named after the colon in --config."""
    config = make_preset(PRESETS, preset, __file__)
    config.preset = preset
    return config.lock()
