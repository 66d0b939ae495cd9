"""The files of a tiny language model: a byte is a token, and its chat template is like Qwen's."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from realgen_jax.models.language import load_language_model
from realgen_jax.models.trainable import Lora
from realgen_jax.nn.lora import LoraConfig
from realgen_jax.rewriter.files import RewriterSettings, model_digest, write_rewriter
from tests.helpers.models import one_device

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
VOCABULARY = 259  # 256 bytes, and START, END, PAD
ENDS = (257, 258)


def chat_folder(folder: Path, template: str | None = TEMPLATE, **entries: Any) -> Path:
    """Write the files to a folder. entries: of config.json and generation_config.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    bytes_alone.add_special_tokens([START, END, PAD])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone, eos_token=END, pad_token=entries.pop("pad_token", PAD)
    )
    tokenizer.chat_template = template
    (folder / "chat_template.jinja").unlink(missing_ok=True)  # of an earlier call
    tokenizer.save_pretrained(folder)

    values = {"vocab_size": VOCABULARY, "eos_token_id": list(ENDS), "model_type": "qwen3"} | entries
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps(values))
    return folder


def parrot(folder: Path, words: Sequence[str], **entries: Any) -> Path:
    """Write a language model that answers with one of these words, the first one if greedy.

    It knows only the last token. All letters of all words differ.
    """
    chat_folder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    logits = torch.zeros(VOCABULARY, VOCABULARY)
    newline = tokenizer.encode("\n")[0]
    for number, word in enumerate(words):
        ids = tokenizer.encode(word)
        logits[newline, ids[0]] = 2 - 0.01 * number
        for before, after in pairwise([*ids, ENDS[0]]):
            logits[before, after] = 2

    # The states are the last token's embedding, one of 272 orthogonal directions.
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=272,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        eos_token_id=list(ENDS),
        pad_token_id=ENDS[1],
        dtype="float32",
        **entries,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY, 272))
        model.lm_head.weight.copy_(torch.nn.functional.pad(logits.T, (0, 272 - VOCABULARY)))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    return folder


def rewriter_folder(folder: Path, base: Path, system: str = "Rewrite.") -> Path:
    """Write a run's rewriter/: adapters that change nothing, and rewriter.json."""
    lora = Lora(LoraConfig(rank=2, alpha=2.0, init="kaiming"))
    settings = SimpleNamespace(path=str(base), dtype="float32", param_dtype="float32", remat="none")
    model = load_language_model(settings, one_device(), lora)
    folder.mkdir(parents=True)
    lora.save(model, folder, lora.init(model, jax.random.key(0)))
    write_rewriter(
        folder,
        RewriterSettings(
            base=str(base),
            base_digest=model_digest(base),
            system=system,
            thinking=True,
            answer_tag="",
            max_prompt_tokens=96,
            max_new_tokens=8,
            temperature=1.0,
            min_words=1,
            max_words=4,
            dtype="float32",
        ),
    )
    return folder
