"""Stage 2: tokenizers, and a CLIP trained on crops and captions.

The text half of CLIP becomes the pipeline's text encoder; an untrained one gives every caption
nearly the same vector. The whole CLIP is the alignment reward. T5 is trained later, with the
transformer that reads it.
"""

import json
import string
from pathlib import Path

import numpy as np
import torch
from fit import fit, rng
from photos import PHOTOS, SIZE, TEMPLATES, TEST_TEMPLATES, crops, prompts
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

STEPS = 1200
BATCH = 64
WIDTH = 64  # of both text encoders
T5_TOKENS = 16


def build(work: Path, pipeline: Path, rewards: Path) -> None:
    """Write both tokenizers and CLIP's text encoder to `pipeline`, and CLIP to `rewards/clip`."""
    if (pipeline / "text_encoder" / "model.safetensors").exists():  # written last
        return

    clip_tokenizer, t5_tokenizer = tokenizers()
    clip_tokenizer.save_pretrained(pipeline / "tokenizer")
    t5_tokenizer.save_pretrained(pipeline / "tokenizer_2")

    # Train CLIP.
    torch.manual_seed(0)
    model = CLIPModel(clip_config(clip_tokenizer))
    captions = prompts(TEMPLATES)
    ids = token_ids(clip_tokenizer, [caption for caption, _ in captions])
    labels = np.array([label for _, label in captions])

    def loss(
        model: CLIPModel, random: np.random.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """CLIP's two-way contrastive loss; all captions and crops of a photograph match."""
        rows = random.integers(len(captions), size=BATCH)
        x = augment(to_tensor(crops(labels[rows], "train", random)), random)
        logits = model(pixel_values=x, input_ids=ids[rows]).logits_per_image
        same = torch.from_numpy(labels[rows][:, None] == labels[rows][None]).float()
        target = same / same.sum(1, keepdim=True)
        accuracy = same.gather(1, logits.argmax(1, keepdim=True)).mean()
        both = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        return both / 2, {"accuracy": accuracy.item()}

    fit("clip", model, loss, work, steps=STEPS, lr=1e-3, weight_decay=0.05)

    # Save it in bfloat16.
    model = model.to(torch.bfloat16)
    model.save_pretrained(rewards / "clip")
    clip_tokenizer.save_pretrained(rewards / "clip")
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor.save_pretrained(rewards / "clip")
    model.text_model.save_pretrained(pipeline / "text_encoder")
    report(model.float().eval(), clip_tokenizer)


def tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Learn both tokenizers from the captions; both can spell any ASCII text."""
    captions = [prompt for prompt, _ in prompts(TEMPLATES + TEST_TEMPLATES)]
    return clip_tokenizer_of(captions), t5_tokenizer_of(captions)


def clip_tokenizer_of(captions: list[str]) -> CLIPTokenizer:
    """A byte-pair tokenizer."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = list(string.ascii_lowercase + string.digits + string.punctuation)
    trainer = trainers.BpeTrainer(
        vocab_size=384, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)

    # The vocabulary: what was learned, every character inside and at the end of a word, and the
    # special tokens.
    learned = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
    word_ends = [character + "</w>" for character in alphabet]
    pieces = dict.fromkeys([*learned, *alphabet, *word_ends])
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def t5_tokenizer_of(captions: list[str]) -> T5TokenizerFast:
    """A unigram tokenizer: the captions' words, and single characters at a lower score."""
    words = sorted({word for caption in captions for word in caption.replace(",", "").split()})
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    scored += [("▁" + word, -1.0) for word in words]
    characters = string.ascii_letters + string.digits + string.punctuation
    scored += [(character, -6.0) for character in characters]
    return T5TokenizerFast(vocab=scored, extra_ids=0, model_max_length=T5_TOKENS)


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """A two-layer T5 v1.1 encoder with random weights."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=16,
        num_heads=4,
        d_ff=2 * WIDTH,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """A small CLIP."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": SIZE,
        "patch_size": 8,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """int64 [n, tokens], padded to the longest length the tokenizer allows."""
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return tokens.input_ids


def to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [n, h, w, 3] -> float32 [n, 3, h, w] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def augment(x: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Vary blur, noise and brightness, so that the score does not depend on sharpness.

    float32 [n, 3, h, w] in [-1, 1].
    """
    n = len(x)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    mix = torch.from_numpy(random.uniform(-0.5, 1, (n, 1, 1, 1))).float().clamp(min=0)
    gain = torch.from_numpy(random.uniform(0.8, 1.2, (n, 1, 1, 1))).float()
    noise = random.standard_normal(x.shape, np.float32) * random.uniform(0, 0.15, (n, 1, 1, 1))
    return (gain * (x + mix * (blurred - x)) + torch.from_numpy(noise).float()).clamp(-1, 1)


@torch.no_grad()
def report(model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Print how many crops are nearest to their own test caption, and how similar captions are."""
    captions = prompts(TEST_TEMPLATES[:1])
    ids = token_ids(tokenizer, [caption for caption, _ in captions])
    labels = np.arange(512) % len(PHOTOS)
    for region in ("train", "held_out"):
        x = to_tensor(crops(labels, region, rng("clip-check", 0)))
        nearest = model(pixel_values=x, input_ids=ids).logits_per_image.argmax(1).numpy()
        share = np.mean(nearest == labels)
        print(f"clip: {share:.3f} of {region} crops nearest to their own caption")

    pooled = F.normalize(model.text_model(input_ids=ids).pooler_output, dim=-1)
    cosines = (pooled @ pooled.T)[~torch.eye(len(ids), dtype=torch.bool)]
    print(
        f"clip: cosine between pooled captions: mean {cosines.mean():.2f}, max {cosines.max():.2f}"
    )
