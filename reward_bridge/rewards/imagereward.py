"""ImageReward, human preference by BLIP's text encoder on BLIP's picture tokens (2304.05977).

Source: THUDM/ImageReward, the package image-reward 1.5.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig
from transformers.initialization import no_init_weights
from transformers.models.blip.modeling_blip import BlipVisionModel

from reward_bridge.preprocess import CLIP_MEAN, CLIP_STD, normalize, resize_and_crop
from reward_bridge.rewards.aesthetic import PUBLISHED_LAYERS, linear_layers
from reward_bridge.weights import State, Table, find, load_strict, read, rename, torch_dtype

# Of the published head's outputs; scores have about mean 0 and standard deviation 1.
MEAN = 0.16717362830052426
STD = 1.0333394966054072
TOKENS = 35  # of a prompt; the rest is cut off, as in the package
HEAD_WIDTH = 64  # of an attention head in both encoders

# Keys of the published file to ours. The projections are for BLIP's other losses.
TABLE: Table = (
    (r"blip\.visual_encoder\.cls_token", "vision.embeddings.class_embedding"),
    (r"blip\.visual_encoder\.pos_embed", "vision.embeddings.position_embedding"),
    (r"blip\.visual_encoder\.patch_embed\.proj\.(.+)", r"vision.embeddings.patch_embedding.\1"),
    (r"blip\.visual_encoder\.norm\.(.+)", r"vision.post_layernorm.\1"),
    (
        r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.(.+)",
        r"vision.encoder.layers.\1.layer_norm\2.\3",
    ),
    (
        r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(.+)",
        r"vision.encoder.layers.\1.self_attn.qkv.\2",
    ),
    (
        r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.(.+)",
        r"vision.encoder.layers.\1.self_attn.projection.\2",
    ),
    (
        r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.(fc[12]\..+)",
        r"vision.encoder.layers.\1.mlp.\2",
    ),
    (r"blip\.text_encoder\.embeddings\.position_ids", None),
    (r"blip\.text_encoder\.(.+)", r"text.\1"),
    (r"blip\.(vision|text)_proj\.(weight|bias)", None),
    *(
        (rf"mlp\.layers\.{theirs}\.(weight|bias)", rf"head.{ours}.\1")
        for ours, theirs in enumerate(PUBLISHED_LAYERS)
    ),
)


class Network(nn.Module):
    """Both encoders and the head, with the sizes of a state dict (after `TABLE`)."""

    def __init__(self, state: State):
        super().__init__()
        patches = state["vision.embeddings.patch_embedding.weight"]
        positions = state["vision.embeddings.position_embedding"]
        words = state["text.embeddings.word_embeddings.weight"]
        width = words.shape[1]
        patch = patches.shape[-1]
        side = round((positions.shape[1] - 1) ** 0.5) * patch
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=len(patches),
                intermediate_size=len(state["vision.encoder.layers.0.mlp.fc1.weight"]),
                num_hidden_layers=_layers(state, "vision.encoder.layers."),
                num_attention_heads=len(patches) // HEAD_WIDTH,
                image_size=side,
                patch_size=patch,
                layer_norm_eps=1e-6,
            )
        )
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=len(words),
                hidden_size=width,
                encoder_hidden_size=len(patches),
                intermediate_size=len(state["text.encoder.layer.0.intermediate.dense.weight"]),
                num_hidden_layers=_layers(state, "text.encoder.layer."),
                num_attention_heads=width // HEAD_WIDTH,
                max_position_embeddings=len(state["text.embeddings.position_embeddings.weight"]),
                layer_norm_eps=1e-12,
                is_decoder=True,  # with cross-attention; it is called without a causal mask
            ),
            add_pooling_layer=False,
        )
        self.head = linear_layers(width)
        self.side = side

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [n, 3, side, side], ids and mask [n, t] -> float32 [n]."""
        tokens = self.vision(pixels).last_hidden_state
        states = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=tokens,
            encoder_attention_mask=torch.ones(tokens.shape[:2], device=tokens.device).long(),
        ).last_hidden_state
        score = self.head(states[:, 0].float()).squeeze(1)
        return (score - MEAN) / STD


class ImageReward:
    """How people would rate the picture for its prompt; about 0 with a spread of 1.

    path: ImageReward.pt or its folder.
    tokenizer: a folder with BERT's tokenizer, bert-base-uncased; by default the file's own folder.
    """

    can_be_negative = True

    def __init__(
        self, device: str, path: str, tokenizer: str | None = None, dtype: str = "float32"
    ):
        file = find(path, "imagereward.path", "ImageReward.pt", "*.safetensors")
        folder = find(
            tokenizer or str(file.parent), "imagereward.tokenizer", "tokenizer.json", "vocab.txt"
        ).parent
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = load_network(file).to(device)
        self.dtype = torch_dtype(dtype)
        for encoder in (self.model.vision, self.model.text):
            encoder.to(self.dtype)
        known = self.model.text.config.vocab_size
        if len(self.tokenizer) > known:
            raise ValueError(
                f"{folder} has a tokenizer of {len(self.tokenizer)} tokens, but {file} knows "
                f"{known}; set config.reward.options.imagereward.tokenizer to bert-base-uncased"
            )

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        images = resize_and_crop(images, self.model.side)
        pixels = normalize(images, CLIP_MEAN, CLIP_STD, self.dtype)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS,
            return_tensors="pt",
        ).to(images.device)  # fmt: skip
        return self.model(pixels, tokens.input_ids, tokens.attention_mask)


def load_network(file: Path) -> Network:
    """Load the published weights. Raises ValueError for keys or shapes that do not fit."""
    state = rename(read(file), TABLE, file)
    try:
        with no_init_weights():  # all weights are loaded next
            network = Network(state)
    except KeyError as error:
        raise ValueError(f"{file} is not an ImageReward: it lacks {error}") from error
    return load_strict(network, state, file)


def _layers(state: State, prefix: str) -> int:
    """The number of layers whose keys begin with a prefix."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})
