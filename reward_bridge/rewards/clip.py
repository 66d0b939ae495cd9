"""What the rewards on a CLIP (arXiv 2103.00020) share: loading its weights in either layout, and its features.

Features come in float32 whatever the weights' dtype, since a cosine rounded to bfloat16 hardly tells pictures apart.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.initialization import no_init_weights

from reward_bridge.preprocess import CLIP_MEAN, CLIP_STD, normalize, resize_and_crop
from reward_bridge.weights import Table, find, load_strict, read, rename, torch_dtype

State = Mapping[str, torch.Tensor]
STRAIGHT = {
    0x2BC: "'",
    **dict.fromkeys(range(0x2018, 0x201C), "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
}

# Keys of OpenAI and open_clip, after `_split`, to transformers'
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
    *(
        (rf"{tower}\.resblocks\.(\d+)\.{theirs}\.(.+)", rf"{model}.encoder.layers.\1.{ours}.\2")
        for tower, model in (
            (r"visual\.transformer", "vision_model"),
            ("transformer", "text_model"),
        )
        for theirs, ours in (
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
            ("attn", "self_attn"),
            (r"mlp\.c_fc", "mlp.fc1"),
            (r"mlp\.c_proj", "mlp.fc2"),
        )
    ),
)


def _split(state: State) -> dict[str, torch.Tensor]:
    """q, k and v out of the fused in_proj; the projections, which OpenAI multiplies from the right, transposed."""
    parts: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if match := re.fullmatch(r"(.+\.attn\.)in_proj_(weight|bias)", key):
            names = (f"{match[1]}{name}_proj.{match[2]}" for name in "qkv")
            parts.update(zip(names, value.chunk(3), strict=True))
        else:
            parts[key] = value.T if key in ("visual.proj", "text_projection") else value
    return parts


def _config(state: State, head_widths: tuple[int, int], activation: str) -> CLIPConfig:
    """Of a state in transformers' layout, sizes read off its shapes; `head_widths` of the vision and the text tower."""

    def tower(name: str, head_width: int) -> dict:
        hidden, width = state[f"{name}.encoder.layers.0.mlp.fc1.weight"].shape
        return {
            "hidden_size": width,
            "intermediate_size": hidden,
            "num_hidden_layers": sum(
                key.startswith(name) and key.endswith("mlp.fc1.weight") for key in state
            ),
            "num_attention_heads": width // head_width,
            "hidden_act": activation,
        }

    vision, text = (
        tower(name, width)
        for name, width in zip(("vision_model", "text_model"), head_widths, strict=True)
    )
    vision["patch_size"] = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    positions = (
        len(state["vision_model.embeddings.position_embedding.weight"]) - 1
    )  # without the class token's
    vision["image_size"] = vision["patch_size"] * math.isqrt(positions)
    text["vocab_size"] = len(state["text_model.embeddings.token_embedding.weight"])
    text["max_position_embeddings"] = len(state["text_model.embeddings.position_embedding.weight"])
    text["bos_token_id"], text["eos_token_id"] = (
        text["vocab_size"] - 2,
        text["vocab_size"] - 1,
    )  # its last two
    return CLIPConfig(
        vision_config=vision,
        text_config=text,
        projection_dim=len(state["visual_projection.weight"]),
    )


def _fill(
    config: CLIPConfig, state: State, source: str | Path, device: str, dtype: str
) -> CLIPModel:
    with no_init_weights():  # all of them are about to be loaded; drawing a ViT-H's takes 20 s
        model = CLIPModel(config)
    load_strict(model, state, source)
    for part in (
        model.vision_model,
        model.visual_projection,
        model.text_model,
        model.text_projection,
    ):
        part.to(torch_dtype(dtype))  # not logit_scale: in bfloat16 a scale of 100 would be 98.9
    return model.to(device)


def load_folder(path: str, option: str, device: str, dtype: str) -> CLIPModel:
    """A CLIPModel folder as transformers saves it. Raises FileNotFoundError and ValueError, see weights.py."""
    folder = find(path, option, "config.json").parent
    file = find(str(folder), option, "model.safetensors", "pytorch_model.bin")
    state = {
        key: value for key, value in read(file).items() if not key.endswith(".position_ids")
    }  # of old versions
    return _fill(CLIPConfig.from_pretrained(folder), state, file, device, dtype)


def load_openai(
    state: State,
    source: str | Path,
    head_widths: tuple[int, int],
    activation: str,
    device: str,
    dtype: str,
) -> CLIPModel:
    """A state dict in OpenAI's or open_clip's layout into transformers' CLIPModel.

    The text feature is taken at the vocabulary's last id, the end token: where OpenAI takes it, at the largest one.
    Raises ValueError naming `source` and what is missing, over, or of another shape.
    """
    renamed = rename(_split(state), OPENAI, source)
    try:
        config = _config(renamed, head_widths, activation)
    except KeyError as error:
        raise ValueError(
            f"{source} is no whole CLIP with a vision transformer: it lacks {error}"
        ) from error
    return _fill(config, renamed, source, device, dtype)


def load_tokenizer(path: str, option: str, model: CLIPModel) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer from a folder, in either of the forms in which it is published.

    Raises FileNotFoundError, and ValueError where it has more tokens than the model.
    """
    for part in ("vocab.json", "merges.txt"):
        folder = find(path, option, "tokenizer.json", part).parent
    tokenizer, known = CLIPTokenizer.from_pretrained(folder), model.config.text_config.vocab_size
    if len(tokenizer) > known:
        raise ValueError(
            f"{folder} has a tokenizer of {len(tokenizer)} tokens, the CLIP knows {known}; "
            f"set config.reward.options.{option} to a folder with the CLIP's own"
        )
    return tokenizer


def clean(text: str) -> str:
    """What OpenAI's and open_clip's tokenizers do to a text first, and transformers' does not.

    HTML entities resolved, quotation marks and apostrophes made straight. They use ftfy for it, which also mends
    wrongly decoded text; that is left out.
    """
    return html.unescape(html.unescape(text)).translate(STRAIGHT)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str], length: int) -> torch.Tensor:
    """int64 [n, length]: start token, text, end token, then zeros; a longer text is cut and ends in the end token.

    Nothing looks at the zeros: attention is causal, and the feature is taken at the end token.
    """
    rows = tokenizer(list(texts), truncation=True, max_length=length).input_ids
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def text_features(
    model: CLIPModel, tokenizer: CLIPTokenizer, prompts: Sequence[str]
) -> torch.Tensor:
    """float32 [n, d], not normalised; equal prompts are encoded once."""
    index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    ids = tokenize(tokenizer, [*index], model.config.text_config.max_position_embeddings)
    features = model.get_text_features(input_ids=ids.to(model.device)).pooler_output
    return features[[index[prompt] for prompt in prompts]].float()


def image_features(
    model: CLIPModel,
    images: torch.Tensor,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
) -> torch.Tensor:
    """uint8 [n, 3, h, w] -> float32 [n, d], not normalised.

    Short side to the model's size, bicubic, then the middle.
    """
    pixels = normalize(resize_and_crop(images, model.config.vision_config.image_size), mean, std)
    return model.get_image_features(pixel_values=pixels).pooler_output.float()


def cosine(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """[n, d] and [n, d] -> [n]."""
    return F.cosine_similarity(image, text, dim=-1)
