"""RealGen in JAX: FLUX.1, SDE rollouts and GRPO updates. Imports neither torch nor reward_bridge."""
