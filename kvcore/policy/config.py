"""The core's configuration."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from kvcore.policy.cost import LoadCost
from kvcore.policy.eviction import POLICIES

Placement: TypeAlias = Literal["write-through", "write-back"]
Admission: TypeAlias = Literal["always", "second-use"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig:
    """One tier: its name, its capacity in pages (None: unbounded) and its eviction policy."""

    name: str
    pages: int | None
    eviction: str = "lru"

    def __post_init__(self) -> None:
        """Refuse a capacity or a policy that cannot be."""
        if self.pages is not None and self.pages < 0:
            raise ValueError(f"tier {self.name!r}: a capacity of {self.pages} pages")
        if self.eviction not in POLICIES:
            raise ValueError(
                f"tier {self.name!r}: no eviction policy {self.eviction!r}; there are {', '.join(POLICIES)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreConfig:
    """Everything that decides beside the events.

    Attributes:
        tiers: From the fastest down; tier 0 is L1, the only one that engines read and write.
        placement: How chunks reach lower tiers: written through when they are stored, or written back when evicted.
        promote_on_hit: Whether a chunk loaded from a lower tier stays in tier 0, or only passes through.
        admission: Whether a chunk is stored at once, or only when it is missed a second time.
        admission_memory: How many missed chunks the second-use admission remembers.
        ttl_ns: Chunks unused for longer are dropped; None keeps them.
        quotas: Pages of tier 0 by tenant (salt).
        load_cost: What loading and computing cost; None loads every hit.
    """

    tiers: tuple[TierConfig, ...]
    placement: Placement = "write-through"
    promote_on_hit: bool = True
    admission: Admission = "always"
    admission_memory: int = 1_000_000
    ttl_ns: int | None = None
    quotas: tuple[tuple[str, int], ...] = ()
    load_cost: LoadCost | None = None

    def __post_init__(self) -> None:
        """Refuse what no core can run."""
        if not self.tiers:
            raise ValueError("a core needs at least one tier")
        if self.ttl_ns is not None and self.ttl_ns <= 0:
            raise ValueError(f"a TTL of {self.ttl_ns} ns")
        if self.admission_memory < 1:
            raise ValueError(f"an admission memory of {self.admission_memory} chunks")
        if any(pages < 0 for _, pages in self.quotas):
            raise ValueError(f"a negative quota in {self.quotas}")
