"""scripts/quantize.py: the folder that it writes is what a run loads, and its errors."""

import pytest

from realgen_jax.models.loading import load_model
from realgen_jax.nn.convert import leaves
from tests.helpers.goldens import PIPELINE
from tests.helpers.models import one_device, pretrained
from tests.helpers.running import call


@pytest.mark.slow
def test_a_run_takes_the_folder_and_the_folder_is_not_replaced(tmp_path, cache):
    folder = tmp_path / "nf4"
    options = ("--config.pretrained.quantization=nf4", f"--folder={folder}")
    done = call("quantize.py", cache, *options)
    assert done.stdout.strip() == str(folder)

    config = pretrained(PIPELINE, quantization="nf4", transformer=str(folder))
    model = load_model(config, (64, 64), one_device())
    assert leaves(model.params)["single.qkv.kernel"].dtype == "uint8"

    again = call("quantize.py", cache, *options)
    assert again.returncode == 1
    assert "which exists; name a new folder" in again.stderr
