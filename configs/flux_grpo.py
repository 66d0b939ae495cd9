"""GRPO on FLUX.1 with AI-image detectors as rewards (RealGen, arXiv 2512.00473).

    python scripts/train.py --config configs/flux_grpo.py                      the embedded model: a laptop, 2 minutes
    python scripts/train.py --config configs/flux_grpo.py:flux_dev_8xh200      RealGen V1's recipe: 8 H200s, FLUX.1-dev

Other machines: flux_dev_8xh200_remote, flux_dev_6x2, flux_dev_1xh200, flux_dev_16xh200. All weights instead of a LoRA:
flux_dev_full_8xh200. What each needs: scripts/preflight.py.

Every key can be set on the command line, --config.train.learning_rate=1e-4; a key that is not here is an error.
Names follow Flow-GRPO's configs where the meaning is the same.
"""

from pathlib import Path

from ml_collections import ConfigDict

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = ROOT / "realgen_jax" / "embedded"
REWARDS = ROOT / "reward_bridge" / "embedded"


def tiny() -> ConfigDict:
    """The embedded model: a 2.4 M parameter FLUX on 64x64 pictures. 2 cores, under 2 minutes, 2 GB.

    Expected: the detector's P(real) rises by 0.15 or more and the held-out checks keep up (README has the figures).
    """
    c = ConfigDict()
    c.seed = 0
    c.run_name = ""  # empty: preset, date and time
    c.run_root = "runs"
    c.num_epochs = 45
    c.save_freq = 15  # epochs between checkpoints
    c.num_checkpoint_limit = 3
    c.save_failure = "stop"  # stop, continue: what the run does when a checkpoint cannot be written (a full disk)
    c.preemption_grace = (
        25.0  # seconds after SIGTERM in which the run must have begun its last save
    )
    c.eval_freq = 15  # epochs between evaluations; one at epoch 0 and one at the end in any case
    c.wandb_project = ""  # empty: no Weights & Biases
    c.compilation_cache = "~/.cache/realgen_jax/xla"  # empty: none
    c.profile = ConfigDict(
        {"steps": ()}
    )  # epochs of which a trace is written, from 1; 3 or later: the first compiles

    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # -1: the rest

    # what scripts/preflight.py reckons with where the mesh does not say; train.py takes the devices that it finds
    c.preflight = ConfigDict({"devices": 1, "mfu": 0.4})

    c.pretrained = ConfigDict()
    c.pretrained.model = str(EMBEDDED / "flux_tiny")  # a FluxPipeline folder
    c.pretrained.transformer = ""  # another transformer: a folder of diffusers or BFL's single file
    c.pretrained.lora = ""  # start from this LoRA: a peft folder or a diffusers file
    c.pretrained.dtype = "float32"  # what the transformer computes in
    c.pretrained.param_dtype = "float32"  # what its frozen weights are kept in
    c.pretrained.vae_dtype = "float32"
    # What the backward pass keeps of the forward one. full: the blocks' inputs; attention: also what the attention
    # gives, on NVIDIA GPUs; dots: and what all projections give; none: all it needs, nothing is computed a second time
    c.pretrained.remat = "full"

    c.prompts = ConfigDict()
    c.prompts.train = str(EMBEDDED / "prompts_train.txt")
    c.prompts.test = str(EMBEDDED / "prompts_test.txt")
    c.prompts.max_tokens = 16  # T5 tokens
    c.prompts.cache = "~/.cache/realgen_jax/text"
    c.prompts.dtype = "float32"
    c.prompts.device = "auto"  # where the text encoders run, once: as reward.device

    c.sample = ConfigDict()
    c.sample.resolution = 64  # pixels a side
    c.sample.num_steps = 10
    c.sample.eval_num_steps = 10
    c.sample.guidance_scale = 3.5
    c.sample.train_batch_size = 64  # images of one rollout call, over all devices
    c.sample.num_image_per_prompt = 16  # the group
    c.sample.branches = 1  # images that share a prefix and part where the window starts
    c.sample.same_latent = False  # True: a group shares its first latent
    c.sample.num_batches_per_epoch = 2  # rollout calls
    c.sample.sde_type = "sde"  # sde, cps
    c.sample.noise_level = 0.9
    c.sample.sde_window_size = 3
    c.sample.sde_window_range = (0, 8)
    c.sample.global_std = False
    c.sample.test_batch_size = 64  # images of one evaluation call
    c.sample.test_images_per_prompt = 4

    c.train = ConfigDict()
    c.train.lora = True  # False: all weights, with float32 master copies
    c.train.lora_rank = 16
    c.train.lora_alpha = 32.0
    c.train.lora_init = "gaussian"  # gaussian, kaiming
    c.train.loss = "guard"  # grpo, guard
    c.train.guard_bias = (
        "sample"  # batch: RealGen's code, which averages the bias over the batch too
    )
    c.train.kl = "velocity"  # velocity, mean, mean_reference
    c.train.beta = 0.01
    c.train.clip_range = 1e-3
    c.train.adv_clip_max = 5.0
    c.train.learning_rate = 1e-3
    c.train.adam_beta1 = 0.9
    c.train.adam_beta2 = 0.999
    c.train.adam_epsilon = 1e-8
    c.train.adam_weight_decay = 1e-4
    c.train.max_grad_norm = 1.0
    c.train.gradient_accumulation_steps = 1  # rollout calls of one optimizer step
    c.train.num_inner_epochs = 1
    c.train.ema_decay = 0.9
    c.train.ema_update_interval = 1
    c.train.recompute_old = (
        False  # True: the update's own program recomputes the sampled means first
    )

    c.reward = ConfigDict()
    c.reward.fn = ConfigDict(
        {"embedded_detector": 1.0, "clip_score": 0.5}
    )  # what is trained on, and its weights
    c.reward.held_out = (
        "embedded_held_out",
        "embedded_prompt_accuracy",
    )  # looked at in evaluations, never trained on
    c.reward.metrics = ("embedded_frechet",)  # checks on a whole set; lower is better
    c.reward.options = ConfigDict({"clip_score": ConfigDict({"path": str(REWARDS / "clip")})})
    c.reward.device = "auto"  # the last GPU, kept from JAX where there are others; without a GPU the CPU. cpu, cuda:N
    c.reward.share_gpu = False  # True: JAX computes on the rewards' GPUs too
    c.reward.devices = (
        ConfigDict()
    )  # rewards that have a device of their own, {"omniaid": "cuda:6"}
    c.reward.batch_size = (
        0  # most images a reward sees at once; 0: all of a call. Halved where memory runs out
    )
    c.reward.deadline = 120.0  # seconds for one reward and one call, retries included
    c.reward.retries = 1
    c.reward.stop_drop = 0.05  # end the run where a held-out reward lies so far below its best, while the reward rises,
    c.reward.stop_patience = 0  # for so many evaluations in a row; 0: never
    c.reward.adversarial = (
        ConfigDict()
    )  # rewards of fn that learn, and how: adversary() has the keys
    # What those take for real: .jsonl ("prompt", "image" or "images"), .json ({prompt: [images]}), or a folder of
    # photographs that stand for every prompt. Files lie relative to root, or to where path is if that is empty.
    c.reward.references = ConfigDict(
        {"path": str(REWARDS / "references" / "photographs.json"), "root": ""}
    )

    # RealBench: what scripts/evaluate.py compares models on, after the run
    c.evaluate = ConfigDict()
    c.evaluate.prompts = (
        ConfigDict(  # .txt or .jsonl ("prompt", "category"); line i of each set is the same scene
            {
                "short": str(EMBEDDED / "realbench_short.jsonl"),
                "long": str(EMBEDDED / "realbench_long.jsonl"),
            }
        )
    )
    c.evaluate.images_per_prompt = 4  # RealBench: 1
    c.evaluate.batch_size = 64  # images of one call, made and scored
    c.evaluate.scores = (
        "embedded_detector",
        "embedded_held_out",
        "embedded_prompt_accuracy",
        "clip_score",
    )
    c.evaluate.detectors = (
        "embedded_detector",
        "embedded_held_out",
    )  # P(real): the share above 0.5 is told as well
    c.evaluate.confidence = 0.95  # of all intervals
    c.evaluate.resamples = 2000  # of the bootstrap, over prompts
    c.evaluate.report_prompts = (
        100  # whose pictures are inside the report; all others are in its tables
    )
    c.evaluate.after_training = True  # train.py ends with the report

    c.evaluate.arena = ConfigDict()
    c.evaluate.arena.protocol = (
        "balanced"  # balanced: both orders, ties kept apart; realgen: the paper's
    )
    c.evaluate.arena.pairs = (
        "all"  # which entries meet: all; photographs: each with these; first: each with the first
    )
    c.evaluate.arena.prompts = 0  # most prompts of a set that are judged, spread evenly; 0: all
    c.evaluate.arena.concurrency = 8  # questions asked at a time
    c.evaluate.arena.requests_per_minute = 0.0  # most of them; 0: as many as the judge takes
    c.evaluate.arena.timeout = 120.0  # seconds for an answer
    c.evaluate.arena.attempts = (
        5  # for one question: rate limits, time-outs, answers that cannot be read
    )
    c.evaluate.arena.max_failures = (
        10  # questions in a row that came to nothing, after which the judge is left alone
    )
    c.evaluate.arena.port = 0  # of the page where a person judges; 0: a free one
    return c


def adversary() -> ConfigDict:
    """How a reward learns: a value of config.reward.adversarial, with RealGen-V2's numbers. Sizes count pairs of a real
    and a generated picture, on one replica.
    """
    a = ConfigDict()
    a.options = (
        ConfigDict()
    )  # of the learner (reward_bridge/learners/), beside config.reward.options of the same name
    # threshold: in epochs whose mean reward is above it; margin: while references lie less than it above what is
    # generated; every: in the first learn_epochs of each cycle; plateau: once the reward rose by less than min_rise in
    # patience epochs
    a.schedule = "threshold"
    a.threshold = 0.6
    a.margin = 0.0
    a.learn_epochs, a.cycle = 1, 1
    a.patience, a.min_rise = 5, 0.01
    a.always_first = True  # in epoch 0 in any case
    a.skip_generator = False  # True: the generator rests in epochs in which this learns
    a.optimizer = "adamw"  # adam, adamw
    a.learning_rate = 4e-5
    a.betas = (0.9, 0.999)
    a.weight_decay = 0.01
    a.batch_size = 16  # of this epoch, in one step; 0: all of it
    a.history_batch_size = 16  # of earlier epochs, beside them
    a.history_size = (
        1000  # kept of earlier epochs in which this learnt; in host memory and in checkpoints
    )
    a.max_passes = 20  # over the epoch,
    a.target_accuracy = 0.9  # until the mean of one pass reaches it
    a.ema_decay = 0.99  # of the weights that give the reward: min((1 + steps) / (10 + steps), this)
    a.codec = "jpeg"  # none, jpeg: what real and generated pictures both pass, once resized
    a.quality = 90  # of it
    a.deadline = 600.0  # seconds of one update
    return a


def tiny_adversarial() -> ConfigDict:
    """The embedded detector learns while the generator is trained on it alone, without KL or alignment: what fools the
    frozen detector within minutes does not fool one that is shown it. 2 cores, 3 minutes.

    Expected: the Fréchet distance to the photographs falls. With the detector frozen (--config.reward.adversarial={})
    it ends above its start (README has the figures).
    """
    c = tiny()
    c.sample.test_images_per_prompt = (
        16  # 512 pictures: a picture in two hundred that is no longer its subject shows
    )
    c.train.beta = 0.0
    c.reward.fn = ConfigDict({"embedded_detector": 1.0})
    c.reward.held_out = ("embedded_held_out", "embedded_prompt_accuracy", "clip_score")
    c.reward.metrics = ("embedded_frechet", "embedded_frechet_held_out")
    a = adversary()
    a.options = ConfigDict(
        {"init": "shipped"}
    )  # shipped: the demo's detector learns on; fresh: from nothing
    a.schedule = "every"
    a.learning_rate = 1e-3
    a.batch_size, a.history_batch_size = 32, 32
    a.max_passes, a.target_accuracy = 8, 0.95
    a.ema_decay = 0.9
    c.reward.adversarial = ConfigDict({"embedded_detector": a})
    return c


def tiny_soft() -> ConfigDict:
    """As tiny_adversarial, with blurred references: pictures alone lead the model to another style."""
    c = tiny_adversarial()
    c.num_epochs = 60
    # This style is far away: at twice the rate, or led by a detector that learns as much, subjects are lost on the way
    c.train.learning_rate = 5e-4
    a = c.reward.adversarial.embedded_detector
    a.max_passes, a.target_accuracy = 4, 0.85
    c.reward.references.path = str(REWARDS / "references" / "soft.json")
    c.reward.metrics = ("embedded_frechet", "embedded_sharpness")
    return c


def flux_dev_8xh200() -> ConfigDict:
    """RealGen V1 Guard (its config `flux_fast_guard`) on 8 H200s: 7 train, the last one holds the rewards.

    504 images of 24 prompts and 2 optimizer steps an epoch. Where the recipe and the code it ran differ, what ran is
    here (window of 7 steps, starts 0..14). Needs FLUX.1-dev and the reward models on disk.
    """
    c = tiny()
    c.seed = 42
    c.num_epochs = 1000
    c.save_freq = 1  # RealGen: 10; an epoch takes minutes, a checkpoint (3 GB) none of them: it is written beside
    c.num_checkpoint_limit = 5
    c.eval_freq = 10
    c.preflight.devices = 7

    c.pretrained.model = "models/FLUX.1-dev"
    c.pretrained.dtype = "bfloat16"
    c.pretrained.param_dtype = "bfloat16"
    c.pretrained.remat = (
        "dots"  # 38 GiB for a sixth of the update's time; 80 GB GPUs are better off with "full"
    )

    c.prompts.train = "dataset/realgen/train.txt"
    c.prompts.test = "dataset/realgen/test.txt"
    c.prompts.max_tokens = 512
    c.prompts.dtype = "bfloat16"

    c.sample.resolution = 1024
    c.sample.num_steps = 28
    c.sample.eval_num_steps = 28
    c.sample.guidance_scale = 3.5
    c.sample.train_batch_size = 21  # 7 GPUs x 3 branches: one prompt a call
    c.sample.num_image_per_prompt = 21
    c.sample.branches = 3
    c.sample.same_latent = False
    c.sample.num_batches_per_epoch = 24
    c.sample.sde_type = "sde"
    c.sample.noise_level = 0.9
    c.sample.sde_window_size = 7
    c.sample.sde_window_range = (0, 21)
    c.sample.global_std = False
    c.sample.test_batch_size = 56
    c.sample.test_images_per_prompt = 1

    c.train.lora_rank = 64
    c.train.lora_alpha = 128.0
    c.train.beta = 4e-4
    c.train.clip_range = 2e-6
    c.train.learning_rate = 1e-4
    c.train.gradient_accumulation_steps = 12
    c.train.ema_decay = 0.9
    c.train.ema_update_interval = 8

    c.reward.fn = ConfigDict({"forensic_chat": 1.0, "omniaid": 1.0, "longclip": 1.0})
    c.reward.held_out = ()  # ("effort",) where its weights are at hand: it tells when the others are being fooled
    c.reward.metrics = ()
    omniaid = {
        "path": "models/omniaid",
        "routing": "patch_mean",
    }  # RealGen's weights; OmniAID's: "feature_extractor"
    c.reward.options = ConfigDict(
        {
            "forensic_chat": ConfigDict({"path": "models/forensic_chat", "dtype": "bfloat16"}),
            "omniaid": ConfigDict(omniaid),
            "longclip": ConfigDict({"path": "models/longclip", "dtype": "float16"}),
        }
    )
    c.reward.deadline = 600.0
    c.reward.retries = 3

    c.evaluate.prompts = ConfigDict(
        {
            "short": "dataset/realbench/short_prompts.txt",
            "long": "dataset/realbench/long_prompts.txt",
        }
    )
    c.evaluate.images_per_prompt = 1
    c.evaluate.batch_size = 28
    c.evaluate.scores = (
        "forensic_chat",
        "omniaid",
        "longclip",
    )  # RealBench: effort, pickscore, hpsv2, hpsv3 as well
    c.evaluate.detectors = ("forensic_chat", "omniaid")
    c.evaluate.resamples = 10000
    c.evaluate.after_training = False
    return c


def flux_dev_8xh200_remote() -> ConfigDict:
    """All 8 GPUs train, the rewards are served elsewhere (scripts/serve_rewards.py). 528 images of 22 prompts, 2 steps.

    The weights are split over pairs of GPUs; --config.mesh.fsdp=4, or 8, halves them again.
    """
    c = flux_dev_8xh200()
    c.mesh.fsdp = 2
    c.preflight.devices = 8
    c.sample.train_batch_size = 24  # 8 GPUs x 3 branches: one prompt a call
    c.sample.num_image_per_prompt = 24
    c.sample.num_batches_per_epoch = 22
    c.train.gradient_accumulation_steps = 11
    servers = ("http://localhost:8017",)  # tunnels or addresses of the machines that score
    c.reward.options = ConfigDict({name: ConfigDict({"servers": servers}) for name in c.reward.fn})
    return c


def flux_dev_6x2() -> ConfigDict:
    """6 GPUs train, 2 hold the rewards, the large one alone on the last. 504 images of 28 prompts, 2 steps."""
    c = flux_dev_8xh200()
    c.preflight.devices = 6
    c.sample.train_batch_size = 18  # 6 GPUs x 3 branches: one prompt a call
    c.sample.num_image_per_prompt = 18
    c.sample.num_batches_per_epoch = 28
    c.sample.test_batch_size = 54
    c.train.gradient_accumulation_steps = 14
    c.reward.devices = ConfigDict({"omniaid": "cuda:6", "longclip": "cuda:6"})
    return c


def flux_dev_1xh200() -> ConfigDict:
    """One GPU for everything, rewards included: start with XLA_CLIENT_MEM_FRACTION set to what preflight.py says.

    504 images of 24 prompts and 2 steps as in the recipe, 3 images a call: a group of 21 is seven calls, each of which
    draws its own window.
    """
    c = flux_dev_8xh200()
    c.preflight.devices = 1
    c.sample.train_batch_size = 3
    c.sample.num_batches_per_epoch = 168
    c.sample.test_batch_size = 8
    c.train.gradient_accumulation_steps = 84
    return c


def flux_dev_16xh200() -> ConfigDict:
    """Two hosts of 8, of each 7 GPUs train and one holds the rewards. 504 images of 24 prompts, 2 steps."""
    c = flux_dev_8xh200()
    c.preflight.devices = 14
    c.sample.train_batch_size = 42  # 14 GPUs x 3 branches: two prompts a call
    c.sample.num_batches_per_epoch = 12
    c.train.gradient_accumulation_steps = 6
    return c


def flux_dev_full_8xh200() -> ConfigDict:
    """All 12 B weights train, with float32 masters spread over 8 GPUs; the rewards are served elsewhere.

    Not a recipe of RealGen, which trains a LoRA: the learning rate is a tenth of the LoRA's, as is usual, and untried.
    """
    c = flux_dev_8xh200_remote()
    c.mesh = ConfigDict({"data": 1, "fsdp": 8, "tensor": 1})
    c.save_freq, c.num_checkpoint_limit = 5, 2  # 190 GB each
    c.train.lora = False
    c.train.learning_rate = 1e-5
    return c


def flux_adv_8xh200() -> ConfigDict:
    """RealGen-V2's FLUX recipe on 8 H200s (its config `flux_fast_guard`): both OmniAID detectors learn from the
    photographs of RealGen's train.jsonl, one of them a prompt.

    Where it differs: 7 GPUs train and the last one holds the rewards (there 8 do both), so that groups are of 21
    pictures, not 24, and an epoch has 504 of 24 prompts; VisualQuality-R1, which samples its answers, is left out; real
    and generated pictures pass one JPEG codec before the detectors see them.
    """
    c = flux_dev_8xh200()
    c.prompts.train = "dataset/realgen/train.jsonl"
    c.sample.branches = 1  # every picture has its own first latent and prefix
    c.sample.sde_window_size = 3
    c.sample.sde_window_range = (0, 14)
    c.train.clip_range = 4e-6
    c.reward.fn = ConfigDict({"omniaid": 1.0, "omniaid_dino": 1.0, "longclip": 1.0})
    c.reward.options = ConfigDict(
        {
            "omniaid": ConfigDict({"path": "models/omniaid"}),
            "omniaid_dino": ConfigDict({"path": "models/omniaid"}),
            "longclip": ConfigDict({"path": "models/longclip", "dtype": "float16"}),
        }
    )
    c.reward.adversarial = ConfigDict({"omniaid": adversary(), "omniaid_dino": adversary()})
    c.reward.references = ConfigDict(
        {"path": "dataset/realgen/train.jsonl", "root": "dataset/realgen"}
    )
    c.evaluate.scores = ("omniaid", "omniaid_dino", "longclip")
    c.evaluate.detectors = ("omniaid", "omniaid_dino")
    return c


def flux_dino_adv() -> ConfigDict:
    """Adv-GRPO's DINO discriminator (there on SD3.5-medium), carried to FLUX.1-dev on 8 H200s.

    As there: 512 pixels, 10 steps, cps with noise 0.8 in the first two, advantages by the global standard deviation, no
    KL, plain ratio, 48 prompts an epoch, nine epochs of the discriminator to one of the generator. Where it differs:
    guidance is FLUX's distilled 3.5, not CFG 4.5; 7 GPUs train and the last one has the rewards, so that groups are of
    14 pictures, not 16; evaluation takes 28 steps, not 40; features are normalised for training as for the reward.
    """
    c = flux_dev_8xh200()
    c.sample.resolution = 512
    c.sample.num_steps = 10
    c.sample.sde_type = "cps"
    c.sample.noise_level = 0.8
    c.sample.sde_window_size = 2
    c.sample.sde_window_range = (0, 2)
    c.sample.branches = 1
    c.sample.train_batch_size = 56  # 7 GPUs x 8: four prompts a call
    c.sample.num_image_per_prompt = 14
    c.sample.num_batches_per_epoch = 12
    c.sample.global_std = True
    c.train.loss = "grpo"
    c.train.beta = 0.0
    c.train.clip_range = 1e-5
    c.train.learning_rate = 3e-4
    c.train.lora_rank, c.train.lora_alpha = 32, 64.0
    c.train.gradient_accumulation_steps = 6
    c.reward.fn = ConfigDict({"dino_discriminator": 1.0})
    c.reward.held_out = ("longclip",)
    c.reward.options = ConfigDict(
        {
            "dino_discriminator": ConfigDict({"path": "models/dinov2-base"}),
            "longclip": ConfigDict({"path": "models/longclip", "dtype": "float16"}),
        }
    )
    a = adversary()
    a.options = ConfigDict(
        {"seed": c.get_ref("seed")}
    )  # of the head's first weights and of the patches
    a.schedule = "every"
    a.learn_epochs, a.cycle = 9, 10
    a.skip_generator = True
    a.optimizer = "adam"
    a.learning_rate = 1e-4
    a.betas = (0.5, 0.999)
    a.weight_decay = 0.0
    a.batch_size, a.history_batch_size, a.history_size = 0, 0, 0
    a.max_passes = 1
    a.ema_decay = 0.0
    c.reward.adversarial = ConfigDict({"dino_discriminator": a})
    c.reward.references = ConfigDict(
        {"path": "dataset/references.json", "root": "dataset/references"}
    )
    c.evaluate.scores = ("longclip",)
    c.evaluate.detectors = ()
    return c


PRESETS = {
    preset.__name__: preset
    for preset in (
        tiny,
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
}


def get_config(preset: str = "tiny") -> ConfigDict:
    """The preset's config; `preset` is what follows the colon of --config."""
    if preset not in PRESETS:
        raise ValueError(
            f"configs/flux_grpo.py has no preset {preset!r}; choose from {', '.join(PRESETS)}"
        )
    config = PRESETS[preset]()
    config.preset = preset
    return config.lock()
