"""Tiny random CLIPs as users have them on disk, and OpenAI's forward pass written out.

Source: openai/CLIP, model.py.
"""

import json

import torch
import transformers
from torch.nn import functional as F

SIDE, PATCH, DIM, LAYERS, POSITIONS = 48, 8, 16, 2, 24
LETTERS = [chr(c) for c in range(97, 123)]
VOCABULARY = [*LETTERS, *(c + "</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"]
TOKENS = len(VOCABULARY)


def write_tokenizer(folder):
    """Write a tokenizer in the published form whose vocabulary is letters.

    Its last two ids are the start and the end token.
    """
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(VOCABULARY)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def token_ids(prompt):
    ids = []
    for word in prompt.split():
        ids += [LETTERS.index(c) for c in word[:-1]] + [26 + LETTERS.index(word[-1])]
    ids = [52, *ids[: POSITIONS - 2], 53]
    return torch.tensor(ids + [0] * (POSITIONS - len(ids)))


def write_folder(folder):
    """A random CLIPModel folder as a user would have it."""
    write_tokenizer(folder)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
    text = {
        "vocab_size": TOKENS,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 52,
        "eos_token_id": 53,
    }
    vision = {"image_size": SIDE, "patch_size": PATCH}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=sizes | text,
        vision_config=sizes | vision,
        projection_dim=DIM,
        logit_scale_init_value=4.5,
    )
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    size, crop = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    processor = transformers.CLIPImageProcessorPil(size=size, crop_size=crop)
    processor.save_pretrained(folder)
    return model, processor


def openai_state(vision, text, seed=0):
    """A random CLIP in the layout of OpenAI's and open_clip's files.

    `vision` and `text` are the towers' widths.
    """
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=rng) / shape[-1] ** 0.5

    state = {
        "visual.class_embedding": draw(vision),
        "visual.conv1.weight": draw(vision, 3, PATCH, PATCH),
        "visual.positional_embedding": draw((SIDE // PATCH) ** 2 + 1, vision),
        "visual.proj": draw(vision, DIM),
        "token_embedding.weight": draw(TOKENS, text),
        "positional_embedding": draw(POSITIONS, text),
        "text_projection": draw(text, DIM),
        "logit_scale": torch.tensor(4.5),
    }
    for tower, width in (("visual.transformer", vision), ("transformer", text)):
        for name in (f"{tower}.resblocks.{i}." for i in range(LAYERS)):
            state |= {
                name + "attn.in_proj_weight": draw(3 * width, width),
                name + "attn.in_proj_bias": draw(3 * width),
                name + "attn.out_proj.weight": draw(width, width),
                name + "attn.out_proj.bias": draw(width),
                name + "mlp.c_fc.weight": draw(4 * width, width),
                name + "mlp.c_fc.bias": draw(4 * width),
                name + "mlp.c_proj.weight": draw(width, 4 * width),
                name + "mlp.c_proj.bias": draw(width),
            }
    for name, width in (("visual.ln_pre", vision), ("visual.ln_post", vision), ("ln_final", text)):
        state |= {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}
    for tower, width in (("visual.transformer", vision), ("transformer", text)):
        for name in (f"{tower}.resblocks.{i}.ln_{j}" for i in range(LAYERS) for j in (1, 2)):
            state |= {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}
    return state


def norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def blocks(state, tower, x, head_width, activation, mask=None):
    """x [t, width]; pre-norm attention and perceptron."""
    for name in (f"{tower}.resblocks.{i}" for i in range(LAYERS)):
        y, width = norm(state, f"{name}.ln_1", x), x.shape[-1]
        weights = [state[f"{name}.attn.{part}"] for part in ("in_proj_weight", "in_proj_bias")]
        out = [state[f"{name}.attn.out_proj.{part}"] for part in ("weight", "bias")]
        x = x + F.multi_head_attention_forward(
            y, y, y, width, width // head_width, *weights, None, None, False, 0.0, *out,
            need_weights=False, attn_mask=mask,
        )[0]  # fmt: skip
        y = F.linear(
            norm(state, f"{name}.ln_2", x),
            state[f"{name}.mlp.c_fc.weight"],
            state[f"{name}.mlp.c_fc.bias"],
        )
        x = x + F.linear(
            activation(y), state[f"{name}.mlp.c_proj.weight"], state[f"{name}.mlp.c_proj.bias"]
        )
    return x


def openai_image(state, pixels, head_width, activation):
    """pixels [3, side, side] -> [dim]."""
    x = F.conv2d(pixels[None], state["visual.conv1.weight"], stride=PATCH)[0].flatten(1).T
    x = torch.cat([state["visual.class_embedding"][None], x]) + state["visual.positional_embedding"]
    x = blocks(state, "visual.transformer", norm(state, "visual.ln_pre", x), head_width, activation)
    return norm(state, "visual.ln_post", x[0]) @ state["visual.proj"]


def openai_text(state, ids, head_width, activation):
    """ids [positions] -> [dim], at the largest id."""
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    x = norm(state, "ln_final", blocks(state, "transformer", x, head_width, activation, mask))
    return x[ids.argmax()] @ state["text_projection"]


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)
