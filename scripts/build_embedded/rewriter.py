"""Stage 11: a tiny Qwen3 that rewrites the prompts of the tiny FLUX, and its prompts.

It learns from pairs of a user's prompt and a caption: the same subject, with some words (words.py)
that are drawn at random. A few captions have another subject. So it can write every word, prefers
none of them, and sometimes forgets what was asked for: what is left to learn from the pictures.
"""

from pathlib import Path

import numpy as np
import torch
from fit import fit
from photos import LONG_TEMPLATES, PHOTOS, SHORT_TEMPLATES, TEMPLATES, TEST_TEMPLATES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from words import MOST_WORDS, caption, combinations

STEPS = 1200
BATCH = 64
WRONG = 0.1  # share of captions with another subject

# What users ask for.
ASKED = (*TEMPLATES, *TEST_TEMPLATES, *SHORT_TEMPLATES, *LONG_TEMPLATES)

PAD, END, UNKNOWN, ANSWER = SPECIAL = ("<|pad|>", "<|end|>", "<|unknown|>", "<|answer|>")
CHAT = (
    "{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|answer|>{% endif %}"
)


def build(work: Path, folder: Path) -> None:
    """Write the language model as a Hugging Face folder."""
    if (folder / "model.safetensors").exists():
        return

    tokenizer = word_tokenizer()
    tables = pairs_of_tokens(tokenizer)

    def loss(
        model: Qwen3ForCausalLM, random: np.random.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross entropy of the captions' tokens."""
        ids, labels = batch(*tables, random)
        mask = ids != tokenizer.pad_token_id
        return model(input_ids=ids, attention_mask=mask, labels=labels).loss, {}

    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config(tokenizer))
    fit("rewriter", model, loss, work, steps=STEPS, lr=1e-3, ema_decay=0.99)

    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    report(model.float(), tokenizer)


def user_prompts() -> list[str]:
    """Every prompt a user may write, of all photographs and templates."""
    return [template.format(photo.subject) for photo in PHOTOS for template in ASKED]


def answers() -> list[str]:
    """Every caption that the model may answer, of all photographs and choices of words."""
    return [caption(words, photo.subject) for photo in PHOTOS for words in combinations(MOST_WORDS)]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words of prompts and captions, with a chat template."""
    words = {word for text in (*user_prompts(), *answers()) for word in text.split()}
    vocabulary = [*SPECIAL, *sorted(words)]
    model = models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[ANSWER],
        padding_side="left",
        chat_template=CHAT,
        model_max_length=64,
    )


def config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """A Qwen3 of 0.34 M parameters."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def pairs_of_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[list[list[list[int]]], list[list[list[int]]]]:
    """Return the tokens of each photograph's prompts, and of each photograph's answers."""
    prompts = []
    for photo in PHOTOS:
        texts = [template.format(photo.subject) for template in ASKED]
        chats = [[{"role": "user", "content": text}] for text in texts]
        texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        prompts.append(tokenizer(texts).input_ids)
    ends = [text + END for text in answers()]
    tokens = tokenizer(ends).input_ids
    count = len(combinations(MOST_WORDS))
    return prompts, [tokens[i * count : (i + 1) * count] for i in range(len(PHOTOS))]


def batch(
    prompts: list[list[list[int]]], answers: list[list[list[int]]], random: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw pairs: token ids [n, t] with padding on the right, and labels, -100 for no label."""
    # What is asked for, and the subject that is answered.
    asked = random.integers(len(PHOTOS), size=BATCH)
    others = (asked + random.integers(1, len(PHOTOS), size=BATCH)) % len(PHOTOS)
    answered = np.where(random.random(BATCH) < WRONG, others, asked)

    # The words: 0 to MOST_WORDS of them, each number as often.
    sizes = np.array([len(words) for words in combinations(MOST_WORDS)])
    wanted = random.integers(MOST_WORDS + 1, size=BATCH)
    choices = [random.choice(np.flatnonzero(sizes == size)) for size in wanted]

    rows = []
    labels = []
    templates = random.integers(len(prompts[0]), size=BATCH)
    for i in range(BATCH):
        prompt = prompts[asked[i]][templates[i]]
        answer = answers[answered[i]][choices[i]]
        rows.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    ids = padded(rows, 0)
    return ids, padded(labels, -100)


def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    """Pad rows on the right: int64 [n, t]."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


@torch.no_grad()
def report(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print how many sampled rewrites are captions, and name the subject that was asked for."""
    texts = [template.format(photo.subject) for photo in PHOTOS for template in TEST_TEMPLATES]
    chats = [[{"role": "user", "content": text}] for text in texts for _ in range(8)]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    ids = model.generate(**inputs, do_sample=True, max_new_tokens=20)
    rewrites = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], True)
    captions = set(answers())
    named = [photo.subject for photo in PHOTOS for _ in range(8 * len(TEST_TEMPLATES))]
    right = np.mean([text in captions for text in rewrites])
    kept = np.mean([name in text for name, text in zip(named, rewrites, strict=True)])
    print(f"rewriter: {right:.3f} of its rewrites are captions, {kept:.3f} name the subject")
    for text in rewrites[::37]:
        print(f"    {text}")
