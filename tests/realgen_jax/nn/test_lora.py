import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from realgen_jax.models.flux.tables import DIFFUSERS
from realgen_jax.models.flux.transformer import Cond
from realgen_jax.nn.lora import LoraConfig, lora_tensors
from tests.helpers.goldens import GOLDENS, PIPELINE
from tests.helpers.models import fresh_adapters, load_adapters

PEFT = GOLDENS / "07_train" / "lora_rollout"


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
    own, adapters = load_adapters(tiny, PEFT, LoraConfig(rank=4, alpha=8.0))
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


def test_full_fine_tuning_trains_the_weights_and_refers_to_a_copy(tiny):
    x, sigma, cond = inputs(tiny.config)
    doubled = jax.tree.map(lambda a: a * 1.1, tiny.params)
    reference = tiny.velocity(None, x, sigma, cond)
    other = dataclasses.replace(tiny, params=doubled)
    np.testing.assert_array_equal(other.velocity(tiny.params, x, sigma, cond), reference)
    assert np.abs(tiny.velocity(doubled, x, sigma, cond) - reference).max() > 1e-3
    assert isinstance(tiny.params, nnx.State)
