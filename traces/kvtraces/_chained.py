"""Whether block ids stand for whole prefixes. Loaded when asked for, because numba is slow to import."""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

NONE = np.int64(-1)
"""What is before a prompt's first block; ids are not negative."""
_FIRST_SLOTS = 1 << 12
_MOST_SLOTS = 1 << 20  # 16 MiB: what does not fit a processor's cache is slow

Longs = NDArray[np.int64]


class Followed:
    """Which block each block follows, over any number of batches of requests.

    Ids that stand for the whole prompt up to their block follow the same one always. In a log of more than half a
    million different blocks those seen last are held against each other, which tells ids of blocks alone as well; a
    request is always held against the whole of itself.
    """

    def __init__(self) -> None:
        """Know no block."""
        self._table = np.full((_FIRST_SLOTS, 2), NONE)
        self._used = 0

    def first_other(self, ids: Longs, counts: Longs, full: Longs) -> int:
        """Return the first block that follows another one than before, or -1.

        Args:
            ids: [m] block ids, request after request.
            counts: [n] how many of them each request has.
            full: [n] how many of these are full blocks, which alone count.
        """
        found, self._table, self._used = _first_other(self._table, self._used, ids, counts, full)
        return int(found)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _first_other(table: Any, used: Any, ids: Any, counts: Any, full: Any) -> Any:
    first = 0
    for row in range(len(counts)):
        while 2 * (used + full[row]) > len(table):
            if len(table) >= _MOST_SLOTS and used > 0:
                table[:] = NONE
                used = 0
            else:
                table = _larger(table)
        before = NONE
        for place in range(first, first + full[row]):
            name = ids[place]
            slot = _slot(table, name)
            if table[slot, 0] == NONE:
                table[slot, 0] = name
                table[slot, 1] = before
                used += 1
            elif table[slot, 1] != before:
                return name, table, used
            before = name
        first += counts[row]
    return NONE, table, used


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _larger(table: Any) -> Any:
    larger = np.full((2 * len(table), 2), NONE)
    for slot in range(len(table)):
        if table[slot, 0] != NONE:
            place = _slot(larger, table[slot, 0])
            larger[place, 0] = table[slot, 0]
            larger[place, 1] = table[slot, 1]
    return larger


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _slot(table: Any, name: Any) -> Any:
    """Return where a name is, or where it would go: open addressing by Fibonacci hashing (Knuth, TAOCP 6.4)."""
    mask = np.uint64(len(table) - 1)
    mixed = np.uint64(name) * np.uint64(0x9E3779B97F4A7C15)
    slot = (mixed ^ (mixed >> np.uint64(32))) & mask
    while table[slot, 0] != NONE and table[slot, 0] != name:
        slot = (slot + np.uint64(1)) & mask
    return slot
