"""Whether block ids stand for whole prefixes. Loaded when asked for, because numba is slow to import."""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

NONE = np.int64(-1)
"""What is before a prompt's first block; ids are not negative."""

Longs = NDArray[np.int64]


class Followed:
    """Which block each block follows, over any number of batches of requests, of `blocks` blocks at most.

    Ids that stand for the whole prompt up to their block follow the same one always.
    """

    def __init__(self, blocks: int) -> None:
        """Know no block."""
        self._table = np.full((2 << blocks.bit_length(), 2), NONE)  # at most half full

    def first_other(self, ids: Longs, counts: Longs, full: Longs) -> int:
        """Return the first block that follows another one than before, or -1.

        Args:
            ids: [m] block ids, request after request.
            counts: [n] how many of them each request has.
            full: [n] how many of these are full blocks, which alone count.
        """
        return int(_first_other(self._table, ids, counts, full))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _first_other(table: Any, ids: Any, counts: Any, full: Any) -> Any:
    first = 0
    for row in range(len(counts)):
        before = NONE
        for place in range(first, first + full[row]):
            name = ids[place]
            slot = _slot(table, name)
            if table[slot, 0] == NONE:
                table[slot, 0] = name
                table[slot, 1] = before
            elif table[slot, 1] != before:
                return name
            before = name
        first += counts[row]
    return NONE


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _slot(table: Any, name: Any) -> Any:
    """Return where a name is, or where it would go: open addressing by Fibonacci hashing (Knuth, TAOCP 6.4)."""
    mask = np.uint64(len(table) - 1)
    mixed = np.uint64(name) * np.uint64(0x9E3779B97F4A7C15)
    slot = (mixed ^ (mixed >> np.uint64(32))) & mask
    while table[slot, 0] != NONE and table[slot, 0] != name:
        slot = (slot + np.uint64(1)) & mask
    return slot
