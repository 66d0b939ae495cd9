"""Which servers are asked through a proxy."""

import httpx2
import pytest

from reward_bridge.addresses import is_address, is_private, proxy_hint, proxy_options
from tests.helpers.faults import DEAD_PROXY, dead_proxy


@pytest.mark.parametrize(
    ("url", "private"),
    [
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1:8000", True),
        ("http://127.8.8.8", True),
        ("http://[::1]:8000", True),
        ("http://10.1.2.3:8000", True),
        ("https://172.16.0.9", True),
        ("http://192.168.1.2", True),
        ("http://[fd00::7]", True),
        ("http://gpu-node-7:8017", True),
        ("http://judge.default.svc.cluster.local.", True),
        ("http://Judge.LOCAL", True),
        ("https://api.openai.com/v1", False),
        ("http://8.8.8.8", False),
        ("http://172.32.0.1", False),
        ("http://[2001:4860:4860::8888]", False),
        ("https://localhost.example.com", False),
    ],
)
def test_private_addresses_are_asked_directly(url, private):
    assert is_private(url) == private
    with dead_proxy():
        client = httpx2.AsyncClient(**proxy_options([url]))
        transport = client._transport_for_url(httpx2.URL(url))
        assert (transport is client._transport) == private
        assert bool(proxy_hint(url)) != private


def test_each_of_several_servers_is_asked_its_own_way(monkeypatch):
    urls = ["http://[::1]:8000", "http://127.0.0.1:1", "https://api.openai.com"]
    with dead_proxy():
        client = httpx2.AsyncClient(**proxy_options(urls))
        direct = [client._transport_for_url(httpx2.URL(url)) is client._transport for url in urls]
        assert direct == [True, True, False]

        monkeypatch.setenv("NO_PROXY", "openai.com")
        client = httpx2.AsyncClient(**proxy_options(urls))
        assert client._transport_for_url(httpx2.URL(urls[2])) is client._transport
        assert not proxy_hint(urls[2])


def test_a_proxy_that_cannot_be_used_does_not_matter_on_this_machine(monkeypatch):
    """The client for SOCKS is not installed."""
    monkeypatch.setenv("ALL_PROXY", DEAD_PROXY.replace("http", "socks5"))
    monkeypatch.setattr("reward_bridge.addresses.find_spec", lambda _: None)
    httpx2.AsyncClient(**proxy_options(["http://localhost:8000"]))
    with pytest.raises(ValueError, match=r"names a SOCKS proxy, .*pip install socksio"):
        proxy_options(["http://localhost:8000", "https://api.openai.com/v1"])


@pytest.mark.parametrize("value", ["localhost:8000/v1", "ftp://a", "http://", "", None, 5])
def test_what_is_no_address(value):
    assert not is_address(value)
    assert is_address("http://a:1/v1")
