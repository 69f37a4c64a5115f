"""What a server and its engines ran with, as the journal tells: a prediction of its log needs no flags again."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvcore.policy import CoreConfig, InstanceLeft, InstanceRegistered, LoadCost
from kvcore.policy.config import Admission, Placement
from kvsim.engine.settings import GIB, LowerKind
from kvsim.errors import UsageError
from kvsim.tuner.pricing import PACKED_SHARE, KvSize, Packing
from kvtraces import Log
from kvtraces.journal import Engine, Head, JournalError, Step, read_segment, segments

_ENGINE: dict[str, type] = {
    "l0_block_tokens": int,
    "l0_prefix_caching": bool,
    "max_model_len": int,
    "max_num_batched_tokens": int,
    "max_num_seqs": int,
    "chunked_prefill": bool,
    "async_scheduling": bool,
}
"""What is taken of an engine as it is."""
_TOLERANCE = 0.01
"""By how much chunks may differ from the KV of their tokens: packed rows are padded, for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A server's settings by the names of `RunSettings`; None where its journal does not tell.

    Attributes:
        chunk_bytes: Bytes of a chunk as engines store it, all ranks together.
        engines: The most engine instances at once.
        engine: What the last engine that registered said of itself (`kvtraces.journal.Engine`); empty where none did.
        changed: Whether the server ran with other settings earlier in the journal; these are its last.
        unlike: Whether engines told of different settings; these are the last one's.
        untold: What it ran with that no simulation does, in words.
    """

    chunk_tokens: int | None
    page_bytes: int | None
    l1_gb: float | None
    policy: str
    l2_gb: float | None
    l2_kind: LowerKind
    l2_policy: str
    placement: Placement
    promote_on_hit: bool
    admission: Admission
    ttl_s: float | None
    load_cost: LoadCost | None
    chunk_bytes: int | None
    engines: int | None
    engine: dict[str, int]
    changed: bool
    unlike: bool
    untold: tuple[str, ...]

    def flags(self, kv: KvSize) -> dict[str, Any]:
        """Return what the journal tells of, by the names of `kvsim run`'s options, for engines with such KV."""
        told: dict[str, Any] = {
            "chunk_tokens": self.chunk_tokens,
            "l1_size_gb": self.l1_gb,
            "policy": self.policy,
            "l2_size_gb": self.l2_gb,
            "l2_kind": self.l2_kind,
            "l2_policy": self.l2_policy,
            "placement": self.placement,
            "promote_on_hit": self.promote_on_hit,
            "admission": self.admission,
            "ttl_s": self.ttl_s,
            "load_or_recompute": self.load_cost is not None,
            "load_cost": self.load_cost,
            "engines": self.engines,
            "page_bytes": self.page_bytes,
        }
        told |= {name: kind(self.engine[name]) for name, kind in _ENGINE.items() if name in self.engine}
        if "l0_blocks" in self.engine and "l0_block_tokens" in self.engine:
            block_bytes = self.engine["l0_block_tokens"] * kv.moved_bytes_per_token
            told["l0_gb"] = (self.engine["l0_blocks"] + 0.5) * block_bytes / GIB  # half a block for the rounding
        return {name: value for name, value in told.items() if value is not None}

    def notes(self) -> list[str]:
        """Return what must be said beside a prediction with these settings."""
        said = [f"the server had {what}, which are not simulated" for what in self.untold]
        if self.changed:
            said.append("the server's settings changed within the journal: its last are simulated")
        if self.unlike:
            said.append("the server's engines had different settings: the last one's are simulated")
        return said

    def packing(self, kv: KvSize) -> Packing:
        """Return how engines packed KV of this size.

        Raises UsageError where their chunks are no such KV, packed or not: it is another model's.
        """
        if self.chunk_bytes is None or self.chunk_tokens is None:
            return "none"
        plain = self.chunk_tokens * kv.stored_bytes_per_token
        if abs(self.chunk_bytes / plain - 1) <= _TOLERANCE:
            return "none"
        if kv.packable and abs(self.chunk_bytes / (plain * PACKED_SHARE) - 1) <= _TOLERANCE:
            return "lossless"
        raise UsageError(
            f"the journal's chunks of {self.chunk_tokens} tokens have {self.chunk_bytes:,} bytes, but KV of this model "
            f"takes {plain:,}, packed {round(plain * PACKED_SHARE):,}: is it another --model, --kv-dtype or "
            "--tensor-parallel?"
        )


def served(journal: str | Path) -> Served:
    """Read a server's settings from the folder that `kvcore serve --journal` wrote.

    Raises UsageError where there is no journal, or it cannot be read.
    """
    try:
        heads = _heads(journal)
        head = heads[-1]
        seen = _seen(journal)
    except JournalError as error:
        raise UsageError(f"{error}; --journal takes the folder that kvcore serve wrote") from error
    config, page_bytes = head.config, head.meta.get("page_bytes")
    facts = list(seen.facts.values())
    upper, lower = config.tiers[0], config.tiers[1] if len(config.tiers) > 1 else None

    def size_gb(pages: int | None) -> float | None:
        return float("inf") if pages is None else None if page_bytes is None else pages * page_bytes / GIB

    return Served(
        chunk_tokens=head.meta.get("chunk_tokens"),
        page_bytes=page_bytes,
        l1_gb=size_gb(upper.pages),
        policy=upper.eviction,
        l2_gb=0.0 if lower is None else size_gb(lower.pages),
        l2_kind="disk" if _on_disk(head.meta.get("l2")) else "network",
        l2_policy="lru" if lower is None else lower.eviction,
        placement=config.placement,
        promote_on_hit=config.promote_on_hit,
        admission=config.admission,
        ttl_s=None if config.ttl_ns is None else config.ttl_ns / 1e9,
        load_cost=config.load_cost,
        chunk_bytes=seen.chunk_bytes,
        engines=seen.most or None,
        engine=facts[-1] if facts else {},
        changed=any(_differ(one, head) for one in heads),
        unlike=any(one != facts[-1] for one in facts),
        untold=tuple(_untold(config)),
    )


def instances(log: Log) -> int:
    """Return how many engine instances a log names."""
    column = log.extra.get("instance")
    return 0 if column is None else len(set(column.tolist()))


def _untold(config: CoreConfig) -> list[str]:
    told = ["quotas of tenants"] if config.quotas else []
    return [*told, "tiers below L2"] if len(config.tiers) > 2 else told


def _on_disk(place: Any) -> bool:
    """Whether a store's place, as a URL, is this host's; a server without one has none."""
    return not place or str(place).startswith("files:")


def _differ(one: Head, other: Head) -> bool:
    names = ("page_bytes", "chunk_tokens", "l2")
    return one.config != other.config or any(one.meta.get(name) != other.meta.get(name) for name in names)


def _heads(journal: str | Path) -> list[Head]:
    """What each segment begins with; one at least."""
    found = []
    for segment in segments(journal):
        record = next((located.record for located in read_segment(segment)), None)
        if not isinstance(record, Head):
            raise JournalError("no configuration at its beginning", segment.name)
        found.append(record)
    if not found:
        raise JournalError(f"no journal in {journal}")
    return found


@dataclass(slots=True)
class _Seen:
    """What a journal tells of instances: engines, and others that are none (`kvcore bench`)."""

    facts: dict[str, dict[str, int]] = field(default_factory=dict)
    """What each engine said of itself, the last one last."""
    sizes: dict[str, int] = field(default_factory=dict)
    """The bytes of each instance's chunks."""
    moves: list[tuple[str, bool]] = field(default_factory=list)
    """Who came (True) and left, in order."""

    @property
    def chunk_bytes(self) -> int | None:
        """Of the last engine; of the first instance where none said what it is."""
        names = [name for name in reversed(self.facts) if name in self.sizes] or list(self.sizes)
        return self.sizes[names[0]] or None if names else None

    @property
    def most(self) -> int:
        """The most engines at once; the most instances where none said what it is."""
        here: set[str] = set()
        most = 0
        for name, came in self.moves:
            if came and (name in self.facts or not self.facts):
                here.add(name)
                most = max(most, len(here))
            elif not came:
                here.discard(name)
        return most


def _seen(journal: str | Path) -> _Seen:
    seen = _Seen()
    with suppress(JournalError):  # damage further on: replaying the journal tells of it
        for segment in segments(journal):
            for located in read_segment(segment):
                match located.record:
                    case Step(event=InstanceRegistered() as event):
                        seen.sizes[event.instance] = event.chunk_bytes
                        seen.moves.append((event.instance, True))
                    case Step(event=InstanceLeft() as event):
                        seen.moves.append((event.instance, False))
                    case Engine(instance=name, facts=facts):
                        seen.facts.pop(name, None)
                        seen.facts[name] = facts
                    case _:
                        pass
    return seen
