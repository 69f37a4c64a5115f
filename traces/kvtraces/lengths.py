"""Reader of logs of lengths alone, as CSV: Azure's and BurstGPT's public logs. They drive load, never a hit ratio."""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from pathlib import Path
from typing import Protocol

import numpy as np

from kvtraces.errors import MEND, BadRows, LogError
from kvtraces.rows import Rows
from kvtraces.schema import MAX_MS, MAX_TOKENS

_BATCH = 200_000


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of one such format, by their names in the header."""

    time: str
    input_tokens: str
    output_tokens: str
    to_ms: Callable[[str], float]
    """Reads a time, from any origin; raises ValueError."""


def _date_ms(text: str) -> float:
    day, _, fraction = text.strip().partition(".")  # Azure writes seven digits, fromisoformat takes six
    digits = len(fraction) - len(fraction.lstrip("0123456789"))
    moment = datetime.fromisoformat(day + fraction[digits:])
    origin = datetime(1970, 1, 1, tzinfo=moment.tzinfo)
    return (moment - origin).total_seconds() * 1000 + float(f"0.{fraction[:digits]}0") * 1000


class _Lines(Protocol):
    """What csv.reader returns."""

    line_num: int

    def __iter__(self) -> Iterator[list[str]]: ...

    def __next__(self) -> list[str]: ...


FORMATS = (
    Columns("TIMESTAMP", "ContextTokens", "GeneratedTokens", _date_ms),  # Azure LLM inference 2023, 2024
    Columns("Timestamp", "Request tokens", "Response tokens", lambda text: float(text) * 1000),  # BurstGPT, in s
    Columns("timestamp", "input_length", "output_length", float),  # a Mooncake log without its hashes, in ms
)


def find_columns(header: list[str]) -> Columns | None:
    """Return the format whose columns a CSV header has."""
    names = {name.strip() for name in header}
    return next((one for one in FORMATS if {one.time, one.input_tokens, one.output_tokens} <= names), None)


def read_lengths(path: Path, pieces: Iterator[bytes], bad: BadRows) -> Iterator[Rows]:
    """Yield the rows of one CSV file. Raises LogError, or reports to `bad`, for the first row that is not one."""
    lines = csv.reader(_lines(pieces))
    try:
        yield from _read(path, lines, bad)
    except csv.Error as error:
        raise LogError(path, lines.line_num, "row", f"is not CSV ({error}); mend the file") from error


def _read(path: Path, lines: "_Lines", bad: BadRows) -> Iterator[Rows]:
    header = [name.strip() for name in next(lines)]
    columns = find_columns(header)
    if columns is None:
        known = "; ".join(f"{one.time}, {one.input_tokens}, {one.output_tokens}" for one in FORMATS)
        raise LogError(path, 1, "header", f"no known columns; a CSV of lengths has one of: {known}")
    names = (columns.time, columns.input_tokens, columns.output_tokens)
    where = [header.index(name) for name in names]
    readers: tuple[Callable[[str], float], ...] = (columns.to_ms, int, int)
    limits = (MAX_MS, MAX_TOKENS + 1, MAX_TOKENS + 1)
    batch: list[tuple[float, ...]] = []
    for cells in lines:
        if not cells:
            continue
        values = []
        for name, column, reader, limit in zip(names, where, readers, limits, strict=True):
            wrong, value = _read_cell(cells, column, reader, limit)
            if wrong:
                bad.report(LogError(path, lines.line_num, name, f"{wrong}; {MEND}"))
                break
            values.append(value)
        else:
            batch.append((lines.line_num, *values))
        if len(batch) == _BATCH:
            yield _rows(path, batch)
            batch = []
    if batch:
        yield _rows(path, batch)


def _read_cell(cells: list[str], column: int, reader: Callable[[str], float], limit: float) -> tuple[str, float]:
    """Return what is wrong with a cell, if anything, and its value."""
    if column >= len(cells) or not cells[column].strip():
        return "is missing", 0
    try:
        value = reader(cells[column])
    except ValueError:
        return f"cannot be read, got {cells[column]!r:.40}", 0
    if not isfinite(value) or not 0 <= value < limit:
        return f"expected from 0 to below {limit:.0f}, got {cells[column]!r:.40}", 0
    return "", value


def _lines(pieces: Iterator[bytes]) -> Iterator[str]:
    for i, piece in enumerate(pieces):
        yield from io.StringIO(piece.decode("utf-8-sig" if i == 0 else "utf-8", errors="replace"), newline="")


def _rows(path: Path, batch: list[tuple[float, ...]]) -> Rows:
    lines, times, inputs, outputs = zip(*batch, strict=True)
    return Rows(
        path=path,
        lines=np.array(lines, np.int32),
        timestamp_ms=np.array(times, np.float64),
        input_tokens=np.array(inputs, np.int64),
        output_tokens=np.array(outputs, np.int64),
        counts=None,
        ids=np.zeros(0, np.int64),
    )
