"""One tier of the cache: what is in it, how full it is, and who goes when room is needed."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import attrgetter

from kvcore.policy.config import TierConfig
from kvcore.policy.decisions import EvictReason
from kvcore.policy.eviction import EvictionPolicy, Lanes, make_policy
from kvcore.policy.types import Chunk

_pages_of = attrgetter("pages")
_salt_of = attrgetter("salt")
MANY_KEPT = 1000
"""With so many chunks that the operator keeps, asks for room are spared walking past them; fewer are soon passed."""


class Entry:
    """A chunk's place in a tier.

    An entry is written (in `Tier.writing`), then resident; a resident one that may no longer be matched but is still
    read is leaving. Nobody evicts an entry that has pins.
    """

    __slots__ = ("chunk", "entered", "pages", "pins", "reason", "salt")

    def __init__(self, chunk: Chunk, pages: int, salt: str) -> None:
        self.chunk = chunk
        self.pages = pages
        self.salt = salt
        self.pins = 1
        self.entered = False
        """Whether the eviction policy knows it."""
        self.reason: EvictReason = "cleared"
        """Why it leaves, if it is leaving."""


class Followed(dict[Chunk, Entry]):
    """A tier's resident chunks where somebody follows them; a plain dict, which is faster, where nobody does."""

    __slots__ = ()

    def drop(self, chunks: Sequence[Chunk]) -> None:
        """Remove `chunks`, all of them here."""
        for chunk in chunks:
            dict.__delitem__(self, chunk)


class Tier:
    """Chunks and pages of one tier; it takes orders and decides nothing but the victims."""

    __slots__ = (
        "capacity",
        "expiry",
        "idle",
        "kept",
        "lanes_stale",
        "leaving",
        "name",
        "policy",
        "quota_idle",
        "quotas",
        "resident",
        "salt_pages",
        "ttl_ns",
        "used",
        "writing",
    )

    def __init__(self, config: TierConfig, ttl_ns: int | None) -> None:
        self.name = config.name
        self.capacity = config.pages
        self.policy: EvictionPolicy = make_policy(config.eviction, config.pages)
        self.resident: dict[Chunk, Entry] = {}
        self.writing: dict[Chunk, Entry] = {}
        self.leaving: dict[Chunk, Entry] = {}
        self.kept: dict[Chunk, Entry] = {}
        self.lanes_stale = False
        """Whether the policy's lanes are to be laid before its next ask."""
        self.used = 0
        """Pages of everything that occupies any: resident, written, leaving, or held by a lost worker."""
        self.idle = 0
        """Pages of the resident chunks without pins: what eviction can free."""
        self.salt_pages: dict[str, int] = {}
        self.quotas: dict[str, int] = {}
        self.quota_idle: dict[str, int] = {}
        """As `idle`, of each tenant that has a quota."""
        self.ttl_ns = ttl_ns
        self.expiry: OrderedDict[Chunk, int] = OrderedDict()
        """When each chunk was used last, oldest first; empty without a TTL."""

    # Pins

    def pin(self, entries: Iterable[Entry]) -> None:
        """Hold resident `entries` where they are."""
        idle, quota_idle = self.idle, self.quota_idle
        for entry in entries:
            pins = entry.pins
            if not pins:
                idle -= entry.pages
                if quota_idle and entry.salt in quota_idle:
                    quota_idle[entry.salt] -= entry.pages
            entry.pins = pins + 1
        self.idle = idle

    def unpin(self, entries: Iterable[Entry]) -> list[Entry]:
        """Let go of `entries`; return those that were only waiting for this to leave."""
        idle, quota_idle = self.idle, self.quota_idle
        gone: list[Entry] = []
        for entry in entries:
            pins = entry.pins - 1
            entry.pins = pins
            if pins:
                continue
            if self.leaving and self.leaving.get(entry.chunk) is entry:
                del self.leaving[entry.chunk]
                self.release((entry,))
                gone.append(entry)
                continue
            idle += entry.pages
            if quota_idle and entry.salt in quota_idle:
                quota_idle[entry.salt] += entry.pages
        self.idle = idle
        return gone

    def keep(self, chunks: Iterable[Chunk]) -> None:
        """Pin those of `chunks` that are resident for the operator, until `let_go`."""
        few = len(self.kept) < MANY_KEPT
        fresh: list[Chunk] = []
        for chunk in chunks:
            entry = self.resident.get(chunk)
            if entry is not None and chunk not in self.kept:
                self.pin((entry,))
                self.kept[chunk] = entry
                fresh.append(chunk)
        self.policy.hide(fresh)
        if few and len(self.kept) >= MANY_KEPT:
            self.lanes_stale = True

    def let_go(self, chunks: Iterable[Chunk]) -> list[Entry]:
        """End what `keep` began; return those that were only waiting for this to leave."""
        many = len(self.kept) >= MANY_KEPT
        kept = [entry for chunk in chunks if (entry := self.kept.pop(chunk, None)) is not None]
        if kept and (many or self.quotas):
            self.lanes_stale = True
        return self.unpin(kept)

    # Room

    def lay_lanes(self) -> None:
        """Have the policy keep the lanes that quotas and the operator's pins call for."""
        everybody = len(self.kept) >= MANY_KEPT
        lanes = Lanes(tenants=frozenset(self.quotas), everybody=everybody, kept=self.kept, tenant_of=self._tenant_of)
        self.policy.lay(lanes if everybody or self.quotas else None)
        self.lanes_stale = False

    def _tenant_of(self, chunk: Chunk) -> str | None:
        entry = self.resident.get(chunk)
        return None if entry is None else entry.salt

    def room_for(self, count: int, pages: int, salt: str) -> tuple[int, bool]:
        """Return how many of `count` chunks of `pages` pages can be had, and whether a quota is what limits them."""
        fit = count
        if self.capacity is not None:
            fit = min(count, max(0, self.capacity - self.used + self.idle) // pages)
        quota = self.quotas.get(salt)
        if quota is None:
            return fit, False
        allowed = max(0, quota - self.salt_pages.get(salt, 0) + self.quota_idle[salt]) // pages
        return min(fit, allowed), allowed < fit

    def set_quota(self, salt: str, pages: int | None) -> None:
        """Limit the tenant `salt` to `pages` pages; None lifts the limit."""
        self.lanes_stale = self.lanes_stale or (salt in self.quotas) != (pages is not None)
        self.quotas.pop(salt, None)
        if pages is not None:
            self.quotas[salt] = pages
        self.count_idle()

    def count_idle(self) -> None:
        """Count the idle pages anew: once, not at every ask."""
        idle = [entry for entry in self.resident.values() if not entry.pins]
        self.idle = sum(map(_pages_of, idle))
        self.quota_idle = dict.fromkeys(self.quotas, 0)
        for entry in idle:
            if entry.salt in self.quota_idle:
                self.quota_idle[entry.salt] += entry.pages

    def _leave_idle(self, entries: Sequence[Entry]) -> None:
        """Give back the pages of entries that were idle and are resident no longer."""
        self.idle -= self.release(entries)
        if self.quota_idle:
            for entry in entries:
                if entry.salt in self.quota_idle:
                    self.quota_idle[entry.salt] -= entry.pages

    def quota_victims(self, pages: int, salt: str) -> list[Entry]:
        """Evict from the tenant's own chunks until `pages` more pages are within its quota; return them."""
        quota = self.quotas.get(salt)
        over = 0 if quota is None else self.salt_pages.get(salt, 0) + pages - quota
        if over <= 0:
            return []
        resident = self.resident

        def own(chunk: Chunk) -> bool:
            entry = resident.get(chunk)
            return entry is not None and not entry.pins and entry.salt == salt

        if self.lanes_stale:
            self.lay_lanes()
        return self._pop(self.policy.victims(over, own, salt))

    def victims(self, pages: int) -> list[Entry]:
        """Evict until `pages` pages are free; return what went, in policy order."""
        short = 0 if self.capacity is None else self.used + pages - self.capacity
        if short <= 0:
            return []
        if self.lanes_stale:
            self.lay_lanes()
        return self._pop(self.policy.victims(short, self._is_idle))

    def _is_idle(self, chunk: Chunk) -> bool:
        entry = self.resident.get(chunk)
        return entry is not None and not entry.pins

    def _pop(self, chunks: list[Chunk] | None) -> list[Entry]:
        if chunks is None:
            raise AssertionError("the policy found less to evict than the tier counts as idle")
        entries = [*map(self.resident.pop, chunks)]
        self._leave_idle(entries)
        if self.ttl_ns is not None:
            for chunk in chunks:
                del self.expiry[chunk]
        return entries

    # A chunk's way through the tier

    def reserve(self, chunks: Iterable[Chunk], pages: int, salt: str) -> dict[Chunk, Entry]:
        """Take room for `chunks`, to be written, and pin them."""
        entries = {chunk: Entry(chunk, pages, salt) for chunk in chunks}
        self.writing.update(entries)
        if entries:
            taken = pages * len(entries)
            self.used += taken
            self.salt_pages[salt] = self.salt_pages.get(salt, 0) + taken
        return entries

    def commit(self, chunks: Sequence[Chunk]) -> list[Entry]:
        """Make written chunks resident; they keep their pins."""
        entries = [*map(self.writing.pop, chunks)]
        self.resident.update(zip(chunks, entries, strict=True))
        return entries

    def insert(self, entries: Sequence[Entry], now_ns: int) -> None:
        """Tell the policy of `entries`, in this order."""
        for entry in entries:
            entry.entered = True
        for pages, group in groupby(entries, key=_pages_of):
            self.policy.insert([entry.chunk for entry in group], pages)
        if self.ttl_ns is not None:
            for entry in entries:
                self.expiry[entry.chunk] = now_ns

    def touch(self, chunks: Sequence[Chunk], now_ns: int) -> None:
        """Tell the policy that `chunks` were used, in this order."""
        self.policy.touch(chunks)
        if self.ttl_ns is not None:
            for chunk in chunks:
                self.expiry[chunk] = now_ns
                self.expiry.move_to_end(chunk)

    def holds(self, chunk: Chunk) -> bool:
        """Return whether a chunk has a place here, matchable or not."""
        return chunk in self.resident or chunk in self.writing or chunk in self.leaving

    def release(self, entries: Iterable[Entry]) -> int:
        """Give the entries' pages back; return how many."""
        used = self.used
        for salt, group in groupby(entries, key=_salt_of):
            pages = sum(map(_pages_of, group))
            self.used -= pages
            left = self.salt_pages[salt] - pages
            if left:
                self.salt_pages[salt] = left
            else:
                del self.salt_pages[salt]
        return used - self.used

    def abandon(self, entry: Entry) -> None:
        """Give up a chunk of a lower tier that was being written: the policy knew of it already."""
        if entry.entered:
            self.policy.forget((entry.chunk,))
            self.expiry.pop(entry.chunk, None)
        self.release((entry,))

    def remove(self, chunks: Iterable[Chunk], reason: EvictReason) -> list[Entry]:
        """Make resident chunks unmatchable; return those whose pages are free at once, for nobody holds them."""
        entries = [*map(self.resident.__getitem__, chunks)]
        known = [entry.chunk for entry in entries if entry.entered]
        self.policy.forget(known)  # before they go: it may ask whose they are
        if self.expiry:
            for chunk in known:
                self.expiry.pop(chunk, None)
        free: list[Entry] = []
        for entry in entries:
            entry.reason = reason
            entry.entered = False
            if entry.pins:
                self.leaving[entry.chunk] = entry
            else:
                free.append(entry)
        if isinstance(self.resident, Followed):
            self.resident.drop([entry.chunk for entry in entries])
        else:
            for entry in entries:
                del self.resident[entry.chunk]
        self._leave_idle(free)
        return free

    def due(self, now_ns: int) -> bool:
        """Return whether `expired` has anything to do."""
        return (
            self.ttl_ns is not None and bool(self.expiry) and next(iter(self.expiry.values())) + self.ttl_ns <= now_ns
        )

    def expired(self, now_ns: int) -> list[Entry]:
        """Remove the chunks unused for longer than the TTL and return them; pinned ones are in use."""
        gone: list[Chunk] = []
        if self.ttl_ns is None:
            return []
        while self.expiry:
            chunk, used_ns = next(iter(self.expiry.items()))
            if used_ns + self.ttl_ns > now_ns:
                break
            if self._is_idle(chunk):
                del self.expiry[chunk]
                gone.append(chunk)
            else:
                self.expiry[chunk] = now_ns
                self.expiry.move_to_end(chunk)
        return self.remove(gone, "expired") if gone else []
