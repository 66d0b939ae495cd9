from types import SimpleNamespace

import pytest

from realgen_jax.training.saving import stop_if_not_finite


@pytest.mark.parametrize(
    ("newest", "resume"), [(None, "there is no checkpoint yet"), (3, "good checkpoint, epoch 3 ")]
)
def test_values_that_are_not_finite_end_the_run_and_are_named(newest, resume):
    checkpoints = SimpleNamespace(wait=lambda: None, newest=lambda: newest, folder="runs/x")
    run = SimpleNamespace(checkpoints=checkpoints)
    values = {"loss": 0.5, "grad_norm": float("nan"), "approx_kl": float("inf")}
    with pytest.raises(FloatingPointError) as error:
        stop_if_not_finite(values, 2, "update", run)
    assert str(error.value).startswith("epoch 2, update: grad_norm, approx_kl not finite; ")
    assert resume in str(error.value)
    assert "lower config.train.learning_rate" in str(error.value)

    stop_if_not_finite({"loss": 0.5}, 2, "update", run)
