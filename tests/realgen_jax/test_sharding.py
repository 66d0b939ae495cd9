import re
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import PartitionSpec as P

from realgen_jax.hosts import put
from realgen_jax.models.flux.tables import RULES
from realgen_jax.models.flux.transformer import FluxConfig, FluxTransformer
from realgen_jax.nn.convert import abstract, leaves
from realgen_jax.sharding import abstract_mesh, batch_devices, make_mesh, param_sharding


def test_meshes():
    devices = jax.devices()
    assert dict(make_mesh(-1, 2, 1, devices).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert batch_devices(make_mesh(2, 2, 2, devices)) == 4
    assert dict(abstract_mesh(-1, 2, 1, 8).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert make_mesh(1, 6, 1, devices).devices.ravel().tolist() == devices[:6]
    for sizes in ((9, 1, 1), (-1, 3, 1), (-1, -1, 1), (4, 2, 2), (0, 1, 1)):
        with pytest.raises(ValueError, match="does not fit 8 devices"):
            make_mesh(*sizes, devices)


def test_every_parameter_of_flux_dev_has_a_rule_and_every_rule_a_parameter():
    shapes = {
        leaf: value.shape
        for leaf, value in leaves(abstract(FluxTransformer, FluxConfig())[1]).items()
    }
    mesh = make_mesh(2, 2, 2, jax.devices())
    sharding = param_sharding(mesh, RULES)
    for leaf, shape in shapes.items():
        hits = [pattern for pattern, _ in RULES if re.fullmatch(pattern, leaf)]
        assert len(hits) == 1, (leaf, hits)
        sharding(leaf, shape)
    for pattern, _ in RULES:
        assert any(re.fullmatch(pattern, leaf) for leaf in shapes), pattern
    for leaf, shape in shapes.items():
        into_or_out = leaf in (
            "img_in.kernel",
            "txt_in.kernel",
            "proj_out.kernel",
        )  # fsdp alone splits them
        parts = prod(shape) // prod(sharding(leaf, shape).shard_shape(shape))
        if prod(shape) > 2e6:
            assert parts == (2 if into_or_out else 4), (leaf, parts)
    whole = sum(2 * jnp.prod(jnp.array(s, jnp.float32)) for s in shapes.values())
    split = sum(
        2 * jnp.prod(jnp.array(sharding(n, s).shard_shape(s), jnp.float32))
        for n, s in shapes.items()
    )
    assert whole > 23e9  # FLUX.1-dev in bfloat16
    assert split < 0.26 * whole  # fsdp 2 x tensor 2: nothing large is left whole


def test_unknown_and_uneven_parameters_are_named():
    sharding = param_sharding(make_mesh(1, 4, 2, jax.devices()), RULES)
    with pytest.raises(
        ValueError,
        match=r"0 sharding rules of the model family match the parameter double\.img\.gate\.kernel",
    ):
        sharding("double.img.gate.kernel", (2, 8, 8))
    with pytest.raises(
        ValueError, match=r"single\.qkv\.kernel \(4, 6, 8\) cannot be split: 6 .* mesh axis fsdp=4"
    ):
        sharding("single.qkv.kernel", (4, 6, 8))
    with pytest.raises(
        ValueError, match=r"single\.mlp\.bias \(4, 4, 9\) cannot be split: 9 .* mesh axis tensor=2"
    ):
        sharding("single.mlp.bias", (4, 4, 9))
    assert sharding("single.proj.bias", (4, 9)).spec == P()
    twice = param_sharding(make_mesh(1, 4, 2, jax.devices()), (*RULES, (r"img_in\..*", P())))
    with pytest.raises(ValueError, match=r"2 sharding rules .* match the parameter img_in\.bias"):
        twice("img_in.bias", (4,))


def test_programs_take_an_array_with_its_axes_in_another_order():
    """As the fused projections lie in a TPU's memory."""
    mesh = make_mesh(1, 1, 1, jax.devices())
    sharding = param_sharding(mesh, RULES)("single.mlp.kernel", (2, 3, 4, 5))
    host = np.arange(120, dtype=np.float32).reshape(2, 3, 4, 5)
    array = put(host, Format(Layout((0, 2, 1, 3)), sharding))
    np.testing.assert_array_equal(array, host)

    program = jax.jit(lambda array: 2 * array)
    np.testing.assert_array_equal(program(array), 2 * host)
    (taken,), _ = program.lower(array).compile().input_formats
    assert taken.layout.major_to_minor == (0, 2, 1, 3)
