"""Which block names of a log are new. Loaded when asked for, because numba is slow to import."""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

EMPTY = np.int64(-1)
"""Where a table of names has none; names are not negative."""
_FIRST_SLOTS = 1 << 12


def first_seen(names: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return [m] whether each name is there for the first time; names are from 0 to 2**63 - 1, [m]."""
    result: NDArray[np.bool_] = _first_seen(names)
    return result


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _first_seen(names: Any) -> Any:
    new = np.empty(len(names), np.bool_)
    table = np.full(_FIRST_SLOTS, EMPTY)
    used = 0
    for i in range(len(names)):
        slot = slot_of(table, names[i])
        new[i] = table[slot] == EMPTY
        if not new[i]:
            continue
        table[slot] = names[i]
        used += 1
        if 2 * used > len(table):
            larger = np.full(2 * len(table), EMPTY)
            for name in table:
                if name != EMPTY:
                    larger[slot_of(larger, name)] = name
            table = larger
    return new


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def slot_of(table: Any, name: Any) -> Any:
    """Return where a name is, or where it would go: open addressing by Fibonacci hashing (Knuth, TAOCP 6.4)."""
    mask = np.uint64(len(table) - 1)
    mixed = np.uint64(name) * np.uint64(0x9E3779B97F4A7C15)
    slot = (mixed ^ (mixed >> np.uint64(32))) & mask
    while table[slot] != EMPTY and table[slot] != name:
        slot = (slot + np.uint64(1)) & mask
    return slot
