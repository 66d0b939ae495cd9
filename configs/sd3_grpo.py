"""GRPO on Stable Diffusion 3.5: Adv-GRPO (arXiv 2511.20256), Flow-GRPO (2505.05470) and RealGen V1.

Each function is an experiment, as in configs/flux_grpo.py. The experiments expect weights and
prompts in models/ and dataset/ of the current folder; dataset/pickscore is the folder of that name
in Flow-GRPO's and Adv-GRPO's repositories. docs/training.md names the weights.

guidance_scale is a factor here: a velocity takes a pass with the prompt and one with the empty
prompt, and the two are combined. `train.cfg_gradient` says whether the second one learns too.
"""

from ml_collections import ConfigDict

from realgen_configs.embedded import tiny_sd3
from realgen_configs.flux_grpo import (
    adv_grpo,
    adv_grpo_learner,
    dino_discriminator,
    flux_dev_8xh200,
)
from realgen_jax.config import base
from realgen_jax.config_files import make_preset

PIPELINE = "StableDiffusion3Pipeline"


def sd35_medium() -> ConfigDict:
    """What the experiments on SD3.5-medium share: model, prompts, guidance, evaluations, PickScore.

    The prompts' embeddings take 46 GB in `prompts.cache`: 27,480 prompts of 205 tokens.
    """
    c = base()
    c.seed = 42
    c.save_freq = 10  # theirs: 60. A checkpoint (0.4 GB) is written in the background
    c.eval_freq = 60

    c.pretrained.family = f"{PIPELINE}:SD3.5-M"
    c.pretrained.model = "models/SD3.5-M"
    c.pretrained.dtype = "bfloat16"
    c.pretrained.param_dtype = "bfloat16"
    c.prompts.train = "dataset/pickscore/train.txt"
    c.prompts.test = "dataset/pickscore/test.txt"
    c.prompts.max_tokens = 128
    c.prompts.dtype = "bfloat16"

    c.sample.width = 512
    c.sample.height = 512
    c.sample.num_steps = 10
    c.evaluate.sample.num_steps = 40
    c.sample.guidance_scale = 4.5
    c.sample.global_std = True
    c.sample.test_batch_size = 128
    c.train.cfg_gradient = "both"
    c.train.loss = "grpo"
    c.train.learning_rate = 3e-4
    c.train.lora_rank = 32
    c.train.lora_alpha = 64.0
    c.train.ema_decay = 0.9
    c.train.ema_update_interval = 8

    c.reward.options.pickscore = ConfigDict(
        {
            "path": "models/PickScore_v1",
            "tokenizer": "models/CLIP-ViT-H-14-laion2B-s32B-b79K",
            "divide_by": 26.0,
        }
    )
    c.reward.deadline = 600.0
    c.reward.retries = 3

    c.evaluate.prompts.short = "dataset/realbench/short_prompts.txt"
    c.evaluate.prompts.long = "dataset/realbench/long_prompts.txt"
    c.evaluate.sample.guidance_scale = 4.5
    c.evaluate.batch_size = 64
    c.evaluate.scores = ("pickscore",)
    c.evaluate.resamples = 10000
    return c


def adv_dino_8xh200() -> ConfigDict:
    """Adv-GRPO with its DINO discriminator (its config `dino_cotrain_sd3_patch_fast`).

    768 images of 48 prompts and 2 optimizer steps an epoch. In epochs 0 to 8 of every ten the
    discriminator learns and the generator rests; in the tenth the generator learns. Adv-GRPO ends
    after 1000 steps, those of the discriminator included, which takes 910 epochs.

    As in Adv-GRPO, 8 GPUs train. The last one holds the rewards too.

    Differences from Adv-GRPO at showlab/Adv-GRPO 8287f90:
    - Features are normalised in training as they are for the reward, and the patches of a score are
      determined by the picture (D44, D47). Real and generated pictures pass the same JPEG codec.
    - Latents stay in float32 between the steps. Theirs are rounded to bfloat16 after their
      log-probability was taken, so that the ratio of unchanged weights is not 1 (D49).
    - Their log-probability of a cps step leaves out the variance, ours has it: our log-ratio is
      0.60 and 0.66 times theirs in the two steps (1 / (2 std^2)), so the same clip_range of 1e-5
      allows moves 1.7 and 1.5 times as large.
    - The moving average counts optimizer steps; theirs moves at every microbatch of every eighth
      step (D8).
    - Every picture of an evaluation has noise of its own; theirs is the same in every batch (D51).
      Their similarity to the references is not among the scores.
    As in theirs, the adapter of the last block's text queries cannot learn (D53).

    Command: python scripts/train.py --config configs/sd3_grpo.py:adv_dino_8xh200, with
    XLA_CLIENT_MEM_FRACTION in the environment. scripts/preflight.py computes its value.
    Machine: 8 H200s.
    Time: 18 seconds an epoch of the generator by scripts/preflight.py, at 40 % of the peak; not
    measured.
    """
    c = sd35_medium()
    adv_grpo(c)
    c.num_epochs = 910
    c.preflight.devices = 8
    c.sample.train_batch_size = 64  # 8 GPUs x 8: four prompts per call
    c.sample.num_image_per_prompt = 16

    c.reward.fn = ConfigDict({"dino_discriminator": 1.0})
    c.reward.held_out = ("pickscore",)
    c.reward.share_gpu = True
    c.reward.options.dino_discriminator = ConfigDict(
        {"path": "models/dinov2-base", "dtype": "bfloat16"}
    )
    c.reward.adversarial.dino_discriminator = dino_discriminator(c)
    # Adv-GRPO: 8 pictures of Qwen-Image a prompt.
    c.reward.references.path = "dataset/references.json"
    c.reward.references.root = "dataset/references"
    return c


def adv_pickscore_8xh200() -> ConfigDict:
    """Adv-GRPO with a PickScore that learns (its config `pickscore_cotrain_sd3_fast`).

    768 images of 48 prompts and 2 optimizer steps an epoch. In epochs in which the references score
    less than the generated pictures, the last vision layer of PickScore learns to prefer the
    references, and the generator rests. Adv-GRPO ends after 1000 steps, those of PickScore
    included, which takes 500 to 1000 epochs.

    Differences from Adv-GRPO: those of `adv_dino_8xh200` in the generator. PickScore's gradients
    are those of all pictures; with theirs, every GPU ends up with weights of its own (D45).

    Command: python scripts/train.py --config configs/sd3_grpo.py:adv_pickscore_8xh200, with
    XLA_CLIENT_MEM_FRACTION in the environment. scripts/preflight.py computes its value.
    Machine: 8 H200s.
    Time: 18 seconds an epoch of the generator by scripts/preflight.py, at 40 % of the peak; not
    measured.
    """
    c = adv_dino_8xh200()
    c.num_epochs = 1000

    c.reward.fn = ConfigDict({"pickscore": 1.0})
    c.reward.held_out = ("pickscore_at_start",)
    del c.reward.options.dino_discriminator
    del c.reward.adversarial.dino_discriminator

    learner = adv_grpo_learner()
    learner.schedule = "margin"
    learner.margin = 0.0
    learner.always_first = False
    learner.learning_rate = 5e-6
    c.reward.adversarial.pickscore = learner
    return c


def adv_dino_1xh200() -> ConfigDict:
    """`adv_dino_8xh200` on one GPU, rewards included. A GPU with 80 GB is enough.

    768 images of 48 prompts and 2 optimizer steps an epoch, as in that preset, but with one prompt
    per call.

    Command: python scripts/train.py --config configs/sd3_grpo.py:adv_dino_1xh200, with
    XLA_CLIENT_MEM_FRACTION in the environment. scripts/preflight.py computes its value.
    Machine: 1 H200 or H100.
    Time: 2.4 minutes an epoch of the generator by scripts/preflight.py, at 40 % of the peak; not
    measured.
    """
    c = adv_dino_8xh200()
    c.preflight.devices = 1
    c.sample.train_batch_size = 16
    c.sample.num_batches_per_epoch = 48
    c.sample.test_batch_size = 32
    c.train.gradient_accumulation_steps = 24
    c.evaluate.batch_size = 16
    return c


def flow_grpo_sd3_pickscore() -> ConfigDict:
    """Flow-GRPO on PickScore (the config `pickscore_sd3` of yifan123/flow_grpo at 74db691).

    1152 images of 48 prompts and 2 optimizer steps an epoch. All steps but the last are trained on.
    It runs until it is stopped.

    Differences from Flow-GRPO: 8 GPUs take 16 calls where 32 GPUs take 4. bfloat16 instead of
    float16. The last of the ten steps has no noise; theirs has, but is not trained on either. As in
    theirs, the KL divides by std^2 / dt instead of the transition's variance.

    Command: python scripts/train.py --config configs/sd3_grpo.py:flow_grpo_sd3_pickscore, with
    XLA_CLIENT_MEM_FRACTION in the environment. scripts/preflight.py computes its value.
    Machine: 8 H200s. The last one holds PickScore too.
    Time: 1.3 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = sd35_medium()
    c.num_epochs = 100_000
    c.preflight.devices = 8

    c.sample.train_batch_size = 72  # 8 GPUs x 9: three prompts per call
    c.sample.num_image_per_prompt = 24
    c.sample.num_batches_per_epoch = 16
    c.sample.sde_type = "sde"
    c.sample.noise_level = 0.7
    c.sample.sde_window_size = 9
    c.sample.sde_window_range = (0, 9)

    c.train.kl = "mean_reference"
    c.train.beta = 0.01
    c.train.clip_range = 1e-4
    c.train.gradient_accumulation_steps = 8

    c.reward.fn = ConfigDict({"pickscore": 1.0})
    c.reward.share_gpu = True
    return c


def realgen_sd3_large_8xh200() -> ConfigDict:
    """RealGen V1 on SD3.5-large (RealGen's config `sd3_fast`).

    504 images of 24 prompts and 2 optimizer steps an epoch, with the rewards, prompts and window of
    `flux_dev_8xh200`. The plain ratio, and advantages by the global standard deviation.

    Differences from RealGen: bfloat16 instead of float16. Their rollout combines the two passes in
    float16 and their update in float32, so that the ratio of unchanged weights is not 1 (D49). The
    pass with the empty prompt is taken as constant, as in theirs, but has no backward pass; theirs
    runs it for nothing (D52). RealGen's window starts at one step per GPU for the whole run (D4).
    RealGen's benchmark samples with a guidance scale of 7:
    --config.evaluate.sample.guidance_scale=7. As in theirs, the adapter of the last block's text
    queries cannot learn (D53), and the KL divides by std^2 / dt (D12).

    Command: python scripts/train.py --config configs/sd3_grpo.py:realgen_sd3_large_8xh200
    Machine: 8 H200s; 7 train, the last one holds the rewards.
    Time: 8.6 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_dev_8xh200()
    c.pretrained.family = f"{PIPELINE}:SD3.5-L"
    c.pretrained.model = "models/SD3.5-L"
    c.sample.guidance_scale = 4.5
    c.sample.global_std = True
    c.evaluate.sample.guidance_scale = 4.5

    c.train.cfg_gradient = "bound"
    c.train.loss = "grpo"
    c.train.kl = "mean_reference"
    c.train.clip_range = 1e-4
    c.train.lora_rank = 32
    c.train.lora_alpha = 64.0

    # RealGen's code adds the advantages of the three rewards (D7), ours averages them: a third of
    # its beta, advantage clip and gradient norm (0.01, 5 and 1) makes the same update.
    c.train.beta = 0.01 / 3
    c.train.adv_clip_max = 5.0 / 3
    c.train.max_grad_norm = 1.0 / 3
    return c


EXPERIMENTS = (
    tiny_sd3,
    adv_dino_8xh200,
    adv_pickscore_8xh200,
    adv_dino_1xh200,
    flow_grpo_sd3_pickscore,
    realgen_sd3_large_8xh200,
)
PRESETS = {experiment.__name__: experiment for experiment in EXPERIMENTS}


def get_config(preset: str = "tiny_sd3") -> ConfigDict:
    """The config of the experiment that is named after the colon in --config."""
    config = make_preset(PRESETS, preset, __file__)
    config.preset = preset
    return config.lock()
