"""Packing of latents into tokens."""

import numpy as np
import pytest

from realgen_jax.nn.tokens import pack, unpack
from tests.helpers.goldens import golden


@pytest.mark.parametrize("case", ["0", "1", "2"])
def test_packing_is_that_of_diffusers(case):
    arrays = golden("03_schedule/packing.npz")
    latents = arrays[f"{case}/latents"].transpose(0, 2, 3, 1)
    packed = arrays[f"{case}/packed"]
    _, h, w, _ = latents.shape
    np.testing.assert_array_equal(pack(latents), packed)
    np.testing.assert_array_equal(unpack(packed, h // 2, w // 2), latents)
