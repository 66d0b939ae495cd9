"""Shared by the tests: the platform, the tiny golden pipeline, the cache of compiled programs."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # torch too, and the programs that tests start
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores; with more threads torch's wait for each other, spinning.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Programs that tests start find tests.helpers
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH")))
)

import json
from types import SimpleNamespace

import jax
import pytest

from realgen_jax.files import file_lock
from tests.helpers.models import golden_model
from tests.helpers.running import call

jax.config.update("jax_num_cpu_devices", 8)
ON_REQUEST = {"slow", "gpu"}


def pytest_collection_modifyitems(config, items):
    """`slow` and `gpu` tests run only when asked for (`-m slow`, `-m gpu`)."""
    if not config.getoption("-m"):
        for item in items:
            for kind in ON_REQUEST & set(item.keywords):
                item.add_marker(pytest.mark.skip(reason=f"{kind}: run by `make test-{kind}`"))


@pytest.fixture(scope="session")
def tiny():
    """The golden pipeline (1 double and 2 single blocks, 64x64 pictures) in float32."""
    return golden_model()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Compiled programs and embeddings, shared by all runs of train.py and by pytest's workers."""
    root = tmp_path_factory.getbasetemp()
    return (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "cache"


@pytest.fixture(scope="session")
def whole(cache):
    """The golden config's run of four epochs on one device: its folder, and its output.

    All of pytest's workers share one run. Copy the folder before changing it.
    """
    pytest.importorskip("torch")
    root = cache.parent
    output = root / "whole.json"
    with file_lock(root / "whole.lock"):
        if not output.exists():
            done = call("train.py", cache, f"--config.run_root={root}", "--config.run_name=whole")
            assert done.returncode == 0, done.stderr
            output.write_text(json.dumps({"stdout": done.stdout, "stderr": done.stderr}))
    return root / "whole", SimpleNamespace(**json.loads(output.read_text()))
