"""The embedded models: experiments that need no download and no GPU.

configs/flux_grpo.py has FLUX's too, with `tiny` as its default, and configs/sd3_grpo.py has SD3's.
So these work:

    --config configs/embedded.py:NAME
    --config configs/flux_grpo.py:NAME
    --config configs/sd3_grpo.py
"""

from importlib.resources import files

from ml_collections import ConfigDict

from realgen_jax.config import adversary, base
from realgen_jax.config_files import make_preset

EMBEDDED = files("realgen_jax") / "embedded"
REWARDS = files("reward_bridge") / "embedded"


def tiny() -> ConfigDict:
    """The embedded model: a FLUX with 2.4 M parameters and 64x64 images.

    Command: python scripts/train.py --config configs/flux_grpo.py
    Machine: 2 CPU cores, 2 GB.
    Time: under 2 minutes for the 45 epochs, then the report.
    Expected: the detector's P(real) rises by 0.15 or more and the held-out checks keep up (figures
    in README.md).
    """
    c = base()
    c.num_epochs = 45
    c.save_freq = 15
    c.num_checkpoint_limit = 3
    c.eval_freq = 15

    c.pretrained.model = str(EMBEDDED / "flux_tiny")
    c.prompts.train = str(EMBEDDED / "prompts_train.txt")
    c.prompts.test = str(EMBEDDED / "prompts_test.txt")
    c.prompts.max_tokens = 16

    c.sample.width = 64
    c.sample.height = 64
    c.sample.train_batch_size = 64
    c.sample.num_image_per_prompt = 16
    c.sample.test_batch_size = 64
    c.sample.test_images_per_prompt = 4

    c.train.lora_rank = 16
    c.train.lora_alpha = 32.0
    c.train.beta = 0.01
    c.train.clip_range = 1e-3
    c.train.learning_rate = 1e-3

    c.reward.fn = ConfigDict({"embedded_detector": 1.0, "clip_score": 0.5})
    c.reward.held_out = ("embedded_held_out", "embedded_prompt_accuracy")
    c.reward.metrics = ("embedded_frechet",)
    c.reward.options.clip_score = ConfigDict({"path": str(REWARDS / "clip")})
    c.reward.references.path = str(REWARDS / "references" / "photographs.json")

    c.evaluate.prompts.short = str(EMBEDDED / "realbench_short.jsonl")
    c.evaluate.prompts.long = str(EMBEDDED / "realbench_long.jsonl")
    c.evaluate.images_per_prompt = 4
    c.evaluate.batch_size = 64
    c.evaluate.scores = (
        "embedded_detector",
        "embedded_held_out",
        "embedded_prompt_accuracy",
        "clip_score",
    )
    c.evaluate.detectors = ("embedded_detector", "embedded_held_out")
    c.evaluate.after_training = True
    return c


def tiny_awm() -> ConfigDict:
    """`tiny` with advantage-weighted matching: the same reward in about a third of the time.

    The numbers were chosen on seed 0 (benchmarks/NOTES.md).

    Command: python scripts/train.py --config configs/flux_grpo.py:tiny_awm
    Machine: 2 CPU cores, 2 GB.
    Time: 25 seconds of training, then the report.
    Expected: the detector's P(real) rises to 0.46 within 16 epochs, in 16 to 23 seconds where
    `tiny` takes 61 to 64 (benchmarks/time_to_reward.py).
    """
    c = tiny()
    c.num_epochs = 16
    c.save_freq = 8
    c.eval_freq = 8

    c.train.loss = "awm"
    c.train.learning_rate = 3e-3
    c.train.beta = 0.1
    c.train.adv_clip_max = 1.0
    c.train.awm.weighting = "ghuber"
    c.train.awm.beta_ema = 0.1
    c.train.awm.sigmas = 2
    c.train.awm.fraction = 1.0
    return c


def tiny_adversarial() -> ConfigDict:
    """`tiny` with a detector that learns, as the only reward, without KL.

    A frozen detector is fooled within minutes. One that learns from the generated images is not.

    Command: python scripts/train.py --config configs/flux_grpo.py:tiny_adversarial
    Machine: 2 CPU cores, 2 GB.
    Time: 3 minutes.
    Expected: the Fréchet distance to the photographs falls. With the detector frozen
    (--config.reward.adversarial={}) it ends above its start (docs/rewards_that_learn.md).
    """
    c = tiny()
    # 512 images: enough to notice if one image in two hundred loses its subject.
    c.sample.test_images_per_prompt = 16
    c.train.beta = 0.0

    c.reward.fn = ConfigDict({"embedded_detector": 1.0})
    c.reward.held_out = ("embedded_held_out", "embedded_prompt_accuracy", "clip_score")
    c.reward.metrics = ("embedded_frechet", "embedded_frechet_held_out")

    detector = adversary()
    detector.options.init = "shipped"  # the trained detector; fresh: random weights
    detector.schedule = "every"
    detector.learning_rate = 1e-3
    detector.batch_size = 32
    detector.history_batch_size = 32
    detector.max_passes = 8
    detector.target_accuracy = 0.95
    detector.ema_decay = 0.9
    c.reward.adversarial.embedded_detector = detector
    return c


def tiny_soft() -> ConfigDict:
    """`tiny_adversarial` with blurred references, which alone pull the model to another style.

    Command: python scripts/train.py --config configs/flux_grpo.py:tiny_soft
    Machine: 2 CPU cores, 2 GB.
    Time: a few minutes.
    Expected: the sharpness falls towards that of the references (docs/rewards_that_learn.md).
    """
    c = tiny_adversarial()
    c.num_epochs = 60

    # The blurred style is far from the start. With twice this learning rate, or with a detector
    # that learns as much as in tiny_adversarial, subjects are lost on the way.
    c.train.learning_rate = 5e-4
    c.reward.adversarial.embedded_detector.max_passes = 4
    c.reward.adversarial.embedded_detector.target_accuracy = 0.85

    c.reward.references.path = str(REWARDS / "references" / "soft.json")
    c.reward.metrics = ("embedded_frechet", "embedded_sharpness")
    c.reward.monitor = "embedded_sharpness"  # the other checks ask for photographs
    return c


def tiny_sd3() -> ConfigDict:
    """Adv-GRPO's DINO discriminator on an embedded SD3 with 1.8 M parameters and 64x64 images.

    As in Adv-GRPO's recipe (`adv_dino_8xh200` in configs/sd3_grpo.py): classifier-free guidance
    with gradients through both halves, 10 steps, cps with noise 0.8 in the first two, groups of 16,
    advantages by the global standard deviation, the plain ratio, no KL, and the discriminator as
    the only reward, on 64 patches of weight 0.3.

    Differences: the discriminator learns in every epoch beside the generator, not in nine of ten
    epochs in which the generator rests, and from the pairs of earlier epochs too; its learning
    rate, the generator's and the clip range are larger.

    Command: python scripts/train.py --config configs/sd3_grpo.py
    Machine: 2 CPU cores, 2 GB.
    Time: 7 minutes for the 40 epochs, then the report.
    Expected: the Fréchet distance to the photographs falls and the prompt accuracy stays at 1
    (docs/rewards_that_learn.md).
    """
    c = tiny()
    c.num_epochs = 40
    c.save_freq = 20
    c.eval_freq = 20

    c.pretrained.model = str(EMBEDDED / "sd3_tiny")
    c.pretrained.family = "StableDiffusion3Pipeline"

    c.sample.guidance_scale = 2.0  # nearest to the photographs; higher scales are too contrasty
    c.evaluate.sample.guidance_scale = 2.0
    c.sample.sde_type = "cps"
    c.sample.noise_level = 0.8
    c.sample.sde_window_size = 2
    c.sample.sde_window_range = (0, 2)
    c.sample.global_std = True

    c.train.cfg_gradient = "both"
    c.train.loss = "grpo"
    c.train.beta = 0.0

    c.reward.fn = ConfigDict({"dino_discriminator": 1.0})
    c.reward.held_out = ("embedded_held_out", "embedded_prompt_accuracy", "clip_score")
    c.reward.metrics = ("embedded_frechet", "embedded_frechet_held_out")
    c.reward.options.dino_discriminator = ConfigDict({"path": str(REWARDS / "dino"), "size": 64})

    discriminator = adversary()
    # Draws the head's initial weights and the patches; follows --config.seed.
    discriminator.options.seed = c.get_ref("seed")
    discriminator.schedule = "every"
    discriminator.optimizer = "adam"
    discriminator.learning_rate = 5e-3
    discriminator.betas = (0.5, 0.999)
    discriminator.weight_decay = 0.0
    discriminator.batch_size = 32
    discriminator.history_batch_size = 32
    discriminator.max_passes = 16
    discriminator.target_accuracy = 0.95
    discriminator.ema_decay = 0.9
    c.reward.adversarial.dino_discriminator = discriminator
    return c


def tiny_rewriter() -> ConfigDict:
    """A language model with 0.3 M parameters learns which words make pictures more real.

    8 prompts x 8 rewrites with a picture each. The image model that it writes for is `tiny`'s,
    with a few words that make pictures more real, less real, or neither. CLIP compares pictures
    with the user's prompt, and the words of the prompt must be kept; without either, the rewriter
    learns to draw what fools the detector (`tiny_rewriter_greedy`).

    Command: python scripts/train.py --config configs/rewriter_grpo.py
    Machine: 2 CPU cores, 2 GB.
    Time: 2 minutes, then the report.
    Expected: P(real) rises by 0.2 or more and the checks hold (docs/rewriter.md).
    """
    c = tiny()
    c.stage = "rewriter"
    c.num_epochs = 120
    c.save_freq = 40
    c.eval_freq = 40

    c.pretrained.model = str(EMBEDDED / "flux_words")

    c.rewriter.path = str(EMBEDDED / "qwen_tiny")
    c.rewriter.prompts_per_epoch = 8
    c.rewriter.rewrites_per_prompt = 8
    c.rewriter.images_per_rewrite = 1
    c.rewriter.max_prompt_tokens = 24
    c.rewriter.max_new_tokens = 20
    c.rewriter.microbatch = 64
    c.rewriter.logit_chunk = 20
    c.rewriter.min_words = 3
    c.rewriter.max_words = 14
    c.rewriter.text_rewards = ConfigDict({"usable": 1.0, "kept": 0.5})

    c.sample.train_batch_size = 64
    c.sample.same_latent = True
    c.train.lora_init = "kaiming"
    c.train.learning_rate = 5e-4
    c.train.adam_weight_decay = 0.0
    c.train.beta = 0.05
    c.train.gradient_accumulation_steps = 1
    c.train.ema_decay = 0.0

    c.reward.fn = ConfigDict({"embedded_detector": 1.0, "clip_score": 1.0})
    return c


def tiny_rewriter_greedy() -> ConfigDict:
    """`tiny_rewriter` with the detector as the only reward and no KL: the counter-example.

    Command: python scripts/train.py --config configs/rewriter_grpo.py:tiny_rewriter_greedy
    Machine and time: as `tiny_rewriter`.
    Expected: P(real) rises by 0.25 or more while the prompt accuracy falls below 0.2.
    """
    c = tiny_rewriter()
    c.reward.fn = ConfigDict({"embedded_detector": 1.0})
    c.rewriter.text_rewards = ConfigDict({"usable": 1.0})
    c.train.beta = 0.0
    return c


EXPERIMENTS = (
    tiny,
    tiny_awm,
    tiny_adversarial,
    tiny_soft,
    tiny_sd3,
    tiny_rewriter,
    tiny_rewriter_greedy,
)
PRESETS = {experiment.__name__: experiment for experiment in EXPERIMENTS}


def get_config(preset: str = "tiny") -> ConfigDict:
    """The config of the experiment that is named after the colon in --config."""
    config = make_preset(PRESETS, preset, __file__)
    config.preset = preset
    return config.lock()
