"""What a server and its engines ran with, as the journal tells: a prediction of its log needs no flags again."""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvcore.policy import (
    Cleared,
    CoreConfig,
    Event,
    InstanceLeft,
    InstanceRegistered,
    LoadCost,
    Pinned,
    QuotaSet,
    TierCleared,
)
from kvcore.policy.config import Admission, Placement
from kvsim.engine.settings import GIB, LowerKind
from kvsim.errors import UsageError
from kvsim.tuner.pricing import PACKED_SHARE, KvSize, Packing
from kvtraces import Log
from kvtraces.journal import Engine, Head, JournalError, Snapshot, Step, read_segment, segments
from kvtraces.words import counted

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
_AT_RUNTIME: dict[type, str] = {
    Cleared: "chunks were cleared",
    TierCleared: "L1 was emptied by a restart of the server",
    Pinned: "chunks were pinned in L1",
    QuotaSet: "quotas of tenants were set",
}
"""Events that no simulation has, in words."""
_ANEW = "the server started with nothing cached"


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
        told: What else must be said beside a prediction: what happened at run time, what the journal tells no more.
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
    told: tuple[str, ...]

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
        return [*said, *self.told]

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
        untold=tuple(_untold(config, quotas=bool(config.quotas) or seen.quotas)),
        told=tuple(seen.told()),
    )


def instances(log: Log) -> int:
    """Return how many engine instances a log names."""
    column = log.extra.get("instance")
    return 0 if column is None else len(set(column.tolist()))


def in_places(log: Log, journal: str | Path, engines: int) -> Log | None:
    """Return a log of more instances than engines with the place of each, 0 and on, as its instance.

    None where the journal does not tell which of them took another's place.
    """
    places = _seen(journal).places
    names = log.extra["instance"].tolist()
    if any(places.get(name, engines) >= engines for name in names):
        return None
    placed = np.array([str(places[name]) for name in names], dtype=object)
    return replace(log, extra={**log.extra, "instance": placed})


def _untold(config: CoreConfig, *, quotas: bool) -> list[str]:
    told = ["quotas of tenants"] if quotas else []
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


class _Tier(msgspec.Struct):
    """What is read of a tier in a snapshot."""

    kept: list[Any]
    quotas: list[Any]


class _State(msgspec.Struct):
    """What is read of a snapshot, as `kvcore.policy.snapshot.dump` makes it."""

    now_ns: int
    tiers: list[_Tier]
    instances: list[tuple[int, str, int, int]]


@dataclass(slots=True)
class _Seen:
    """What a journal tells of instances: engines, and others that are none (`kvcore bench`); and what was done."""

    facts: dict[str, dict[str, int]] = field(default_factory=dict)
    """What each engine said of itself, the last one last."""
    sizes: dict[str, int] = field(default_factory=dict)
    """The bytes of each instance's chunks."""
    moves: list[tuple[str, bool]] = field(default_factory=list)
    """Who came (True) and left, in order."""
    here: dict[str, None] = field(default_factory=dict)
    """Who is there."""
    times: dict[str, list[float]] = field(default_factory=dict)
    """What happened that no simulation has, and when: seconds after the journal's beginning."""
    quotas: bool = False
    """Whether quotas were in force when the journal begins."""
    kept: bool = False
    """Whether chunks were pinned by the operator then."""
    first_ns: int | None = None
    last_ns: int = 0

    @property
    def chunk_bytes(self) -> int | None:
        """Of the last engine; of the first instance where none said what it is."""
        names = [name for name in reversed(self.facts) if name in self.sizes] if self.facts else list(self.sizes)
        return self.sizes[names[0]] or None if names else None

    @property
    def most(self) -> int:
        """The most engines at once; the most instances where none said what it is."""
        here: set[str] = set()
        most = 0
        for name, came in self.moves:
            if came and self._is_engine(name):
                here.add(name)
                most = max(most, len(here))
            elif not came:
                here.discard(name)
        return most

    @property
    def places(self) -> dict[str, int]:
        """Which engine of a simulation each one is: what comes after another has left for good takes its place."""
        gone = {name: at for at, (name, came) in enumerate(self.moves) if not came and name not in self.here}
        found: dict[str, int] = {}
        for at, (name, _) in enumerate(self.moves):
            if name not in found and self._is_engine(name):
                taken = {place for other, place in found.items() if gone.get(other, len(self.moves)) > at}
                found[name] = min(set(range(len(found) + 1)) - taken)
        return found

    def told(self) -> list[str]:
        """Return what must be said of it beside a prediction."""
        said = ["chunks were pinned in L1 from the journal's beginning on, which is not simulated"] if self.kept else []
        for what, times in self.times.items():
            at = f"{times[0]:,.0f} s" if len(times) == 1 else f"first {times[0]:,.0f} and last {times[-1]:,.0f} s"
            said.append(
                f"{what} {counted(len(times), 'time')}, {at} after the journal's beginning, which is not simulated: "
                "hits from then on may differ"
            )
        lacking = {"--engines": "how many engines there were at once"} if self.facts and not self.most else {}
        if self.facts and not self.chunk_bytes:
            lacking["--packing"] = "whether engines packed their KV"
        if lacking:
            what, flags = " and ".join(lacking.values()), " and ".join(lacking)
            said.append(f"the journal does not tell {what}, as where its first segments are deleted: give {flags}")
        return said

    def came(self, name: str, chunk_bytes: int) -> None:
        self.sizes[name] = chunk_bytes
        if name not in self.here:
            self.here[name] = None
            self.moves.append((name, True))

    def left(self, name: str) -> None:
        if name in self.here:
            del self.here[name]
            self.moves.append((name, False))

    def goes_on(self, state: _State) -> None:
        """Take in what a segment begins with; of the first one, all that the deleted ones before it told."""
        if self.first_ns is None:
            self.quotas = bool(state.tiers[0].quotas)
            self.kept = bool(state.tiers[0].kept)
        self.passed(state.now_ns)
        there = {name: size for _, name, _, size in state.instances}
        for name in [name for name in self.here if name not in there]:
            self.left(name)
        for name, size in there.items():
            self.came(name, size)

    def began_anew(self) -> None:
        """Take in that a server started that knew nothing of what was before."""
        self.happened(_ANEW)
        for name in list(self.here):
            self.left(name)

    def passed(self, now_ns: int) -> None:
        """Take in the time of an event; the clock begins anew where the machine did."""
        self.first_ns = now_ns if self.first_ns is None else self.first_ns - max(0, self.last_ns - now_ns)
        self.last_ns = now_ns

    def happened(self, what: str) -> None:
        self.times.setdefault(what, []).append((self.last_ns - (self.first_ns or 0)) / 1e9)

    def _is_engine(self, name: str) -> bool:
        return name in self.facts or not self.facts


def _seen(journal: str | Path) -> _Seen:
    seen = _Seen()
    with suppress(JournalError):  # damage further on: replaying the journal tells of it
        for number, segment in enumerate(segments(journal)):
            anew = number > 0  # until a snapshot says otherwise
            for located in read_segment(segment):
                match located.record:
                    case Snapshot(core=core):
                        anew = False
                        seen.goes_on(_state(core, segment.name))
                    case Step(event=event):
                        seen.passed(event.now_ns)
                        if anew:
                            anew = False
                            seen.began_anew()
                        _take(seen, event)
                    case Engine(instance=name, facts=facts):
                        seen.facts.pop(name, None)
                        seen.facts[name] = facts
                    case _:
                        pass
    return seen


def _take(seen: _Seen, event: Event) -> None:
    match event:
        case InstanceRegistered():
            seen.came(event.instance, event.chunk_bytes)
        case InstanceLeft():
            seen.left(event.instance)
        case Cleared() | TierCleared() | Pinned() | QuotaSet():
            seen.happened(_AT_RUNTIME[type(event)])
        case _:
            pass


def _state(core: bytes, segment: str) -> _State:
    try:
        return msgspec.msgpack.decode(core, type=_State)
    except msgspec.MsgspecError as error:
        raise JournalError(f"a snapshot that cannot be read: {error}", segment) from error
