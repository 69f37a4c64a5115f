import time

import numpy as np
import pytest

from kvcore.live.allocator import OutOfPages, PageAllocator


def make(pages: int) -> PageAllocator:
    return PageAllocator(np.zeros(pages, np.uint64), np.zeros(pages, np.uint32))


def is_adjacent(ids: np.ndarray) -> bool:
    return bool((np.diff(ids.astype(np.int64)) == 1).all())


def test_a_chunks_pages_are_adjacent_and_distinct_from_others() -> None:
    allocator = make(100)
    first, second = allocator.take(18), allocator.take(18)
    assert is_adjacent(first)
    assert is_adjacent(second)
    assert not set(first.tolist()) & set(second.tolist())
    assert (allocator.free, allocator.used) == (64, 36)


def test_a_returned_chunks_pages_serve_the_next_one_whole() -> None:
    allocator = make(90)
    held = [allocator.take(18) for _ in range(5)]
    allocator.give(held[2])
    assert allocator.take(18).tolist() == held[2].tolist()


def test_neighbours_join_into_one_run() -> None:
    allocator = make(40)
    held = [allocator.take(10) for _ in range(4)]
    for index in (0, 2, 1):
        allocator.give(held[index])
    assert is_adjacent(allocator.take(30))


def test_scattered_pages_still_make_a_chunk() -> None:
    allocator = make(64)
    held = [allocator.take(1) for _ in range(64)]
    for ids in held[::2]:
        allocator.give(ids)
    taken = allocator.take(32)
    assert sorted(taken.tolist()) == list(range(0, 64, 2))
    assert allocator.free == 0


def test_too_many_pages_change_nothing() -> None:
    allocator = make(10)
    allocator.take(7)
    with pytest.raises(OutOfPages, match="4 pages asked for, 3 free of 10"):
        allocator.take(4)
    assert allocator.free == 3
    assert allocator.take(3).size == 3


def test_generations_rise_when_pages_are_taken_and_given_back() -> None:
    generations = np.zeros(4, np.uint64)
    allocator = PageAllocator(generations, np.zeros(4, np.uint32))
    ids = allocator.take(2)
    assert generations[ids].tolist() == [1, 1]
    allocator.give(ids)
    assert sorted(generations.tolist()) == [0, 0, 2, 2], "who was told of them does not begin to write any more"
    allocator.take(4)
    assert sorted(generations.tolist()) == [1, 1, 3, 3]


@pytest.mark.parametrize("ids", [[3], [1, 1], [99], [0, 3]])
def test_pages_not_in_use_cannot_be_given(ids: list[int]) -> None:
    allocator = make(4)
    allocator.give(allocator.take(4)[3:])
    before = allocator.free
    with pytest.raises(ValueError, match="given back"):
        allocator.give(np.array(ids, np.uint32))
    assert allocator.free == before


def test_marks_last_until_settled_or_given() -> None:
    writers = np.zeros(6, np.uint32)
    allocator = PageAllocator(np.zeros(6, np.uint64), writers)
    first, second = allocator.take(2, writer=7), allocator.take(2, writer=8)
    assert writers[first].tolist() == [7, 7]
    allocator.settle(first)
    allocator.give(second)
    assert not writers.any()
    assert allocator.used == 2


def test_a_restart_quarantines_marked_pages_until_their_writer_is_gone() -> None:
    generations, writers = np.zeros(10, np.uint64), np.zeros(10, np.uint32)
    before = PageAllocator(generations, writers)
    committed = before.take(2, writer=1)
    torn, other = before.take(3, writer=1), before.take(3, writer=2)
    after = PageAllocator(generations, writers, in_use=committed)
    assert (after.used, after.quarantined, after.free) == (2, 6, 2)
    assert not writers[committed].any()
    with pytest.raises(OutOfPages, match="6 quarantined"):
        after.take(3)
    with pytest.raises(ValueError, match="given back"):
        after.give(torn)
    assert after.reap(lambda writer: writer == 2) == 3
    assert after.quarantined == 3
    assert sorted(after.take(5).tolist()) == sorted(set(range(10)) - set(committed.tolist()) - set(other.tolist()))
    assert after.reap(lambda _: False) == 3
    assert after.reap(lambda _: False) == 0


def test_a_million_pages_are_no_slower_than_few() -> None:
    """A fragmented arena in steady state: were a take to look at every page, this would last minutes."""
    allocator = make(1 << 20)
    held = [allocator.take(18) for _ in range((1 << 20) // 18)]
    rng = np.random.default_rng(0)
    start = time.perf_counter()
    for index in rng.integers(0, len(held), 3000).tolist():
        allocator.give(held[index])
        held[index] = np.concatenate([allocator.take(7), allocator.take(11)])
    assert time.perf_counter() - start < 5
    assert allocator.used == len(held) * 18
