"""What the core decides. Decisions carry no time: the same events give equal decisions."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from kvcore.policy.types import Chunk

EvictReason: TypeAlias = Literal["room", "quota", "expired", "cleared", "passing", "failed"]
RefuseReason: TypeAlias = Literal[
    "room", "quota", "first_use", "resident", "storing", "recompute", "lease", "cleared", "left", "unknown"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """The leading chunks that are cached: `hits[t]` of them are found in tier t and in none above it."""

    request: str
    hits: tuple[int, ...]
    resumed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Copy `chunks`, consecutive in the prompt: from tier 0 to the engine, from a lower tier to tier 0."""

    request: str
    tier: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Room is reserved for `chunks` in `tier`: write them there, from the engine (0) or from the tier above."""

    request: str
    tier: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evict:
    """`chunks` leave `tier`: their pages there are free from now on."""

    tier: int
    chunks: tuple[Chunk, ...]
    reason: EvictReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Demote:
    """`chunks` leave `tier` for the next one, where room is reserved.

    Their pages in `tier` are free when the transport has taken the bytes over, which it does before it carries
    out the next decision.
    """

    tier: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refuse:
    """`chunks` are not placed in (or not loaded from) `tier`, and why.

    room: pinned chunks fill the tier. quota: the tenant's. first_use: not asked for before. resident, storing: nothing
    to do. recompute: computing them is faster than loading. unknown: no such request, or its stores have ended.
    lease, cleared, left: they were placed, and what was written is not to be believed, since the lease had run out, the
    chunk was cleared, or the writer is gone; their pages are free from now on.
    """

    request: str
    tier: int
    chunks: tuple[Chunk, ...]
    reason: RefuseReason


Decision: TypeAlias = Matched | Load | Place | Evict | Demote | Refuse
