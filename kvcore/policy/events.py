"""What happens to a cache, as the core is told of it.

Every event carries its time, for the core has no clock, and names chunks by tuples, never one object a chunk.
"""

from dataclasses import dataclass
from typing import TypeAlias

from kvcore.policy.types import Chunk


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceRegistered:
    """An engine instance announced itself; each of its chunks occupies `chunk_pages` pages of every tier."""

    now_ns: int
    instance: str
    chunk_pages: int
    chunk_bytes: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that no chunk has."""
        if self.chunk_pages < 1 or self.chunk_bytes < 0:
            raise ValueError(
                f"instance {self.instance!r}: a chunk of {self.chunk_pages} pages, {self.chunk_bytes} bytes"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLeft:
    """An instance is gone for certain: none of its workers reads or writes any more."""

    now_ns: int
    instance: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LookedUp:
    """A request asks what is cached of its prompt.

    Asked again under the same `request` it gets the answer of the first time and changes nothing. A request that
    comes back after its stores had ended (preempted, then `resumed`) is served without a use being noted.
    """

    now_ns: int
    request: str
    instance: str
    chunks: tuple[Chunk, ...]
    """Every full chunk of the prompt, head first."""
    computed_chunks: int = 0
    """How many of them, from the head, the engine holds already."""
    salt: str = ""
    """The tenant, for quotas; what separates tenants' KV is in the names."""
    queued_bytes: int = 0
    """Bytes waiting on the link to the engine."""
    resumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadDone:
    """What a `Load` asked for has arrived: in the engine from tier 0, in tier 0 from a lower tier."""

    now_ns: int
    request: str
    tier: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFailed:
    """`chunks` of a `Load` did not arrive."""

    now_ns: int
    request: str
    tier: int
    chunks: tuple[Chunk, ...]
    gone: bool = True
    """Whether a lower tier has lost them (a checksum, a lost file), and not only could not be asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomAsked:
    """A request wants room in tier 0 for `chunks` of its prompt, head first."""

    now_ns: int
    request: str
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreCommitted:
    """`chunks` are written whole in `tier`."""

    now_ns: int
    request: str
    tier: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAborted:
    """`chunks` will not be written in `tier`; nobody writes to their pages any more."""

    now_ns: int
    request: str
    tier: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnded:
    """A request asks for no more room: its prompt is computed, or it was cancelled."""

    now_ns: int
    request: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseExpired:
    """A request's worker has not been heard of for too long.

    What it reads may be evicted from now on (readers compare generations). What it writes is never matched, and
    keeps its pages until the worker acknowledges or its instance has left.
    """

    now_ns: int
    request: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleared:
    """The operator empties the cache: `chunks`, or everything where None."""

    now_ns: int
    chunks: tuple[Chunk, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TierCleared:
    """One tier is emptied, as when its memory is gone: what lies in the others stays."""

    now_ns: int
    tier: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """The operator keeps `chunks` in tier 0, those that are there, until they are unpinned."""

    now_ns: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unpinned:
    """The operator gives `chunks` back to the eviction policy."""

    now_ns: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaSet:
    """The tenant `salt` may hold at most `pages` pages of tier 0; None lifts the quota."""

    now_ns: int
    salt: str
    pages: int | None

    def __post_init__(self) -> None:
        """Refuse a negative quota."""
        if self.pages is not None and self.pages < 0:
            raise ValueError(f"quota of {self.salt!r}: {self.pages} pages")


Event: TypeAlias = (
    InstanceRegistered
    | InstanceLeft
    | LookedUp
    | LoadDone
    | LoadFailed
    | RoomAsked
    | StoreCommitted
    | StoreAborted
    | RequestEnded
    | LeaseExpired
    | Cleared
    | TierCleared
    | Pinned
    | Unpinned
    | QuotaSet
)
