"""Addresses of servers, and which of them are asked through the proxy of the environment."""

import ipaddress
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx2

# Ends of names that exist in a private network only (RFC 6761, RFC 6762, and ICANN for .internal).
PRIVATE_ENDS = (".localhost", ".local", ".internal")


def is_address(value: object) -> bool:
    """Whether a value is the http or https URL of a server."""
    try:
        url = httpx2.URL(value)
    except (httpx2.InvalidURL, TypeError):
        return False
    return url.scheme in ("http", "https") and bool(url.host)


def is_private(url: str) -> bool:
    """Whether a server is on this machine or in a private network, by its address alone.

    Names are not looked up. Private are names without a dot, those that end like PRIVATE_ENDS, and
    the addresses that are not routed in the internet, such as 127.0.0.1, ::1 or 10.0.0.7.
    """
    host = httpx2.URL(url).host.rstrip(".")
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:  # a name
        return "." not in host or host.lower().endswith(PRIVATE_ENDS)


def proxy_options(urls: Iterable[str]) -> dict[str, Any]:
    """The options of an httpx2 client that asks private servers directly.

    The other servers are asked through the proxies in the environment (HTTP_PROXY, HTTPS_PROXY,
    ALL_PROXY), with the exceptions in NO_PROXY. A proxy that no server needs is not even read.
    Raises ValueError for one that would need a package that is not installed.
    """
    urls = list(urls)
    private = [httpx2.URL(url) for url in urls if is_private(url)]
    needs_socks = any(proxy.startswith("socks") for proxy in getproxies().values())
    if len(private) < len(urls) and needs_socks and find_spec("socksio") is None:
        raise ValueError(
            "the environment names a SOCKS proxy, which needs a package: pip install socksio, or "
            "unset ALL_PROXY"
        )
    directly = {}
    for url in private:
        host = f"[{url.host}]" if ":" in url.host else url.host
        directly[f"all://{host}"] = None
    return {"trust_env": len(private) < len(urls), "mounts": directly}


def proxy_hint(url: str) -> str:
    """What to add to the error of a server that was asked through a proxy; "" for the others."""
    server = httpx2.URL(url)
    proxies = getproxies()
    has_proxy = bool(proxies.get(server.scheme) or proxies.get("all"))
    if not has_proxy or is_private(url) or proxy_bypass(server.host):
        return ""
    return " (through the proxy in the environment; NO_PROXY can except the server's name)"
