"""Reading of logs: which format a file has, what its block size is, in which order its rows come."""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvtraces.doubts import check_chains, repeated_ids, unit_of_time
from kvtraces.errors import MEND, BadRows, LogError
from kvtraces.log import IntArray, Log, join_columns, offsets
from kvtraces.rows import Rows, leading
from kvtraces.schema import MAX_BLOCK_TOKENS
from kvtraces.sources import Progress, Stream, expand, read_pieces
from kvtraces.words import counted

CANDIDATES = tuple(1 << i for i in range(21))
"""Block sizes that are tried where a log does not give its own."""
_HEAD = 1 << 16

Reader = Callable[[Path, Iterator[bytes], BadRows], Iterator[Rows]]


@dataclass(frozen=True, slots=True)
class Format:
    """A format of logs, and how a file of it is known by its first bytes."""

    name: str
    looks_like: Callable[[bytes], bool]
    read: Reader


def _read_jsonl(path: Path, pieces: Iterator[bytes], bad: BadRows) -> Iterator[Rows]:
    from kvtraces.jsonl import read_jsonl  # noqa: PLC0415 - numba is loaded only to read

    return read_jsonl(path, pieces, bad)


def _read_session(path: Path, pieces: Iterator[bytes], bad: BadRows) -> Iterator[Rows]:
    from kvtraces.agent import read_session  # noqa: PLC0415 - as above

    return read_session(path, pieces, bad)


def _read_lengths(path: Path, pieces: Iterator[bytes], bad: BadRows) -> Iterator[Rows]:
    from kvtraces.lengths import read_lengths  # noqa: PLC0415 - few logs are CSV

    return read_lengths(path, pieces, bad)


def _looks_like_session(head: bytes) -> bool:
    return head.lstrip().startswith(b"{") and b'"requests"' in head and b'"input_length"' not in head


def _looks_like_csv(head: bytes) -> bool:
    first = head.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)[0]
    return re.match(rb'[\w" ]+,[\w" ,]+\r?$', first) is not None


FORMATS = (
    Format("coding-agent session", _looks_like_session, _read_session),
    Format("lengths", _looks_like_csv, _read_lengths),
    Format("JSONL", lambda head: True, _read_jsonl),
)
"""Tried in this order; what is nothing else is JSONL, whose reader says what is wrong with it."""


def read(
    paths: str | Path | Sequence[str | Path],
    *,
    block_tokens: int | None = None,
    skip_bad: bool = False,
    sort: bool = False,
    progress: Progress | None = None,
) -> Log:
    """Read one log from files, globs, folders and rotated sets, plain, gz or zst, of any known format.

    The block size is what the rows say (`block_size`); else `block_tokens`; else the one power of two for which every
    row has `len(hash_ids) == ceil(input_length / block)`. Only full blocks are kept. Rows are sorted by `seq` where
    they have it; else time must not run backwards within a recording. Several recordings are merged by `seq` where no
    two rows share one and time does not run backwards then, else by time, each in its own order; ties keep the order in
    which they were given. With `sort`, a log without `seq` is put in order of time, as one that was written in order of
    completion needs.

    With `skip_bad`, bad rows are left out and counted in the Log. `progress` is called with (bytes read, bytes in all).
    What is doubtful of a log that can be read is in `Log.doubts`.
    Raises LogError, one line that names file, line and field, for anything that is not a log.
    """
    if block_tokens is not None and not 1 <= block_tokens <= MAX_BLOCK_TOKENS:
        raise ValueError(f"--block-size must be from 1 to {MAX_BLOCK_TOKENS}, not {block_tokens}")
    bad = BadRows(skip_bad)
    streams = expand(paths)
    recordings = [_read_stream(stream, bad, advance) for stream, advance in _metered(streams, progress)]
    batches = [rows for recording in recordings for rows in recording]
    if not batches:
        raise _empty(streams, bad)
    block = _settle_block(batches, block_tokens, bad)
    for rows in batches:
        _check_counts(rows, block, bad)
    doubts = check_chains(batches, block, bad)
    by_time = sort and not any("seq" in rows.extra for rows in batches)
    for recording in () if by_time else recordings:
        _check_order(recording, bad)
    recordings = [recording for recording in recordings if any(map(len, recording))]
    if not recordings:
        raise _empty(streams, bad)
    log = _assemble(recordings, block, bad)
    if by_time:
        log = _in_time(log, doubts)
    doubts += [*unit_of_time(log.timestamp_ms), *repeated_ids(log.extra.get("request_id"))]
    return replace(log, doubts=tuple(doubts))


def _metered(
    streams: Sequence[Stream], progress: Progress | None
) -> Iterator[tuple[Stream, Callable[[int], None] | None]]:
    """Yield the streams, each with what its bytes are to be told to."""
    if progress is None:
        yield from ((stream, None) for stream in streams)
        return
    total = sum(file.stat().st_size for stream in streams for file in stream.files)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    yield from ((stream, advance) for stream in streams)


def _read_stream(stream: Stream, bad: BadRows, advance: Callable[[int], None] | None) -> list[Rows]:
    return [rows for file in stream.files for rows in _read_file(file, bad, advance) if len(rows)]


def _read_file(path: Path, bad: BadRows, advance: Callable[[int], None] | None) -> Iterator[Rows]:
    pieces = read_pieces(path, bad, advance)
    first = next(pieces, b"")
    if not first.strip():
        return
    found = next(one for one in FORMATS if one.looks_like(first[:_HEAD]))
    yield from found.read(path, _chain(first, pieces), bad)


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    del first
    yield from rest


def _empty(streams: Sequence[Stream], bad: BadRows) -> LogError:
    path = streams[0].files[0] if streams else Path()
    others = sum(len(stream.files) for stream in streams) - 1
    where = f"empty log: no requests in it{f' or the {others} files after it' if others > 0 else ''}"
    if bad.count:
        return LogError(
            path, None, None, f"{where}, {counted(bad.count, 'bad row')} left out; the first: {bad.messages[0]}"
        )
    return LogError(path, None, None, f"{where}; record some, or check the path")


def _settle_block(batches: Sequence[Rows], asked: int | None, bad: BadRows) -> int | None:
    """Return the block size of all rows, None if they have lengths alone; report rows that contradict it."""
    bare = [rows for rows in batches if rows.counts is None]
    if bare:
        if len(bare) < len(batches):
            raise LogError(bare[0].path, None, None, "has lengths alone, the other files block hashes; read them apart")
        return None
    given = next((int(size) for rows in batches for size in _given_sizes(rows)), None)
    if given is None:
        return asked or _infer_block(batches, bad)
    if asked is not None and asked != given:
        rows = next(rows for rows in batches if len(_given_sizes(rows)))
        what = f"is {given}, but --block-size {asked} was given; leave that out"
        raise rows.error(int(np.argmax(np.asarray(rows.block_size) > 0)), "block_size", what)
    return given


def _given_sizes(rows: Rows) -> IntArray:
    return np.zeros(0, np.int64) if rows.block_size is None else rows.block_size[rows.block_size > 0]


def _infer_block(batches: Sequence[Rows], bad: BadRows) -> int:
    """Return the one power of two for which every row has `ceil(input_length / block)` ids."""
    total = sum(map(len, batches))
    fits: dict[int, int] = {size: sum(int(_fits(rows, size).sum()) for rows in batches) for size in CANDIDATES}
    most = max(fits.values())
    best = [size for size in CANDIDATES if fits[size] == most]
    path = batches[0].path
    if most == total or (bad.skip and 2 * most > total):
        if len(best) == 1:
            return best[0]
        sizes = ", ".join(map(str, best if len(best) <= 6 else [*best[:5], "...", best[-1]]))
        raise LogError(path, None, "hash_ids", f"fit blocks of {sizes} tokens alike; say which with --block-size")
    if len(best) == 1 and 2 * most > total:
        rows = next(rows for rows in batches if not _fits(rows, best[0]).all())
        raise _wrong_count(rows, int(np.flatnonzero(~_fits(rows, best[0]))[0]), best[0])
    ranked = [size for size in sorted(fits, key=lambda size: -fits[size])[:3] if fits[size]]
    sizes = ", ".join(f"{size} ({fits[size]} of {total} rows)" for size in ranked) or "none fits any"
    what = f"no power of two is the block size of every row; best: {sizes}; say which it is with --block-size"
    raise LogError(path, None, "hash_ids", what)


def _fits(rows: Rows, size: int) -> NDArray[np.bool_]:
    fits: NDArray[np.bool_] = np.asarray(rows.counts) == -(-rows.input_tokens // size)
    return fits


def _wrong_count(rows: Rows, row: int, block: int) -> LogError:
    count = 0 if rows.counts is None else int(rows.counts[row])
    tokens = int(rows.input_tokens[row])
    expected = f"{-(-tokens // block)}"
    if rows.block_size is not None and tokens % block:
        expected = f"{tokens // block} or {expected}"
    return rows.error(
        row, "hash_ids", f"{count} ids where {tokens} tokens in blocks of {block} have {expected}; {MEND}"
    )


def _check_counts(rows: Rows, block: int | None, bad: BadRows) -> None:
    """Report rows of another block size or a wrong number of ids, and drop them."""
    if block is None or rows.counts is None:
        return
    good = np.ones(len(rows), bool)
    if rows.block_size is not None:
        for row in np.flatnonzero((rows.block_size != block) & (rows.block_size > 0)):
            size = int(rows.block_size[row])
            bad.report(rows.error(int(row), "block_size", f"is {size}, in other rows {block}; read them apart"))
            good[row] = False
    floor = rows.input_tokens // block
    right = (rows.counts == floor) | (rows.counts == -(-rows.input_tokens // block))
    for row in np.flatnonzero(good & ~right):
        bad.report(_wrong_count(rows, int(row), block))
    good &= right
    if rows.output_counts is not None:
        most = -(-(rows.input_tokens + rows.output_tokens) // block) - floor
        for row in np.flatnonzero(good & (rows.output_counts > most)):
            what = f"{rows.output_counts[row]} ids where prompt and output leave room for {most[row]}; {MEND}"
            bad.report(rows.error(int(row), "output_hash_ids", what))
        good &= rows.output_counts <= most
    if not good.all():
        rows.keep(good)


def _check_order(recording: Sequence[Rows], bad: BadRows) -> None:
    """Report rows out of order: time that runs backwards, `seq` in some rows only or twice. Drop them."""
    if not any("seq" in rows.extra for rows in recording):
        _check_times(recording, bad)
        return
    seen: set[int] = set()
    for rows in recording:
        good = _check_seq(rows, seen, bad)
        if not good.all():
            rows.keep(good)


def _check_times(recording: Sequence[Rows], bad: BadRows) -> None:
    """Report rows whose time runs backwards, or those that jump ahead of the others where these are fewer."""
    times = np.concatenate([np.zeros(0), *(rows.timestamp_ms for rows in recording)])
    before = np.maximum.accumulate(np.concatenate(([0.0], times)))[:-1]
    kept = times >= before
    if kept.all():
        return
    jumps = False
    if bad.skip:
        longest = _longest_in_order(times)
        jumps = bool(longest.sum() > kept.sum())
        kept = longest if jumps else kept
    done = 0
    for rows in recording:
        good = kept[done : done + len(rows)]
        for row in np.flatnonzero(~good).tolist():
            at, latest = times[done + row], before[done + row]
            what = f"{at:.16g} comes after {latest:.16g}: time runs backwards; sort the rows (--sort), or give them seq"
            told = f"{at:.16g} is out of order with most rows; sort them all (--sort)" if jumps else what
            bad.report(rows.error(row, "timestamp", told))
        done += len(rows)
        if not good.all():
            rows.keep(good)


def _in_time(log: Log, doubts: list[str]) -> Log:
    """Return a log in order of time; rows of one time keep theirs. How many were out of order is doubtful."""
    late = int(np.count_nonzero(log.timestamp_ms < np.maximum.accumulate(log.timestamp_ms)))
    if not late:
        return log
    doubts.append(f"sorted by timestamp: {counted(late, 'row')} of {len(log):,} came after a later one")
    return log.select(np.argsort(log.timestamp_ms, kind="stable"))


def _longest_in_order(times: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which rows are in the longest run of rows whose times never fall: the fewest are left out."""
    ends: list[float] = []  # the smallest time that a run of each length can end in, and the row of it
    rows: list[int] = []
    before = np.full(len(times), -1)
    for row, time in enumerate(times.tolist()):
        length = bisect_right(ends, time)
        before[row] = rows[length - 1] if length else -1
        ends[length : length + 1], rows[length : length + 1] = [time], [row]
    found = np.zeros(len(times), bool)
    row = rows[-1]
    while row >= 0:
        found[row] = True
        row = int(before[row])
    return found


def _check_seq(rows: Rows, seen: set[int], bad: BadRows) -> NDArray[np.bool_]:
    good = np.ones(len(rows), bool)
    seqs = rows.extra.get("seq", np.full(len(rows), np.nan)).tolist()
    for row, seq in enumerate(seqs):
        if seq != seq:  # noqa: PLR0124 - NaN: the row has none
            bad.report(rows.error(row, "seq", f"is missing, though other rows of the recording have it; {MEND}"))
        elif seq in seen:
            bad.report(rows.error(row, "seq", f"{seq:.0f} is there twice; keep each recording under a name of its own"))
        else:
            seen.add(seq)
            continue
        good[row] = False
    return good


def _assemble(recordings: Sequence[Sequence[Rows]], block: int | None, bad: BadRows) -> Log:
    """Return the log of rows known to be good, in order; takes the block ids out of them as it goes."""
    batches = [rows for recording in recordings for rows in recording]
    inputs = np.concatenate([rows.input_tokens for rows in batches])
    full = np.zeros(len(inputs), np.int64) if block is None else inputs // block
    starts = offsets(full)
    blocks = np.empty(starts[-1], np.int64)
    done = 0
    for rows in batches:
        n = len(rows)
        if rows.counts is not None:
            blocks[starts[done] : starts[done + n]] = leading(rows.ids, rows.counts, full[done : done + n])
            rows.ids = blocks[:0]
        done += n
    output_starts, output_blocks = _outputs(batches, block)
    extra = join_columns([rows.extra for rows in batches], [len(rows) for rows in batches])
    log = Log(
        block_tokens=block,
        timestamp_ms=np.concatenate([rows.timestamp_ms for rows in batches]),
        input_tokens=inputs,
        output_tokens=np.concatenate([rows.output_tokens for rows in batches]),
        starts=starts,
        blocks=blocks,
        output_starts=output_starts,
        output_blocks=output_blocks,
        extra=extra,
        skipped=bad.count,
        skipped_messages=tuple(bad.messages),
    )
    order = _order(log, [sum(map(len, recording)) for recording in recordings])
    return log if order is None else log.select(order)


def _outputs(batches: Sequence[Rows], block: int | None) -> tuple[IntArray | None, IntArray | None]:
    """Return the output's full blocks of all rows; None if no row has any recorded."""
    if block is None or all(rows.output_counts is None for rows in batches):
        return None, None
    counts, ids = [], []
    for rows in batches:
        if rows.output_counts is None:
            counts.append(np.zeros(len(rows), np.int64))
            continue
        room = (rows.input_tokens + rows.output_tokens) // block - rows.input_tokens // block
        wanted = np.minimum(rows.output_counts, room)
        counts.append(wanted)
        ids.append(leading(rows.output_ids, rows.output_counts, wanted))
    return offsets(np.concatenate(counts)), np.concatenate(ids)


def _order(log: Log, lengths: Sequence[int]) -> IntArray | None:
    """Return the order of the rows of recordings of the given lengths; None if they are in it."""
    seq = log.extra.get("seq")
    if len(lengths) == 1:
        return None if seq is None else _sorted(seq)
    # By time, but never against a recording's own order: where its clock was set back, the latest time stands.
    within, ends = [], offsets(np.array(lengths, np.int64))
    for first, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        own = None if seq is None or np.isnan(seq[first]) else seq[first:end]
        within.append(first + (np.arange(end - first) if own is None else np.argsort(own, kind="stable")))
    rows = np.concatenate(within)
    latest = np.concatenate([np.maximum.accumulate(log.timestamp_ms[part]) for part in within])
    if seq is not None and not np.isnan(seq).any() and len(np.unique(seq)) == len(seq):
        # Of one server, or of two of which one counted on where the other was: where time runs backwards, of two.
        by_seq = np.argsort(seq[rows])
        if bool((np.diff(latest[by_seq]) >= 0).all()):
            return rows[by_seq]
    return rows[np.argsort(latest, kind="stable")]


def _sorted(seq: NDArray[np.float64]) -> IntArray | None:
    return None if bool((seq[1:] >= seq[:-1]).all()) else np.argsort(seq, kind="stable")
