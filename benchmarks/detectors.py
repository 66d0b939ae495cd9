"""RealGen's detectors at their real sizes with random weights on a GPU; part of bridge.py.

The limit to compare with is 2 FLOP for each weight and token of a forward pass.
"""

import json
import tempfile
import time
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from reward_bridge.bridge import Reward, RewardBridge
from reward_bridge.preprocess import CLIP_MEAN, CLIP_STD
from reward_bridge.rewards.forensic_chat import FAKE, REAL, ForensicChat, token_ids
from reward_bridge.rewards.mixture import MixtureDetector, MixtureReward, Sizes
from reward_bridge.rewards.qwen_vl import QwenInputs

CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
QWEN_7B = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
    },
}
PROCESSOR = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
    "image_processor_type": "Qwen2VLImageProcessor",
}
SPECIAL_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
]


def forensic_chat(device: str) -> Reward:
    """ForensicChat, with random weights drawn on the device instead of 16 GB read from disk."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = qwen_tokenizer()
        tokenizer.save_pretrained(folder)
        config = Qwen2_5_VLConfig(
            **QWEN_7B,
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
            vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        )
        config.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        reward = object.__new__(ForensicChat)
        reward.inputs = QwenInputs(str(folder), "forensic_chat.path")
        reward.fake = token_ids(reward.inputs, FAKE, device)
        reward.real = token_ids(reward.inputs, REAL, device)

    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    reward.model = model.eval().requires_grad_(False)
    return reward


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A byte-pair tokenizer that has the answers' words as one token each."""
    merges = []
    for word in (*FAKE, *REAL):
        for end in range(1, len(word)):
            merges.append((word[:end], word[end]))
    joined = ["".join(pair) for pair in merges]
    pieces = dict.fromkeys(["<|endoftext|>", *sorted(ByteLevel.alphabet()), *joined])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=list(dict.fromkeys(merges)))
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    return tokenizer


def omniaid(device: str) -> Reward:
    """OmniAID: 6 experts of rank 8, of which two and the one for artefacts are active."""
    config = CLIPVisionConfig(**CLIP_L_336)
    with torch.device(device):
        model = MixtureDetector(
            CLIPVisionModel(config), CLIPVisionModel(config), Sizes(1024, 6, 8, 256, 5, 2)
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return MixtureReward(
        device,
        model.eval().requires_grad_(False),
        config.image_size,
        512,
        (CLIP_MEAN, CLIP_STD),
        "bfloat16",
    )


MAKE = {"forensic_chat": forensic_chat, "omniaid": omniaid}


def detectors(device: str, images: int, side: int) -> dict:
    """Measure each reward alone and both together on `images` pictures.

    Returns images per second, peak memory and how many pictures of a batch went through the model
    at once (0: all).
    """
    pixels = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, device=device)
    repeats = 5
    results = {}
    for names in (("omniaid",), ("forensic_chat",), ("forensic_chat", "omniaid")):
        rewards = {name: MAKE[name](device) for name in names}
        bridge = RewardBridge(rewards, dict.fromkeys(rewards, device), deadline=600, retries=0)
        torch.cuda.reset_peak_memory_stats(device)
        bridge.submit(pixels, [""] * images).result()

        start = time.perf_counter()
        for _ in range(repeats):
            bridge.submit(pixels, [""] * images).result()
        seconds = (time.perf_counter() - start) / repeats
        parameters = 0
        for reward in rewards.values():
            parameters += sum(p.numel() for p in reward.model.parameters())
        results[" + ".join(names)] = {
            "parameters": parameters,
            "seconds": seconds,
            "images_per_second": images / seconds,
            "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "batch_sizes": bridge.batch_sizes,
        }
        bridge.close()
        del rewards, bridge
        torch.cuda.empty_cache()
    return results
