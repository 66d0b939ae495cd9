"""RealGen's stage 1: a language model that rewrites prompts, trained on the pictures it gives.

The image model is frozen. Each function is an experiment, as in configs/flux_grpo.py; pictures,
rewards and GPUs are those of `flux_dev_8xh200` there. RealGen published neither code nor numbers of
this stage, except for the model (Qwen3-4B-Instruct) and the batch size, 32. docs/rewriter.md says
what the stage does, and how the image model is trained on the rewrites afterwards.

    --config configs/rewriter_grpo.py                        the embedded models
    --config configs/rewriter_grpo.py:flux_rewriter_8xh200
"""

from ml_collections import ConfigDict

from realgen_configs.embedded import tiny_rewriter, tiny_rewriter_greedy
from realgen_configs.flux_grpo import flux_dev_8xh200, flux_dev_8xh200_remote
from realgen_jax.config_files import make_preset

SYSTEM = (
    "You turn a short image prompt into one that a photographer could have shot. Begin with the "
    "prompt itself and keep its people, objects, numbers, colours, texts and relations. Then add "
    "what the camera saw: place, light, materials, small imperfections, distance, framing, depth "
    "of field. One paragraph, plain English, 120 to 220 words. No lists, no praise of quality, no "
    "comments. Answer with the prompt alone."
)

# Camera file names, and words that praise a picture instead of describing it.
SPAM = (
    r"IMG_\d+",
    r"DSC\w*\d+",
    r"\.(CR[23]|ARW|RAF|NEF|DNG)\b",
    r"\b(8k|masterpiece|ultra-?realistic)\b",
)


def flux_rewriter_8xh200() -> ConfigDict:
    """Qwen3-4B-Instruct-2507 rewrites short prompts for FLUX.1-dev: 32 prompts x 7 rewrites.

    One optimizer step an epoch, on 224 rewrites with a picture each. The prompts are users' prompts
    of about 20 words; RealGen's own are not published.

    Where nothing is published the numbers are ours, from neighbours: learning rates are 5e-6 for
    LoRA in UniRL and 1e-6 for all weights in PromptRL and T2I-R1, the KL (k3, 0.01) is theirs, the
    asymmetrical clip range is DAPO's (arXiv 2503.14476), lengths are those of RealGen's published
    long prompts (158 to 237 words).

    Command: python scripts/train.py --config configs/rewriter_grpo.py:flux_rewriter_8xh200
    Machine: 8 H200s; 7 sample and train, the last one holds rewards and text encoders.
    Time: 2.9 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_dev_8xh200()
    c.stage = "rewriter"
    c.num_epochs = 300
    c.save_freq = 5
    c.eval_freq = 20
    c.pretrained.remat = "full"  # the image model has no backward pass
    c.prompts.train = "dataset/short_train.txt"
    c.prompts.test = "dataset/realbench/short_prompts.txt"

    c.rewriter.path = "models/Qwen3-4B-Instruct-2507"
    c.rewriter.system = SYSTEM
    c.rewriter.dtype = "bfloat16"
    c.rewriter.param_dtype = "bfloat16"
    c.rewriter.remat = "full"
    c.rewriter.prompts_per_epoch = 32  # RealGen's batch size
    c.rewriter.rewrites_per_prompt = 7
    c.rewriter.images_per_rewrite = 1
    c.rewriter.max_prompt_tokens = 320
    c.rewriter.max_new_tokens = 384
    c.rewriter.temperature = 1.0
    c.rewriter.loss = "grpo"
    c.rewriter.aggregate = "token"
    c.rewriter.clip_range = (0.2, 0.28)
    c.rewriter.importance_cap = 2.0
    c.rewriter.microbatch = 56  # 7 GPUs x 8
    c.rewriter.logit_chunk = 64
    c.rewriter.min_words = 120
    c.rewriter.max_words = 240
    c.rewriter.text_rewards = ConfigDict({"usable": 1.0, "length": 0.25, "kept": 0.25, "spam": 0.0})
    c.rewriter.spam_patterns = SPAM
    c.rewriter.max_unusable = 0.5

    c.sample.train_batch_size = 56  # 7 GPUs x 8
    c.sample.same_latent = True  # rewrites of a prompt are compared on the same noise
    c.sample.global_std = False

    c.train.lora_rank = 32
    c.train.lora_alpha = 64.0
    c.train.lora_init = "kaiming"
    c.train.learning_rate = 1e-5
    c.train.adam_weight_decay = 0.0
    c.train.adv_clip_max = 5.0
    c.train.beta = 0.01
    c.train.gradient_accumulation_steps = 4  # all of an epoch's rewrites
    c.train.ema_decay = 0.0
    c.train.ema_update_interval = 1

    c.reward.held_out = ("effort", "clip_score")
    c.reward.options.effort = ConfigDict({"path": "models/effort"})
    c.reward.options.clip_score = ConfigDict({"path": "models/clip-vit-large-patch14"})
    c.evaluate.images_per_prompt = 2
    return c


def flux_rewriter_plain_8xh200() -> ConfigDict:
    """`flux_rewriter_8xh200` with a penalty for camera file names and praise.

    RealGen's published rewrites are full of them: 55 % hold a camera's file name.

    Command: python scripts/train.py --config configs/rewriter_grpo.py:flux_rewriter_plain_8xh200
    Machine and time: as `flux_rewriter_8xh200`.
    """
    c = flux_rewriter_8xh200()
    c.rewriter.text_rewards.spam = 0.5
    return c


def flux_rewriter_1xh200() -> ConfigDict:
    """`flux_rewriter_8xh200` with one GPU for everything: 8 prompts x 8 rewrites.

    Command: python scripts/train.py --config configs/rewriter_grpo.py:flux_rewriter_1xh200, with
    XLA_CLIENT_MEM_FRACTION in the environment. scripts/preflight.py computes its value.
    Machine: 1 H200.
    Time: 5.7 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_rewriter_8xh200()
    c.preflight.devices = 1
    c.rewriter.prompts_per_epoch = 8
    c.rewriter.rewrites_per_prompt = 8
    c.rewriter.microbatch = 8
    c.sample.train_batch_size = 8
    c.sample.test_batch_size = 8
    c.train.gradient_accumulation_steps = 8
    return c


def flux_rewriter_full_8xh200() -> ConfigDict:
    """`flux_rewriter_8xh200` with all weights of the language model: 32 prompts x 8 rewrites.

    All 8 GPUs train, and the weights are split over them. Rewards are served by other machines;
    the text encoders share the last GPU (XLA_CLIENT_MEM_FRACTION leaves room for their 10 GB).

    Command: python scripts/train.py --config configs/rewriter_grpo.py:flux_rewriter_full_8xh200
    Machine: 8 H200s, and scripts/serve_rewards.py elsewhere.
    Time: 2.9 minutes an epoch by scripts/preflight.py, at 40 % of the peak; not measured.
    """
    c = flux_rewriter_8xh200()
    c.preflight.devices = 8
    c.mesh.data = 1
    c.mesh.fsdp = 8
    c.rewriter.rewrites_per_prompt = 8
    c.rewriter.microbatch = 64
    c.rewriter.logit_chunk = 384  # in each chunk the head's gradient is summed over devices
    c.sample.train_batch_size = 64
    c.sample.test_batch_size = 64
    c.train.lora = False
    c.train.learning_rate = 1e-6

    served = flux_dev_8xh200_remote().reward.options.omniaid
    c.reward.options = ConfigDict(dict.fromkeys((*c.reward.fn, *c.reward.held_out), served))
    c.reward.share_gpu = True
    c.prompts.device = "cuda:7"
    return c


EXPERIMENTS = (
    tiny_rewriter,
    tiny_rewriter_greedy,
    flux_rewriter_8xh200,
    flux_rewriter_plain_8xh200,
    flux_rewriter_1xh200,
    flux_rewriter_full_8xh200,
)
PRESETS = {experiment.__name__: experiment for experiment in EXPERIMENTS}


def get_config(preset: str = "tiny_rewriter") -> ConfigDict:
    """The config of the experiment that is named after the colon in --config."""
    config = make_preset(PRESETS, preset, __file__)
    config.preset = preset
    return config.lock()
