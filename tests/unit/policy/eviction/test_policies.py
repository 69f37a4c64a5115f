"""Every eviction policy against a naive model, written from its definition with plain lists, one step at a time."""

import copy
import random
from collections import OrderedDict
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.policy.eviction import POLICIES, EvictionPolicy, make_policy
from kvcore.policy.types import Chunk

Eligible = Callable[[Chunk], bool]


def first(chunks: list[int], eligible: Eligible) -> int | None:
    return next((chunk for chunk in chunks if eligible(chunk)), None)


class Model:
    """`pages` of every resident chunk; `evict` removes and returns one eligible chunk, or returns None."""

    def __init__(self, capacity: int | None) -> None:
        self.capacity = capacity
        self.pages: dict[int, int] = {}

    def victims(self, pages: int, eligible: Eligible) -> list[int] | None:
        before = copy.deepcopy(self.__dict__)
        taken: list[int] = []
        while pages > 0:
            chunk = self.evict(eligible)
            if chunk is None:
                self.__dict__ = before
                return None
            taken.append(chunk)
            pages -= self.pages.pop(chunk)
        return taken

    def total(self, chunks: list[int], sizes: dict[int, int] | None = None) -> int:
        return sum((sizes or self.pages)[chunk] for chunk in chunks)

    def insert(self, chunk: int, pages: int) -> None: ...
    def touch(self, chunk: int) -> None: ...
    def forget(self, chunk: int) -> None: ...
    def evict(self, eligible: Eligible) -> int | None: ...


class ListModel(Model):
    """A single list, the next victim first."""

    def __init__(self, capacity: int | None) -> None:
        super().__init__(capacity)
        self.order: list[int] = []

    def insert(self, chunk: int, pages: int) -> None:
        self.order.append(chunk)

    def forget(self, chunk: int) -> None:
        self.order.remove(chunk)

    def evict(self, eligible: Eligible) -> int | None:
        chunk = first(self.order, eligible)
        if chunk is not None:
            self.order.remove(chunk)
        return chunk


class FifoModel(ListModel):
    pass


class LruModel(ListModel):
    def touch(self, chunk: int) -> None:
        self.order.remove(chunk)
        self.order.append(chunk)


class RankModel(Model):
    """The lowest (value, time of the last insertion or touch) leaves first."""

    def __init__(self, capacity: int | None) -> None:
        super().__init__(capacity)
        self.value: dict[int, int] = {}
        self.uses: dict[int, int] = {}
        self.used_at: dict[int, int] = {}
        self.clock = 0
        self.age = 0

    def use(self, chunk: int, pages: int) -> None:
        self.clock += 1
        self.used_at[chunk] = self.clock
        self.uses[chunk] = self.uses.get(chunk, 0) + 1
        self.value[chunk] = self.worth(self.uses[chunk], pages)

    def insert(self, chunk: int, pages: int) -> None:
        self.use(chunk, pages)

    def touch(self, chunk: int) -> None:
        self.use(chunk, self.pages[chunk])

    def forget(self, chunk: int) -> None:
        del self.value[chunk], self.uses[chunk]

    def evict(self, eligible: Eligible) -> int | None:
        order = sorted(self.value, key=lambda chunk: (self.value[chunk], self.used_at[chunk]))
        chunk = first(order, eligible)
        if chunk is not None:
            self.age = max(self.age, self.value[chunk])
            self.forget(chunk)
        return chunk

    def worth(self, uses: int, pages: int) -> int:
        raise NotImplementedError


class LfuModel(RankModel):
    def worth(self, uses: int, pages: int) -> int:
        return uses


class GdsfModel(RankModel):
    def worth(self, uses: int, pages: int) -> int:
        return self.age + (uses << 20) // pages


class SieveModel(Model):
    """The paper's pseudocode: a queue, oldest first, with a hand that is a chunk or None (start at the oldest)."""

    def __init__(self, capacity: int | None) -> None:
        super().__init__(capacity)
        self.queue: list[int] = []
        self.visited: set[int] = set()
        self.hand: int | None = None

    def insert(self, chunk: int, pages: int) -> None:
        self.queue.append(chunk)

    def touch(self, chunk: int) -> None:
        self.visited.add(chunk)

    def newer(self, chunk: int) -> int | None:
        place = self.queue.index(chunk) + 1
        return self.queue[place] if place < len(self.queue) else None

    def forget(self, chunk: int) -> None:
        if chunk == self.hand:
            self.hand = self.newer(chunk)
        self.queue.remove(chunk)
        self.visited.discard(chunk)

    def evict(self, eligible: Eligible) -> int | None:
        if not any(eligible(chunk) for chunk in self.queue):
            return None
        chunk = self.hand if self.hand is not None else self.queue[0]
        while not eligible(chunk) or chunk in self.visited:
            if eligible(chunk):
                self.visited.remove(chunk)
            newer = self.newer(chunk)
            chunk = newer if newer is not None else self.queue[0]
        self.hand = self.newer(chunk)
        self.queue.remove(chunk)
        return chunk


class S3FifoModel(Model):
    def __init__(self, capacity: int | None) -> None:
        super().__init__(capacity)
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghost: list[tuple[int, int]] = []
        self.frequency: dict[int, int] = {}

    def insert(self, chunk: int, pages: int) -> None:
        self.frequency[chunk] = 0
        if any(chunk == ghost for ghost, _ in self.ghost):
            self.ghost = [entry for entry in self.ghost if entry[0] != chunk]
            self.main.append(chunk)
        else:
            self.small.append(chunk)

    def touch(self, chunk: int) -> None:
        self.frequency[chunk] = min(3, self.frequency[chunk] + 1)

    def forget(self, chunk: int) -> None:
        (self.small if chunk in self.small else self.main).remove(chunk)

    def evict(self, eligible: Eligible) -> int | None:
        capacity = self.capacity or 0
        small_first = self.total(self.small) >= capacity // 10
        for from_small in (True, False) if small_first else (False, True):
            chunk = self.evict_small(eligible) if from_small else self.evict_main(eligible)
            if chunk is not None:
                return chunk
        return self.evict_main(eligible)

    def evict_small(self, eligible: Eligible) -> int | None:
        for chunk in [chunk for chunk in self.small if eligible(chunk)]:
            self.small.remove(chunk)
            if self.frequency[chunk] >= 2:
                self.main.append(chunk)
                self.frequency[chunk] = 0
                continue
            self.ghost.append((chunk, self.pages[chunk]))
            limit = (self.capacity or 0) - (self.capacity or 0) // 10
            while sum(size for _, size in self.ghost) > limit:
                self.ghost.pop(0)
            return chunk
        return None

    def evict_main(self, eligible: Eligible) -> int | None:
        while (chunk := first(self.main, eligible)) is not None:
            self.main.remove(chunk)
            if self.frequency[chunk] == 0:
                return chunk
            self.frequency[chunk] -= 1
            self.main.append(chunk)
        return None


class ArcModel(Model):
    def __init__(self, capacity: int | None) -> None:
        super().__init__(capacity)
        self.t1: list[int] = []
        self.t2: list[int] = []
        self.b1: list[int] = []
        self.b2: list[int] = []
        self.ghost_pages: dict[int, int] = {}
        self.target = 0

    def lengths(self) -> tuple[int, int, int, int]:
        return (
            self.total(self.t1),
            self.total(self.t2),
            self.total(self.b1, self.ghost_pages),
            self.total(self.b2, self.ghost_pages),
        )

    def insert(self, chunk: int, pages: int) -> None:
        if self.capacity is None:
            self.t1.append(chunk)
            return
        self.pages[chunk] = pages
        _, _, b1, b2 = self.lengths()
        if chunk in self.b1:
            self.target = min(self.capacity, self.target + pages * (max(1, b2 // b1)))
            self.b1.remove(chunk)
            self.t2.append(chunk)
        elif chunk in self.b2:
            self.target = max(0, self.target - pages * (max(1, b1 // b2)))
            self.b2.remove(chunk)
            self.t2.append(chunk)
        else:
            self.t1.append(chunk)
        while self.b1 and self.lengths()[0] + self.lengths()[2] > self.capacity:
            self.b1.pop(0)
        while self.b2 and sum(self.lengths()) > 2 * self.capacity:
            self.b2.pop(0)

    def touch(self, chunk: int) -> None:
        self.forget(chunk)
        self.t2.append(chunk)

    def forget(self, chunk: int) -> None:
        (self.t1 if chunk in self.t1 else self.t2).remove(chunk)

    def evict(self, eligible: Eligible) -> int | None:
        turn = [(self.t1, self.b1), (self.t2, self.b2)]
        if self.total(self.t1) <= self.target:
            turn.reverse()
        for live, ghosts in turn:
            chunk = first(live, eligible)
            if chunk is not None:
                live.remove(chunk)
                if self.capacity is not None:
                    ghosts.append(chunk)
                    self.ghost_pages[chunk] = self.pages[chunk]
                return chunk
        return None


class WTinyLfuModel(Model):
    """Counts are halved all at once, by a pass over all of them."""

    def __init__(self, capacity: int | None) -> None:
        super().__init__(capacity)
        self.window: list[int] = []
        self.probation: list[int] = []
        self.protected: list[int] = []
        self.uses: dict[int, int] = {}
        self.counted = 0
        self.room_made = False

    def count(self, chunk: int) -> None:
        self.uses[chunk] = min(15, self.uses.get(chunk, 0) + 1)
        self.counted += self.pages[chunk]
        if self.capacity is not None and self.counted >= 10 * self.capacity:
            self.counted -= 10 * self.capacity
            self.uses = {chunk: uses // 2 for chunk, uses in self.uses.items()}

    def window_is_over(self) -> bool:
        return self.total(self.window) > (self.capacity or 0) // 100

    def insert(self, chunk: int, pages: int) -> None:
        self.pages[chunk] = pages
        while self.room_made and self.window_is_over():
            self.probation.append(self.window.pop(0))
        self.room_made = False
        self.window.append(chunk)
        self.count(chunk)

    def touch(self, chunk: int) -> None:
        if chunk in self.window:
            self.window.remove(chunk)
            self.window.append(chunk)
        else:
            (self.protected if chunk in self.protected else self.probation).remove(chunk)
            self.protected.append(chunk)
            main = (self.capacity or 0) - (self.capacity or 0) // 100
            while self.total(self.protected) > main * 4 // 5:
                self.probation.append(self.protected.pop(0))
        self.count(chunk)

    def forget(self, chunk: int) -> None:
        self.uses.pop(chunk, None)
        self.leave(chunk)

    def leave(self, chunk: int) -> None:
        for segment in (self.window, self.probation, self.protected):
            if chunk in segment:
                segment.remove(chunk)

    def evict(self, eligible: Eligible) -> int | None:
        rival = first(self.probation + self.protected, eligible)
        candidate = first(self.window, eligible) if rival is None or self.window_is_over() else None
        loser = candidate if candidate is not None else rival
        if candidate is not None and rival is not None and self.uses[candidate] > self.uses.get(rival, 0):
            loser = rival
            self.window.remove(candidate)
            self.probation.append(candidate)
        if loser is not None:
            self.leave(loser)
            self.room_made = True
            if self.capacity is None:
                del self.uses[loser]
        return loser


MODELS: dict[str, type[Model]] = {
    "lru": LruModel,
    "fifo": FifoModel,
    "lfu": LfuModel,
    "sieve": SieveModel,
    "s3fifo": S3FifoModel,
    "arc": ArcModel,
    "gdsf": GdsfModel,
    "w-tinylfu": WTinyLfuModel,
}

CHUNKS = st.lists(st.integers(0, 30), max_size=8, unique=True)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["insert", "insert", "touch", "touch", "forget", "victims"]), CHUNKS, CHUNKS, st.integers(1, 3)
    ),
    max_size=40,
)
CAPACITIES = st.one_of(st.none(), st.integers(3, 40), st.integers(100, 250))


class Pair:
    """A policy and its model under the same calls."""

    def __init__(self, name: str, capacity: int | None) -> None:
        self.policy: EvictionPolicy = make_policy(name, capacity)
        self.model = MODELS[name](capacity)
        self.capacity = capacity

    def step(self, kind: str, chunks: list[int], pinned: list[int], number: int) -> None:
        resident = self.model.pages
        present = [chunk for chunk in chunks if chunk in resident]
        if kind == "insert":
            self.insert([chunk for chunk in chunks if chunk not in resident], number, pinned)
        elif kind == "touch":
            self.policy.touch(present)
            for chunk in present:
                self.model.touch(chunk)
        elif kind == "forget":
            self.policy.forget(present[:1])
            for chunk in present[:1]:
                self.model.forget(chunk)
                del resident[chunk]
        else:
            self.victims(number * 3, pinned)

    def insert(self, chunks: list[int], pages: int, pinned: list[int]) -> None:
        """Insert within the capacity, as the core does: not at all where too little can be evicted."""
        if self.capacity is not None:
            over = sum(self.model.pages.values()) + pages * len(chunks) - self.capacity
            if over > 0 and self.victims(over, pinned) is None:
                return
        self.policy.insert(chunks, pages)
        for chunk in chunks:
            self.model.pages[chunk] = pages
            self.model.insert(chunk, pages)

    def victims(self, pages: int, pinned: list[int]) -> list[int] | None:
        """Ask both; a None must leave the policy as it was."""

        def eligible(chunk: Chunk) -> bool:
            return chunk not in pinned

        before = copy.deepcopy(state(self.policy))
        expected = self.model.victims(pages, eligible)
        taken = self.policy.victims(pages, eligible)
        assert taken == expected
        if taken is None:
            assert state(self.policy) == before
        else:
            assert not set(taken) & set(pinned)
        return expected

    def drain(self) -> list[int]:
        order: list[int] = []
        while self.model.pages:
            taken = self.victims(1, [])
            assert taken is not None
            order += taken
        return order


def state(policy: EvictionPolicy) -> list[object]:
    """The order of a plain dict is compared too: no policy may depend on more than what it is made of."""
    return [
        list(value.items()) if isinstance(value, OrderedDict) else value
        for value in (getattr(policy, name) for name in policy.__slots__)
    ]


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=150, deadline=None)
@given(capacity=CAPACITIES, steps=STEPS)
def test_model(name: str, capacity: int | None, steps: list[tuple[str, list[int], list[int], int]]) -> None:
    pair = Pair(name, capacity)
    for step in steps:
        pair.step(*step)
    pair.drain()


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=100, deadline=None)
@given(capacity=CAPACITIES, steps=STEPS, asked=st.lists(st.integers(1, 5), min_size=2, max_size=4), pinned=CHUNKS)
def test_room_made_in_parts(
    name: str,
    capacity: int | None,
    steps: list[tuple[str, list[int], list[int], int]],
    asked: list[int],
    pinned: list[int],
) -> None:
    """Several asks for whole chunks give the victims, and leave the state, of one ask for their sum."""
    whole, parts = Pair(name, capacity), Pair(name, capacity)
    for kind, chunks, pins, _ in steps:
        for pair in (whole, parts):
            pair.step(kind, chunks, pins, 1)
    expected = whole.victims(sum(asked), pinned)
    if expected is not None:
        assert [chunk for pages in asked for chunk in parts.victims(pages, pinned) or []] == expected
        assert state(parts.policy) == state(whole.policy)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(("capacity", "universe"), [(9, 12), (30, 30), (30, 150), (130, 200), (None, 60)])
def test_model_long(name: str, capacity: int | None, universe: int) -> None:
    """Far into a run, where ghosts, ages and halved counts matter: a few chunks popular, and which ones changes."""
    rng = random.Random(f"{name} {capacity} {universe}")
    pair = Pair(name, capacity)
    for step in range(1500):
        popular = [(step // 300 * 7 + int(universe * rng.random() ** 3)) % universe for _ in range(rng.randint(1, 6))]
        chunks = list(dict.fromkeys(popular))
        pinned = rng.sample(range(universe), universe // 10) if rng.random() < 0.5 else []
        pages = rng.choice([1, 1, 1, 2])
        pair.step("insert", chunks, pinned, pages)
        pair.step("touch", chunks if rng.random() < 0.7 else chunks[:1], [], 0)
        if rng.random() < 0.05:
            pair.step(rng.choice(["forget", "victims"]), chunks, pinned, rng.randint(1, 3))
    pair.drain()


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_asked_or_too_much(name: str) -> None:
    policy = make_policy(name, 10)
    assert policy.victims(0, lambda _: True) == []
    assert policy.victims(1, lambda _: True) is None
    policy.insert([1, 2], 3)
    assert policy.victims(0, lambda _: False) == []
    assert policy.victims(7, lambda _: True) is None
    assert policy.victims(4, lambda chunk: chunk != 1) is None
    assert policy.victims(6, lambda _: True) == [1, 2]


@pytest.mark.parametrize("name", POLICIES)
def test_state_is_plain(name: str) -> None:
    """Dictionaries from chunks, and integers: what a snapshot can be taken of without knowing the policy."""
    policy = make_policy(name, 10)
    policy.insert([b"a", b"b", b"c"], 1)
    policy.touch([b"b"])
    policy.victims(1, lambda _: True)
    assert not hasattr(policy, "__dict__")
    for slot in policy.__slots__:
        value = getattr(policy, slot)
        assert type(value) in (int, dict, OrderedDict)
        if isinstance(value, dict):
            inner = [dict(item) if isinstance(item, OrderedDict) else {0: item} for item in value.values()]
            assert all(type(number) is int for item in inner for number in item.values())


def test_names() -> None:
    with pytest.raises(
        ValueError, match="unknown policy 'mru'; known are lru, fifo, lfu, sieve, s3fifo, arc, gdsf, w-tinylfu"
    ):
        make_policy("mru", 1)
    with pytest.raises(ValueError, match="'belady' needs the future"):
        make_policy("belady", 1)


@pytest.mark.parametrize("name", ["lru", "lfu", "gdsf", "w-tinylfu"])
def test_counts_are_forgotten(name: str) -> None:
    """A chunk that the operator dropped comes back as a new one."""
    policies = [make_policy(name, 8), make_policy(name, 8)]
    for policy in policies:
        policy.insert([1, 2, 3], 1)
    policies[0].touch([1, 1, 1])
    for policy in policies:
        policy.forget([1])
        policy.insert([1], 1)
    assert [policy.victims(3, lambda _: True) for policy in policies] == [[2, 3, 1]] * 2


@pytest.mark.parametrize("uses", [1, 2, 4, 15])
def test_wtinylfu_drops_counts_that_are_zero(uses: int) -> None:
    """A stream of chunks, however often used, leaves about as many counts as a sample period has uses."""
    capacity, most = 20, 0
    policy = make_policy("w-tinylfu", capacity)
    for chunk in range(5000):
        if chunk >= capacity:
            assert policy.victims(1, lambda _: True) is not None
        policy.insert([chunk], 1)
        policy.touch([chunk] * (uses - 1))
        most = max(most, len(policy._counts))
    assert most <= 11 * capacity


def test_wtinylfu_may_come_to_have_no_counts() -> None:
    policy = make_policy("w-tinylfu", 1)
    for _ in range(30):
        policy.insert([1], 1)
        policy.forget([1])
    assert policy.victims(1, lambda _: True) is None


def test_s3fifo_filters_a_scan() -> None:
    """Chunks used three times outlive a scan three times as long as the cache."""
    policy = make_policy("s3fifo", 20)
    policy.insert(range(10), 1)
    for _ in range(2):
        policy.touch(range(10))
    policy.insert(range(100, 110), 1)
    for chunk in range(110, 170):
        policy.victims(1, lambda _: True)
        policy.insert([chunk], 1)
    left = policy.victims(20, lambda _: True)
    assert left is not None
    assert set(range(10)) <= set(left)
