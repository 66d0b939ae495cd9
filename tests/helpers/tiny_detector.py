"""A tiny random Mask2Former, with a CLIP and a file of prompts, for GenEval's checks."""

import json
from pathlib import Path

import torch
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

from tests.helpers.tiny_clips import write_folder

NAMES = ["dog", "cat", "mouse"]
RECORDS = [
    {
        "prompt": "a dog",
        "tag": "colors",
        "include": [{"class": "dog", "count": 1, "color": "red"}],
    },
    {"prompt": "a cat", "tag": "single_object", "include": [{"class": "cat", "count": 1}]},
]


def write_geneval(root: Path) -> Path:
    """Write detector/, clip/ and metadata.jsonl to a folder, and return it."""
    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2, patch_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, num_queries=12, id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    Mask2FormerForUniversalSegmentation(config).save_pretrained(root / "detector")
    (root / "clip").mkdir()
    write_folder(root / "clip")
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, RECORDS)) + "\n")
    return root
