"""Lanes: the order of those chunks alone that an ask is about, so that it need not walk past all the others.

A tenant at its quota makes room among its own chunks, and chunks that the operator keeps are nobody's victims. A lane
holds one tenant's chunks that the operator does not keep, or everybody's, in the order that they have in the queue.
Who would be found in the queue is found in the lane, in the same order. A tier lays lanes where it has a quota or keeps
many chunks; without them a queue is a plain `OrderedDict`.
"""

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, cast

from kvcore.policy.types import Chunk

Queue: TypeAlias = OrderedDict[Chunk, int]
"""The pages of each chunk; the chunk that would leave first comes first."""

Ranks: TypeAlias = dict[int, Queue]
"""Queues by rank, as of LFU's counts. No rank is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """Which lanes there are."""

    tenants: frozenset[str | None]
    """The tenants that have one."""
    everybody: bool
    """Whether there is one of everybody's chunks; its name is None."""
    kept: Container[Chunk]
    """Chunks that are in no lane."""
    tenant_of: Callable[[Chunk], str | None]
    """Tells whose a chunk of the queue is."""

    def of(self, chunk: Chunk) -> tuple[str | None, ...]:
        """Return the lanes that `chunk` belongs to."""
        if chunk in self.kept:
            return ()
        tenant = self.tenant_of(chunk)
        own = (tenant,) if tenant in self.tenants else ()
        return (None, *own) if self.everybody else own


class LanedQueue(OrderedDict[Chunk, int]):
    """A queue with lanes. It has what policies do with a queue; what they do not do is refused.

    A chunk that a walk has set aside, out of one lane, is put back before anything else happens to it.
    """

    def __init__(self, queue: Queue, lanes: Lanes) -> None:
        super().__init__()
        put = super().__setitem__
        for chunk, pages in queue.items():
            put(chunk, pages)
        self.lay(lanes)

    def lay(self, lanes: Lanes) -> None:
        """Lay the lanes anew."""
        self._lanes = lanes
        self._by_name: dict[str | None, Queue] = {}
        kept, tenants, tenant_of = lanes.kept, lanes.tenants, lanes.tenant_of
        if lanes.everybody:
            self._by_name[None] = OrderedDict((chunk, pages) for chunk, pages in self.items() if chunk not in kept)
        if tenants:
            for chunk, pages in self.items():
                if tenant_of(chunk) in tenants and chunk not in kept:
                    self._by_name.setdefault(tenant_of(chunk), OrderedDict())[chunk] = pages

    def lane(self, tenant: str | None) -> Queue:
        """Return the lane of `tenant`, or of everybody where None; the queue itself where there is none."""
        if self._lanes.everybody if tenant is None else tenant in self._lanes.tenants:
            return self._by_name.setdefault(tenant, OrderedDict())
        return self

    def hide(self, chunk: Chunk) -> None:
        """Take a chunk that is kept from now on out of its lanes; does nothing where it is not in the queue."""
        if chunk in self:
            for name in (None, self._lanes.tenant_of(chunk)):
                if name in self._by_name:
                    self._by_name[name].pop(chunk, None)

    def _join(self, chunk: Chunk, pages: int) -> None:
        for name in self._lanes.of(chunk):
            lane = self._by_name.get(name)
            if lane is None:
                lane = self._by_name[name] = OrderedDict()
            lane[chunk] = pages

    def __setitem__(self, chunk: Chunk, pages: int) -> None:
        super().__setitem__(chunk, pages)
        self._join(chunk, pages)

    def __delitem__(self, chunk: Chunk) -> None:
        super().__delitem__(chunk)
        for name in self._lanes.of(chunk):
            if name in self._by_name:
                self._by_name[name].pop(chunk, None)  # a walk may have set it aside

    def move_to_end(self, chunk: Chunk, last: bool = True) -> None:
        """Move `chunk` in the queue and in its lanes."""
        super().move_to_end(chunk, last)
        for name in self._lanes.of(chunk):
            lane = self._by_name.get(name)
            if lane is not None and chunk in lane:  # one that is kept no longer is missing until lanes are laid anew
                lane.move_to_end(chunk, last)

    def pop(self, chunk: Chunk, *default: Any) -> Any:
        """Remove `chunk` and return its pages, or the default where it is not here."""
        if chunk not in self and default:
            return default[0]
        pages = self[chunk]
        del self[chunk]
        return pages

    def popitem(self, last: bool = True) -> tuple[Chunk, int]:
        """Remove and return the last chunk, or the first, and its pages."""
        chunk = next(reversed(self) if last else iter(self))
        return chunk, self.pop(chunk)

    def _refused(self, *_: Any) -> Any:
        raise TypeError("the lanes of a queue follow chunk by chunk")

    update = clear = setdefault = __ior__ = _refused  # type: ignore[assignment]


class LanedRanks(dict[int, Queue]):
    """Ranks whose queues have lanes."""

    def __init__(self, ranks: Ranks, lanes: Lanes) -> None:
        super().__init__({rank: LanedQueue(queue, lanes) for rank, queue in ranks.items()})
        self._lanes = lanes

    def queue(self) -> Queue:
        """Return a queue for a new rank."""
        return LanedQueue(OrderedDict(), self._lanes)


class Laned:
    """What a policy whose queues can have lanes has besides."""

    __slots__ = ()
    _LANED: ClassVar[tuple[str, ...]]
    """The attributes that hold its queues, or its ranks."""

    def lay(self, lanes: Lanes | None) -> None:
        """Give the queues these lanes, or none."""
        for name in self._LANED:
            setattr(self, name, _laid(getattr(self, name), lanes))

    def hide(self, chunks: Iterable[Chunk]) -> None:
        """Take chunks that are kept from now on out of the lanes."""
        for chunk in chunks:
            for name in self._LANED:
                part = getattr(self, name)
                for queue in part.values() if isinstance(part, LanedRanks) else (part,):
                    if isinstance(queue, LanedQueue):
                        queue.hide(chunk)


def lane_of(queue: Queue, tenant: str | None) -> Queue:
    """Return where to look for victims among a tenant's chunks, or among everybody's where None."""
    return queue.lane(tenant) if isinstance(queue, LanedQueue) else queue


def _laid(part: Queue | Ranks, lanes: Lanes | None) -> Queue | Ranks:
    if not isinstance(part, OrderedDict):
        if lanes is None:
            return {rank: cast("Queue", _laid(queue, None)) for rank, queue in part.items()}
        return LanedRanks(part, lanes)
    if lanes is None:
        return OrderedDict(part) if isinstance(part, LanedQueue) else part
    if isinstance(part, LanedQueue):
        part.lay(lanes)
        return part
    return LanedQueue(part, lanes)
