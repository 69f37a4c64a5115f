"""Parsing of many JSON lists of integers at once."""

from typing import Any

import numba
import numpy as np

from kvtraces._lists import ParsedLists

_LIMIT = np.int64(2**63 - 1)
_TENTH = _LIMIT // 10
_LAST = _LIMIT % 10
_ZERO, _NINE, _COMMA, _OPEN, _CLOSE = ord("0"), ord("9"), ord(","), ord("["), ord("]")
_SPACE, _TAB, _CR, _LF = ord(" "), ord("\t"), ord("\r"), ord("\n")


def parse_lists(text: bytes, rows: int) -> ParsedLists:
    """See `kvtraces._lists.parse_lists`."""
    result: Any = _parse(np.frombuffer(text, np.uint8), rows)
    return result[0], result[1], int(result[2])


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _parse(text: Any, rows: int) -> Any:
    commas = 0
    for byte in text:
        commas += byte == _COMMA
    ids = np.empty(commas + 1, np.int64)  # commas between lists included, so that every list may have its last id
    counts = np.empty(rows, np.int64)
    end, pos, used = len(text), 0, 0
    for row in range(rows):
        first = used
        if pos >= end or text[pos] != _OPEN:
            return ids, counts, row
        pos = _skip_blanks(text, pos + 1)
        while text[pos] != _CLOSE:
            value, pos = _integer(text, pos)
            if value < 0:
                return ids, counts, row
            ids[used] = value
            used += 1
            pos = _skip_blanks(text, pos)
            if text[pos] == _COMMA:
                pos = _skip_blanks(text, pos + 1)
            elif text[pos] != _CLOSE:
                return ids, counts, row
        counts[row] = used - first
        pos += 2  # the bracket, and the comma that joins the next list
    return ids[:used], counts, -1


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _integer(text: Any, pos: int) -> Any:
    """Return (value, where it ends); the value is -1 for what is no integer from 0 to 2**63 - 1."""
    value = np.int64(0)
    first = pos
    while _ZERO <= text[pos] <= _NINE:
        digit = np.int64(text[pos]) - _ZERO
        if value > _TENTH or (value == _TENTH and digit > _LAST):
            return np.int64(-1), pos
        value = value * 10 + digit
        pos += 1
    return (value, pos) if pos > first else (np.int64(-1), pos)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _skip_blanks(text: Any, pos: int) -> int:
    while text[pos] == _SPACE or text[pos] == _TAB or text[pos] == _CR or text[pos] == _LF:
        pos += 1
    return pos
