"""Reader of JSONL logs: our own and Mooncake's.

Rows are decoded a piece of the file at a time; only a piece with something wrong in it is decoded line by line, to
name the line. The block ids, most of a log's bytes, are kept as raw text and parsed for a whole piece at once, in a
thread of its own, because neither the kernel for long pieces nor reading holds the interpreter's lock.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvtraces._lists import ParsedLists, parse_lists
from kvtraces.errors import MEND, BadRows, LogError
from kvtraces.log import TEXT, Column, IntArray
from kvtraces.rows import Rows
from kvtraces.schema import NUMBERS, TEXTS, BlockId, Row

_RAW: dict[str, tuple[Any, ...]] = {"hash_ids": (msgspec.Raw,), "output_hash_ids": (msgspec.Raw, None)}


def _raw_fields(*, required: bool) -> list[Any]:
    """Return the schema's fields, or the required ones alone, with the lists of block ids left as text."""
    found: list[Any] = []
    for field in msgspec.structs.fields(Row):
        default = () if field.required else (field.default,)
        if field.required or not required:
            found.append((field.name, *_RAW.get(field.name, (field.type, *default))))
    return found


_RawRow: Any = msgspec.defstruct("RawRow", _raw_fields(required=False), kw_only=True, gc=False)
_MooncakeRow: Any = msgspec.defstruct("MooncakeRow", _raw_fields(required=True), forbid_unknown_fields=True, gc=False)
"""A row that has nothing but what every row must have: most public logs, and twice as fast."""
_NO_IDS = np.zeros(0, np.int64)
_BOM = b"\xef\xbb\xbf"


def read_jsonl(path: Path, pieces: Iterator[bytes], bad: BadRows) -> Iterator[Rows]:
    """Yield the rows of one file. Raises LogError, or reports to `bad`, for the first row that is not one."""
    decoder = _Decoder(path, bad)
    with ThreadPoolExecutor(max_workers=1) as pool:
        pending: tuple[list[Any], NDArray[np.int32], Future[ParsedLists]] | None = None
        for piece in pieces:
            rows, lines = decoder.decode(piece)
            task = pool.submit(parse_lists, _joined(rows), len(rows))
            if pending is not None:
                yield _columns(path, bad, *pending)
            pending = rows, lines, task
        if pending is not None:
            yield _columns(path, bad, *pending)


def explain(error: Exception, line: bytes) -> tuple[str, str]:
    """Return (field, what is wrong) for an error that msgspec raised over a row's text."""
    text = str(error)
    if not isinstance(error, msgspec.ValidationError):
        what = text.removeprefix("JSON is malformed: ")
        return "row", "is cut short" if "truncated" in what else f"is not JSON ({what})"
    missing = re.match(r"Object missing required field `(.*?)`(?: - at `\$\.?(.*)`)?$", text)
    if missing:
        return ".".join(part for part in (missing[2], missing[1]) if part), "is missing"
    what, _, place = text.replace("`", "").partition(" - at $")
    field = place.lstrip(".")
    what = what[:1].lower() + what[1:].replace(" | ", " or ")
    if not field or ", got" in what:
        return field or "row", what
    try:
        return field, f"{what}, got {_shown(line, field)}"
    except (msgspec.DecodeError, UnicodeDecodeError) as malformed:  # further on in the same row
        return explain(malformed, line)


class _Decoder:
    """Turns pieces of one file into raw rows and their line numbers."""

    def __init__(self, path: Path, bad: BadRows) -> None:
        self.path = path
        self.bad = bad
        self.next_line = 1
        self.mooncake: Any = msgspec.json.Decoder(_MooncakeRow)
        self.full: Any = msgspec.json.Decoder(_RawRow)
        self.fast = self.mooncake

    def decode(self, piece: bytes) -> tuple[list[Any], NDArray[np.int32]]:
        if self.next_line == 1:
            piece = piece.removeprefix(_BOM)
        breaks = int(np.count_nonzero(np.frombuffer(piece, np.uint8) == ord("\n")))  # four times as fast as bytes.count
        count = breaks + (not piece.endswith(b"\n"))
        first, self.next_line = self.next_line, self.next_line + count
        rows = self._decode_whole(piece)
        if rows is not None and len(rows) == count:
            return rows, np.arange(first, first + count, dtype=np.int32)
        return self._decode_lines(piece, first)

    def _decode_whole(self, piece: bytes) -> list[Any] | None:
        """Return the piece's rows; None if it must be read line by line."""
        while True:
            try:
                rows: list[Any] = self.fast.decode_lines(piece)
            except (msgspec.DecodeError, UnicodeDecodeError):
                if self.fast is self.full:
                    return None
                self.fast = self.full  # a row has optional fields, and then the rest are likely to
            else:
                return rows

    def _decode_lines(self, piece: bytes, first: int) -> tuple[list[Any], NDArray[np.int32]]:
        rows, lines = [], []
        for number, line in enumerate(piece.split(b"\n"), first):
            if not line.strip():
                continue
            try:
                row = self.full.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                field, what = explain(error, line)
                self.bad.report(LogError(self.path, number, field, f"{what}; {MEND}"))
                continue
            rows.append(row)
            lines.append(number)
        return rows, np.array(lines, np.int32)


def _columns(path: Path, bad: BadRows, rows: list[Any], lines: NDArray[np.int32], task: Future[ParsedLists]) -> Rows:
    """Return raw rows as columns, once `task` has parsed the prompts' block ids."""
    ids, counts, wrong = task.result()
    output_ids, output_counts, wrong_output = _parse_outputs(rows)
    if wrong >= 0 or wrong_output >= 0:
        rows, lines = _with_good_ids(path, bad, rows, lines)
        ids, counts, _ = parse_lists(_joined(rows), len(rows))
        output_ids, output_counts, _ = _parse_outputs(rows)
    return Rows(
        path=path,
        lines=lines,
        timestamp_ms=np.array([row.timestamp for row in rows], np.float64),
        input_tokens=np.array([row.input_length for row in rows], np.int64),
        output_tokens=np.array([row.output_length for row in rows], np.int64),
        counts=counts,
        ids=ids,
        output_counts=output_counts,
        output_ids=output_ids,
        **_optional(rows),
    )


def _joined(rows: Sequence[Any]) -> bytes:
    return b",".join([row.hash_ids for row in rows])


def _parse_outputs(rows: Sequence[Any]) -> tuple[IntArray, IntArray | None, int]:
    if not _is_full(rows) or not any(_has_outputs(row) for row in rows):
        return _NO_IDS, None, -1
    lists = [row.output_hash_ids if _has_outputs(row) else b"[]" for row in rows]
    return parse_lists(b",".join(lists), len(rows))


def _has_outputs(row: Any) -> bool:
    return row.output_hash_ids is not None and bytes(row.output_hash_ids) != b"null"


def _is_full(rows: Sequence[Any]) -> bool:
    return bool(rows) and type(rows[0]) is _RawRow


def _optional(rows: Sequence[Any]) -> dict[str, Any]:
    """Return the optional columns that at least one row has, and the block sizes."""
    if not _is_full(rows):
        return {}
    sizes = list(map(attrgetter("block_size"), rows))
    block_size = None if _empty(sizes) else np.array([size or 0 for size in sizes], np.int64)
    extra: dict[str, Column] = {}
    for name in NUMBERS:
        values = list(map(attrgetter(name), rows))
        if not _empty(values):
            extra[name] = np.array([np.nan if value is None else value for value in values], np.float64)
    for name in TEXTS:
        values = list(map(attrgetter(name), rows))
        if not _empty(values):
            extra[name] = np.array(["" if value is None else value for value in values], TEXT)
    return {"block_size": block_size, "extra": extra}


def _empty(values: list[Any]) -> bool:
    return values.count(None) == len(values)


_ID_LIST: Any = msgspec.json.Decoder(list[BlockId])


def _with_good_ids(
    path: Path, bad: BadRows, rows: list[Any], lines: NDArray[np.int32]
) -> tuple[list[Any], NDArray[np.int32]]:
    """Return the rows whose block ids are what they should be; report the others."""
    good = []
    for i, row in enumerate(rows):
        lists = {"hash_ids": row.hash_ids}
        if _is_full(rows) and _has_outputs(row):
            lists["output_hash_ids"] = row.output_hash_ids
        for name, raw in lists.items():
            try:
                _ID_LIST.decode(raw)
            except msgspec.DecodeError as error:
                field, what = explain(error, bytes(raw))
                bad.report(LogError(path, int(lines[i]), name + field.removeprefix("row"), f"{what}; {MEND}"))
                break
        else:
            good.append(i)
    return [rows[i] for i in good], lines[good]


def _shown(line: bytes, field: str) -> str:
    """Return the value of a field as the row writes it, shortened."""
    value = line
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", field):
        if index:
            value = bytes(msgspec.json.decode(value, type=list[msgspec.Raw])[int(index)])
        else:
            value = bytes(msgspec.json.decode(value, type=dict[str, msgspec.Raw])[key])
    shown = value.decode(errors="replace")
    return shown if len(shown) <= 40 else shown[:37] + "..."
