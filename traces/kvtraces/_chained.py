"""Whether block ids stand for whole prefixes. Loaded when asked for, because numba is slow to import."""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from kvtraces._seen import EMPTY, slot_of

Longs = NDArray[np.int64]


class Followed:
    """Which block each block follows, over any number of batches of requests, of `blocks` blocks at most.

    Ids that stand for the whole prompt up to their block follow the same one always.
    """

    def __init__(self, blocks: int) -> None:
        """Know no block."""
        self._names = np.full(2 << blocks.bit_length(), EMPTY)  # at most half full
        self._before = np.empty_like(self._names)

    def first_other(self, ids: Longs, counts: Longs, full: Longs) -> int:
        """Return the first block that follows another one than before, or -1.

        Args:
            ids: [m] block ids, request after request.
            counts: [n] how many of them each request has.
            full: [n] how many of these are full blocks, which alone count.
        """
        return int(_first_other(self._names, self._before, ids, counts, full))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _first_other(names: Any, befores: Any, ids: Any, counts: Any, full: Any) -> Any:
    first = 0
    for row in range(len(counts)):
        before = EMPTY  # a prompt's first block follows none
        for place in range(first, first + full[row]):
            name = ids[place]
            slot = slot_of(names, name)
            if names[slot] == EMPTY:
                names[slot] = name
                befores[slot] = before
            elif befores[slot] != before:
                return name
            before = name
        first += counts[row]
    return EMPTY
