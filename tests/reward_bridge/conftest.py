"""Skips the tests of reward_bridge where its packages are not installed; starts reward servers."""

import importlib.util

import pytest

PACKAGES = ("torch", "transformers", "httpx2", "starlette", "tenacity", "uvicorn")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]

collect_ignore_glob = ["*"] if MISSING else []


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """All server processes: tests/helpers/reward_servers.py, Servers."""
    # Imported here because this file is also read where torch is missing.
    from tests.helpers.reward_servers import running_servers

    with running_servers(tmp_path_factory.mktemp("script") / "imports.txt") as servers:
        yield servers
