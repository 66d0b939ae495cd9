import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from realgen_jax.models.flux.transformer import Cond
from realgen_jax.nn.lora import (
    LoraConfig,
    init_lora,
    load_lora,
    lora_tensors,
    make_velocity,
    save_lora,
)
from tests.helpers.goldens import GOLDENS, PIPELINE

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
    adapters = init_lora(tiny.config, LoraConfig(rank=16, alpha=32.0), jax.random.key(3))
    tensors = lora_tensors(adapters)
    a = np.concatenate([v.ravel() for k, v in tensors.items() if k.endswith("A")])
    assert abs(a.std() - 1 / 16) < 2e-3
    assert not any(v.any() for k, v in tensors.items() if k.endswith("B"))
    velocity = make_velocity(tiny.config, LoraConfig(rank=16, alpha=32.0), 4, 4)
    x, sigma, cond = inputs(tiny.config)
    base = velocity(tiny.params, None, x, sigma, cond)
    np.testing.assert_allclose(velocity(tiny.params, adapters, x, sigma, cond), base, atol=1e-5)
    uniform = lora_tensors(init_lora(tiny.config, LoraConfig(4, 8.0, "kaiming"), jax.random.key(0)))
    bound = 1 / np.sqrt(256)
    assert 0.9 * bound < np.abs(uniform["transformer_blocks.0.ff.net.2.lora_A"]).max() <= bound
    with pytest.raises(ValueError, match="lora init is 'zeros'; choose one of gaussian, kaiming"):
        init_lora(tiny.config, LoraConfig(init="zeros"), jax.random.key(0))


def test_peft_agrees(tiny):
    """The same adapters, the same inputs, in peft."""
    torch, diffusers, peft = (pytest.importorskip(name) for name in ("torch", "diffusers", "peft"))
    config, adapters = load_lora(PEFT, tiny.config)
    assert config == CONFIG
    x, sigma, cond = inputs(tiny.config)
    ours = make_velocity(tiny.config, config, 4, 4)(tiny.params, adapters, x, sigma, cond)
    model = diffusers.FluxTransformer2DModel.from_pretrained(PIPELINE / "transformer")
    model = peft.PeftModel.from_pretrained(model, PEFT).eval()
    rows, columns = np.meshgrid(np.arange(4), np.arange(4), indexing="ij")
    ids = np.stack([np.zeros_like(rows), rows, columns], -1).reshape(-1, 3)
    as_torch = [torch.tensor(np.asarray(a)) for a in (x, cond.t5, cond.clip, sigma, cond.guidance)]
    with torch.no_grad():
        x, t5, clip, sigma, guidance = as_torch
        theirs = model(
            hidden_states=x, encoder_hidden_states=t5, pooled_projections=clip, timestep=sigma, guidance=guidance,
            img_ids=torch.tensor(ids).float(), txt_ids=torch.zeros(5, 3), return_dict=False,
        )[0]  # fmt: skip
    base = make_velocity(tiny.config, config, 4, 4)(tiny.params, None, *inputs(tiny.config))
    assert np.abs(ours - base).max() > 1e-3
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_files_round_trip_and_diffusers_reads_them(tiny, tmp_path):
    _, adapters = load_lora(PEFT, tiny.config)
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    save_lora(file, adapters, CONFIG)
    for path in (file, file.parent):
        config, again = load_lora(path, tiny.config)
        assert (config.rank, config.alpha) == (4, 8.0)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(adapters), strict=True):
            np.testing.assert_array_equal(a, b)
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    model = diffusers.FluxTransformer2DModel.from_pretrained(PIPELINE / "transformer")
    model.load_lora_adapter(str(file.parent), weight_name=file.name, prefix="transformer")
    assert set(model.peft_config) == {"default_0"}
    assert model.peft_config["default_0"].lora_alpha == 8.0
    theirs = {k: v.numpy() for k, v in model.state_dict().items() if "lora_" in k}
    ours = lora_tensors(adapters)
    assert len(theirs) == len(ours) == 36
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key.replace(".default_0.weight", "")], value)


def test_alpha_keys_and_no_alpha(tiny, tmp_path):
    _, adapters = load_lora(PEFT, tiny.config)
    plain = {f"transformer.{k}.weight": v for k, v in lora_tensors(adapters).items()}
    save_file(plain, tmp_path / "plain.safetensors")
    assert load_lora(tmp_path / "plain.safetensors", tiny.config)[0].alpha == 4.0
    modules = {k.rpartition(".lora_")[0] for k in plain}
    save_file(
        {**plain, **{f"{m}.alpha": np.array(2.0, np.float32) for m in modules}},
        tmp_path / "a.safetensors",
    )
    assert load_lora(tmp_path / "a.safetensors", tiny.config)[0].alpha == 2.0
    mixed = {
        **plain,
        "transformer.x.alpha": np.array(2, np.float32),
        "transformer.y.alpha": np.array(3, np.float32),
    }
    save_file(mixed, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"different alphas .*2\.0, 3\.0"):
        load_lora(tmp_path / "b.safetensors", tiny.config)


def test_wrong_files_are_named(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; expected a LoRA file or folder"):
        load_lora(tmp_path / "none.safetensors", tiny.config)
    with pytest.raises(FileNotFoundError, match=r"holds neither adapter_model\.safetensors"):
        load_lora(tmp_path, tiny.config)
    weights = load_file(PEFT / "adapter_model.safetensors")
    key = "base_model.model.single_transformer_blocks.1.attn.to_v.lora_B.weight"

    def write(**change):
        save_file(
            {k: v for k, v in {**weights, **change}.items() if v is not None},
            tmp_path / "x.safetensors",
        )
        return tmp_path / "x.safetensors"

    with pytest.raises(ValueError, match=r"lacks single_transformer_blocks\.1\.attn\.to_v\.lora_B"):
        load_lora(write(**{key: None}), tiny.config)
    with pytest.raises(
        ValueError, match=r"to_v\.lora_B in .* has shape \(63, 4\); expected \(64, 4\)"
    ):
        load_lora(write(**{key: np.zeros((63, 4), np.float32)}), tiny.config)
    stray = "base_model.model.single_transformer_blocks.0.proj_out.lora_A.weight"
    with pytest.raises(ValueError, match=r"holds single_transformer_blocks\.0\.proj_out\.lora_A"):
        load_lora(write(**{stray: np.zeros((4, 64), np.float32)}), tiny.config)
    save_file({"conv.weight": np.zeros(3, np.float32)}, tmp_path / "y.safetensors")
    with pytest.raises(ValueError, match=r"no key that ends in \.lora_A\.weight"):
        load_lora(tmp_path / "y.safetensors", tiny.config)


def test_full_fine_tuning_trains_the_weights_and_refers_to_a_copy(tiny):
    velocity = make_velocity(tiny.config, None, 4, 4)
    x, sigma, cond = inputs(tiny.config)
    doubled = jax.tree.map(lambda a: a * 1.1, tiny.params)
    reference = velocity(tiny.params, None, x, sigma, cond)
    np.testing.assert_array_equal(velocity(doubled, tiny.params, x, sigma, cond), reference)
    assert np.abs(velocity(tiny.params, doubled, x, sigma, cond) - reference).max() > 1e-3
    assert isinstance(tiny.params, nnx.State)
