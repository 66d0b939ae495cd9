"""Keys of Flow-Factory's YAML files for GRPO, NFT, AWM and DPPO, and ours. For the page alone.

Read for names and meanings: X-GenGroup/Flow-Factory, examples/*/lora/flux1/default.yaml 5f6cda1
and src/flow_factory/hparams/training_args/ c5b89b1 and 6c7882b.
"""

from realgen_jax.convert_config.keys import absent, differs, same

_SIZE = differs("height and width; ours are two keys", "sample.height", "sample.width")
_OVERLAP = absent("rewards always overlap with sampling, and never with updates")

FLOW_FACTORY = {
    # Environment
    "launcher": absent("`python scripts/train.py`; several hosts: docs/clusters.md"),
    "config_file": absent("the mesh is in the config"),
    "num_processes": differs("devices of the mesh; a process drives all of a host", "mesh.data"),
    "main_process_port": absent("the flag `--coordinator`"),
    "mixed_precision": differs(
        "bf16 and fp16: bfloat16; no: float32", "pretrained.dtype", "pretrained.param_dtype"
    ),
    # Data
    "data.datasets": absent("one file of prompts"),
    "data.datasets.dataset_dir": differs(
        "a file, `.txt` or `.jsonl` with `prompt`", "prompts.train", "prompts.test"
    ),
    "data.datasets.train.weight": absent("one file of prompts"),
    "data.datasets.train.max_dataset_size": absent("shorten the file"),
    "data.preprocessing_batch_size": absent("chosen by the encoder's process"),
    "data.dataloader_num_workers": absent("embeddings are read from the cache"),
    "data.force_reprocess": absent("a changed prompt is encoded anew by itself"),
    "data.cache_dir": same("prompts.cache"),
    "data.sampler_type": absent("a group is an axis of the batch"),
    "data.sampler_subgroup_size": absent("a group is an axis of the batch"),
    # Model
    "model.finetune_type": differs("lora: True; full: False", "train.lora"),
    "model.lora_rank": same("train.lora_rank"),
    "model.lora_alpha": same("train.lora_alpha"),
    "model.target_modules": absent("attention and feed-forward layers of all blocks"),
    "model.target_components": absent("the transformer"),
    "model.master_weight_dtype": absent("float32"),
    "model.model_name_or_path": differs("a folder", "pretrained.model"),
    "model.model_type": absent("read from the folder's `model_index.json`"),
    "model.resume_path": differs(
        "a LoRA to start from; the flag `--resume` continues a run", "pretrained.lora"
    ),
    "model.resume_type": absent("seen from the file"),
    # Log
    "log.run_name": same("run_name"),
    "log.project": same("wandb_project"),
    "log.logging_backend": absent("TensorBoard and `metrics.jsonl` always; wandb with a project"),
    "log.save_dir": same("run_root"),
    "log.save_freq": same("save_freq"),
    "log.save_model_only": absent("checkpoints have all of the state"),
    # Training
    "train.trainer_type": differs("grpo, grpo-guard, nft, awm, dppo", "train.loss"),
    "train.max_epochs": same("num_epochs"),
    "train.reward_optimization_overlap": _OVERLAP,
    "train.reward_optimization_overlap_mode": _OVERLAP,
    "train.reward_optimization_overlap_poll_interval": _OVERLAP,
    "train.advantage_aggregation": differs("gdpo: gdpo; sum: weighted_sum", "train.advantages"),
    "train.global_std": same("sample.global_std"),
    "train.clip_range": differs("of `awm`: `train.awm.clip_range`; symmetric", "train.clip_range"),
    "train.adv_clip_range": differs("symmetric", "train.adv_clip_max"),
    "train.kl_type": differs("v-based: velocity; x-based: mean_reference", "train.kl"),
    "train.kl_beta": same("train.beta"),
    "train.kl_guidance_scale": absent("the KL has the rollout's guidance"),
    "train.ref_param_device": absent("the base model is the model without its LoRA"),
    "train.resolution": _SIZE,
    "train.height": same("sample.height"),
    "train.width": same("sample.width"),
    "train.num_frames": absent("of video models"),
    "train.frame_rate": absent("of video models"),
    "train.num_inference_steps": same("sample.num_steps"),
    "train.guidance_scale": same("sample.guidance_scale"),
    "train.per_device_batch_size": differs(
        "times the devices: the images of a call", "sample.train_batch_size"
    ),
    "train.group_size": same("sample.num_image_per_prompt"),
    "train.unique_sample_num_per_epoch": differs(
        "times the group, divided by the images of a call", "sample.num_batches_per_epoch"
    ),
    "train.gradient_step_per_epoch": differs(
        "calls of an epoch, divided by it", "train.gradient_accumulation_steps"
    ),
    "train.gradient_accumulation_steps": differs(
        "auto: see `gradient_step_per_epoch`", "train.gradient_accumulation_steps"
    ),
    "train.num_inner_epochs": same("train.num_inner_epochs"),
    "train.ema_decay": differs(
        "of the exported weights; of `nft` and `awm`, the old policy's largest decay",
        "train.ema_decay",
        "train.nft.old_most",
        "train.awm.old_most",
    ),
    "train.ema_update_interval": differs(
        "epochs; ours: optimizer steps", "train.ema_update_interval"
    ),
    "train.ema_decay_schedule": differs(
        "linear: the decay grows by `old_rate` a step", "train.nft.old_rate", "train.awm.old_rate"
    ),
    "train.warmup_steps": differs(
        "steps until the largest decay; ours is the rate",
        "train.nft.old_rate",
        "train.awm.old_rate",
    ),
    "train.ema_device": absent("with the weights; `train.offload` keeps it in host memory"),
    "train.enable_gradient_checkpointing": differs(
        "full, attention, dots, none", "pretrained.remat"
    ),
    "train.offload_samples_to_cpu": absent("latents stay on the devices"),
    "train.latent_storage_dtype": absent("float32, so that the ratio is exact"),
    "train.shuffle_samples": absent("calls are replayed as sampled, so that the ratio is exact"),
    "train.seed": same("seed"),
    "train.learning_rate": same("train.learning_rate"),
    "train.adam_betas": differs("two keys", "train.adam_beta1", "train.adam_beta2"),
    "train.adam_weight_decay": same("train.adam_weight_decay"),
    "train.adam_epsilon": same("train.adam_epsilon"),
    "train.max_grad_norm": same("train.max_grad_norm"),
    # NFT, AWM and DPPO
    "train.nft_beta": same("train.nft.mix"),
    "train.off_policy": differs("`nft` always samples with the old policy", "train.awm.off_policy"),
    "train.num_train_timesteps": differs(
        "noise levels for each picture", "train.nft.sigmas", "train.awm.sigmas"
    ),
    "train.time_sampling_strategy": differs(
        "levels are steps of the rollout: permuted or strata", "train.nft.draw", "train.awm.draw"
    ),
    "train.time_shift": absent("levels are steps of the rollout"),
    "train.timestep_range": differs(
        "share of the steps from the first; or a least noise level",
        "train.nft.fraction",
        "train.awm.fraction",
        "train.nft.least_sigma",
        "train.awm.least_sigma",
    ),
    "train.awm_weighting": differs("uniform: plain", "train.awm.weighting"),
    "train.ghuber_power": absent("0.25"),
    "train.kl_weight": same("train.awm.kl_weight"),
    "train.ema_kl_beta": same("train.awm.beta_ema"),
    "train.kl_mask_type": differs("x-based: True", "train.dppo.per_variance"),
    "train.kl_mask_threshold": same("train.dppo.threshold"),
    # Steps with noise
    "scheduler.dynamics_type": differs(
        "Flow-SDE: sde; CPS: cps; Dance-SDE: dance; ODE: `nft`, `awm`", "sample.sde_type"
    ),
    "scheduler.noise_level": same("sample.noise_level"),
    "scheduler.num_sde_steps": differs(
        "steps in a row; `sde_window.trained_steps` draws some of them",
        "sample.sde_window_size",
        "sample.sde_window.trained_steps",
    ),
    "scheduler.sde_steps": differs("a list; ours is a range", "sample.sde_window_range"),
    "scheduler.seed": absent("all random numbers come from `seed`"),
    # Evaluations
    "eval.resolution": differs("two keys", "evaluate.sample.height", "evaluate.sample.width"),
    "eval.height": same("evaluate.sample.height"),
    "eval.width": same("evaluate.sample.width"),
    "eval.num_frames": absent("of video models"),
    "eval.frame_rate": absent("of video models"),
    "eval.per_device_batch_size": differs("of all devices", "sample.test_batch_size"),
    "eval.guidance_scale": same("evaluate.sample.guidance_scale"),
    "eval.num_inference_steps": same("evaluate.sample.num_steps"),
    "eval.eval_freq": same("eval_freq"),
    "eval.seed": absent("all random numbers come from `seed`"),
    # Rewards
    "rewards.name": absent("a reward's name is its key"),
    "rewards.reward_model": differs("a name, or `class` in its options", "reward.fn"),
    "rewards.weight": differs("the value", "reward.fn"),
    "rewards.batch_size": differs("one for all rewards", "reward.batch_size"),
    "rewards.device": differs("one for all, or by name", "reward.device", "reward.devices"),
    "rewards.dtype": differs("an option of the reward", "reward.options"),
    "rewards.reward_model_kwargs": differs("by name", "reward.options"),
    "eval_rewards": differs("their names", "reward.held_out"),
    # Optimizer
    "optimizers.learning_rate": same("train.learning_rate"),
    "optimizers.weight_decay": same("train.adam_weight_decay"),
    "optimizers.betas": differs("two keys", "train.adam_beta1", "train.adam_beta2"),
    "optimizers.eps": same("train.adam_epsilon"),
    "optimizers.max_grad_norm": same("train.max_grad_norm"),
}
