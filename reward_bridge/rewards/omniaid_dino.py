"""P(real) by OmniAID (arXiv 2511.08423) on DINOv3.

Source: yunncheng/OmniAID, models/OmniAID_DINO.py.
"""

from pathlib import Path

from transformers import DINOv3ViTConfig, DINOv3ViTModel
from transformers.initialization import no_init_weights

from reward_bridge.preprocess import IMAGENET_MEAN, IMAGENET_STD
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

DINO_TABLE: Table = (
    *mixture_table("layer", "tower.model.layer"),
    (r"((embeddings|norm)\..+)", r"tower.\1"),
    (r"feature_extractor\.(layer\..+)", r"feature_extractor.model.\1"),
    (r"(feature_extractor\.(embeddings|norm)\..+)", r"\1"),
)


class OmniAIDDino(MixtureReward):
    """P(real) by OmniAID-DINO, DINOv3 ViT-L/16 at 448 px.

    path: a .pth file, published or trained with the authors' code, or its folder.
    heads: attention heads; None: the width / 64.
    resize_first: 512 for v1 weights; 0 for v2 weights, which were trained without this resize.

    `size`, `rope_theta` and `eps` cannot be read off the weights' shapes. Their defaults are
    ViT-L/16's.
    """

    def __init__(
        self,
        device: str,
        path: str,
        size: int = 448,
        top_k: int = 2,
        heads: int | None = None,
        rope_theta: float = 100.0,
        eps: float = 1e-5,
        resize_first: int = 512,
        dtype: str = "float32",
    ):
        file = find(
            path,
            "omniaid_dino.path",
            "checkpoint_omniaid_dino_v1.pth",
            "ckpt/checkpoint_omniaid_dino_v1.pth",
        )
        state = read_mixture(file, DINO_TABLE)
        config = dino_config(state, size, heads, file, rope_theta=rope_theta, layer_norm_eps=eps)
        sizes = read_sizes(state, top_k, "omniaid_dino", file)

        with no_init_weights():  # all weights are loaded next
            model = MixtureDetector(DINOv3ViTModel(config), DINOv3ViTModel(config), sizes)
        load_strict(model, state, file)

        self.file = file
        super().__init__(device, model, size, resize_first, (IMAGENET_MEAN, IMAGENET_STD), dtype)


def dino_config(
    state: State, size: int, heads: int | None, source: Path, **options: float
) -> DINOv3ViTConfig:
    """The configuration of the tower in `state`, from its shapes and keys.

    Registers, biases and the gated MLP (with SiLU, in ViT-S+, H+ and 7B) are detected. Raises
    ValueError if `size` is not a multiple of the patch size.
    """
    width, _, patch, _ = tensor_shape(state, "tower.embeddings.patch_embeddings.weight", source)
    if size % patch:
        raise ValueError(
            f"got omniaid_dino.size {size}; expected a multiple of the patch size {patch} of "
            f"{source}"
        )
    layer = "tower.model.layer.0"
    gated = f"{layer}.mlp.gate_proj.weight" in state
    return DINOv3ViTConfig(
        hidden_size=width,
        intermediate_size=tensor_shape(state, f"{layer}.mlp.up_proj.weight", source)[0],
        num_hidden_layers=count_layers(state),
        num_attention_heads=head_count(heads, width, "omniaid_dino"),
        num_register_tokens=tensor_shape(state, "tower.embeddings.register_tokens", source)[1],
        image_size=size,
        patch_size=patch,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        query_bias=f"{layer}.attention.q_proj.bias" in state,
        key_bias=f"{layer}.attention.k_proj.bias" in state,
        value_bias=f"{layer}.attention.v_proj.bias" in state,
        proj_bias=f"{layer}.attention.o_proj.bias" in state,
        mlp_bias=f"{layer}.mlp.up_proj.bias" in state,
        **options,
    )
