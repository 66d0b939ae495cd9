"""Which devices can be compiled for, and how a wrong name is refused. Nothing is compiled here."""

import pytest

from realgen_jax.preflight import targets
from realgen_jax.preflight.targets import CARDS, SLICES, target_devices


@pytest.mark.parametrize(
    ("target", "count", "words"),
    [
        ("rtx5090", 1, "'rtx5090'; choose from rtx4090, "),
        ("h200:2x2", 4, "'h200:2x2'; choose from"),
        ("v4", 4, "'v4'; choose from"),
        ("h200", 13, "as many GPUs on each host, but the mesh has 13 on 2"),
        ("v5p", 7, "no slice has 7 chips; choose a mesh of 4, 8"),
    ],
)
def test_what_cannot_be_compiled_for_is_refused_in_one_line(target, count, words):
    with pytest.raises(ValueError, match=words) as error:
        target_devices(target, count)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("target", "extra", "name"),
    [("h200", "aot-cuda", "CUDA_PACKAGES"), ("v5p", "aot-tpu", "TPU_PACKAGES")],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, target, extra, name):
    monkeypatch.setattr(targets, name, ("no_such_package",))
    with pytest.raises(ValueError, match=f"no_such_package; .*realgen_jax\\[{extra}\\]"):
        target_devices(target, 4)


@pytest.mark.parametrize("target", CARDS)
def test_every_card_is_a_gpu_of_its_compute_capability(target):
    devices = target_devices(target, 2)
    assert [device.platform for device in devices] == ["gpu", "gpu"]
    assert {device.device_kind for device in devices} == {CARDS[target].name}
    capability = ".".join(map(str, CARDS[target].capability))
    assert {device.compute_capability for device in devices} == {capability}


@pytest.mark.parametrize("count", [14, 16])
def test_more_than_eight_gpus_are_two_hosts(count):
    devices = target_devices("h200", count)
    half = count // 2
    assert [device.process_index for device in devices] == [0] * half + [1] * half


@pytest.mark.slow
@pytest.mark.parametrize("target", SLICES)
def test_every_tpu_has_its_slices(target):
    for count in (4, 8):
        assert len(target_devices(target, count)) == count
    with pytest.raises(ValueError, match="has 4 chips, but the mesh has 8"):
        target_devices(f"{target}:{SLICES[target][4]}", 8)
    with pytest.raises(ValueError, match=f"--compile_for={target}:3x5"):
        target_devices(f"{target}:3x5", 8)
