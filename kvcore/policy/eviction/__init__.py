"""Eviction policies, one a file, and their names."""

from collections.abc import Callable
from typing import Final

from kvcore.policy.eviction.arc import Arc
from kvcore.policy.eviction.base import EvictionPolicy
from kvcore.policy.eviction.fifo import Fifo
from kvcore.policy.eviction.gdsf import Gdsf
from kvcore.policy.eviction.lanes import Lanes
from kvcore.policy.eviction.lfu import Lfu
from kvcore.policy.eviction.lru import Lru
from kvcore.policy.eviction.s3fifo import S3Fifo
from kvcore.policy.eviction.sieve import Sieve
from kvcore.policy.eviction.wtinylfu import WTinyLfu

__all__ = [
    "OFFLINE",
    "POLICIES",
    "Arc",
    "EvictionPolicy",
    "Fifo",
    "Gdsf",
    "Lanes",
    "Lfu",
    "Lru",
    "S3Fifo",
    "Sieve",
    "WTinyLfu",
    "make_policy",
]

_MAKERS: Final[dict[str, Callable[[int | None], EvictionPolicy]]] = {
    "lru": lambda _: Lru(),
    "fifo": lambda _: Fifo(),
    "lfu": lambda _: Lfu(),
    "sieve": lambda _: Sieve(),
    "s3fifo": S3Fifo,
    "arc": Arc,
    "gdsf": lambda _: Gdsf(),
    "w-tinylfu": WTinyLfu,
}

POLICIES: Final = tuple(_MAKERS)
"""The names of the policies that can run."""

OFFLINE: Final = ("belady",)
"""The names of the bounds that need the future."""


def make_policy(name: str, capacity_pages: int | None) -> EvictionPolicy:
    """Return a new policy for a tier of `capacity_pages` pages, None for one without bound.

    Raises ValueError where `name` is none of `POLICIES`.
    """
    make = _MAKERS.get(name)
    if make is not None:
        return make(capacity_pages)
    if name in OFFLINE:
        raise ValueError(f"policy {name!r} needs the future, so only the offline sweep can run it")
    raise ValueError(f"unknown policy {name!r}; known are {', '.join(POLICIES)}")
