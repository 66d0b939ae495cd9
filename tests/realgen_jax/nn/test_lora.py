import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from realgen_jax.models.flux.tables import DIFFUSERS
from realgen_jax.models.flux.transformer import Cond
from realgen_jax.nn.lora import LoraConfig, lora_tensors, read_lora_config, save_lora
from tests.helpers.goldens import GOLDENS, PIPELINE
from tests.helpers.models import fresh_adapters, load_adapters

PEFT = GOLDENS / "07_train" / "lora_rollout"
CONFIG = LoraConfig(rank=4, alpha=8.0)


def inputs(config, n=2):
    keys = jax.random.split(jax.random.key(0), 3)
    cond = Cond(
        jax.random.normal(keys[0], (n, 5, config.joint_attention_dim)),
        jax.random.normal(keys[1], (n, config.pooled_projection_dim)),
        jnp.full(n, 3.5),
    )
    return jax.random.normal(keys[2], (n, 16, 64)), jnp.full(n, 0.6), cond


def test_fresh_adapters_change_nothing_and_start_as_pefts(tiny):
    model, adapters = fresh_adapters(tiny, LoraConfig(rank=16, alpha=32.0), jax.random.key(3))
    tensors = lora_tensors(adapters, DIFFUSERS)
    a = np.concatenate([v.ravel() for k, v in tensors.items() if k.endswith("A")])
    assert abs(a.std() - 1 / 16) < 2e-3
    assert not any(v.any() for k, v in tensors.items() if k.endswith("B"))
    x, sigma, cond = inputs(tiny.config)
    base = model.velocity(None, x, sigma, cond)
    np.testing.assert_allclose(model.velocity(adapters, x, sigma, cond), base, atol=1e-5)
    _, adapters = fresh_adapters(tiny, LoraConfig(4, 8.0, "kaiming"), jax.random.key(0))
    uniform = lora_tensors(adapters, DIFFUSERS)
    bound = 1 / np.sqrt(256)
    assert 0.9 * bound < np.abs(uniform["transformer_blocks.0.ff.net.2.lora_A"]).max() <= bound


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": "zeros"}, "lora_init is 'zeros'; choose one of gaussian, kaiming"),
        ({"rank": 0}, "lora_rank is 0; expected 1 or more"),
        ({"alpha": 0.0}, "lora_alpha is 0; expected a number above 0"),
    ],
)
def test_adapters_that_cannot_learn_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**change)


def test_peft_agrees(tiny):
    """The same adapters, the same inputs, in peft."""
    torch, diffusers, peft = (pytest.importorskip(name) for name in ("torch", "diffusers", "peft"))
    own, adapters = load_adapters(tiny, PEFT)
    assert own.trainable.config == CONFIG
    x, sigma, cond = inputs(tiny.config)
    ours = own.velocity(adapters, x, sigma, cond)
    model = diffusers.FluxTransformer2DModel.from_pretrained(PIPELINE / "transformer")
    model = peft.PeftModel.from_pretrained(model, PEFT).eval()
    rows, columns = np.meshgrid(np.arange(4), np.arange(4), indexing="ij")
    ids = np.stack([np.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    as_torch = [torch.tensor(np.asarray(a)) for a in (x, cond.t5, cond.clip, sigma, cond.guidance)]
    with torch.no_grad():
        x, t5, clip, sigma, guidance = as_torch
        theirs = model(
            hidden_states=x,
            encoder_hidden_states=t5,
            pooled_projections=clip,
            timestep=sigma,
            guidance=guidance,
            img_ids=torch.tensor(ids).float(),
            txt_ids=torch.zeros(5, 3),
            return_dict=False,
        )[0]
    base = own.velocity(None, *inputs(tiny.config))
    assert np.abs(ours - base).max() > 1e-3
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_files_round_trip_and_diffusers_reads_them(tiny, tmp_path):
    _, adapters = load_adapters(tiny, PEFT)
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    save_lora(file.parent, adapters, CONFIG, DIFFUSERS)
    for path in (file, file.parent):
        model, again = load_adapters(tiny, path)
        assert model.trainable.config == CONFIG
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(adapters), strict=True):
            np.testing.assert_array_equal(a, b)
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    model = diffusers.FluxTransformer2DModel.from_pretrained(PIPELINE / "transformer")
    model.load_lora_adapter(str(file.parent), weight_name=file.name, prefix="transformer")
    assert set(model.peft_config) == {"default_0"}
    assert model.peft_config["default_0"].lora_alpha == 8.0
    theirs = {k: v.numpy() for k, v in model.state_dict().items() if "lora_" in k}
    ours = lora_tensors(adapters, DIFFUSERS)
    assert len(theirs) == len(ours) == 36
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key.replace(".default_0.weight", "")], value)


def test_alpha_keys_and_no_alpha(tiny, tmp_path):
    _, adapters = load_adapters(tiny, PEFT)
    plain = {f"transformer.{k}.weight": v for k, v in lora_tensors(adapters, DIFFUSERS).items()}
    save_file(plain, tmp_path / "plain.safetensors")
    assert read_lora_config(tmp_path / "plain.safetensors").alpha == 4.0
    modules = {k.rpartition(".lora_")[0] for k in plain}
    save_file(
        {**plain, **{f"{m}.alpha": np.array(2.0, np.float32) for m in modules}},
        tmp_path / "a.safetensors",
    )
    assert read_lora_config(tmp_path / "a.safetensors").alpha == 2.0
    mixed = {
        **plain,
        "transformer.x.alpha": np.array(2, np.float32),
        "transformer.y.alpha": np.array(3, np.float32),
    }
    save_file(mixed, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"different alphas .*2\.0, 3\.0"):
        load_adapters(tiny, tmp_path / "b.safetensors")


def test_wrong_files_are_named(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; expected a LoRA file or folder"):
        load_adapters(tiny, tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds neither adapter_model\.safetensors"):
        load_adapters(tiny, tmp_path)
    weights = load_file(PEFT / "adapter_model.safetensors")
    key = "base_model.model.single_transformer_blocks.1.attn.to_v.lora_B.weight"

    def write(**change):
        save_file(
            {k: v for k, v in {**weights, **change}.items() if v is not None},
            tmp_path / "x.safetensors",
        )
        return tmp_path / "x.safetensors"

    with pytest.raises(ValueError, match=r"lacks single_transformer_blocks\.1\.attn\.to_v\.lora_B"):
        load_adapters(tiny, write(**{key: None}))
    with pytest.raises(
        ValueError, match=r"to_v\.lora_B in .* has shape \(63, 4\); expected \(64, 4\)"
    ):
        load_adapters(tiny, write(**{key: np.zeros((63, 4), np.float32)}))
    stray = "base_model.model.single_transformer_blocks.0.proj_out.lora_A.weight"
    with pytest.raises(ValueError, match=r"holds single_transformer_blocks\.0\.proj_out\.lora_A"):
        load_adapters(tiny, write(**{stray: np.zeros((4, 64), np.float32)}))
    save_file({"conv.weight": np.zeros(3, np.float32)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match=r"no key that ends in \.lora_A\.weight"):
        load_adapters(tiny, tmp_path / "y.safetensors")


def test_full_fine_tuning_trains_the_weights_and_refers_to_a_copy(tiny):
    x, sigma, cond = inputs(tiny.config)
    doubled = jax.tree.map(lambda a: a * 1.1, tiny.params)
    reference = tiny.velocity(None, x, sigma, cond)
    other = dataclasses.replace(tiny, params=doubled)
    np.testing.assert_array_equal(other.velocity(tiny.params, x, sigma, cond), reference)
    assert np.abs(tiny.velocity(doubled, x, sigma, cond) - reference).max() > 1e-3
    assert isinstance(tiny.params, nnx.State)
