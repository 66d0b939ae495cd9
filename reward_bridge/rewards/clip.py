"""What CLIP-based rewards (arXiv 2103.00020) share: loading of weights, tokens, features.

Features are float32, whatever the weights' dtype: a cosine rounded to bfloat16 hardly tells
pictures apart.
"""

import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.initialization import no_init_weights

from reward_bridge.preprocess import CLIP_MEAN, CLIP_STD, normalize, resize_and_crop
from reward_bridge.weights import State, Table, find, load_strict, read, rename, torch_dtype

# Curly apostrophes and quotation marks, and their straight forms.
STRAIGHT = {
    0x2BC: "'",
    **dict.fromkeys(range(0x2018, 0x201C), "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
}

TOWERS = ((r"visual\.transformer", "vision_model"), ("transformer", "text_model"))
LAYER_PARTS = (
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn", "self_attn"),
    (r"mlp\.c_fc", "mlp.fc1"),
    (r"mlp\.c_proj", "mlp.fc2"),
)
LAYERS: Table = tuple(
    (rf"{tower}\.resblocks\.(\d+)\.{theirs}\.(.+)", rf"{model}.encoder.layers.\1.{ours}.\2")
    for tower, model in TOWERS
    for theirs, ours in LAYER_PARTS
)

# Keys of OpenAI and open_clip, after `_split`, to those of transformers.
OPENAI: Table = (
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"visual\.ln_pre\.(weight|bias)", r"vision_model.pre_layrnorm.\1"),
    (r"visual\.ln_post\.(weight|bias)", r"vision_model.post_layernorm.\1"),
    (r"visual\.proj", "visual_projection.weight"),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (r"ln_final\.(weight|bias)", r"text_model.final_layer_norm.\1"),
    (r"text_projection", "text_projection.weight"),
    (r"logit_scale", "logit_scale"),
    (r"input_resolution|context_length|vocab_size", None),  # sizes, in OpenAI's own archives
    *LAYERS,
)


# -- Loading


def load_folder(path: str, option: str, device: str, dtype: str) -> CLIPModel:
    """Load a CLIPModel folder as transformers saves it.

    Raises FileNotFoundError if a file is missing, ValueError if the weights do not fit.
    """
    folder = find(path, option, "config.json").parent
    file = find(path, option, "model.safetensors", "pytorch_model.bin")
    state = {}
    for key, value in read(file).items():
        if not key.endswith(".position_ids"):  # a buffer of old versions
            state[key] = value
    return _fill(CLIPConfig.from_pretrained(folder), state, file, device, dtype)


def load_openai(
    state: State,
    source: str | Path,
    head_widths: tuple[int, int],
    activation: str,
    device: str,
    dtype: str,
) -> CLIPModel:
    """Load a state dict in OpenAI's or open_clip's layout into transformers' CLIPModel.

    head_widths: width of an attention head in the vision and in the text tower.

    The text feature is taken at the end token, which has the vocabulary's last id. OpenAI takes it
    at the largest id, which is equivalent. Raises ValueError naming `source` and keys that are
    missing, unexpected or have another shape.
    """
    renamed = rename(_split(state), OPENAI, source)
    try:
        config = _config(renamed, head_widths, activation)
    except KeyError as error:
        raise ValueError(
            f"{source} is not a complete CLIP with a vision transformer: it lacks {error}"
        ) from error
    return _fill(config, renamed, source, device, dtype)


def load_tokenizer(path: str, option: str, model: CLIPModel) -> CLIPTokenizer:
    """Load CLIP's byte-pair tokenizer from a folder, in either published format.

    Raises FileNotFoundError if a file is missing, ValueError if the tokenizer has more tokens than
    the model.
    """
    for part in ("vocab.json", "merges.txt"):
        folder = find(path, option, "tokenizer.json", part).parent
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    known = model.config.text_config.vocab_size
    if len(tokenizer) > known:
        raise ValueError(
            f"{folder} has a tokenizer of {len(tokenizer)} tokens, but the CLIP knows {known}; set "
            f"config.reward.options.{option} to a folder with the CLIP's own"
        )
    return tokenizer


def _split(state: State) -> dict[str, torch.Tensor]:
    """Split the fused in_proj into q, k and v, and transpose the two projections.

    OpenAI multiplies by the projections from the right.
    """
    parts: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.+\.attn\.)in_proj_(weight|bias)", key)
        if match:
            names = [f"{match[1]}{name}_proj.{match[2]}" for name in "qkv"]
            parts.update(zip(names, value.chunk(3), strict=True))
        elif key in ("visual.proj", "text_projection"):
            parts[key] = value.T
        else:
            parts[key] = value
    return parts


def _config(state: State, head_widths: tuple[int, int], activation: str) -> CLIPConfig:
    """The configuration of a state in transformers' layout, from its shapes.

    Raises KeyError if a tensor is missing.
    """
    vision = _tower_config(state, "vision_model", head_widths[0], activation)
    patch_embedding = state["vision_model.embeddings.patch_embedding.weight"]
    vision_positions = state["vision_model.embeddings.position_embedding.weight"]
    vision["patch_size"] = patch_embedding.shape[-1]
    patches = len(vision_positions) - 1  # without the class token
    vision["image_size"] = vision["patch_size"] * math.isqrt(patches)

    text = _tower_config(state, "text_model", head_widths[1], activation)
    vocabulary = len(state["text_model.embeddings.token_embedding.weight"])
    text["vocab_size"] = vocabulary
    text["max_position_embeddings"] = len(state["text_model.embeddings.position_embedding.weight"])
    text["bos_token_id"] = vocabulary - 2  # the last two ids
    text["eos_token_id"] = vocabulary - 1
    return CLIPConfig(
        vision_config=vision,
        text_config=text,
        projection_dim=len(state["visual_projection.weight"]),
    )


def _tower_config(state: State, name: str, head_width: int, activation: str) -> dict[str, Any]:
    hidden, width = state[f"{name}.encoder.layers.0.mlp.fc1.weight"].shape
    layers = [key for key in state if key.startswith(name) and key.endswith("mlp.fc1.weight")]
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // head_width,
        "hidden_act": activation,
    }


def _fill(
    config: CLIPConfig, state: State, source: str | Path, device: str, dtype: str
) -> CLIPModel:
    # All weights are loaded next; initialising those of a ViT-H would take 20 s.
    with no_init_weights():
        model = CLIPModel(config)
    load_strict(model, state, source)

    # logit_scale stays in float32: in bfloat16 a scale of 100 would be 98.9.
    parts = (
        model.vision_model,
        model.visual_projection,
        model.text_model,
        model.text_projection,
    )
    for part in parts:
        part.to(torch_dtype(dtype))
    return model.to(device)


# -- Texts and features


def clean(text: str) -> str:
    """Clean a text as OpenAI's and open_clip's tokenizers do and transformers' does not.

    Resolves HTML entities and straightens quotation marks and apostrophes. Their tokenizers use
    ftfy, which also repairs wrongly decoded text; that is left out.
    """
    return html.unescape(html.unescape(text)).translate(STRAIGHT)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str], length: int) -> torch.Tensor:
    """int64 [n, length]: start token, text, end token, zeros. A longer text is cut.

    The zeros have no effect: attention is causal, and the feature is taken at the end token.
    """
    rows = tokenizer(list(texts), truncation=True, max_length=length).input_ids
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def text_features(
    model: CLIPModel, tokenizer: CLIPTokenizer, prompts: Sequence[str]
) -> torch.Tensor:
    """float32 [n, d], not normalised. Equal prompts are encoded once."""
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    ids = tokenize(tokenizer, list(index), model.config.text_config.max_position_embeddings)
    features = model.get_text_features(input_ids=ids.to(model.device)).pooler_output
    return features[[index[prompt] for prompt in prompts]].float()


def image_features(
    model: CLIPModel,
    images: torch.Tensor,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> torch.Tensor:
    """uint8 [n, 3, h, w] -> float32 [n, d], not normalised.

    The short side is resized to the model's size, bicubic, and the middle is cropped.
    """
    pixels = normalize(resize_and_crop(images, model.config.vision_config.image_size), mean, std)
    return model.get_image_features(pixel_values=pixels).pooler_output.float()


def cosine(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Cosine similarity [n] of features [n, d] and [n, d]."""
    return F.cosine_similarity(image, text, dim=-1)
