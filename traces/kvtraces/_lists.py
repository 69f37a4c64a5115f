"""Lists of block ids: a few are parsed by msgspec, many by a compiled kernel, which is faster and slow to import."""

from itertools import chain

import msgspec
import numpy as np

from kvtraces.log import IntArray

_FEW_BYTES = 8 << 20  # numba's import takes as long as msgspec does for about twice that
_NOT_PLAIN = (b".", b"e", b"E", b"-")  # 1.0, 1e3 and -0 are integers to some

ParsedLists = tuple[IntArray, IntArray, int]


def parse_lists(text: bytes, rows: int) -> ParsedLists:
    """Parse `rows` JSON lists joined by commas, each known to be valid JSON but perhaps no list of integers.

    Returns (ids [m], counts [rows], bad): `bad` is the first row that is not a list of integers from 0 to 2**63 - 1,
    -1 if there is none; with one, the other two are of no use.
    """
    if len(text) < _FEW_BYTES and not any(sign in text for sign in _NOT_PLAIN):
        try:
            lists = msgspec.json.decode(b"[" + text + b"]", type=list[list[int]])
            counts = np.fromiter(map(len, lists), np.int64, len(lists))
            return np.fromiter(chain.from_iterable(lists), np.int64, int(counts.sum())), counts, -1
        except (msgspec.ValidationError, OverflowError):
            pass  # the kernel says where
    from kvtraces._digits import parse_lists as parse_many  # noqa: PLC0415 - slow to import

    return parse_many(text, rows)
