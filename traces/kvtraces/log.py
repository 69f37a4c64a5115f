"""A request log in memory: one row a request, as columns."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Column = np.ndarray[Any, Any]
"""An optional column: float64 with NaN, or numpy's variable-width strings with "", where a row lacks the field."""

TEXT = np.dtypes.StringDType()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Log:
    """A recorded request log in the order in which the cache saw its requests.

    Shapes: n requests, m full blocks in all of them together.
    """

    block_tokens: int | None
    """Tokens in a block; None for a log of lengths alone, which drives load but has no hit ratio."""
    timestamp_ms: FloatArray
    """[n] arrival times. They never fall, unless a recording gives the order itself (`seq`)."""
    input_tokens: IntArray
    """[n] prompt lengths, the trailing partial block included."""
    output_tokens: IntArray
    """[n] output lengths."""
    starts: IntArray
    """[n + 1]; the full blocks of request i are `blocks[starts[i]:starts[i + 1]]`."""
    blocks: IntArray
    """[m] names of the full prompt blocks: a name stands for the block and everything before it."""
    output_starts: IntArray | None = None
    """[n + 1]; request i's blocks that end in its output are `output_blocks[output_starts[i]:output_starts[i + 1]]`."""
    output_blocks: IntArray | None = None
    """Names of the full blocks that follow a prompt's full blocks once its output is appended; None if not recorded."""
    extra: dict[str, Column] = field(default_factory=dict)
    """Optional columns by schema name, [n] each: NaN or an empty string where a row lacks the field."""
    skipped: int = 0
    """Bad rows left out."""
    skipped_messages: tuple[str, ...] = ()
    """What was wrong with the first few of them."""
    doubts: tuple[str, ...] = ()
    """What a reader of any figure of it should know, a line each: see `kvtraces.doubts`."""

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.timestamp_ms)

    def select(self, rows: Column | slice | Sequence[int]) -> "Log":
        """Return the log of some rows, in the order given: indices, a boolean mask or a slice."""
        picked = np.arange(len(self))[rows]
        starts, blocks = _pick(self.starts, self.blocks, picked)
        output_starts, output_blocks = None, None
        if self.output_starts is not None and self.output_blocks is not None:
            output_starts, output_blocks = _pick(self.output_starts, self.output_blocks, picked)
        return replace(
            self,
            timestamp_ms=self.timestamp_ms[picked],
            input_tokens=self.input_tokens[picked],
            output_tokens=self.output_tokens[picked],
            starts=starts,
            blocks=blocks,
            output_starts=output_starts,
            output_blocks=output_blocks,
            extra={name: column[picked] for name, column in self.extra.items()},
        )

    def head(self, n: int) -> "Log":
        """Return the log of the first `n` requests."""
        return self.select(slice(n))

    def chunks(self, chunk_tokens: int) -> tuple[IntArray, IntArray]:
        """Return the full chunks of every prompt as `(starts, names)`, shaped like `starts` and `blocks`.

        Chunk j of a request is named by its last block, so every multiple of the native block reads off one log.
        Raises ValueError for a log of lengths alone, or a chunk size that is no multiple of its block.
        """
        k = self._blocks_per_chunk(chunk_tokens)
        full = np.diff(self.starts)
        return _coarsen(self.starts, self.blocks, np.zeros_like(full), full, k)

    def coarsen(self, chunk_tokens: int) -> "Log":
        """Return the log as if its block had `chunk_tokens` tokens, the output's blocks included.

        Raises ValueError as `chunks` does.
        """
        starts, blocks = self.chunks(chunk_tokens)
        output_starts, output_blocks = None, None
        if self.output_starts is not None and self.output_blocks is not None:
            full = np.diff(self.starts)
            output_starts, output_blocks = _coarsen(
                self.output_starts,
                self.output_blocks,
                full,
                full + np.diff(self.output_starts),
                chunk_tokens // (self.block_tokens or chunk_tokens),
            )
        return replace(
            self,
            block_tokens=chunk_tokens,
            starts=starts,
            blocks=blocks,
            output_starts=output_starts,
            output_blocks=output_blocks,
        )

    @staticmethod
    def concatenate(logs: Sequence["Log"]) -> "Log":
        """Return one log of all rows, log after log; a column that some lack is NaN or empty there.

        Raises ValueError for no logs, or for blocks of different sizes.
        """
        if not logs:
            raise ValueError("there are no logs to concatenate")
        sizes = {log.block_tokens for log in logs}
        if len(sizes) > 1:
            raise ValueError(f"logs of different block sizes cannot be joined: {sorted(map(str, sizes))}")
        outputs = any(log.output_starts is not None for log in logs)
        return Log(
            block_tokens=logs[0].block_tokens,
            timestamp_ms=np.concatenate([log.timestamp_ms for log in logs]),
            input_tokens=np.concatenate([log.input_tokens for log in logs]),
            output_tokens=np.concatenate([log.output_tokens for log in logs]),
            starts=offsets(np.concatenate([np.diff(log.starts) for log in logs])),
            blocks=np.concatenate([log.blocks for log in logs]),
            output_starts=offsets(np.concatenate([log._output_counts() for log in logs])) if outputs else None,
            output_blocks=np.concatenate([log.output_blocks for log in logs if log.output_blocks is not None])
            if outputs
            else None,
            extra=join_columns([log.extra for log in logs], [len(log) for log in logs]),
            skipped=sum(log.skipped for log in logs),
            skipped_messages=tuple(message for log in logs for message in log.skipped_messages),
            doubts=tuple(doubt for log in logs for doubt in log.doubts),
        )

    def _output_counts(self) -> IntArray:
        return np.zeros(len(self), np.int64) if self.output_starts is None else np.diff(self.output_starts)

    def _blocks_per_chunk(self, chunk_tokens: int) -> int:
        if self.block_tokens is None:
            raise ValueError("this log has lengths alone: without block hashes it has no chunks and no hit ratio")
        if chunk_tokens < 1 or chunk_tokens % self.block_tokens:
            raise ValueError(
                f"a chunk of {chunk_tokens} tokens is no multiple of the log's block of {self.block_tokens} tokens"
            )
        return chunk_tokens // self.block_tokens


def offsets(counts: IntArray) -> IntArray:
    """Return [n + 1] starts of runs of the given lengths, [n]."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def join_columns(tables: Sequence[dict[str, Column]], lengths: Sequence[int]) -> dict[str, Column]:
    """Return optional columns end to end; where a table lacks one, NaN or "" stands in for each of its rows."""
    dtypes = {name: column.dtype for table in tables for name, column in table.items()}
    joined = {}
    for name, dtype in dtypes.items():
        absent = np.nan if dtype.kind == "f" else ""
        parts = [
            table[name] if name in table else np.full(length, absent, dtype)
            for table, length in zip(tables, lengths, strict=True)
        ]
        joined[name] = np.concatenate(parts)
    return joined


def _pick(starts: IntArray, values: IntArray, rows: IntArray) -> tuple[IntArray, IntArray]:
    """Return the runs of `rows`, end to end, and their starts."""
    counts = np.diff(starts)[rows]
    picked = offsets(counts)
    where = np.repeat(starts[:-1][rows] - picked[:-1], counts)
    where += np.arange(len(where))
    return picked, values[where]


def _coarsen(starts: IntArray, names: IntArray, first: IntArray, end: IntArray, k: int) -> tuple[IntArray, IntArray]:
    """Return the names of the chunks of k blocks that end in blocks [first, end) of each chain, whose names are given.

    `starts` is where each chain's block `first` lies in `names`.
    """
    if k == 1:
        return starts, names
    first_chunk = first // k
    counts = end // k - first_chunk
    coarse = offsets(counts)
    chunk = np.arange(coarse[-1]) - np.repeat(coarse[:-1] - first_chunk, counts)
    return coarse, names[np.repeat(starts[:-1] - first, counts) + (chunk + 1) * k - 1]
