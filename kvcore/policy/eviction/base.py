"""What the core asks of an eviction policy."""

from collections.abc import Callable, Iterable
from typing import Protocol

from kvcore.policy.eviction.lanes import Lanes
from kvcore.policy.types import Chunk


class EvictionPolicy(Protocol):
    """Orders the chunks of one tier.

    A policy only orders. It holds no storage, clock, lock or metric, draws no random numbers, and answers from
    the calls made so far alone, so the same calls give the same victims in every process.

    One request may have its room made in several calls of `victims` before any of its chunks is inserted; where each
    call asks for whole chunks, the victims and the state after are those of a single call for the sum. This is why a
    policy is not told what is coming in. What it remembers of evicted chunks it notes in `victims` and reads in
    `insert`.
    """

    def insert(self, chunks: Iterable[Chunk], pages: int) -> None:
        """Take in `chunks`, none of them present, one after the other; each occupies `pages` pages."""

    def touch(self, chunks: Iterable[Chunk]) -> None:
        """Note one use of each of `chunks`, all of them present, one after the other."""

    def forget(self, chunks: Iterable[Chunk]) -> None:
        """Drop `chunks`, all of them present, for a reason of the operator's: no trace of them is kept."""

    def victims(self, pages: int, eligible: Callable[[Chunk], bool], tenant: str | None = None) -> list[Chunk] | None:
        """Evict: remove and return the fewest chunks, in policy order, that free at least `pages` pages.

        Chunks that are not `eligible` (pinned, say) are passed over and keep their place. Returns None, with no
        state changed, where the eligible chunks do not free enough. Where `tenant` is given, it tells that no others'
        are eligible, and changes nothing but where the policy looks.
        """

    def lay(self, lanes: Lanes | None) -> None:
        """Keep `lanes`, by which asks for victims need not walk past chunks that are none; decisions stay the same."""

    def hide(self, chunks: Iterable[Chunk]) -> None:
        """Take `chunks`, not all present, out of the lanes: they are eligible to nobody until lanes are laid anew."""
