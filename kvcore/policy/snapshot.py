"""A core's whole state as plain values, so that a journal can begin in the middle.

A restored core decides, from then on, what the one that was dumped would have decided.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, TypeAlias

from kvcore.policy.config import CoreConfig
from kvcore.policy.core import Core, Lost
from kvcore.policy.decisions import Matched
from kvcore.policy.events import InstanceRegistered
from kvcore.policy.request import Request
from kvcore.policy.tier import Entry, Tier
from kvcore.policy.types import Chunk

State: TypeAlias = dict[str, Any]
"""Nested lists, string-keyed dicts, strings, bytes, integers, booleans and None: what any format can hold."""

_PLACES = ("resident", "writing", "leaving")


def dump(core: Core) -> State:
    """Return the state of `core`."""
    return {
        "now_ns": core._now_ns,
        "tiers": [_dump_tier(tier) for tier in core.tiers],
        "instances": [[i.now_ns, i.instance, i.chunk_pages, i.chunk_bytes] for i in core._instances.values()],
        "requests": [_dump_request(request) for request in core._requests.values()],
        "lost": [
            [name, lost.instance, lost.reason, [_dump_entry(e) for e in lost.entries.values()], list(lost.fetching)]
            for name, lost in core._lost.items()
        ],
        "copying": [[tier, chunk] for tier, chunk in core._copying],
        "fetches": [[chunk, [request.name for request in waiters]] for chunk, waiters in core._fetches.items()],
        "missed": list(core._missed),
    }


def restore(config: CoreConfig, state: State) -> Core:
    """Return a core of `config` in the dumped `state`.

    Raises:
        ValueError: The state is of a core with other tiers.
    """
    core = Core(config)
    names = [tier["name"] for tier in state["tiers"]]
    if names != [tier.name for tier in core.tiers]:
        raise ValueError(f"a snapshot of tiers {names} for a core of tiers {[tier.name for tier in core.tiers]}")
    core._now_ns = state["now_ns"]
    for tier, dumped in zip(core.tiers, state["tiers"], strict=True):
        _restore_tier(tier, dumped)
    for now_ns, instance, pages, size in state["instances"]:
        event = InstanceRegistered(now_ns=now_ns, instance=instance, chunk_pages=pages, chunk_bytes=size)
        core._instances[instance] = event
    for dumped in state["requests"]:
        core._requests[dumped["name"]] = _restore_request(core.tiers, dumped)
    for name, instance, reason, entries, fetching in state["lost"]:
        lost = core._lost[name] = Lost(instance, reason)
        lost.entries = {entry.chunk: entry for entry in map(_restore_entry, entries)}
        lost.fetching = dict.fromkeys(fetching)
    for tier_index, chunk in state["copying"]:
        core._copying[tier_index, chunk] = _place(core.tiers[tier_index - 1], chunk)
    core._fetches = {chunk: [core._requests[name] for name in names] for chunk, names in state["fetches"]}
    core._missed = OrderedDict.fromkeys(state["missed"])
    for index, tier in enumerate(core.tiers):
        strays = [entry for lost in core._lost.values() for entry in lost.entries.values()] if index == 0 else []
        _count(tier, strays)
    return core


def _dump_entry(entry: Entry) -> list[Any]:
    return [entry.chunk, entry.pages, entry.salt, entry.pins, entry.entered, entry.reason]


def _restore_entry(dumped: list[Any]) -> Entry:
    chunk, pages, salt, pins, entered, reason = dumped
    entry = Entry(chunk, pages, salt)
    entry.pins, entry.entered, entry.reason = pins, entered, reason
    return entry


def _dump_tier(tier: Tier) -> State:
    slots = type(tier.policy).__slots__  # type: ignore[attr-defined]  # every policy keeps its state in slots
    return {
        "name": tier.name,
        **{place: [_dump_entry(entry) for entry in getattr(tier, place).values()] for place in _PLACES},
        "kept": list(tier.kept),
        "quotas": [[salt, pages] for salt, pages in tier.quotas.items()],
        "expiry": [[chunk, used_ns] for chunk, used_ns in tier.expiry.items()],
        "policy": {slot: _dump_value(getattr(tier.policy, slot)) for slot in slots},
    }


def _restore_tier(tier: Tier, dumped: State) -> None:
    for place in _PLACES:
        setattr(tier, place, {entry.chunk: entry for entry in map(_restore_entry, dumped[place])})
    tier.kept = {chunk: _place(tier, chunk) for chunk in dumped["kept"]}
    tier.quotas = dict(dumped["quotas"])
    tier.expiry = OrderedDict(dumped["expiry"])
    for slot, value in dumped["policy"].items():
        setattr(tier.policy, slot, _restore_value(value))


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


def _dump_request(request: Request) -> State:
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


def _restore_request(tiers: Iterable[Tier], dumped: State) -> Request:
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
    tier.idle = sum(entry.pages for entry in tier.resident.values() if not entry.pins)
    tier.salt_pages = {}
    for entry in places:
        tier.salt_pages[entry.salt] = tier.salt_pages.get(entry.salt, 0) + entry.pages
