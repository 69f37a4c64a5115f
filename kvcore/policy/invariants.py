"""What must hold of the core's state between any two events."""

from collections import Counter
from collections.abc import Sequence

from kvcore.policy.state import State
from kvcore.policy.tier import Entry, Tier


def check(state: State) -> None:
    """Raise AssertionError naming the invariant that does not hold."""
    pins: Counter[int] = Counter()
    for request in state.requests.values():
        for found in request.found:
            pins.update(id(entry) for entry in found)
        pins.update(id(entry) for entry in request.held)
        pins.update(id(entry) for entry in [*request.writing.values(), *request.fetching.values()])
        _require(request.busy or not request.ended, f"request {request.name!r} has ended and is still here")
    pins.update(id(entry) for entry in state.copying.values())
    strays = [entry for one in state.lost.values() for entry in one.entries.values()]
    for index, tier in enumerate(state.tiers):
        _check_tier(index, tier, strays if index == 0 else [], pins)


def _check_tier(index: int, tier: Tier, strays: Sequence[Entry], pins: Counter[int]) -> None:
    name = f"tier {tier.name!r}"
    pins.update(id(entry) for entry in tier.kept.values())
    if index:
        pins.update(id(entry) for entry in tier.writing.values())
    places = [*tier.resident.values(), *tier.writing.values(), *tier.leaving.values()]
    _require(len({entry.chunk for entry in places}) == len(places), f"{name}: a chunk has two places")
    _require(tier.used == sum(e.pages for e in [*places, *strays]), f"{name}: used pages are not what occupies them")
    _require(tier.capacity is None or tier.used <= tier.capacity, f"{name}: {tier.used} pages of {tier.capacity} used")
    idle = [entry for entry in tier.resident.values() if not entry.pins]
    _require(tier.idle == sum(entry.pages for entry in idle), f"{name}: idle pages are not those without pins")
    own = {salt: sum(entry.pages for entry in idle if entry.salt == salt) for salt in tier.quotas}
    _require(tier.quota_idle == own, f"{name}: idle pages of tenants with a quota do not add up")
    _require(all(entry.entered for entry in idle), f"{name}: a chunk can be neither evicted nor used")
    _require(all(entry.pins > 0 for entry in tier.leaving.values()), f"{name}: a chunk that nobody holds is leaving")
    wrong = [(entry.chunk, entry.pins, pins[id(entry)]) for entry in places if entry.pins != pins[id(entry)]]
    _require(not wrong, f"{name}: chunks whose pins differ from their holders: {wrong}")
    salts: Counter[str] = Counter()
    for entry in [*places, *strays]:
        salts[entry.salt] += entry.pages
    _require(dict(salts) == tier.salt_pages, f"{name}: pages by tenant do not add up")
    if tier.ttl_ns is not None:
        entered = {entry.chunk for entry in places if entry.entered}
        _require(set(tier.expiry) == entered, f"{name}: not every chunk of the policy's has a time of its last use")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)
