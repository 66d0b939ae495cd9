"""Models whose kernels are quantised: replay, meshes, files, and what is refused."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from realgen_configs.flux_grpo import get_config
from realgen_jax.models import FAMILIES as FAMILY_TABLE
from realgen_jax.models.exporting import write_quantized
from realgen_jax.models.loading import abstract_model, load_model
from realgen_jax.nn.convert import leaves
from realgen_jax.nn.quantize import FORMATS
from realgen_jax.nn.tensors import QUANTIZATION, STEM, Tensors
from realgen_jax.sharding import make_mesh
from realgen_jax.training.programs import make_recipe
from tests.helpers.made_up import MADE_UP, write_model
from tests.helpers.models import one_device, pretrained
from tests.helpers.quantized import dequantized
from tests.helpers.replays import FAMILIES, Replay, random_cond, random_model

SIZE = (64, 64)
F32 = jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FORMATS)
def test_an_update_replays_the_rollout_to_the_bit(name, family, dtype):
    _, metrics = Replay(family, "tiny", dtype, "both", one_device(), quantization=name).update()
    assert metrics["ratio_deviation"] == 0.0
    assert metrics["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["flux", "sd3", "zimage"])
def test_a_velocity_is_that_of_the_values_which_the_codes_stand_for(family):
    model, adapters = random_model(family, "tiny", F32, one_device(), quantization="nf4")
    config, params = dequantized(model.family, model.config, model.params)
    cond = random_cond(family, model, "tiny", 2, "both")
    x = jax.random.normal(jax.random.key(0), (2, *model.token_shape))
    sigma = jnp.full(2, 0.7)

    @jax.jit
    def velocity(model):
        return model.velocity(adapters, x, sigma, cond)

    plain = velocity(model.__class__(**{**vars(model), "config": config, "params": params}))
    np.testing.assert_allclose(velocity(model), plain, atol=2e-5)
    assert np.abs(plain).max() > 0.1


@cache
def on_mesh(name, layout):
    """The model, and latents and gradient of a call in float32."""
    mesh = make_mesh(*layout, jax.devices())
    run = Replay("flux", "tiny", F32, "", mesh, quantization=name)
    state, _ = run.update()
    return run, jax.tree.leaves(jax.tree.map(np.asarray, state.opt_state[1][0].mu))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp8", "nf4"])
def test_codes_and_scales_are_split_like_the_kernel_and_results_are_those_of_one_device(name):
    alone, gradient = on_mesh(name, (1, 1, 1))
    run, split_gradient = on_mesh(name, (2, 2, 2))
    np.testing.assert_allclose(run.latents, alone.latents, atol=1e-4)
    for ours, theirs in zip(split_gradient, gradient, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())

    # qkv [2, 256, 3, 256]: inputs over fsdp, outputs over tensor; nf4 has 8 blocks of inputs.
    arrays = leaves(run.model.params)
    inputs, blocks = {"fp8": (128, 1), "nf4": (64, 4)}[name]
    for leaf, size in (("kernel", inputs), ("kernel_scale", blocks)):
        array = arrays[f"single.qkv.{leaf}"]
        assert array.sharding.shard_shape(array.shape) == (2, size, 3, 128)


def test_a_mesh_that_cuts_a_block_is_refused():
    config = pretrained(family="FluxPipeline", model="", dtype="bfloat16", quantization="nf4")
    mesh = jax.sharding.AbstractMesh((1, 64, 1), ("data", "fsdp", "tensor"))
    with pytest.raises(
        ValueError, match=r"double\.img\.mlp\.fc1\.kernel_scale .* mesh axis fsdp=64"
    ):
        abstract_model(config, SIZE, mesh)


@pytest.mark.parametrize("name", FORMATS)
def test_a_written_folder_loads_back_to_the_bit(name, tmp_path):
    direct = load_model(pretrained(quantization=name), SIZE, one_device())
    write_quantized(pretrained(quantization=name), SIZE, tmp_path / "whole")
    stored = pretrained(quantization=name, transformer=str(tmp_path / "whole"))
    loaded = load_model(stored, SIZE, one_device())
    for (leaf, ours), theirs in zip(
        leaves(loaded.params).items(), leaves(direct.params).values(), strict=True
    ):
        assert ours.dtype == theirs.dtype, leaf
        np.testing.assert_array_equal(ours, theirs)

    other = "nf4" if name != "nf4" else "int8"
    for wrong in ("", other):
        config = pretrained(quantization=wrong, transformer=str(tmp_path / "whole"))
        with pytest.raises(
            ValueError, match=rf"holds weights in {name}, but .*quantization is '{wrong}'"
        ):
            abstract_model(config, SIZE, one_device())


def test_a_folder_without_a_scale_is_refused(tmp_path):
    config = pretrained(quantization="int8")
    write_quantized(config, SIZE, tmp_path)
    file = tmp_path / f"{STEM}.safetensors"
    tensors = Tensors(file)
    rest = {key: tensors.read(key) for key in tensors.keys() - {"single.qkv.kernel_scale"}}
    save_file(rest, file, metadata={QUANTIZATION: "int8"})
    config.transformer = str(tmp_path)
    with pytest.raises(ValueError, match=r"lacks single\.qkv\.kernel_scale"):
        abstract_model(config, SIZE, one_device())

    # Without its header, the file is like those of other programs.
    save_file(rest, file)
    with pytest.raises(ValueError, match=r"of dtype I8; .* Quantized weights are read from"):
        abstract_model(config, SIZE, one_device())


def test_a_folder_needs_a_format(tmp_path):
    with pytest.raises(ValueError, match=r"quantization is ''; expected one of fp8, int8, nf4"):
        write_quantized(pretrained(), SIZE, tmp_path)


def test_all_weights_are_not_trained_as_codes():
    config = get_config("tiny").unlock()
    config.pretrained.quantization = "nf4"
    config.train.lora = False
    with pytest.raises(ValueError, match=r"quantization is 'nf4', but config\.train\.lora=False"):
        make_recipe(config)


def test_a_family_without_codes_refuses_them(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILY_TABLE, MADE_UP.pipeline, "tests.helpers.made_up:MADE_UP")
    write_model(tmp_path)
    config = pretrained(tmp_path, quantization="nf4")
    with pytest.raises(ValueError, match=rf"is 'nf4', which {MADE_UP.pipeline} does not support"):
        abstract_model(config, SIZE, one_device())
