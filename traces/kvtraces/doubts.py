"""What is doubtful of a log that can be read: one line each, of mistakes that home-made logs have."""

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvtraces.errors import MEND, BadRows
from kvtraces.log import Column, IntArray, offsets
from kvtraces.rows import Rows
from kvtraces.words import counted

SCHEMA = "traces/data/README.md"
"""Where the fields and their units are described."""
_EPOCH_S = (1e9, 4e9)
"""Dates from 2001 to 2096 in seconds; in ms they are weeks of 1970, or of a machine that has run for so long."""
MOST_BLOCKS = 1 << 20
"""So many of a log's blocks are held against each other: ids that are not chained show soon, and to look at all of a
large log's would take longer than to read it."""
_MOST_PER_S = 1000.0
"""Requests a second, beyond which times with fractions are seconds, most likely."""


def check_chains(batches: Sequence[Rows], block: int | None, bad: BadRows) -> list[str]:
    """Report rows that name a block twice, and drop them; return what is wrong where ids are not prefix-chained.

    Only full blocks count. A prompt whose ids stand for all that is before them cannot have one twice.
    """
    if block is None or (name := _followed_otherwise(batches, block)) is None:
        return []
    for rows in batches:
        _check_repeats(rows, block, bad)
    name = _followed_otherwise(batches, block)
    return [] if name is None else [_not_chained(batches, block, name)]


def _followed_otherwise(batches: Sequence[Rows], block: int) -> int | None:
    """Return a block that does not follow the same block always, among the log's first ones."""
    from kvtraces._chained import Followed  # noqa: PLC0415 - numba is loaded only to read

    left = min(MOST_BLOCKS, sum(len(rows.ids) for rows in batches if rows.counts is not None))
    followed = Followed(left)
    for rows in batches:
        if rows.counts is None:
            continue
        taken = int(np.searchsorted(np.cumsum(rows.counts), left, side="right"))
        name = followed.first_other(rows.ids, rows.counts[:taken], rows.input_tokens[:taken] // block)
        if name >= 0:
            return name
        if taken < len(rows):
            break
        left -= len(rows.ids)
    return None


def _check_repeats(rows: Rows, block: int, bad: BadRows) -> None:
    if rows.counts is None:
        return
    owner, place = _places(rows.counts)
    full = np.flatnonzero(place < (rows.input_tokens // block)[owner])
    order = full[np.lexsort((rows.ids[full], owner[full]))]
    here, there = order[:-1], order[1:]
    twice = here[(rows.ids[here] == rows.ids[there]) & (owner[here] == owner[there])]
    good = np.ones(len(rows), bool)
    wrong, first = np.unique(owner[twice], return_index=True)
    for row, one in zip(wrong.tolist(), twice[first].tolist(), strict=True):
        what = f"names block {rows.ids[one]} twice; an id stands for the whole prompt up to its block; {MEND}"
        bad.report(rows.error(row, "hash_ids", what))
        good[row] = False
    if not good.all():
        rows.keep(good)


def _not_chained(batches: Sequence[Rows], block: int, name: int) -> str:
    """Return what to say of a block that follows different ones: which, and where."""
    found: dict[int | None, str] = {}
    for rows in batches:
        if rows.counts is None:
            continue
        owner, place = _places(rows.counts)
        for at in np.flatnonzero((rows.ids == name) & (place < (rows.input_tokens // block)[owner])).tolist():
            before = int(rows.ids[at - 1]) if place[at] else None
            found.setdefault(before, f"{rows.path}:{rows.lines[owner[at]]}")
    (one, here), (other, there) = list(found.items())[:2]
    return (
        f"hash_ids must stand for the whole prompt up to their block, and these do not: block {name} "
        f"{_follows(one)} in {here} and {_follows(other)} in {there}; what is predicted of them is too good; "
        f"chain them as {SCHEMA} says"
    )


def _places(counts: IntArray) -> tuple[IntArray, IntArray]:
    """Return [m] of which row each id is, and its place in it."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - offsets(counts)[owner]


def _follows(before: int | None) -> str:
    return "begins a prompt" if before is None else f"follows block {before}"


def repeated_ids(ids: Column | None) -> list[str]:
    """Return what is doubtful of the column `request_id`: ids that several rows have."""
    if ids is None:
        return []
    seen: set[str] = set()
    again = [one for one in ids.tolist() if one and (one in seen or seen.add(one))]  # type: ignore[func-returns-value]
    if not again:
        return []
    have = "has a request_id" if len(again) == 1 else "have a request_id"
    return [
        f"{counted(len(again), 'row')} {have} that an earlier row has, {again[0]} first: is a recording there twice?"
    ]


def unit_of_time(timestamp_ms: NDArray[np.float64]) -> list[str]:
    """Return what is doubtful of a log's timestamps, [n]: that they are seconds, as it looks."""
    first = float(timestamp_ms[0])
    as_read = f"timestamps are in milliseconds ({SCHEMA}), and these look like seconds: "
    mend = "; if they are, multiply them by 1,000"
    if _EPOCH_S[0] <= first <= _EPOCH_S[1]:
        date = time.strftime("%Y-%m-%d", time.gmtime(first))
        return [f"{as_read}the first, {first:.16g}, is a time of {date} then{mend}"]
    span_s = 1e-3 * float(np.ptp(timestamp_ms))
    fractions = np.count_nonzero(timestamp_ms % 1)
    if 2 * fractions > len(timestamp_ms) and span_s and len(timestamp_ms) > _MOST_PER_S * span_s:
        rate = len(timestamp_ms) / span_s
        return [f"{as_read}most have fractions, and in ms they are {rate:,.0f} requests a second{mend}"]
    return []
