"""Loading language models strictly, and writing them for transformers and peft."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ml_dtypes import bfloat16
from safetensors.numpy import load_file

from realgen_jax.models.language import abstract_language_model, load_language_model
from realgen_jax.models.trainable import AllWeights, Lora
from realgen_jax.nn.convert import leaves
from realgen_jax.nn.export import to_torch
from realgen_jax.nn.lora import LoraConfig, lora_tensors
from realgen_jax.rewriter.generate import generate
from realgen_jax.sharding import abstract_mesh, make_mesh
from tests.helpers.compiling import QUICK
from tests.helpers.language import (
    ADAPTER,
    LORA,
    TIED,
    UNTIED,
    changed_folder,
    golden_language,
    prompts,
    random_adapters,
    row_keys,
    settings,
)
from tests.helpers.models import one_device

KEY = jax.random.key(0)
GATE = "model.layers.1.mlp.gate_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def load(folder, **changes):
    return load_language_model(settings(folder, **changes), one_device())


@pytest.mark.parametrize("folder", [TIED, UNTIED])
def test_every_tensor_of_a_folder_is_read_once(folder):
    model = load(folder)
    ours = dict(to_torch(model.params, model.family.table(model.config)))
    theirs = load_file(folder / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(GATE), f"lacks {GATE}"),
        (lambda t: t.update(extra=t[GATE]), "holds extra, which this model does not have"),
        (lambda t: t.update({GATE: t[GATE][:-1]}), r"gate_proj.weight .* has shape \(95, 64\)"),
        (
            lambda t: t.update({"lm_head.weight": t[EMBEDDING] + np.float32(1e-6)}),
            "lm_head.weight .* differs from model.embed_tokens.weight, but .* tie_word_embeddings",
        ),
        (
            lambda t: t.update({"lm_head.weight": t[EMBEDDING][:-1].copy()}),
            "lm_head.weight .* differs from model.embed_tokens.weight",
        ),
    ],
)
def test_files_of_another_model_are_refused(tmp_path, change, message):
    folder = changed_folder(tmp_path, tensors=change)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_an_equal_head_is_the_embedding(tmp_path):
    def add(tensors):
        tensors["lm_head.weight"] = tensors[EMBEDDING].copy()

    model = load(changed_folder(tmp_path, tensors=add))
    again = golden_language()
    for a, b in zip(jax.tree.leaves(model.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_untied_model_needs_its_head(tmp_path):
    folder = changed_folder(tmp_path, UNTIED, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        load(folder)


YARN = {"rope_theta": 5e6, "rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2'; expected 'qwen3'"),
        ({"model_type": "removed"}, "model_type None; expected 'qwen3'"),
        ({"rope_parameters": YARN}, "rope_type 'yarn' in rope_parameters; expected 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear' in rope_scaling"),
        ({"rope_parameters": "removed"}, "lacks rope_theta"),
        ({"rope_theta": 1e6}, "has rope_theta 5000000.0 in rope_parameters"),
        ({"attention_bias": True}, "attention_bias True; expected False"),
        ({"use_sliding_window": True}, "use_sliding_window True; expected False"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types 'sliding_att"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; expected 'silu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1; expected 0.0"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* expected None"),
        ({"num_experts": 8}, "num_experts 8, which is not known here"),
        ({"head_dim": "removed"}, "lacks head_dim"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of"),
    ],
)
def test_models_that_are_not_computed_are_refused_by_name(tmp_path, config, message):
    """Before any weight is read: there are none in this folder."""
    folder = changed_folder(tmp_path, **config)
    (folder / "model.safetensors").unlink()
    for read in (abstract_language_model, load_language_model):
        with pytest.raises(ValueError, match=message) as error:
            read(settings(folder), one_device())
        assert "config.json" in str(error.value)
        assert "\n" not in str(error.value)


def test_older_and_newer_names_of_theta(tmp_path):
    folder = changed_folder(
        tmp_path, rope_theta=1e4, rope_scaling=None, rope_parameters="removed", torch_dtype="x"
    )
    model = abstract_language_model(settings(folder), one_device())
    assert model.config.rope_theta == 1e4
    assert golden_language().config.rope_theta == 5e6


def test_missing_folders_are_named(tmp_path):
    for path, message in (
        ("", "config.rewriter.path is empty; expected a Hugging Face folder"),
        (str(tmp_path / "no"), "which holds no config.json"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            load_language_model(settings(path), one_device())
    folder = changed_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected a folder of transformers"):
        load(folder)


def test_without_a_folder_the_published_model_is_assumed():
    mesh = abstract_mesh(1, 4, 2, 8)
    model = abstract_language_model(settings(""), mesh, LORA)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    assert parameters == 4_022_468_096
    assert model.config.rope_theta == 5e6
    adapters = LORA.abstract(model)
    assert len(jax.tree.leaves(adapters)) == 14
    shapes = {name: leaf.sharding.spec for name, leaf in leaves(model.params).items()}
    assert shapes["layers.q.kernel"] == P(None, "fsdp", "tensor")


# -- Adapters


def greedy(model, trainable, steps=12):
    ids, mask = prompts(96, (8, 3, 5), 8)
    fixed = {"steps": steps, "ends": (1,), "pad": 0, "temperature": 0.0}
    run = jax.jit(partial(generate, **fixed), compiler_options=QUICK)
    tokens, _ = run(model, trainable, ids, mask, row_keys(3))
    return ids, mask, np.asarray(tokens.new_ids), np.asarray(tokens.completion)


def same_continuation(theirs, ours):
    """transformers' greedy continuation of the same prompts."""
    torch = pytest.importorskip("torch")
    ids, mask, new_ids, _ = ours
    with torch.no_grad():
        out = theirs.generate(
            input_ids=torch.tensor(ids).long(),
            attention_mask=torch.tensor(mask).long(),
            max_new_tokens=new_ids.shape[1],
            do_sample=False,
            eos_token_id=1,
            pad_token_id=0,
        )
    out = out[:, ids.shape[1] :].numpy()
    np.testing.assert_array_equal(out, new_ids[:, : out.shape[1]])
    assert not new_ids[:, out.shape[1] :].any()


def test_an_exported_adapter_continues_in_peft_as_here(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    lora = Lora(LoraConfig(rank=3, alpha=5.0))
    model = golden_language(TIED, lora)
    adapters = random_adapters(model, 0.3)
    lora.save(model, tmp_path, adapters)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(TIED)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    ours = greedy(model, adapters)
    same_continuation(theirs, ours)
    assert not np.array_equal(ours[2], greedy(model, None)[2])
    entries = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (entries["r"], entries["lora_alpha"]) == (3, 5.0)
    assert entries["base_model_name_or_path"] == str(TIED)

    # And back, to the bit.
    again = lora.load(model, tmp_path, KEY)
    for a, b in zip(jax.tree.leaves(adapters), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_adapter_of_peft_is_read():
    model = golden_language(TIED, LORA)
    ours = lora_tensors(LORA.load(model, ADAPTER, KEY), model.family.table(model.config))
    theirs = load_file(ADAPTER / "adapter_model.safetensors")
    assert len(theirs) == len(ours) == 28
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[f"base_model.model.{name}.weight"])


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    model = golden_language()
    with pytest.raises(ValueError, match=r"has rank 4, but config.train.lora_rank is 2"):
        Lora(LoraConfig(2, 8.0)).load(model, ADAPTER, KEY)

    few = Lora(LoraConfig(4, 8.0), targets=("layers.q",))
    with pytest.raises(ValueError, match=r"holds model.layers.0.mlp.down_proj"):
        few.load(model, ADAPTER, KEY)

    with pytest.raises(ValueError, match=r"config.rewriter.adapter is set, but config.train.lora="):
        AllWeights().load(model, ADAPTER, KEY)

    dora = tmp_path / "dora"
    shutil.copytree(ADAPTER, dora)
    entries = json.loads((dora / "adapter_config.json").read_text()) | {"use_dora": True}
    (dora / "adapter_config.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"a DoRA is not read; merge it with peft .*rewriter.path"):
        LORA.load(model, dora, KEY)


# -- All weights


@pytest.mark.slow
def test_exported_weights_continue_in_transformers_as_here(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = golden_language(UNTIED, AllWeights())
    state = model.trainable.init(model, jax.random.key(0))
    state = jax.tree.map(lambda leaf: leaf * 1.1, state)
    model.trainable.save(model, tmp_path, state)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert theirs.generation_config.eos_token_id == 1
    same_continuation(theirs, greedy(model, state))

    again = load(tmp_path)
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)


def test_master_weights_are_float32():
    mesh = make_mesh(1, 2, 1, jax.devices())
    model = load_language_model(settings(TIED, param_dtype="bfloat16"), mesh, AllWeights())
    state = model.trainable.init(model, jax.random.key(0))
    params = leaves(model.params)
    for name, leaf in leaves(state).items():
        assert leaf.dtype == jnp.float32
        assert params[name].dtype == bfloat16
        assert leaf.sharding == params[name].sharding
