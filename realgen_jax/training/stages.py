"""The stages by name."""

from realgen_jax.training.diffusion import DiffusionStage, make_diffusion
from realgen_jax.training.rewriting import RewriterStage, make_rewriting

# config.stage -> a function (run) -> Stage
STAGES = {"diffusion": make_diffusion, "rewriter": make_rewriting}

# config.stage -> the folder of the trained weights in a run's folder
OUTPUTS = {"diffusion": DiffusionStage.output, "rewriter": RewriterStage.output}
