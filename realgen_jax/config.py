"""The training config, every key with default, unit and choices, and the flag --config.

A config file defines `get_config()`, which starts from `base()` and sets what differs:

    from realgen_jax.config import base

    def get_config():
        c = base()
        c.pretrained.model = "models/FLUX.1-dev"
        ...
        return c

Programs take it as --config FILE, and a shipped one by name, --config flux_grpo:tiny. Every key can
be set on the command line, --config.train.learning_rate=1e-4. A key that does not exist is an
error, in a file as on the command line.
"""

from ml_collections import ConfigDict


def base() -> ConfigDict:
    """Return a training config with neutral values: no model, no prompts and no rewards.

    The keys are fixed: a misspelled key raises AttributeError or KeyError. New keys can only be
    added to mappings that are keyed by reward or prompt set.
    """
    c = ConfigDict()
    c.preset = "custom"  # part of the run's default name; get_config() sets it
    # diffusion: trains the image model. rewriter: trains a language model that rewrites prompts for
    # the frozen image model; config.rewriter is for that stage only (docs/rewriter.md).
    c.stage = "diffusion"
    c.seed = 0  # root of all random numbers
    c.run_name = ""  # the run's folder; empty: preset, date and time
    c.run_root = "runs"  # parent of the run folders
    c.num_epochs = 100
    c.save_freq = 10  # epochs between checkpoints
    c.num_checkpoint_limit = 5  # number of newest checkpoints to keep
    c.save_failure = "stop"  # stop, continue: what to do if a checkpoint cannot be written
    c.preemption_grace = 25.0  # seconds after SIGTERM or SIGHUP until the last save has begun
    c.eval_freq = 10  # epochs between evaluations; epoch 0 and the last one are always evaluated
    c.wandb_project = ""  # empty: no Weights & Biases
    c.compilation_cache = "~/.cache/realgen_jax/xla"  # folder of compiled programs; empty: none

    # Epochs to trace, counted from 1. Use 3 or later: earlier epochs include compilation.
    c.profile = ConfigDict({"steps": ()})

    # Mesh axes; -1 takes all remaining devices. docs/clusters.md explains the axes.
    c.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    # Assumptions made by scripts/preflight.py. Training uses the devices it finds.
    c.preflight = ConfigDict()
    c.preflight.devices = 1  # training devices, if config.mesh leaves the number open
    c.preflight.mfu = 0.4  # achieved fraction of the devices' peak FLOP/s

    c.pretrained = _pretrained()
    c.prompts = _prompts()
    c.sample = _sample()
    c.train = _train()
    c.rewriter = _rewriter()
    c.reward = _reward()
    c.evaluate = _evaluate(c.sample)

    c.lock()
    for mapping in (c.reward.fn, c.reward.options, c.reward.devices, c.reward.adversarial):
        mapping.unlock()
    c.rewriter.text_rewards.unlock()
    c.evaluate.prompts.unlock()
    return c


def _pretrained() -> ConfigDict:
    """The model that training starts from."""
    c = ConfigDict()
    c.model = ""  # a diffusers pipeline folder; its model_index.json determines the family
    # What preflight.py assumes if there is no such folder: a pipeline class, and after a colon a
    # published model, "StableDiffusion3Pipeline:SD3.5-L". Without the colon: the first of them.
    c.family = "FluxPipeline"
    c.transformer = ""  # replaces the transformer: a diffusers folder or a file (docs/files.md)
    c.vae = ""  # replaces the autoencoder: a diffusers folder or a file, such as ae.safetensors
    c.lora = ""  # LoRA to start from: a peft folder or a file of any naming
    c.dtype = "float32"  # float32, bfloat16: compute dtype of the transformer
    c.param_dtype = "float32"  # float32, bfloat16: dtype of its frozen weights
    c.vae_dtype = "float32"  # float32, bfloat16
    c.vae_tile = 0  # decode pictures in overlapping tiles of this side, in pixels; 0: as a whole
    # How the kernels of its blocks are held, frozen under a LoRA: fp8, int8: 8 bits with a scale
    # for each output channel; nf4: 4 bits with a scale for 32 inputs; empty: as param_dtype says.
    c.quantization = ""
    # True: its blocks' kernels, frozen under a LoRA, and the autoencoder stay in host memory. Each
    # layer is copied to the device when its block runs, the autoencoder when pictures are decoded.
    c.offload = False

    # What the forward pass saves for the backward pass, from least to most memory:
    # full: the inputs of the blocks; attention: also the attention outputs (on NVIDIA GPUs);
    # dots: also the outputs of all projections; none: everything, so nothing is recomputed.
    c.remat = "full"
    return c


def _prompts() -> ConfigDict:
    """Prompt files and their text embeddings."""
    c = ConfigDict()
    c.train = ""  # .txt with one prompt per line, or .jsonl with "prompt"
    c.test = ""  # evaluation prompts, same formats
    c.max_tokens = 512  # T5 tokens
    c.cache = "~/.cache/realgen_jax/text"  # folder of text embeddings
    c.dtype = "float32"  # float32, bfloat16: dtype of the text encoders and embeddings
    c.device = "auto"  # where the text encoders run, once; choices as for reward.device
    return c


def _sample() -> ConfigDict:
    """Rollouts. How evaluations sample is in config.evaluate.sample."""
    c = ConfigDict()
    c.width = 512  # pixels
    c.height = 512
    # Several sizes (width, height) instead, in turn: epoch e, counted from 0, has size e mod n.
    c.buckets = ()
    c.num_steps = 10  # denoising steps
    c.guidance_scale = 3.5
    c.train_batch_size = 8  # images per rollout call, over all devices
    c.num_image_per_prompt = 8  # group size: images per prompt
    c.branches = 1  # images that share the ODE prefix and branch where the SDE window starts
    c.same_latent = False  # True: the images of a group share the initial noise
    c.num_batches_per_epoch = 2  # rollout calls per epoch
    c.solver = "euler"  # euler, dpm2: of rollouts without noise (train.loss nft, awm)
    # Of the same rollouts: this many steps in a row predict their velocity from the last computed
    # ones, then one computes it, as do the first two steps and the last one. 0: all compute it.
    c.cached_steps = 0
    c.sde_type = "sde"  # sde, cps, dance
    c.noise_level = 0.9
    # constant; cosine: noise_level at sigma = 1, falling to noise_least at 0 (HiCoGen).
    c.noise_schedule = "constant"
    c.noise_least = 0.0
    c.sde_window_size = 3  # number of steps with noise; these are trained on
    c.sde_window_range = (0, 8)  # [first, end) of the steps among which the window is placed
    c.sde_window = _sde_window()
    c.scout = _scout()
    c.global_std = False  # True: advantages are divided by the epoch's std, not the group's
    c.test_batch_size = 8  # images per evaluation call
    c.test_images_per_prompt = 1
    return c


def _sde_window() -> ConfigDict:
    """Where the window of steps with noise is placed. Defaults are MixGRPO's."""
    c = ConfigDict()
    # random: every rollout call draws its start. Or the start moves from epoch to epoch:
    # progressive: after `epochs` epochs; decay: after `most` epochs at the first start, falling
    #   linearly to `least`; exp_decay: after `epochs` epochs up to the start `threshold`, then
    #   after ceil(epochs exp(-rate (start - threshold))).
    c.strategy = "random"
    c.epochs = 25
    c.stride = 1  # steps by which it moves; 0: it stays where it is
    c.rollback = True  # at the end, return to the first start; False: stay at the last one
    c.most = 10
    c.least = 1
    c.threshold = 13
    c.rate = 0.1
    c.trained_steps = 0  # steps of the window to train on, drawn for each rollout call; 0: all
    # 0: the schedule's own steps behind the window. Above: this share of their number, of second
    # order (MixGRPO-Flash: 0.4 or 0.2).
    c.after = 0.0
    return c


def _scout() -> ConfigDict:
    """Scout and select (Sol-RL): which of many cheap previews of a prompt are sampled in full."""
    c = ConfigDict()
    c.previews = 0  # previews of a prompt; 0: none, every picture is sampled in full
    c.num_steps = 4  # denoising steps of a preview
    c.solver = "euler"  # euler, dpm2
    # best_worst: the best half of num_image_per_prompt, and the worst of the rest;
    # mean_deviation: those whose advantages are farthest from the mean.
    c.select = "best_worst"
    return c


def _train() -> ConfigDict:
    """The update."""
    c = ConfigDict()
    c.lora = True  # False: train all weights, with float32 master copies
    c.lora_rank = 32
    c.lora_alpha = 64.0
    c.lora_init = "gaussian"  # gaussian, kaiming
    c.loss = "guard"  # grpo, guard, dppo, nft, awm
    c.cfg_gradient = ""  # with classifier-free guidance: both, bound; else empty
    c.guard_bias = "sample"  # sample; batch: also averaged over the batch, as in RealGen's code
    c.kl = "velocity"  # velocity, mean, mean_reference
    c.beta = 0.0  # weight of the KL term
    c.clip_range = 1e-4  # of the policy ratio, around 1
    c.adv_clip_max = 5.0  # largest absolute advantage
    # per_reward, weighted_sum, dr_grpo, mixgrpo, gdpo, gdpo_unbiased, paco, pareto, gardo:
    # how advantages are computed from the rewards of a group (docs/rewards.md).
    c.advantages = "per_reward"
    # paco: the logarithm is taken of rewards whose std / mean is above this: mean, median (of that
    # of all rewards), or a number, such as "0.2".
    c.tame_above = "mean"
    c.learning_rate = 1e-4
    c.adam_beta1 = 0.9
    c.adam_beta2 = 0.999
    c.adam_epsilon = 1e-8
    c.adam_weight_decay = 1e-4
    c.max_grad_norm = 1.0
    c.gradient_accumulation_steps = 1  # rollout calls per optimizer step
    c.num_inner_epochs = 1  # passes over an epoch's images
    c.ema_decay = 0.9
    c.ema_update_interval = 1  # optimizer steps between EMA updates
    c.offload = False  # True: optimizer state and EMA stay in host memory between the updates
    c.recompute_old = False  # True: the update program first recomputes the sampled means

    # NormGuard, for velocities longer than the base model's: the weight of the mean of
    # max(|v| / |v of the base model| - limit, 0)^2. 0: off.
    c.norm_guard = ConfigDict({"weight": 0.0, "limit": 1.0})

    # GARDO: the KL is for the pictures that the trained reward ranks above what other rewards do.
    c.kl_gate = _kl_gate()

    # What only one of the losses has.
    c.dppo = _dppo()
    c.nft = _nft()
    c.awm = _awm()
    return c


def _kl_gate() -> ConfigDict:
    """Which pictures the KL holds back, by the ranks of other rewards. Defaults are GARDO's."""
    c = ConfigDict()
    c.against = ()  # these other rewards, of reward.watched; empty: the KL is for all pictures
    # Share under the KL of the pictures that the trained reward ranks higher than the others do.
    c.share = 0.1  # in the first epoch; then times 1.1 or 0.9 as the ranks differ more or less
    c.least = 0.02  # the smallest share
    c.most = 0.2  # the largest share
    return c


def _dppo() -> ConfigDict:
    """Flow-DPPO, config.train.loss dppo. It clips neither ratios nor advantages."""
    c = ConfigDict()
    # Pictures whose step has moved this far, where their advantage points to, are dropped. Mean
    # over a picture's elements of (mean - mean_old)^2 / 2.
    c.threshold = 1e-5
    c.per_variance = True  # that over std^2, the KL of the two steps
    return c


def _nft() -> ConfigDict:
    """DiffusionNFT, config.train.loss nft. beta is the weight of the KL, adv_clip_max its C."""
    c = ConfigDict()
    c.mix = 1.0  # b: how far the two implicit policies lie from the old one
    c.advantages = "all"  # all, positive_only, negative_only, one_only, binary
    c.update(_levels(sigmas=9, draw="permuted", fraction=1.0))
    c.update(_old_policy(most=0.5))
    return c


def _awm() -> ConfigDict:
    """Advantage-weighted matching, config.train.loss awm. beta: KL; adv_clip_max: advantages."""
    c = ConfigDict()
    c.weighting = "plain"  # plain, ghuber, huber, t, t2: of the matching error
    c.advantage_max = 1.0  # advantages are clipped to +-adv_clip_max and scaled to +-advantage_max
    c.clip_range = 1.0  # of the ratio, around 1
    c.beta_ema = 1.0  # weight of the KL to the old policy
    c.kl_weight = "uniform"  # uniform, elbo: weight of both KLs over sigma
    c.off_policy = False  # True: the old policy samples, and ratios refer to it
    c.update(_levels(sigmas=6, draw="strata", fraction=0.9))
    c.update(_old_policy(most=0.3))
    return c


def _levels(sigmas: int, draw: str, fraction: float) -> ConfigDict:
    """The noise levels that an objective without a window trains on, steps of the rollout."""
    c = ConfigDict()
    c.sigmas = sigmas  # number of noise levels for each picture
    # permuted: the first of a permutation, drawn for each picture; strata: one of each of `sigmas`
    # parts of the schedule, the same for a rollout call.
    c.draw = draw
    c.first_step = 0  # the first step that may be drawn
    c.fraction = fraction  # the share of the steps, from the first one, that may be drawn
    c.least_sigma = 0.0  # above 0: only steps before the last one with a sigma this high
    return c


def _old_policy(most: float) -> ConfigDict:
    """After an epoch, old <- d old + (1 - d) trained, d = min(rate (steps - delay), most)."""
    c = ConfigDict()
    c.old_rate = 0.001  # per optimizer step
    c.old_delay = 0  # optimizer steps; until then, d is 0
    c.old_most = most
    return c


def _rewriter() -> ConfigDict:
    """The language model that rewrites prompts, config.stage rewriter.

    An epoch has prompts_per_epoch x rewrites_per_prompt x images_per_rewrite pictures; a group is
    the rewrites of a prompt. config.sample says how the frozen image model draws them; of its keys,
    those that divide an epoch, and those of the noise, are not read. Of config.train, loss,
    clip_range and what belongs to one loss are not read; config.train.gradient_accumulation_steps
    counts microbatches.
    """
    c = ConfigDict()
    c.path = ""  # the language model: a Hugging Face folder with weights and tokenizer (Qwen3)
    c.adapter = ""  # a peft folder to start from, such as a cold start made with another program
    c.system = ""  # the system prompt; empty: none
    c.thinking = False  # what the chat template is told; only some templates read it
    c.answer_tag = ""  # "answer": only what is inside <answer></answer> is the rewrite
    c.dtype = "float32"  # float32, bfloat16: compute dtype of the language model
    c.param_dtype = "float32"  # float32, bfloat16: dtype of its frozen weights
    c.remat = "full"  # as config.pretrained.remat

    c.prompts_per_epoch = 8
    c.rewrites_per_prompt = 8  # group size: rewrites per prompt
    c.images_per_rewrite = 1
    c.max_prompt_tokens = 320  # of system prompt, prompt and chat template; longer ones are errors
    c.max_new_tokens = 384  # of a rewrite, with its end token
    c.temperature = 1.0  # of sampling in training; evaluations take the likeliest token

    c.loss = "grpo"  # grpo: a ratio per token; gspo: a ratio per rewrite (clip_range near 4e-4)
    # What a mean over tokens is: token: over all tokens of the optimizer step; sequence: over a
    # rewrite's tokens, then over rewrites; constant: their sum over max_new_tokens.
    c.aggregate = "token"
    c.clip_range = (0.2, 0.28)  # of the ratio, below and above 1
    # Weights that correct for the sampler's rounding, exp(old - sampled log-prob) up to this; 0: no
    # weights.
    c.importance_cap = 2.0
    c.microbatch = 8  # rewrites per forward and backward pass, over all devices
    c.logit_chunk = 64  # tokens of a rewrite whose logits are in memory at a time

    c.min_words = 5  # outside of these, the text reward "length" falls
    c.max_words = 60
    # {text reward: weight}, beside config.reward.fn: usable, length, kept, spam.
    c.text_rewards = ConfigDict()
    c.spam_patterns = ()  # regular expressions of words that the text reward "spam" counts
    # Largest share of an epoch's rewrites that cannot be drawn; after 3 epochs in a row above it,
    # the run ends with an error.
    c.max_unusable = 0.5
    return c


def _reward() -> ConfigDict:
    """Rewards and their devices. docs/rewards.md lists them; their classes define the options."""
    c = ConfigDict()
    # {reward: weight}: the rewards to train on. The sum is divided by the sum of |weight|; a reward
    # with a negative weight is a penalty.
    c.fn = ConfigDict()
    c.held_out = ()  # rewards that are scored in evaluations but never trained on
    # Rewards that are scored in every epoch, for metrics.jsonl, but never trained on: "diversity".
    c.watched = ()
    c.metrics = ()  # metrics of a whole set of images in evaluations; lower is better
    # True: prompts of a .jsonl file that have an "original", such as rewrites, are scored by it.
    c.score_original = False
    c.options = ConfigDict()  # {reward: its constructor's options}

    # auto: the last GPU, which JAX does not use if there are others; without a GPU, the CPU.
    # Or cpu, cuda:N.
    c.device = "auto"
    c.share_gpu = False  # True: JAX uses the rewards' GPUs too
    c.devices = ConfigDict()  # rewards with a device of their own: {"omniaid": "cuda:6"}
    c.batch_size = 0  # images a reward gets at once, halved if out of memory; 0: the whole call
    c.deadline = 120.0  # seconds for one reward and one call, retries included
    c.retries = 1

    # What judges the run: reward, or the name of a held-out reward or a metric. best/ goes by it.
    # If it is reward, alarms and the early stop count only while that rises. auto: reward; if a
    # reward learns, whose values do not compare over time, the first of held_out, or of metrics.
    c.monitor = "auto"

    # Stop the run once a held-out reward (or the metric that is monitored) has been `stop_drop`, in
    # its own units, worse than its best for `stop_patience` evaluations in a row. 0: never stop.
    c.stop_drop = 0.05
    c.stop_patience = 0

    c.adversarial = ConfigDict()  # {reward of fn: adversary()}: rewards that learn during the run

    # Real images for rewards that learn: .jsonl ("prompt", "image" or "images"), .json
    # ({prompt: [images]}), or a folder of photographs that are used for every prompt. File names
    # are relative to root; if root is empty, to the folder that contains path.
    c.references = ConfigDict({"path": "", "root": ""})
    return c


def _evaluate(rollouts: ConfigDict) -> ConfigDict:
    """RealBench, as run by scripts/evaluate.py and for the report at the end of a run."""
    c = ConfigDict()

    # {set: file}, .txt or .jsonl ("prompt", "category"). Line i of all sets describes one scene.
    c.prompts = ConfigDict()
    c.images_per_prompt = 1  # RealBench: 1
    # {benchmark: file of its prompts}, for evaluate.py --benchmark; docs/realbench.md has sources.
    c.benchmarks = ConfigDict(
        {
            "geneval": "dataset/geneval/evaluation_metadata.jsonl",
            "dpg": "dataset/dpg_bench/dpg_bench.csv",
            "partiprompts": "dataset/partiprompts/PartiPrompts.tsv",
            "ocr": "dataset/ocr/test.txt",
        }
    )
    c.category_mean = False  # True: also the mean over categories, each counted alike (GenEval)
    c.sample = _evaluation_sample(rollouts)
    c.batch_size = 8  # images that are generated and scored in one call
    c.scores = ()  # rewards
    c.detectors = ()  # scores that are P(real); the share above 0.5 is reported as well
    c.confidence = 0.95  # level of all intervals
    c.resamples = 2000  # bootstrap resamples, over prompts
    c.report_prompts = 100  # prompts whose images are in the report; its tables cover all prompts
    c.after_training = False  # True: train.py ends with the report
    c.arena = _arena()
    return c


def _evaluation_sample(rollouts: ConfigDict) -> ConfigDict:
    """How pictures are sampled in RealBench, in the evaluations of a run, and by sample.py."""
    c = ConfigDict()
    c.width = rollouts.get_oneway_ref("width")  # pixels; the rollouts', unless it is set
    c.height = rollouts.get_oneway_ref("height")
    c.num_steps = 10  # denoising steps
    c.solver = "euler"  # euler, dpm2
    # The tuned weights take the first share of the steps, the base model the others. A LoRA's base
    # is the model without it.
    c.tuned_share = 1.0
    c.guidance_scale = 3.5
    return c


def _arena() -> ConfigDict:
    """The arena of RealBench: a judge compares pairs of images."""
    c = ConfigDict()
    c.protocol = "balanced"  # balanced: both orders, ties count as ties; realgen: the paper's
    c.pairs = "all"  # all; photographs: each entry with the photographs; first: each with the first
    c.prompts = 0  # maximum number of prompts per set, evenly spaced; 0: all
    c.concurrency = 8  # questions in flight
    c.requests_per_minute = 0.0  # upper limit; 0: no limit
    c.timeout = 120.0  # seconds for an answer
    c.attempts = 5  # per question: rate limits, time-outs and unreadable answers are retried
    c.max_failures = 10  # give up on the judge after this many failed questions in a row
    c.port = 0  # port of the page for human judges; 0: any free port
    return c


def adversary() -> ConfigDict:
    """How a reward learns: a value of config.reward.adversarial. Defaults are RealGen-V2's.

    Sizes count pairs of a real and a generated image, per replica.
    """
    c = ConfigDict()
    c.options = ConfigDict()  # learner options (reward_bridge/learners/), added to reward.options

    # When it learns.
    # threshold: in epochs whose mean reward is above `threshold`;
    # margin: in epochs whose references score less than `margin` above the generated images;
    # every: in the first `learn_epochs` epochs of each `cycle`;
    # plateau: if the reward has not risen by `min_rise` over the last `patience` epochs; after
    #   learning, the count starts again.
    c.schedule = "threshold"
    c.threshold = 0.6
    c.margin = 0.0
    c.learn_epochs = 1
    c.cycle = 1
    c.patience = 5
    c.min_rise = 0.01
    c.always_first = True  # learn in epoch 0, whatever the schedule says
    c.skip_generator = False  # True: the generator is not updated in epochs when this learns

    c.optimizer = "adamw"  # adam, adamw
    c.learning_rate = 4e-5
    c.betas = (0.9, 0.999)
    c.weight_decay = 0.01

    c.batch_size = 16  # pairs from this epoch per step; 0: all
    c.history_batch_size = 16  # pairs from earlier epochs, added to each step
    c.history_size = 1000  # pairs kept from epochs it learned in, in host memory and checkpoints
    c.max_passes = 20  # maximum number of passes over the epoch's pairs
    c.target_accuracy = 0.9  # stop after a pass with this mean accuracy

    # The reward is computed with an EMA of the weights. Its decay is
    # min((1 + steps) / (10 + steps), ema_decay).
    c.ema_decay = 0.99
    c.codec = "jpeg"  # none, jpeg: how real and generated images are encoded after the resize
    c.quality = 90  # codec quality
    c.deadline = 600.0  # seconds for one update

    c.lock()
    c.options.unlock()
    return c
