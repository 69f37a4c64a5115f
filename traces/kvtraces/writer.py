"""Writing of logs, a row at a time as a recorder does, or whole; and reading them back as rows."""

import gzip
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from kvtraces.errors import MEND, BadRows, LogError
from kvtraces.log import Log
from kvtraces.schema import INTEGERS, NUMBERS, TEXTS, Row
from kvtraces.sources import read_pieces, rotated_set, rotation, rotation_number

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_MOST_WAITING_BYTES = 1 << 20


class Writer:
    """Appends rows to a log, in JSONL, compressed as its suffix says.

    A file is never written to twice nor renamed: a recording goes on in `name.1.jsonl`, `name.2.jsonl`, ... once
    `max_bytes` (uncompressed) are full, or where `name.jsonl` is there already, from a run that may have crashed in
    the middle of a row. Readers take `name.jsonl` for the whole set, in that order. Where writing fails, what was
    waiting is lost and counted, the file ends behind the last row before it (a compressed one cut short, as by a
    crash), and a later write opens the next one.

    Files are made with `mode`. Raises ValueError for a path with another suffix or a `max_bytes` below 1; OSError
    where writing fails.
    """

    def __init__(self, path: str | Path, *, max_bytes: int | None = None, mode: int = 0o666) -> None:
        self.path = Path(path)
        if not self.path.name.endswith(SUFFIXES):
            raise ValueError(f"a log is written to {', '.join(SUFFIXES)}, not {self.path.name}")
        if number := rotation_number(self.path):
            raise ValueError(f"{self.path.name} would be read as file {number} of another log: leave the .{number} out")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, not {max_bytes}")
        self.max_bytes = max_bytes
        self.rows = 0
        """Rows handed to the operating system."""
        self.lost = 0
        """Rows that could not be."""
        self._mode = mode
        used = [rotation_number(file) for file in rotated_set(self.path)]
        self._number = max(0, *used) + 1 if used else 0
        self._encode = msgspec.json.Encoder().encode
        self._open = ExitStack()
        self._files: tuple[Any, ...] = ()
        self._bytes = 0
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._whole_bytes = 0
        """Of the file, as it lies on disk, up to the last row that was handed over."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self) -> None:
        """Raise OSError where the next file cannot be made; leaves nothing."""
        path = rotation(self.path, self._number)
        with ExitStack() as stack:
            _create(path, self._mode, stack)
        path.unlink()

    def write(self, row: Row) -> None:
        """Append one row, which waits for `flush` or for many."""
        line = self._encode(row) + b"\n"
        if self._bytes and self.max_bytes is not None and self._bytes + len(line) > self.max_bytes:
            self.close()
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        self._bytes += len(line)
        if self._waiting_bytes > _MOST_WAITING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand what was written to the operating system; a compressed file is whole only once closed."""
        if not self._waiting:
            return
        lines, self._waiting, self._waiting_bytes = self._waiting, [], 0
        try:
            if not self._files:
                self._files = _create(rotation(self.path, self._number), self._mode, self._open)
                self._number += 1
            self._files[0].write(b"".join(lines))
            for file in self._files:
                file.flush()
            self._whole_bytes = self._files[-1].tell()
        except OSError:
            self.lost += len(lines)
            self._give_up()
            raise
        self.rows += len(lines)

    def close(self) -> None:
        """End the file being written. A later write opens the next one."""
        try:
            self.flush()
            self._open.close()
        finally:
            self._files = ()
            self._bytes = self._whole_bytes = 0

    def _give_up(self) -> None:
        """End a file in which writing failed, without what there may be of the rows that are lost."""
        with suppress(OSError):
            self._open.close()
        if self._files:
            path = rotation(self.path, self._number - 1)
            with suppress(OSError):
                if self._whole_bytes:
                    os.truncate(path, self._whole_bytes)
                else:
                    path.unlink()
                    self._number -= 1
        self._files = ()
        self._bytes = self._whole_bytes = 0


def write(log: Log, path: str | Path, *, max_bytes: int | None = None) -> None:
    """Write a whole log as JSONL, compressed as the suffix says. Raises what `Writer` and `rows_of` raise."""
    with Writer(path, max_bytes=max_bytes) as writer:
        for row in rows_of(log):
            writer.write(row)


def rows_of(log: Log) -> Iterator[Row]:
    """Yield a log's rows, with its block size in each. Raises ValueError for a log of lengths alone."""
    if log.block_tokens is None:
        raise ValueError("a log of lengths alone has no rows of this schema: they need block hashes")
    optional = {name: log.extra[name].tolist() for name in (*NUMBERS, *TEXTS) if name in log.extra}
    times, starts = log.timestamp_ms.tolist(), log.starts.tolist()
    inputs, outputs = log.input_tokens.tolist(), log.output_tokens.tolist()
    output_starts = None if log.output_starts is None else log.output_starts.tolist()
    for i in range(len(log)):
        row = Row(
            timestamp=times[i],
            input_length=inputs[i],
            output_length=outputs[i],
            hash_ids=log.blocks[starts[i] : starts[i + 1]].tolist(),
            block_size=log.block_tokens,
        )
        for name, values in optional.items():
            if values[i] == values[i] and values[i] != "":
                setattr(row, name, int(values[i]) if name in INTEGERS else values[i])
        if output_starts is not None and log.output_blocks is not None:
            row.output_hash_ids = log.output_blocks[output_starts[i] : output_starts[i + 1]].tolist()
        yield row


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield the rows of one JSONL file as they lie in it, each checked against the schema alone. Raises LogError."""
    decoder = msgspec.json.Decoder(Row)
    number = 0
    for piece in read_pieces(Path(path), BadRows(skip=False)):
        for line in piece.removesuffix(b"\n").split(b"\n"):
            number += 1
            if not line.strip():
                continue
            try:
                yield decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise LogError(path, number, "row", f"{error}; {MEND}") from error


class _Sequenced(msgspec.Struct):
    seq: int | None = None


def next_seq(path: str | Path) -> int:
    """Return one more than the largest `seq` of a rotated set, where a recorder goes on; 0 for none.

    Rows that a crash cut short are passed over. Raises LogError for a file that cannot be read.
    """
    decoder = msgspec.json.Decoder(_Sequenced)
    largest = -1
    for file in rotated_set(Path(path)):
        for piece in read_pieces(file, BadRows(skip=True)):
            for line in piece.removesuffix(b"\n").split(b"\n"):
                try:
                    seq = decoder.decode(line).seq
                except (msgspec.DecodeError, UnicodeDecodeError):
                    continue
                largest = max(largest, -1 if seq is None else seq)
    return largest + 1


def _create(path: Path, mode: int, stack: ExitStack) -> tuple[Any, ...]:
    """Open a new file; return what to write to and what to flush, in that order."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    raw = stack.enter_context(os.fdopen(fd, "wb"))
    if path.suffix == ".gz":
        return stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0)), raw
    if path.suffix == ".zst":
        import zstandard  # noqa: PLC0415 - loaded when such a log is written

        compressor = zstandard.ZstdCompressor(level=9)
        return stack.enter_context(compressor.stream_writer(raw, closefd=False)), raw
    return (raw,)
