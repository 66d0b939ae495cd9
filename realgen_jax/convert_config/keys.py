"""Every key of Flow-GRPO's and RealGen's configs, and the key of ours that says the same.

The table is what `python -m realgen_jax.convert_config` converts by, and what
docs/from_elsewhere.md shows. Sources, read for the names and meanings of the keys:

    yifan123/flow_grpo   config/base.py 54809b5, config/grpo.py 31c71b9, scripts/train_*.py 74db691
    yejy53/RealGen       RealGen_v1/flow_grpo/config/grpo.py, RealGen_v2/config/realgen.py 35de0a2
"""

from typing import NamedTuple


class Key(NamedTuple):
    """What becomes of a key of theirs."""

    ours: tuple[str, ...]  # keys of our config; empty: it has no counterpart
    note: str = ""  # what differs, or why there is no counterpart; empty: the same value

    @property
    def same(self) -> bool:
        """Whether the value is taken over as it is."""
        return len(self.ours) == 1 and not self.note


def same(key: str) -> Key:
    """A key of ours with the same meaning and unit."""
    return Key((key,))


def differs(note: str, *ours: str) -> Key:
    """Keys of ours that say it in another way."""
    return Key(ours, note)


def absent(note: str) -> Key:
    """No key of ours."""
    return Key((), note)


FLOW_GRPO = {
    # General
    "run_name": same("run_name"),
    "debug": absent("their scripts do not read it"),
    "num_epochs": same("num_epochs"),
    "resume_from": absent("the flag `--resume` continues a run; their checkpoints are not read"),
    "seed": same("seed"),
    "logdir": same("run_root"),
    "save_dir": absent("everything of a run is in `run_root/run_name`"),
    "save_freq": same("save_freq"),
    "eval_freq": same("eval_freq"),
    "num_checkpoint_limit": same("num_checkpoint_limit"),
    "mixed_precision": differs(
        "bf16 and fp16: bfloat16, of the frozen weights too; no: float32",
        "pretrained.dtype",
        "pretrained.param_dtype",
        "prompts.dtype",
    ),
    "allow_tf32": absent("JAX's own default, or `JAX_DEFAULT_MATMUL_PRECISION`"),
    "use_lora": same("train.lora"),
    "dataset": differs(
        "two files of the folder, which `prompt_fn` names", "prompts.train", "prompts.test"
    ),
    "resolution": differs("pixels of each side", "sample.width", "sample.height"),
    "activation_checkpointing": differs(
        '"full" in both cases, which costs time but changes no result', "pretrained.remat"
    ),
    "fsdp_optimizer_offload": same("train.offload"),
    # The model
    "pretrained.model": differs(
        "a folder: of a name on the hub, `models/` and its last part", "pretrained.model"
    ),
    "pretrained.revision": absent("the folder has one revision"),
    # Sampling
    "sample.num_steps": differs(
        "one less for Z-Image, whose last step goes from noise level 0 to 0", "sample.num_steps"
    ),
    "sample.eval_num_steps": differs("the same for evaluations", "evaluate.sample.num_steps"),
    "sample.guidance_scale": differs(
        "also of evaluations, unless the preset sets `eval_guidance_scale`", "sample.guidance_scale"
    ),
    "sample.eval_guidance_scale": differs(
        "only if the preset sets it: their scripts without a window do not read it",
        "evaluate.sample.guidance_scale",
    ),
    "sample.train_batch_size": differs(
        "times the GPUs: ours counts the images of all devices", "sample.train_batch_size"
    ),
    "sample.num_image_per_prompt": same("sample.num_image_per_prompt"),
    "sample.mini_num_image_per_prompt": differs(
        "images that share the steps before the window; times the GPUs, a call's images",
        "sample.branches",
        "sample.train_batch_size",
    ),
    "sample.test_batch_size": differs(
        "times the GPUs, for evaluations and for the report",
        "sample.test_batch_size",
        "evaluate.batch_size",
    ),
    "sample.num_batches_per_epoch": same("sample.num_batches_per_epoch"),
    "sample.global_std": same("sample.global_std"),
    "sample.noise_level": same("sample.noise_level"),
    "sample.same_latent": same("sample.same_latent"),
    "sample.sde_window_size": differs(
        "only if the preset sets it; otherwise, or at 0, all trained steps have noise",
        "sample.sde_window_size",
    ),
    "sample.sde_window_range": differs("as `sde_window_size`", "sample.sde_window_range"),
    "sample.train_num_steps": differs(
        "the window's length, which goes before `sde_window_size`; it starts in the first half",
        "sample.sde_window_size",
        "sample.sde_window_range",
    ),
    "sample.sde_type": same("sample.sde_type"),
    "sample.kl_reward": absent("a KL in the reward: use `train.beta`, which they recommend too"),
    "sample.batch_size": absent("their scripts do not read it"),
    "sample.sample_time_per_prompt": absent("of video models"),
    # Training
    "train.batch_size": absent("an update takes the rollout's calls as they were sampled"),
    "train.use_8bit_adam": absent("AdamW's state is float32"),
    "train.learning_rate": same("train.learning_rate"),
    "train.adam_beta1": same("train.adam_beta1"),
    "train.adam_beta2": same("train.adam_beta2"),
    "train.adam_weight_decay": same("train.adam_weight_decay"),
    "train.adam_epsilon": same("train.adam_epsilon"),
    "train.gradient_accumulation_steps": same("train.gradient_accumulation_steps"),
    "train.max_grad_norm": differs(
        "by the sum of the weights where RealGen adds up advantages", "train.max_grad_norm"
    ),
    "train.num_inner_epochs": same("train.num_inner_epochs"),
    "train.cfg": differs(
        'SD3 and Z-Image with guidance: "both", or "bound" as in RealGen V1; else empty',
        "train.cfg_gradient",
    ),
    "train.adv_clip_max": differs("as `max_grad_norm`", "train.adv_clip_max"),
    "train.clip_range": same("train.clip_range"),
    "train.clip_range_lt": absent("`train.clip_range` is symmetric"),
    "train.clip_range_gt": absent("`train.clip_range` is symmetric"),
    "train.timestep_shift": absent("of BAGEL"),
    "train.timestep_fraction": differs(
        "without a window: the steps with noise are this share of all, from the first",
        "sample.sde_window_size",
        "sample.sde_window_range",
    ),
    "train.beta": differs("as `max_grad_norm`", "train.beta"),
    "train.lora_path": same("pretrained.lora"),
    "train.ema": differs(
        "True: decay 0.9 every 8 optimizer steps, theirs move at every microbatch of these",
        "train.ema_decay",
        "train.ema_update_interval",
    ),
    "train.sft": absent("no supervised loss beside the reward"),
    "train.sft_batch_size": absent("no supervised loss beside the reward"),
    # Prompts and rewards
    "prompt_fn": differs(
        "geneval: `train_metadata.jsonl`; RealGen V2: `train.jsonl`; else `train.txt`",
        "prompts.train",
        "prompts.test",
    ),
    "prompt_fn_kwargs": absent("prompts are files"),
    "reward_fn": differs(
        "names and options as below; several rewards: their weighted sum is normalised",
        "reward.fn",
        "train.advantages",
    ),
    "per_prompt_stat_tracking": absent("a group is always the pictures of one prompt"),
    # Of video models
    "height": absent("of video models"),
    "width": absent("of video models"),
    "frames": absent("of video models"),
    "diffusion_loss": absent("of video models"),
}

REALGEN = {
    "rationorm": differs(
        'True: "guard", centred for each sample (`train.guard_bias="batch"`: as theirs)',
        "train.loss",
    ),
    "train.vkl": differs(
        'True: "velocity"; False: "mean_reference", whose KL divides by std² / dt', "train.kl"
    ),
    "train.highclip_range": absent("`train.clip_range` is symmetric"),
    "train.preset_lora_path": absent("the adapter is not merged; merge it into the model's folder"),
    "train.preset_lora_weightname": absent("as `preset_lora_path`"),
    "real_image_path": absent("their scripts do not read it"),
    "d_times": absent("their scripts do not read it"),
    "d_lr": differs("per detector", "reward.adversarial.*.learning_rate"),
    "d_threshold": differs("per detector", "reward.adversarial.*.threshold"),
    "d_batch_size": differs(
        "half from this epoch, half from earlier ones",
        "reward.adversarial.*.batch_size",
        "reward.adversarial.*.history_batch_size",
    ),
    "d_target_acc": differs("per detector", "reward.adversarial.*.target_accuracy"),
    "d_max_epochs": differs("per detector", "reward.adversarial.*.max_passes"),
    "d_buffer_size": differs("per detector", "reward.adversarial.*.history_size"),
}

KEYS = {**FLOW_GRPO, **REALGEN}

CHAT = "http://localhost:8000/v1"  # a server of the model, such as vLLM's

# Their name of a reward -> ours, and the options that it needs. docs/rewards.md says where the
# files come from.
REWARDS = {
    "pickscore": (
        "pickscore",
        {
            "path": "models/PickScore_v1",
            "tokenizer": "models/CLIP-ViT-H-14-laion2B-s32B-b79K",
            "divide_by": 26.0,
        },
    ),
    "clipscore": ("clip_score", {"path": "models/clip-vit-large-patch14"}),
    "hpsv2": ("hpsv2", {"path": "models/HPSv2"}),
    "hpsv3": ("hpsv3", {"path": "models/HPSv3", "base": "models/Qwen2-VL-7B-Instruct"}),
    "aesthetic": (
        "aesthetic",
        {
            "path": "models/sac+logos+ava1-l14-linearMSE.pth",
            "clip": "models/clip-vit-large-patch14",
        },
    ),
    "jpeg_compressibility": ("jpeg_compressibility", {}),
    "imagereward": (
        "imagereward",
        {"path": "models/ImageReward", "tokenizer": "models/bert-base-uncased"},
    ),
    "ocr": ("ocr", {}),
    "unifiedreward": ("unifiedreward", {"url": CHAT, "model": "UnifiedReward-7b-v1.5"}),
    "qwenvl": ("qwen_vl_score", {"url": CHAT, "model": "Qwen2.5-VL-7B-Instruct"}),
    "deqa": ("deqa", {"url": CHAT, "model": "DeQA-Score-Mix3"}),
    "visualquality": ("visualquality_r1", {"url": CHAT, "model": "VisualQuality-R1-7B"}),
    "forensic_chat": ("forensic_chat", {"path": "models/forensic_chat", "dtype": "bfloat16"}),
    "omniaid": ("omniaid", {"path": "models/omniaid", "routing": "patch_mean"}),
    "omniaid-dino": ("omniaid_dino", {"path": "models/omniaid"}),
    "longclip": ("longclip", {"path": "models/longclip", "dtype": "float16"}),
}

# Part of the model's name in lower case -> (config.pretrained.family, LoRA rank and alpha, which
# are constants of their scripts). The first one that fits counts.
MODELS = {
    "z-image-turbo": ("ZImagePipeline:Z-Image-Turbo", 64, 128.0),
    "z-image": ("ZImagePipeline", 64, 128.0),
    "stable-diffusion-3.5-large": ("StableDiffusion3Pipeline:SD3.5-L", 32, 64.0),
    "stable-diffusion-3.5-medium": ("StableDiffusion3Pipeline:SD3.5-M", 32, 64.0),
    "flux.1-dev": ("FluxPipeline", 64, 128.0),
    "flux1-dev": ("FluxPipeline", 64, 128.0),
}
