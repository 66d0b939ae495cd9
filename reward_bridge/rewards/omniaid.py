"""P(real) by OmniAID (arXiv 2511.08423) on CLIP. Source: yunncheng/OmniAID, models/OmniAID.py."""

import math
from pathlib import Path

from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.initialization import no_init_weights

from reward_bridge.preprocess import CLIP_MEAN, CLIP_STD
from reward_bridge.rewards.mixture import (
    MixtureDetector,
    MixtureReward,
    count_layers,
    head_count,
    mixture_table,
    read_mixture,
    read_sizes,
    tensor_shape,
)
from reward_bridge.weights import State, Table, find, load_strict

CLIP_TABLE: Table = (
    *mixture_table("encoder_layers", "tower.encoder.layers"),
    (r"(embeddings\..+)", r"tower.\1"),
    (r"ln_pre\.(.+)", r"tower.pre_layrnorm.\1"),
    (r"ln_post\.(.+)", r"tower.post_layernorm.\1"),
    (r"(feature_extractor\..+)", r"\1"),
)


class OmniAID(MixtureReward):
    """P(real) by OmniAID on CLIP ViT-L/14 at 336 px.

    path: a .pth file, published or trained with the authors' code, or its folder.
    routing: the feature that the router was trained on, "feature_extractor" (published files) or
        "patch_mean" (RealGen V1's reward server).
    top_k: 2; 1 for the GenImage weights.
    heads: attention heads; None: the width / 64.
    resize_first: 512 for v1 weights (RealGen's); 0 for v2 weights, trained without it.
    """

    def __init__(
        self,
        device: str,
        path: str,
        routing: str = "feature_extractor",
        top_k: int = 2,
        heads: int | None = None,
        resize_first: int = 512,
        dtype: str = "float32",
    ):
        file = find(
            path, "omniaid.path", "checkpoint_omniaid_v1.pth", "ckpt/checkpoint_omniaid_v1.pth"
        )
        state = read_mixture(file, CLIP_TABLE)
        check_routing(routing, state, file)
        config = clip_config(state, heads, "omniaid", file)
        sizes = read_sizes(state, top_k, "omniaid", file)

        with no_init_weights():  # all weights are loaded next
            extractor = CLIPVisionModel(config) if routing == "feature_extractor" else None
            model = MixtureDetector(CLIPVisionModel(config), extractor, sizes)
        load_strict(model, state, file)

        self.file = file
        super().__init__(
            device, model, config.image_size, resize_first, (CLIP_MEAN, CLIP_STD), dtype
        )


def check_routing(routing: str, state: State, source: Path) -> None:
    """Raise ValueError if the file does not have the tower that `routing` needs.

    The router's weights do not show which feature it expects, and the wrong feature gives wrong
    scores without an error.
    """
    if routing not in ("feature_extractor", "patch_mean"):
        raise ValueError(
            f"got omniaid.routing {routing!r}; expected 'feature_extractor' or 'patch_mean'"
        )
    has_extractor = any(key.startswith("feature_extractor.") for key in state)
    fitting = "feature_extractor" if has_extractor else "patch_mean"
    if routing != fitting:
        article = "a" if has_extractor else "no"
        raise ValueError(
            f"{source} has {article} feature_extractor tower, but routing is {routing!r}; set "
            f"config.reward.options.omniaid.routing to {fitting!r} if its router was trained so"
        )


def clip_config(state: State, heads: int | None, option: str, source: Path) -> CLIPVisionConfig:
    """The configuration of the tower in `state`, from its shapes.

    Quick-GELU and eps 1e-5, as in OpenAI's models, are transformers' defaults.
    """
    width, _, patch, _ = tensor_shape(state, "tower.embeddings.patch_embedding.weight", source)
    positions = tensor_shape(state, "tower.embeddings.position_embedding.weight", source)[0]
    hidden = tensor_shape(state, "tower.encoder.layers.0.mlp.fc1.weight", source)[0]
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=count_layers(state),
        num_attention_heads=head_count(heads, width, option),
        image_size=math.isqrt(positions - 1) * patch,
        patch_size=patch,
    )
