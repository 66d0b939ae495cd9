"""GRPO on FLUX.1 with AI-image detectors as rewards (RealGen, arXiv 2512.00473).

Each function is an experiment, written as its changes to `realgen_jax.config.base()`, which
explains all keys. `--config configs/flux_grpo.py:NAME` picks one. The default is `tiny`, the
embedded model; its experiments are in configs/embedded.py. Any key can be set on the command line,
--config.train.learning_rate=1e-4. Keys have Flow-GRPO's names where the meaning is the same.

The experiments below expect weights and prompts in models/ and dataset/ of the current folder.
docs/training.md and docs/rewards.md say where they come from, and scripts/preflight.py what a
machine needs.
"""

from importlib.resources import files

from ml_collections import ConfigDict

from realgen_configs.embedded import tiny, tiny_adversarial, tiny_awm, tiny_soft
from realgen_jax.config import adversary, base
from realgen_jax.config_files import make_preset

REWARDS = files("reward_bridge") / "embedded"


def flux_dev_8xh200() -> ConfigDict:
    """RealGen V1 Guard on FLUX.1-dev (RealGen's config `flux_fast_guard`).

    504 images of 24 prompts and 2 optimizer steps an epoch. Where RealGen's recipe and the code
    that ran it differ, these are the values that were run: a window of 7 steps, starting at step
    0 to 14.

    Command: python scripts/train.py --config configs/flux_grpo.py:flux_dev_8xh200
    Machine: 8 H200s; 7 train, the last one holds the rewards.
    Time: 10.7 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    Expected: RealGen's results. It has not been run at this size yet.
    """
    c = base()
    c.seed = 42
    c.num_epochs = 1000
    c.save_freq = 1  # RealGen: 10. A checkpoint (3 GB) is written in the background
    c.preflight.devices = 7

    c.pretrained.model = "models/FLUX.1-dev"
    c.pretrained.dtype = "bfloat16"
    c.pretrained.param_dtype = "bfloat16"
    # Takes 38 GiB and saves a sixth of an update's time. Prefer "full" on GPUs with 80 GB.
    c.pretrained.remat = "dots"
    c.prompts.train = "dataset/realgen/train.txt"
    c.prompts.test = "dataset/realgen/test.txt"
    c.prompts.dtype = "bfloat16"

    c.sample.width = 1024
    c.sample.height = 1024
    c.sample.num_steps = 28
    c.evaluate.sample.num_steps = 28
    c.sample.guidance_scale = 3.5
    c.sample.train_batch_size = 21  # 7 GPUs x 3 branches: one prompt per call
    c.sample.num_image_per_prompt = 21
    c.sample.branches = 3
    c.sample.num_batches_per_epoch = 24
    c.sample.sde_type = "sde"
    c.sample.noise_level = 0.9
    c.sample.sde_window_size = 7
    c.sample.sde_window_range = (0, 21)
    c.sample.test_batch_size = 56

    c.train.loss = "guard"
    c.train.lora_rank = 64
    c.train.lora_alpha = 128.0
    c.train.beta = 4e-4
    c.train.clip_range = 2e-6
    c.train.learning_rate = 1e-4
    c.train.gradient_accumulation_steps = 12
    c.train.ema_decay = 0.9
    c.train.ema_update_interval = 8

    # Hold out "effort" if you have its weights: it shows when the other detectors are fooled.
    c.reward.fn = ConfigDict({"forensic_chat": 1.0, "omniaid": 1.0, "longclip": 1.0})
    c.reward.held_out = ()
    c.reward.options.forensic_chat = ConfigDict(
        {"path": "models/forensic_chat", "dtype": "bfloat16"}
    )
    # "patch_mean" is for RealGen's weights; OmniAID's own need "feature_extractor".
    c.reward.options.omniaid = ConfigDict({"path": "models/omniaid", "routing": "patch_mean"})
    c.reward.options.longclip = ConfigDict({"path": "models/longclip", "dtype": "float16"})
    c.reward.deadline = 600.0
    c.reward.retries = 3
    # Used only by rewards that learn. Experiments with such rewards set their own path.
    c.reward.references.path = str(REWARDS / "references" / "photographs.json")

    c.evaluate.prompts.short = "dataset/realbench/short_prompts.txt"
    c.evaluate.prompts.long = "dataset/realbench/long_prompts.txt"
    c.evaluate.batch_size = 28
    # RealBench also has effort, pickscore, hpsv2 and hpsv3.
    c.evaluate.scores = ("forensic_chat", "omniaid", "longclip")
    c.evaluate.detectors = ("forensic_chat", "omniaid")
    c.evaluate.resamples = 10000
    return c


def flux_dev_8xh200_remote() -> ConfigDict:
    """`flux_dev_8xh200` with all 8 GPUs training and the rewards served by other machines.

    528 images of 22 prompts and 2 optimizer steps an epoch. The weights are split over pairs of
    GPUs; --config.mesh.fsdp=4 or 8 halves them again.

    Command: python scripts/train.py --config configs/flux_grpo.py:flux_dev_8xh200_remote
    Machine: 8 H200s, and scripts/serve_rewards.py elsewhere.
    Time: 9.8 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_dev_8xh200()
    c.mesh.fsdp = 2
    c.preflight.devices = 8
    c.sample.train_batch_size = 24  # 8 GPUs x 3 branches: one prompt per call
    c.sample.num_image_per_prompt = 24
    c.sample.num_batches_per_epoch = 22
    c.train.gradient_accumulation_steps = 11

    servers = ("http://localhost:8017",)  # the addresses of the servers, or of tunnels to them
    c.reward.options = ConfigDict()
    for name in c.reward.fn:
        c.reward.options[name] = ConfigDict({"servers": servers})
    return c


def flux_dev_6x2() -> ConfigDict:
    """`flux_dev_8xh200` with 6 GPUs training and 2 for the rewards.

    The largest reward has the last GPU to itself.

    504 images of 28 prompts and 2 optimizer steps an epoch.

    Command: python scripts/train.py --config configs/flux_grpo.py:flux_dev_6x2
    Machine: 8 H200s.
    Time: 12.4 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_dev_8xh200()
    c.preflight.devices = 6
    c.sample.train_batch_size = 18  # 6 GPUs x 3 branches: one prompt per call
    c.sample.num_image_per_prompt = 18
    c.sample.num_batches_per_epoch = 28
    c.sample.test_batch_size = 54
    c.train.gradient_accumulation_steps = 14
    c.reward.devices = ConfigDict({"omniaid": "cuda:6", "longclip": "cuda:6"})
    return c


def flux_dev_1xh200() -> ConfigDict:
    """`flux_dev_8xh200` with one GPU for everything, rewards included.

    504 images of 24 prompts and 2 optimizer steps an epoch, as in that preset, but with 3 images
    per call. A group of 21 takes seven calls, each with its own window.

    Command: python scripts/train.py --config configs/flux_grpo.py:flux_dev_1xh200, with
    XLA_CLIENT_MEM_FRACTION in the environment. scripts/preflight.py computes its value.
    Machine: 1 H200.
    Time: 75 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_dev_8xh200()
    c.preflight.devices = 1
    c.sample.train_batch_size = 3
    c.sample.num_batches_per_epoch = 168
    c.sample.test_batch_size = 8
    c.train.gradient_accumulation_steps = 84
    return c


def flux_dev_16xh200() -> ConfigDict:
    """`flux_dev_8xh200` on two hosts. On each, 7 GPUs train and one holds the rewards.

    504 images of 24 prompts and 2 optimizer steps an epoch.

    Command: see docs/clusters.md, examples/slurm.sh and examples/jobset.yaml.
    Machine: 2 hosts with 8 H200s each.
    Time: 5.3 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_dev_8xh200()
    c.preflight.devices = 14
    c.sample.train_batch_size = 42  # 14 GPUs x 3 branches: two prompts per call
    c.sample.num_batches_per_epoch = 12
    c.train.gradient_accumulation_steps = 6
    return c


def flux_dev_full_8xh200() -> ConfigDict:
    """`flux_dev_8xh200_remote` training all 12 B weights, with float32 masters over 8 GPUs.

    528 images of 22 prompts and 2 optimizer steps an epoch. RealGen has no such recipe; it trains a
    LoRA. The learning rate is a tenth of the LoRA's, as is usual, and has not been tried.

    Command: python scripts/train.py --config configs/flux_grpo.py:flux_dev_full_8xh200
    Machine: 8 H200s, and scripts/serve_rewards.py elsewhere.
    Time: 10.8 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_dev_8xh200_remote()
    c.mesh.data = 1
    c.mesh.fsdp = 8
    c.save_freq = 5
    c.num_checkpoint_limit = 2  # 190 GB each
    c.train.lora = False
    c.train.learning_rate = 1e-5
    return c


def flux_adv_8xh200() -> ConfigDict:
    """RealGen-V2's recipe for FLUX (its config `flux_fast_guard`).

    Both OmniAID detectors learn from the photographs of RealGen's train.jsonl, one per prompt.
    504 images of 24 prompts and 2 optimizer steps an epoch.

    Differences from RealGen-V2: 7 GPUs train and the last one holds the rewards, while RealGen-V2
    uses all 8 for both, so groups have 21 images instead of 24. VisualQuality-R1 is served by
    another program on the last GPU or elsewhere, its instruction is ours, and an answer of it
    without a number is an error instead of a score of 1. Real and generated images pass the same
    JPEG codec before the detectors see them.

    Command: start VisualQuality-R1 (docs/rewards.md, "Other questions to a chat model"), then
    python scripts/train.py --config configs/flux_grpo.py:flux_adv_8xh200
    Machine: 8 H200s.
    Time: 8.7 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_dev_8xh200()
    c.prompts.train = "dataset/realgen/train.jsonl"
    c.sample.branches = 1  # every image has its own initial noise and prefix
    c.sample.sde_window_size = 3
    c.sample.sde_window_range = (0, 14)
    c.train.clip_range = 4e-6

    c.reward.fn = ConfigDict(
        {"omniaid": 1.0, "omniaid_dino": 1.0, "visualquality_r1": 1.0, "longclip": 1.0}
    )
    # Checks that do not move: the detectors as they are before they learn.
    c.reward.held_out = ("omniaid_at_start", "omniaid_dino_at_start")
    c.reward.options = ConfigDict()
    c.reward.options.omniaid = ConfigDict({"path": "models/omniaid"})
    c.reward.options.omniaid_dino = ConfigDict({"path": "models/omniaid"})
    # Answers of up to 512 tokens take a while; up to 32 questions are asked at a time.
    c.reward.options.visualquality_r1 = ConfigDict(
        {
            "url": "http://localhost:8000/v1",
            "model": "VisualQuality-R1-7B",
            "concurrency": 32,
            "timeout": 120.0,
            "deadline": 500.0,
        }
    )
    c.reward.options.longclip = ConfigDict({"path": "models/longclip", "dtype": "float16"})
    c.reward.adversarial.omniaid = adversary()
    c.reward.adversarial.omniaid_dino = adversary()
    c.reward.references.path = "dataset/realgen/train.jsonl"
    c.reward.references.root = "dataset/realgen"

    c.evaluate.scores = ("omniaid", "omniaid_dino", "longclip")
    c.evaluate.detectors = ("omniaid", "omniaid_dino")
    return c


def adv_grpo(c: ConfigDict) -> None:
    """Set what all of Adv-GRPO's recipes share: the sampler, the calls of an epoch, the update."""
    c.sample.width = 512
    c.sample.height = 512
    c.sample.num_steps = 10
    c.sample.sde_type = "cps"
    c.sample.noise_level = 0.8
    c.sample.sde_window_size = 2
    c.sample.sde_window_range = (0, 2)
    c.sample.branches = 1
    c.sample.num_batches_per_epoch = 12
    c.sample.global_std = True

    c.train.loss = "grpo"
    c.train.beta = 0.0
    c.train.clip_range = 1e-5
    c.train.learning_rate = 3e-4
    c.train.lora_rank = 32
    c.train.lora_alpha = 64.0
    c.train.gradient_accumulation_steps = 6


def adv_grpo_learner() -> ConfigDict:
    """How Adv-GRPO's rewards learn: one Adam step on all pairs of an epoch; the generator rests."""
    c = adversary()
    c.skip_generator = True
    c.optimizer = "adam"
    c.betas = (0.5, 0.999)
    c.weight_decay = 0.0
    c.batch_size = 0
    c.history_batch_size = 0
    c.history_size = 0
    c.max_passes = 1
    c.ema_decay = 0.0
    return c


def dino_discriminator(run: ConfigDict) -> ConfigDict:
    """Adv-GRPO's schedule of its DINO discriminator: it learns in nine of ten epochs."""
    c = adv_grpo_learner()
    # Draws the head's initial weights and the patches; follows --config.seed.
    c.options.seed = run.get_ref("seed")
    c.schedule = "every"
    c.learn_epochs = 9
    c.cycle = 10
    c.learning_rate = 1e-4
    return c


def flux_dino_adv() -> ConfigDict:
    """Adv-GRPO's DINO discriminator (arXiv 2511.20256), on FLUX.1-dev instead of SD3.5-medium.

    672 images of 48 prompts and 2 optimizer steps an epoch. As in Adv-GRPO: 512 pixels, 10 steps,
    cps with noise 0.8 in the first two steps, advantages by the global standard deviation, no KL,
    the plain ratio, 48 prompts an epoch, and nine epochs of the discriminator for each epoch of the
    generator.

    Differences from Adv-GRPO: FLUX's distilled guidance of 3.5 instead of CFG 4.5; 7 GPUs train and
    the last one holds the rewards, so groups have 14 images instead of 16; evaluations take 28
    steps, not 40; features are normalised in training as they are for the reward; the LoRA covers
    the feed-forward layers too, theirs only the attention. Their log-probability of a cps step
    leaves out the variance, ours has it: our log-ratio is 0.62 and 0.71 times theirs in the two
    steps (1 / (2 std^2)), so the same clip_range of 1e-5 allows moves 1.6 and 1.4 times as large.

    Command: python scripts/train.py --config configs/flux_grpo.py:flux_dino_adv
    Machine: 8 H200s.
    Time: 1.3 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_dev_8xh200()
    adv_grpo(c)
    c.sample.train_batch_size = 56  # 7 GPUs x 8: four prompts per call
    c.sample.num_image_per_prompt = 14

    c.reward.fn = ConfigDict({"dino_discriminator": 1.0})
    c.reward.held_out = ("longclip",)
    c.reward.options = ConfigDict()
    c.reward.options.dino_discriminator = ConfigDict({"path": "models/dinov2-base"})
    c.reward.options.longclip = ConfigDict({"path": "models/longclip", "dtype": "float16"})
    c.reward.adversarial.dino_discriminator = dino_discriminator(c)
    c.reward.references.path = "dataset/references.json"
    c.reward.references.root = "dataset/references"

    c.evaluate.scores = ("longclip",)
    c.evaluate.detectors = ()
    return c


EXPERIMENTS = (
    tiny,
    tiny_awm,
    tiny_adversarial,
    tiny_soft,
    flux_dev_8xh200,
    flux_dev_8xh200_remote,
    flux_dev_6x2,
    flux_dev_1xh200,
    flux_dev_16xh200,
    flux_dev_full_8xh200,
    flux_adv_8xh200,
    flux_dino_adv,
)
PRESETS = {experiment.__name__: experiment for experiment in EXPERIMENTS}


def get_config(preset: str = "tiny") -> ConfigDict:
    """The config of the experiment that is named after the colon in --config."""
    config = make_preset(PRESETS, preset, __file__)
    config.preset = preset
    return config.lock()
