import functools
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from reward_bridge.rewards import make_reward
from reward_bridge.rewards.forensic_chat import QUESTION, p_real
from reward_bridge.rewards.hpsv3 import ENDING, INSTRUCTION
from reward_bridge.rewards.qwen_vl import QwenInputs, patchify
from tests.helpers.goldens import golden
from tests.helpers.pictures import pictures

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
TEMPLATE = (  # Qwen2-VL's, without videos and numbered pictures
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROCESSOR = {  # as published, but for max_pixels: 12845056
    "min_pixels": 3136,
    "max_pixels": 16 * 28 * 28,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
}
SIZES = [
    (56, 84),
    (60, 75),
    (30, 41),
    (140, 200),
]  # as it is; rounded; enlarged; rounded, then made smaller
UTILS = (4 * 28 * 28, 16384 * 28 * 28)  # qwen_vl_utils' MIN_PIXELS and MAX_PIXELS


def save_tokenizer(folder, template=TEMPLATE, words=("real", "Real", "fake", "Fake")):
    """Bytes, the words, the special tokens, and every long line of HPSv3's text.

    One token for a long line keeps the tests short.
    """
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    pieces = ["<|endoftext|>", *sorted(ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.add_tokens([line.strip() for line in INSTRUCTION.splitlines() if len(line) > 40])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return tokenizer


def sizes(tokenizer, vocabulary):
    """What both models' configurations share."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text |= {
        "num_key_value_heads": 2,
        "vocab_size": vocabulary,
        "rope_parameters": rope,
        "initializer_range": 0.2,
    }
    text |= {"bos_token_id": 0, "eos_token_id": 0}
    vision = {"depth": 2, "num_heads": 2, "initializer_range": 0.2}
    ids = {"image_token_id": "<|image_pad|>", "vision_start_token_id": "<|vision_start|>"}
    return text, vision, {key: tokenizer.convert_tokens_to_ids(token) for key, token in ids.items()}


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forensic_chat")
    tokenizer = save_tokenizer(folder)
    text, vision, ids = sizes(tokenizer, len(tokenizer) + 3)
    vision |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder


@functools.cache
def tools(folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    return tokenizer, transformers.Qwen2VLImageProcessorPil.from_pretrained(folder)


def one_by_one(folder, pixels, text, bounds=UTILS):
    """The inputs of a picture and a text by PIL, transformers' processor and a dialogue by hand.

    PIL up to 11, which the authors had, resizes the columns first, then the rows; 13 chooses the
    order by the sizes.
    """
    tokenizer, processor = tools(folder)
    height, width = smart_resize(*pixels.shape[1:], 28, *bounds)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    for size in ((width, image.height), (width, height)):
        image = image.resize(size, Image.Resampling.BICUBIC)
    inputs = dict(processor(image, return_tensors="pt"))
    tokens = "<|image_pad|>" * (inputs["image_grid_thw"].prod().item() // 4)
    turn = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    turn += f"<|im_start|>user\n<|vision_start|>{tokens}<|vision_end|>{text}<|im_end|>\n"
    turn += "<|im_start|>assistant\n"
    inputs["input_ids"] = tokenizer([turn], return_tensors="pt").input_ids
    inputs["mm_token_type_ids"] = (
        inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    ).int()
    return inputs


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_the_image_processors(chat_folder, size):
    """Exactly if nothing is resized, else within one grey level for each of two resizes."""
    images = pictures(3, *size)
    patches, grid = QwenInputs(str(chat_folder), "x").patches(images)
    want = [one_by_one(chat_folder, pixels, "") for pixels in images]
    assert all(torch.equal(grid, one["image_grid_thw"][0]) for one in want)
    want = torch.cat([one["pixel_values"] for one in want])
    assert patches.shape == want.shape
    differ = (patches - want).abs()
    assert differ.max() < (1e-6 if size == (56, 84) else 2.1 / 255 / min(PROCESSOR["image_std"]))
    assert (differ > 1e-6).float().mean() < 0.01


def test_patchify_keeps_blocks_together():
    """A 4x4 picture of patches of one pixel, in 2x2 blocks."""
    patches, grid = patchify(torch.arange(16.0).view(1, 1, 4, 4), 1, 2, 2)
    assert grid.tolist() == [1, 4, 4]
    assert patches[:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert torch.equal(patches[:, 0], patches[:, 1])


def report(name, size, got, single, want):
    """With `-s`: the figures that the tolerances stand for."""
    error, alone = np.abs(got - want).max() / want.std(), np.abs(got / single - 1).max()
    print(f"\n{name} {size}: {error:.1e} of the spread {want.std():.2g}, batch {alone:.1e}")


@pytest.fixture(scope="module")
def chat_model(chat_folder):
    return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(chat_folder).eval()


def forensic_reference(folder, model, pixels):
    with torch.no_grad():
        logits = model(**one_by_one(folder, pixels, QUESTION)).logits[0, -1].numpy()
    at = tools(folder)[0].get_vocab()
    fake, real = (
        (logits[at["fake"]] + logits[at["Fake"]]) / 2,
        (logits[at["Real"]] + logits[at["real"]]) / 2,
    )
    return np.exp(real) / (np.exp(fake) + np.exp(real))


@pytest.mark.parametrize("size", SIZES)
def test_forensic_chat_is_the_models_own_one_by_one(chat_folder, chat_model, size):
    images = pictures(4, *size)
    reward = make_reward("forensic_chat", "cpu", {"path": str(chat_folder), "dtype": "float32"})
    with torch.inference_mode():
        got = reward(images, [""] * 4).numpy()
        single = torch.cat([reward(image[None], [""]) for image in images]).numpy()
    want = np.array([forensic_reference(chat_folder, chat_model, pixels) for pixels in images])
    report("forensic_chat", size, got, single, want)
    assert want.std() > 1e-2
    np.testing.assert_allclose(got, single, rtol=1e-5)
    np.testing.assert_allclose(
        got, want, rtol=0, atol=1e-6 if size == (56, 84) else 1e-2 * want.std()
    )


def test_forensic_chat_score_golden():
    arrays = golden("10_rewards/forensic_chat.npz")
    logits = torch.from_numpy(arrays["logits"][:, -1])
    got = p_real(logits[:, [3, 11]], logits[:, [43, 49]])
    np.testing.assert_allclose(got, arrays["score"], rtol=1e-5, atol=1e-7)


def test_a_folder_without_chat_template_gets_the_models(chat_folder, tmp_path):
    save_tokenizer(tmp_path, template=None)
    (tmp_path / "config.json").write_text("{}")
    assert QwenInputs(str(tmp_path), "x").turn("Hm?") == QwenInputs(str(chat_folder), "x").turn(
        "Hm?"
    )


def test_forensic_chat_warns_once_of_answers_that_begin_otherwise(chat_folder, monkeypatch, caplog):
    """The model has random weights, so that every token has much the same probability."""
    images = pictures(2, 56, 84)
    reward = make_reward("forensic_chat", "cpu", {"path": str(chat_folder), "dtype": "float32"})
    inputs = reward.inputs(images, [QUESTION] * 2)
    with torch.inference_mode():
        p = reward.model(**inputs).logits[:, -1].softmax(1)
    mass = p[:, torch.cat([reward.fake, reward.real])].sum(1)

    scores = []
    for least in (mass.min().item() * 0.99, mass.max().item() * 1.01, 1.0):
        monkeypatch.setattr("reward_bridge.rewards.forensic_chat.LEAST_MASS", least)
        with torch.inference_mode():
            scores.append(reward(images, [""] * 2).tolist())
    assert scores[0] == scores[1] == scores[2]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("reward 'forensic_chat': on 2 of 2 pictures the model begins its answer")
    assert f"a probability of {mass.min():.2g}; expected" in line


def test_forensic_chat_names_what_is_wrong(chat_folder, tmp_path):
    def load(path):
        return make_reward("forensic_chat", "cpu", {"path": str(path)})

    with pytest.raises(
        FileNotFoundError, match=r"config\.json; set config\.reward\.options\.forensic_chat\.path"
    ):
        load(tmp_path)
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in chat_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors.index.json").write_text('{"metadata": {}}')
    with pytest.raises(ValueError, match=r"holds model\.safetensors and model\.safetensors\.index"):
        load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index of shards"):
        load(copy)
    (copy / "model.safetensors.index.json").unlink()
    key = next(key for key in state if key.endswith("layers.1.mlp.up_proj.weight"))
    for changed, message in (
        ({key: None}, r"missing_keys.*layers\.1\.mlp\.up_proj"),
        ({"model.extra": torch.zeros(1)}, r"unexpected_keys.*extra"),
        ({key: torch.zeros(3, 32)}, r"mismatched_keys.*up_proj.*3, 32.*64, 32"),
    ):
        wrong = {k: v for k, v in (state | changed).items() if v is not None}
        save_file(wrong, copy / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=message):
            load(copy)
    save_tokenizer(copy, words=("real", "Real", "fake"))
    with pytest.raises(ValueError, match=r"has no token 'Fake' among its \d+"):
        load(copy)
    save_tokenizer(copy, "{{ messages[0]['content'][1]['text'] }}")
    with pytest.raises(ValueError, match=r"makes 0 <\|image_pad\|> of one picture"):
        QwenInputs(str(copy), "x")(pictures(1, 56, 56), [""])


PROMPTS = [
    "a cat",
    "two dogs and a very long, quite unnecessary description of where they are",
    "the {sea}",
]


@pytest.fixture(scope="module")
def hpsv3(tmp_path_factory):
    """The base folder, a file in the published layout (names of transformers 4.45), its tensors."""
    base, place = tmp_path_factory.mktemp("qwen2_vl"), tmp_path_factory.mktemp("hpsv3")
    tokenizer = save_tokenizer(base)
    (base / "preprocessor_config.json").write_text(
        json.dumps({**PROCESSOR, "max_pixels": 12845056})
    )
    text, vision, ids = sizes(tokenizer, len(tokenizer) + 40)
    vision |= {"embed_dim": 32, "hidden_size": 32}
    torch.manual_seed(1)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
    flat = {
        "model_type": "qwen2_vl",
        **text,
        "rope_theta": 1e4,
        "vision_config": {**vision, "in_chans": 3},
        **ids,
    }
    del flat["rope_parameters"]  # written as in Qwen2-VL-7B-Instruct
    (base / "config.json").write_text(json.dumps(flat))
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    model.resize_token_embeddings(len(tokenizer) + 1)
    layers = [
        torch.nn.Linear(32, 1024),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.05),
        torch.nn.Linear(1024, 16),
    ]
    head = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(16, 2)).eval()
    state = {f"rm_head.{key}": value for key, value in head.state_dict().items()}
    for key, value in model.state_dict().items():
        state[
            key.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        ] = value.clone()
    assert {"visual.merger.mlp.0.weight", "model.embed_tokens.weight", "lm_head.weight"} < set(
        state
    )
    save_file(state, place / "HPSv3.safetensors")
    return SimpleNamespace(
        base=base, file=place / "HPSv3.safetensors", state=state, model=model.model, head=head
    )


def test_hpsv3_text_is_the_one_of_its_training():
    """To the space: SHA-256 of INSTRUCTION and prompt_with_special_token in HPSv3's
    hpsv3/dataset/data_collator_qwen.py.
    """
    digest = hashlib.sha256((INSTRUCTION + ENDING).encode()).hexdigest()
    assert digest == "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"


def load_hpsv3(hpsv3, **options):
    return make_reward(
        "hpsv3",
        "cpu",
        {"path": str(hpsv3.file), "base": str(hpsv3.base), "dtype": "float32"} | options,
    )


def hpsv3_reference(hpsv3, pixels, prompt):
    """As published: the picture's embeddings among the words', then the model without positions."""
    text = INSTRUCTION.format(text_prompt=prompt) + ENDING
    inputs = one_by_one(hpsv3.base, pixels, text, (256 * 28 * 28, 256 * 28 * 28))
    with torch.no_grad():
        x = hpsv3.model.language_model.embed_tokens(inputs["input_ids"])
        image = hpsv3.model.visual(
            inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]
        ).pooler_output
        x = x.masked_scatter(inputs["mm_token_type_ids"].bool()[..., None].expand_as(x), image)
        out = hpsv3.head(hpsv3.model.language_model(inputs_embeds=x).last_hidden_state[0])
    at = (
        inputs["input_ids"][0]
        .tolist()
        .index(tools(hpsv3.base)[0].convert_tokens_to_ids("<|Reward|>"))
    )
    return out[at, 0].item()


@pytest.mark.parametrize("size", [(448, 448), (112, 168)])
def test_hpsv3_is_the_models_own_one_by_one(hpsv3, size):
    """With prompts of unequal lengths, padded. Pictures of 448x448 need no resizing."""
    images, reward = pictures(3, *size), load_hpsv3(hpsv3)
    pairs = list(zip(images, PROMPTS, strict=True))
    with torch.inference_mode():
        got = reward(images, PROMPTS).numpy()
        single = torch.cat([reward(image[None], [prompt]) for image, prompt in pairs]).numpy()
    want = np.array([hpsv3_reference(hpsv3, *pair) for pair in pairs])
    report("hpsv3", size, got, single, want)
    assert want.std() > 1e-2
    np.testing.assert_allclose(got, single, rtol=1e-5)
    np.testing.assert_allclose(
        got, want, rtol=0, atol=1e-6 if size == (448, 448) else 1e-2 * want.std()
    )


def test_hpsv3_options(hpsv3, tmp_path):
    """RealGen's scale; a file with today's names; a float32 head on a bfloat16 model."""
    images, prompts = pictures(1, 56, 56), PROMPTS[:1]
    exact, half = load_hpsv3(hpsv3), load_hpsv3(hpsv3, dtype="bfloat16")
    want = exact(images, prompts)
    torch.testing.assert_close(load_hpsv3(hpsv3, divide_by=15)(images, prompts), want / 15)
    new = {}
    for key, value in hpsv3.state.items():
        tower = key.startswith("model.") and "model.language_model." + key.removeprefix("model.")
        new[tower or ("model." + key if key.startswith("visual.") else key)] = value
    save_file(new, tmp_path / "any.safetensors")
    assert torch.equal(load_hpsv3(hpsv3, path=str(tmp_path))(images, prompts), want)
    assert {p.dtype for p in half.model.head.parameters()} == {torch.float32}
    assert {p.dtype for p in half.model.model.parameters()} == {torch.bfloat16}
    for (name, a), (_, b) in zip(
        half.model.named_buffers(), exact.model.named_buffers(), strict=True
    ):
        assert torch.equal(a, b), name
    torch.testing.assert_close(half(images, prompts), want, atol=0.03, rtol=0.03)


def test_hpsv3_names_what_is_wrong(hpsv3, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"set config\.reward\.options\.hpsv3\.path"):
        load_hpsv3(hpsv3, path="nowhere")
    with pytest.raises(FileNotFoundError, match=r"set config\.reward\.options\.hpsv3\.base"):
        load_hpsv3(hpsv3, base="nowhere")
    file, key = tmp_path / "HPSv3.safetensors", "model.layers.0.mlp.up_proj.weight"
    table = hpsv3.state["model.embed_tokens.weight"]
    for changed, message in (
        ({"rm_head.6.bias": torch.zeros(2)}, r"1 unexpected keys, such as 'head\.6\.bias'"),
        (
            {"value_head.bias": torch.zeros(2)},
            r"1 keys that do not belong to this model, such as 'value_head\.bias'",
        ),
        ({key: torch.zeros(3, 32)}, r"up_proj\.weight has shape \(3, 32\), expected \(64, 32\)"),
        ({"model.embed_tokens.weight": table[1:].clone()}, r"embed_tokens\.weight has shape"),
        (
            {key: None},
            r"1 keys missing, such as 'model\.language_model\.layers\.0\.mlp\.up_proj\.weight'",
        ),
    ):
        save_file({k: v for k, v in (hpsv3.state | changed).items() if v is not None}, file)
        with pytest.raises(ValueError, match=message):
            load_hpsv3(hpsv3, path=str(file))
