"""A core's whole state as plain values, so that a journal can begin in the middle.

A restored core decides, from then on, what the one that was dumped would have decided.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, TypeAlias

from kvcore.policy.config import CoreConfig
from kvcore.policy.core import Core
from kvcore.policy.decisions import Matched
from kvcore.policy.events import InstanceRegistered
from kvcore.policy.request import Request
from kvcore.policy.state import Lost
from kvcore.policy.tier import Entry, Tier
from kvcore.policy.types import Chunk

Plain: TypeAlias = dict[str, Any]
"""Nested lists, string-keyed dicts, strings, bytes, integers, booleans and None: what any format can hold."""

_PLACES = ("resident", "writing", "leaving")


def dump(core: Core) -> Plain:
    """Return the state of `core`."""
    state = core._state
    return {
        "now_ns": state.now_ns,
        "tiers": [_dump_tier(tier) for tier in state.tiers],
        "instances": [[i.now_ns, i.instance, i.chunk_pages, i.chunk_bytes] for i in state.instances.values()],
        "requests": [_dump_request(request) for request in state.requests.values()],
        "lost": [
            [name, lost.instance, lost.reason, [_dump_entry(e) for e in lost.entries.values()], list(lost.fetching)]
            for name, lost in state.lost.items()
        ],
        "copying": [[tier, chunk] for tier, chunk in state.copying],
        "fetches": [[chunk, [request.name for request in waiters]] for chunk, waiters in state.fetches.items()],
        "missed": list(state.missed),
    }


def restore(config: CoreConfig, dumped: Plain) -> Core:
    """Return a core of `config` in the `dumped` state.

    Raises:
        ValueError: The state is of a core with other tiers.
    """
    core = Core(config)
    state = core._state
    names = [tier["name"] for tier in dumped["tiers"]]
    if names != [tier.name for tier in core.tiers]:
        raise ValueError(f"a snapshot of tiers {names} for a core of tiers {[tier.name for tier in core.tiers]}")
    state.now_ns = dumped["now_ns"]
    for tier, one in zip(core.tiers, dumped["tiers"], strict=True):
        _restore_tier(tier, one)
    for now_ns, instance, pages, size in dumped["instances"]:
        event = InstanceRegistered(now_ns=now_ns, instance=instance, chunk_pages=pages, chunk_bytes=size)
        state.instances[instance] = event
    for one in dumped["requests"]:
        state.requests[one["name"]] = _restore_request(core.tiers, one)
    for name, instance, reason, entries, fetching in dumped["lost"]:
        lost = state.lost[name] = Lost(instance, reason)
        lost.entries = {entry.chunk: entry for entry in map(_restore_entry, entries)}
        lost.fetching = dict.fromkeys(fetching)
    for tier_index, chunk in dumped["copying"]:
        state.copying[tier_index, chunk] = _place(core.tiers[tier_index - 1], chunk)
    state.fetches = {chunk: [state.requests[name] for name in names] for chunk, names in dumped["fetches"]}
    state.missed = OrderedDict.fromkeys(dumped["missed"])
    for index, tier in enumerate(core.tiers):
        strays = [entry for lost in state.lost.values() for entry in lost.entries.values()] if index == 0 else []
        _count(tier, strays)
    return core


def surplus(core: Core, config: CoreConfig) -> tuple[Chunk, ...]:
    """Return what must leave the lower tiers of `core`, which are at rest, for the sizes of `config`."""
    lower = enumerate(config.tiers[1:], 1)
    return tuple(entry.chunk for index, tier in lower for entry in _first_to_leave(core, index, tier.pages))


def reconfigured(core: Core, config: CoreConfig) -> Core:
    """Return a core of `config` that goes on where `core` is; what lies in the lower tiers stays there.

    The eviction policy of a tier that is of another size, or of another policy, begins anew, with the tier's chunks in
    the order in which the old one would have evicted them. A quota that the configuration changes is as it says, the
    others are as the operator has set them since.

    Raises:
        ValueError: Tier 0 is not empty, a lower one is not at rest or holds too much (`surplus`), or there are others.
    """
    if core.tiers[0].used:
        raise ValueError("only a core whose first tier is empty can be configured otherwise")
    names = [[tier.name for tier in one.tiers[1:]] for one in (core.config, config)]
    if names[0] != names[1]:
        raise ValueError(f"a core of lower tiers {names[0]} cannot go on with {names[1]}")
    dumped = dump(core)
    for index, tier in enumerate(core.tiers):
        pages = config.tiers[index].pages
        if tier.idle != tier.used or (pages is not None and tier.used > pages):
            raise ValueError(f"tier {tier.name!r} is at work, or holds more than its new size")
        dumped["tiers"][index] |= _reconfigured_tier(core, index, config)
    was, wanted = dict(core.config.quotas), dict(config.quotas)
    kept = {salt: pages for salt, pages in core.tiers[0].quotas.items() if was.get(salt) == wanted.get(salt)}
    changed = {salt: pages for salt, pages in wanted.items() if was.get(salt) != pages}
    dumped["tiers"][0]["quotas"] = [[salt, pages] for salt, pages in (kept | changed).items()]
    return restore(config, dumped)


def _reconfigured_tier(core: Core, index: int, config: CoreConfig) -> Plain:
    """Return what becomes otherwise in the dump of a tier under another configuration."""
    old, new = core.config, config
    if old.tiers[index] == new.tiers[index] and (old.ttl_ns is None) == (new.ttl_ns is None):
        return {}
    after = Core(new).tiers[index]
    after.insert(_first_to_leave(core, index, 0), core._state.now_ns)
    dumped = _dump_tier(after)
    changed: Plain = {"name": after.name}
    if old.tiers[index] != new.tiers[index]:
        changed["policy"] = dumped["policy"]
    if old.ttl_ns is None or new.ttl_ns is None:  # a chunk whose last use nobody noted was used just now
        changed["expiry"] = dumped["expiry"]
    return changed


def _first_to_leave(core: Core, index: int, pages: int | None) -> list[Entry]:
    """Return the chunks that a tier would evict to be within `pages` pages, in that order; nothing changes."""
    tier = restore(core.config, dump(core)).tiers[index]
    tier.capacity = pages
    return tier.victims(0)


def _dump_entry(entry: Entry) -> list[Any]:
    return [entry.chunk, entry.pages, entry.salt, entry.pins, entry.entered, entry.reason]


def _restore_entry(dumped: list[Any]) -> Entry:
    chunk, pages, salt, pins, entered, reason = dumped
    entry = Entry(chunk, pages, salt)
    entry.pins, entry.entered, entry.reason = pins, entered, reason
    return entry


def _dump_tier(tier: Tier) -> Plain:
    slots = type(tier.policy).__slots__  # type: ignore[attr-defined]  # every policy keeps its state in slots
    return {
        "name": tier.name,
        **{place: [_dump_entry(entry) for entry in getattr(tier, place).values()] for place in _PLACES},
        "kept": list(tier.kept),
        "quotas": [[salt, pages] for salt, pages in tier.quotas.items()],
        "expiry": [[chunk, used_ns] for chunk, used_ns in tier.expiry.items()],
        "policy": {slot: _dump_value(getattr(tier.policy, slot)) for slot in slots},
    }


def _restore_tier(tier: Tier, dumped: Plain) -> None:
    for place in _PLACES:
        getattr(tier, place).update((entry.chunk, entry) for entry in map(_restore_entry, dumped[place]))
    tier.kept = {chunk: _place(tier, chunk) for chunk in dumped["kept"]}
    tier.quotas = dict(dumped["quotas"])
    tier.expiry = OrderedDict(dumped["expiry"])
    for slot, value in dumped["policy"].items():
        setattr(tier.policy, slot, _restore_value(value))
    tier.lanes_stale = True  # what they follow is restored, they themselves are not dumped


def _dump_value(value: Any) -> Any:
    """Policies' state: integers, and dicts of them, ordered or not, nested or not."""
    if isinstance(value, dict):
        kind = "ordered" if isinstance(value, OrderedDict) else "dict"
        return {kind: [[key, _dump_value(item)] for key, item in value.items()]}
    return value


def _restore_value(value: Any) -> Any:
    if isinstance(value, dict):
        ((kind, items),) = value.items()
        pairs = [(key, _restore_value(item)) for key, item in items]
        return OrderedDict(pairs) if kind == "ordered" else dict(pairs)
    return value


def _dump_request(request: Request) -> Plain:
    return {
        "name": request.name,
        "instance": request.instance,
        "salt": request.salt,
        "chunks": list(request.chunks),
        "resumed": request.resumed,
        "hits": list(request.matched.hits),
        "found": [[entry.chunk for entry in found] for found in request.found],
        "held": [entry.chunk for entry in request.held],
        "new": list(request.new),
        "passing": list(request.passing),
        "run": list(request.run),
        "loading": request.loading,
        "fetching": list(request.fetching),
        "awaited": list(request.awaited),
        "writing": list(request.writing),
        "ended": request.ended,
    }


def _restore_request(tiers: Iterable[Tier], dumped: Plain) -> Request:
    request = Request(
        name=dumped["name"],
        instance=dumped["instance"],
        salt=dumped["salt"],
        chunks=tuple(dumped["chunks"]),
        resumed=dumped["resumed"],
    )
    tiers = tuple(tiers)
    top = tiers[0]
    request.matched = Matched(request=request.name, hits=tuple(dumped["hits"]), resumed=request.resumed)
    request.found = [
        [_place(tier, chunk) for chunk in chunks] for tier, chunks in zip(tiers, dumped["found"], strict=True)
    ]
    request.held = [_place(top, chunk) for chunk in dumped["held"]]
    request.new = {chunk: _place(top, chunk) for chunk in dumped["new"]}
    request.passing = {chunk: _place(top, chunk) for chunk in dumped["passing"]}
    request.run = tuple(dumped["run"])
    request.loading = dumped["loading"]
    request.fetching = {chunk: top.writing[chunk] for chunk in dumped["fetching"]}
    request.awaited = dict.fromkeys(dumped["awaited"])
    request.writing = {chunk: top.writing[chunk] for chunk in dumped["writing"]}
    request.ended = dumped["ended"]
    return request


def _place(tier: Tier, chunk: Chunk) -> Entry:
    """Return the entry of a chunk that is held: leaving if it may no longer be matched, for it has one place only."""
    return tier.leaving[chunk] if chunk in tier.leaving else tier.resident[chunk]


def _count(tier: Tier, strays: list[Entry]) -> None:
    """Recompute the accounts from the entries."""
    places = [*tier.resident.values(), *tier.writing.values(), *tier.leaving.values(), *strays]
    tier.used = sum(entry.pages for entry in places)
    tier.count_idle()
    tier.salt_pages = {}
    for entry in places:
        tier.salt_pages[entry.salt] = tier.salt_pages.get(entry.salt, 0) + entry.pages
