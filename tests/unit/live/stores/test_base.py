import threading
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.live.stores.base import FRAME_BYTES, accept, frame, framed, is_intact

NAME = b"n" * 32


def cut(data: bytes | bytearray, at: list[int]) -> list[memoryview]:
    bounds = [0, *sorted(min(a, len(data)) for a in at), len(data)]
    return [memoryview(data)[a:b] for a, b in pairwise(bounds)]


@given(data=st.binary(max_size=300), one=st.lists(st.integers(0, 300)), two=st.lists(st.integers(0, 300)))
def test_a_frame_does_not_depend_on_how_the_bytes_are_cut(data: bytes, one: list[int], two: list[int]) -> None:
    header = frame(NAME, cut(data, one))
    assert len(header) == FRAME_BYTES
    assert is_intact(NAME, header, cut(data, two))


@given(data=st.binary(min_size=1, max_size=100), position=st.integers(min_value=0), flip=st.integers(1, 255))
def test_any_changed_byte_is_noticed(data: bytes, position: int, flip: int) -> None:
    value = bytearray(frame(NAME, [memoryview(data)]) + data)
    position %= len(value)
    value[position] ^= flip
    into = [memoryview(bytearray(len(data)))]
    assert not accept(NAME, memoryview(value), into)


@pytest.mark.parametrize("size", [0, 1, FRAME_BYTES - 1, FRAME_BYTES, FRAME_BYTES + 9, FRAME_BYTES + 11])
def test_a_value_of_another_size_is_refused(size: int) -> None:
    data = b"0123456789"
    value = (frame(NAME, [memoryview(data)]) + data + b"more")[:size]
    assert not accept(NAME, memoryview(value), [memoryview(bytearray(10))])


def test_another_chunks_value_is_refused() -> None:
    data = memoryview(b"0123456789")
    assert not is_intact(b"m" * 32, frame(NAME, [data]), [data])


@given(data=st.binary(max_size=300), at=st.lists(st.integers(0, 300)))
def test_a_value_in_one_piece_is_the_frame_and_the_bytes_and_comes_back(data: bytes, at: list[int]) -> None:
    value = framed(NAME, cut(data, at))
    assert bytes(value) == frame(NAME, cut(data, at)) + data
    into = bytearray(len(data))
    assert accept(NAME, value, cut(into, at))
    assert into == data


def test_others_run_while_a_value_is_copied() -> None:
    """Of a copy's time the interpreter's lock is held for little; with others at work the best of some tries counts."""
    data = memoryview(bytearray(b"x" * (64 << 20)))
    assert min(share_held(data) for _ in range(4)) < 0.3


def share_held(data: memoryview) -> float:
    """Return the longest time that another thread stood still for, as a share of the whole."""
    thread = threading.Thread(target=framed, args=(NAME, [data]))
    start = last = time.perf_counter()
    longest = 0.0
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest / (time.perf_counter() - start)
