import io

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from reward_bridge.rewards import REWARDS, make_reward  # noqa: E402


def pictures(n, height, width, seed=0):
    """Smooth random pictures: resampling differs less from PIL's than on noise, as on photographs."""
    small = np.random.default_rng(seed).integers(0, 256, (n, height // 8, width // 8, 3), np.uint8)
    big = [np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC)) for p in small]
    return torch.from_numpy(np.stack(big).transpose(0, 3, 1, 2).copy())


def test_unknown_rewards_are_named():
    with pytest.raises(ValueError, match=r"there is no reward 'beauty'; choose from .*clip_score"):
        make_reward("beauty", "cpu", {})
    for target in REWARDS.values():
        module, _, name = target.partition(":")
        assert hasattr(__import__(module, fromlist=[name]), name)


def test_jpeg_compressibility_is_minus_the_files_size():
    images = pictures(3, 64, 96)
    scores = make_reward("jpeg_compressibility", "cpu", {})(images, ["a"] * 3)
    for pixels, score in zip(images, scores, strict=True):
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=95)
        assert score == pytest.approx(-len(file.getvalue()) / 500_000)
    flat = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    assert make_reward("jpeg_compressibility", "cpu", {})(flat, ["a"]) > scores.max()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny random CLIPModel, saved as a user's would be."""
    folder = tmp_path_factory.mktemp("clip")
    characters = [chr(c) for c in range(97, 123)]
    vocabulary = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={p: i for i, p in enumerate(vocabulary)}, merges=[], model_max_length=20
    )
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 20, **ends, "pad_token_id": ends["eos_token_id"]}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    vision = {**sizes, "image_size": 48, "patch_size": 8}
    config = transformers.CLIPConfig(text_config={**sizes, **text}, vision_config=vision, projection_dim=16)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size, crop = {"shortest_edge": 48}, {"height": 48, "width": 48}
    transformers.CLIPImageProcessorPil(size=size, crop_size=crop).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("size", [(48, 48), (96, 160), (40, 32)])
def test_clip_score_is_the_models_own_one_by_one(clip, size):
    """Against transformers' PIL pipeline, one picture at a time. Only the resize may differ, and that by little."""
    images, prompts = pictures(5, *size), ["a cat", "dog", "a cat", "the sea at night", "x"]
    got = make_reward("clip_score", "cpu", {"path": str(clip)})(images, prompts)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(clip)
    want = []
    for pixels, prompt in zip(images, prompts, strict=True):
        values = processor(Image.fromarray(pixels.permute(1, 2, 0).numpy()), return_tensors="pt").pixel_values
        with torch.no_grad():
            out = model(pixel_values=values, **tokenizer([prompt], return_tensors="pt"))
        want.append(out.logits_per_image.item() / model.logit_scale.exp().item() * 100 / 30)
    tolerance = 1e-5 if size == (48, 48) else 1e-2 * np.std(want)
    np.testing.assert_allclose(got, want, atol=tolerance)


def test_clip_score_names_a_missing_folder():
    with pytest.raises(FileNotFoundError, match=r"set config\.reward\.options\.clip_score\.path"):
        make_reward("clip_score", "cpu", {"path": "nowhere"})
