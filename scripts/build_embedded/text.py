"""Stage 2: tokenizers, and a CLIP trained on crops and captions.

CLIP's text half becomes the pipeline's text encoder (an untrained one gives every caption nearly the same vector), the
whole of it the alignment reward. T5 is trained later, with the transformer that reads it.
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

STEPS, BATCH = 1200, 64
WIDTH = 64  # of both text encoders
T5_TOKENS = 16


def tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """A byte-pair vocabulary for CLIP and a unigram one for T5, learnt from the captions; both can spell any ASCII."""
    captions = [prompt for prompt, _ in prompts(TEMPLATES + TEST_TEMPLATES)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = list(string.ascii_lowercase + string.digits + string.punctuation)
    trainer = trainers.BpeTrainer(
        vocab_size=384, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    learnt = sorted(bpe.get_vocab(), key=bpe.get_vocab().get)
    pieces = dict.fromkeys([*learnt, *alphabet, *(c + "</w>" for c in alphabet)])
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    clip = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)

    words = sorted({word for caption in captions for word in caption.replace(",", "").split()})
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    scored += [("▁" + word, -1.0) for word in words]
    scored += [(c, -6.0) for c in string.ascii_letters + string.digits + string.punctuation]
    return clip, T5TokenizerFast(vocab=scored, extra_ids=0, model_max_length=T5_TOKENS)


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """A two-layer T5 v1.1 encoder with random weights."""
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=16, num_heads=4, d_ff=2 * WIDTH, num_layers=2,
        feed_forward_proj="gated-gelu", dropout_rate=0.0, tie_word_embeddings=False,
    )  # fmt: skip
    return T5EncoderModel(config)


def _augment(x: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Blur, noise and brightness, so that the score is about what a picture shows and not about how sharp it is."""
    n = len(x)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, stride=1)
    mix = torch.from_numpy(random.uniform(-0.5, 1, (n, 1, 1, 1))).float().clamp(min=0)
    gain = torch.from_numpy(random.uniform(0.8, 1.2, (n, 1, 1, 1))).float()
    noise = torch.from_numpy(
        random.standard_normal(x.shape, np.float32) * random.uniform(0, 0.15, (n, 1, 1, 1))
    )
    return (gain * (x + mix * (blurred - x)) + noise.float()).clamp(-1, 1)


def build(work: Path, pipeline: Path, rewards: Path) -> None:
    """Write both tokenizers, CLIP's text encoder (`pipeline`) and the whole CLIP (`rewards/clip`)."""
    if (pipeline / "text_encoder" / "model.safetensors").exists():  # what is written last
        return
    clip_tokenizer, t5_tokenizer = tokenizers()
    clip_tokenizer.save_pretrained(pipeline / "tokenizer")
    t5_tokenizer.save_pretrained(pipeline / "tokenizer_2")
    ends = {
        "bos_token_id": clip_tokenizer.bos_token_id,
        "eos_token_id": clip_tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    text = {
        "vocab_size": len(clip_tokenizer), "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 77, **ends,
        "pad_token_id": clip_tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "image_size": SIZE, "patch_size": 8, "hidden_size": 128, "intermediate_size": 256,
        "num_hidden_layers": 3, "num_attention_heads": 4,
    }  # fmt: skip
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    captions = prompts(TEMPLATES)
    ids = clip_tokenizer(
        [c for c, _ in captions], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    labels = np.array([i for _, i in captions])

    def loss(
        model: CLIPModel, random: np.random.Generator
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """CLIP's two-way contrastive loss; captions and crops of one photograph all count as matches."""
        rows = random.integers(len(captions), size=BATCH)
        x = (
            torch.from_numpy(crops(labels[rows], "train", random)).permute(0, 3, 1, 2).float()
            / 127.5
            - 1
        )
        logits = model(pixel_values=_augment(x, random), input_ids=ids[rows]).logits_per_image
        same = torch.from_numpy(labels[rows][:, None] == labels[rows][None]).float()
        target = same / same.sum(1, keepdim=True)
        accuracy = same.gather(1, logits.argmax(1, keepdim=True)).mean()
        both = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
        return both / 2, {"accuracy": accuracy.item()}

    fit("clip", model, loss, work, steps=STEPS, lr=1e-3, weight_decay=0.05)
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
    check(model.float().eval(), clip_tokenizer)


@torch.no_grad()
def check(model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Print how often a crop is nearest to its own photograph's test caption, and how alike the captions are."""
    captions = prompts(TEST_TEMPLATES[:1])
    ids = tokenizer(
        [c for c, _ in captions], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    labels = np.arange(512) % len(PHOTOS)
    for region in ("train", "held_out"):
        pixels = crops(labels, region, rng("clip-check", 0))
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        nearest = model(pixel_values=x, input_ids=ids).logits_per_image.argmax(1).numpy()
        print(
            f"clip: {np.mean(nearest == labels):.3f} of {region} crops nearest to their own caption"
        )
    pooled = F.normalize(model.text_model(input_ids=ids).pooler_output, dim=-1)
    alike = (pooled @ pooled.T)[~torch.eye(len(ids), dtype=torch.bool)]
    print(f"clip: cosine between pooled captions: mean {alike.mean():.2f}, max {alike.max():.2f}")
