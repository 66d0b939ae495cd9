"""What each kind of text encoder makes of prompts: their tokens, and the arrays that are kept.

Tokenizers and models are those of transformers. A model family (realgen_jax/models) names one of
RECIPES for each of its text encoders.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Model,
    T5EncoderModel,
)

from reward_bridge.text_encoders import chat_text

CHAT_MULTIPLE = 32  # prompts in a chat template are padded to a multiple of it, as Z-Image does

# Tensors that files for another use of the same encoders hold too: T5's decoder, the rest of a
# whole CLIP, and the output layer of a language model.
T5_UNUSED = r"decoder\..+|lm_head\.weight"
CLIP_UNUSED = r"vision_model\..+|(visual|text)_projection\.weight|logit_scale"
CLIP_PROJECTED_UNUSED = r"vision_model\..+|visual_projection\.weight|logit_scale"
QWEN_UNUSED = r"lm_head\.weight"


@dataclass(frozen=True)
class Tokens:
    """The tokens of n prompts, padded at the end.

    ids: int64 [n, t]. lengths: int64 [n], without padding. cut: rows that max_tokens made shorter.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    cut: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """A kind of text encoder.

    model: its class. unused: matches the keys of tensors that do not belong to it.
    tokens(tokenizer, config, prompts, max_tokens): of all prompts of a cache, so that a prompt's
        row does not depend on where an encoding was interrupted. config: the model's.
    arrays(model, ids, lengths): what is kept of n prompts, each [n, ...].
    trim(model): removes the parts of a loaded model that `arrays` does not run.
    counts(tokenizer, prompts): their numbers of tokens, of which max_tokens are read; None if
        longer prompts are cut silently.
    width(max_tokens): tokens to which ids are padded where arrays need the same shape whatever the
        prompts; None if they have it.
    """

    model: type[PreTrainedModel]
    unused: str
    tokens: Callable[[PreTrainedTokenizerBase, Any, Sequence[str], int], Tokens]
    arrays: Callable[[PreTrainedModel, torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
    trim: Callable[[PreTrainedModel], None] = lambda model: None
    counts: Callable[[PreTrainedTokenizerBase, Sequence[str]], list[int]] | None = None
    width: Callable[[int], int] | None = None


def t5_tokens(
    tokenizer: PreTrainedTokenizerBase, config: Any, prompts: Sequence[str], max_tokens: int
) -> Tokens:
    """Exactly max_tokens tokens, as in FLUX and SD3."""
    cut = longer_than(tokenizer, prompts, max_tokens)
    return tokenize(tokenizer, prompts, cut, padding="max_length", max_length=max_tokens)


def clip_tokens(
    tokenizer: PreTrainedTokenizerBase, config: Any, prompts: Sequence[str], max_tokens: int
) -> Tokens:
    """CLIP's fixed number of tokens, 77. Longer prompts are cut silently, as in FLUX and SD3."""
    length = config.max_position_embeddings
    return tokenize(tokenizer, prompts, (), padding="max_length", max_length=length)


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, config: Any, prompts: Sequence[str], max_tokens: int
) -> Tokens:
    """The prompt as a user's turn in the tokenizer's chat template, which counts in max_tokens.

    t is the number of tokens of the longest prompt up to a multiple of CHAT_MULTIPLE.
    """
    texts = [user_turn(tokenizer, prompt) for prompt in prompts]
    cut = longer_than(tokenizer, texts, max_tokens)
    tokens = tokenize(tokenizer, texts, cut, padding="longest", max_length=max_tokens)

    # transformers does not round up a max_tokens that is no multiple.
    rest = -tokens.ids.shape[1] % CHAT_MULTIPLE
    ids = pad(tokens.ids, (0, rest), value=tokenizer.pad_token_id)
    return replace(tokens, ids=ids)


def t5_states(t5: T5EncoderModel, ids: torch.Tensor, lengths: torch.Tensor) -> tuple:
    """The encoder's last states [n, t, d]. There is no mask: T5 attends to its padding."""
    return (t5(ids).last_hidden_state,)


def clip_pooled(clip: CLIPTextModel, ids: torch.Tensor, lengths: torch.Tensor) -> tuple:
    """The pooled vector without its projection [n, d], as in FLUX."""
    return (clip(ids).pooler_output,)


def clip_projected(
    clip: CLIPTextModelWithProjection, ids: torch.Tensor, lengths: torch.Tensor
) -> tuple:
    """The states that enter the last layer [n, 77, d], and the projected pooled vector [n, p].

    As in SD3: all 77 states are used, those of the padding too, without the final norm.
    """
    output = clip(ids, output_hidden_states=True)
    return output.hidden_states[-2], output.text_embeds


def qwen3_states(qwen: Qwen3Model, ids: torch.Tensor, lengths: torch.Tensor) -> tuple:
    """The states that enter the last layer [n, t, d], 0 in the padding, and lengths int32 [n].

    As in Z-Image. `without_last_layer` has made these the model's output. There is no mask: Qwen3
    is causal, and the padding comes last.
    """
    longest = int(lengths.max())
    states = qwen(ids[:, :longest], use_cache=False).last_hidden_state

    valid = torch.arange(longest, device=ids.device) < lengths[:, None]
    states = states.masked_fill(~valid[..., None], 0)
    states = pad(states, (0, 0, 0, ids.shape[1] - longest))
    return states, lengths.to(torch.int32)


def without_last_layer(qwen: Qwen3Model) -> None:
    """Let a language model return the states that enter its last layer, without a norm."""
    qwen.layers = qwen.layers[:-1]
    qwen.norm = torch.nn.Identity()


def token_counts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[int]:
    """The numbers of tokens of prompts."""
    return [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids]


def chat_counts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[int]:
    """The numbers of tokens of prompts in the chat template."""
    return token_counts(tokenizer, [user_turn(tokenizer, prompt) for prompt in prompts])


def whole_chats(max_tokens: int) -> int:
    """max_tokens up to a multiple of CHAT_MULTIPLE."""
    return -(-max_tokens // CHAT_MULTIPLE) * CHAT_MULTIPLE


def user_turn(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The chat template with a prompt as the user's turn, as Z-Image's pipeline fills it in."""
    return chat_text(tokenizer, [{"role": "user", "content": prompt}], thinking=True)


RECIPES = {
    "t5_states": Recipe(T5EncoderModel, T5_UNUSED, t5_tokens, t5_states, counts=token_counts),
    "clip_pooled": Recipe(CLIPTextModel, CLIP_UNUSED, clip_tokens, clip_pooled),
    "clip_projected": Recipe(
        CLIPTextModelWithProjection, CLIP_PROJECTED_UNUSED, clip_tokens, clip_projected
    ),
    "qwen3_chat": Recipe(
        Qwen3Model,
        QWEN_UNUSED,
        chat_tokens,
        qwen3_states,
        without_last_layer,
        chat_counts,
        whole_chats,
    ),
}


def get_recipe(name: str) -> Recipe:
    """Return one of RECIPES. Raises ValueError for another name."""
    if name not in RECIPES:
        raise ValueError(f"there is no text encoder {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    cut: tuple[int, ...],
    **padding: Any,
) -> Tokens:
    """Tokenize texts, cut at max_length and padded as told."""
    tokens = tokenizer(
        list(texts), truncation=True, padding_side="right", return_tensors="pt", **padding
    )
    return Tokens(tokens.input_ids, tokens.attention_mask.sum(dim=1), cut)


def longer_than(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int
) -> tuple[int, ...]:
    """The rows of the texts with more than `length` tokens."""
    counts = token_counts(tokenizer, texts)
    return tuple(row for row, count in enumerate(counts) if count > length)
