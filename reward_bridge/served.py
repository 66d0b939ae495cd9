"""What reward servers tell of themselves: a digest that changes with what computes the scores."""

import logging
from collections.abc import Sequence
from typing import Any

from reward_bridge.reward import RewardError
from reward_bridge.wire import DIGEST

# {(reward, server): the digest that was first told to this process, "" for none}. All clients share
# it, so that none of them uses scores of another reward.
_told: dict[tuple[str, str], str] = {}


def check_served(reward: str, server: str, servers: Sequence[str], content: Any) -> None:
    """Raise RewardError unless all servers serve the same as each other, and as before.

    content: the JSON of an answer of `server`, one of `servers`. A server that tells no digest, as
    other programs, is warned of once.
    """
    told = content.get(DIGEST) if isinstance(content, dict) else None
    digest = told if isinstance(told, str) else ""
    source = f"reward {reward!r}, server {server}"
    if (reward, server) not in _told and not digest:
        logging.getLogger(__name__).warning(
            "%s does not tell what it serves (it has no digest, as an older version); if its "
            "weights or options change, nothing will notice",
            source,
        )

    before = _told.setdefault((reward, server), digest)
    if digest != before:
        raise RewardError(
            f"{source} serves something else than before: its digest was {_short(before)}, is now "
            f"{_short(digest)}; start it with the same weights and options as before"
        )
    for other in servers:
        theirs = _told.get((reward, other), "")
        if digest and theirs and digest != theirs:
            raise RewardError(
                f"reward {reward!r}: the servers {other} and {server} serve different things: "
                f"their digests are {_short(theirs)} and {_short(digest)}; start both with the "
                "same weights and options"
            )


def served_digest(reward: str, servers: Sequence[str]) -> str:
    """Return the digest that these servers told; "" if none did."""
    digests = [_told.get((reward, server), "") for server in servers]
    return next(filter(None, digests), "")


def _short(digest: str) -> str:
    """A digest for a message."""
    return digest[:16] or "unknown"
