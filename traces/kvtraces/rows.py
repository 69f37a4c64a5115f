"""Rows as a reader yields them: checked one by one, before block size, order and full blocks are settled."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kvtraces.errors import LogError
from kvtraces.log import Column, FloatArray, IntArray, offsets


@dataclass(slots=True, kw_only=True, eq=False)
class Rows:
    """Some consecutive rows of one file, as columns: n rows, m block ids in all of them together."""

    path: Path
    lines: NDArray[np.int32]
    """[n] where each row lies in its file, from 1."""
    timestamp_ms: FloatArray
    input_tokens: IntArray
    output_tokens: IntArray
    counts: IntArray | None
    """[n] how many of `ids` each row has; None for a format of lengths alone."""
    ids: IntArray
    """[m] block ids, a trailing partial block's included."""
    output_counts: IntArray | None = None
    output_ids: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    block_size: IntArray | None = None
    """[n] as the rows give it, 0 where one does not; None where none does."""
    extra: dict[str, Column] = field(default_factory=dict)
    labels: Sequence[str] = ()
    """[n] what to put before a field's name in messages, for formats whose rows are not lines."""

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lines)

    def error(self, row: int, name: str, message: str) -> LogError:
        """Return what to say about field `name` of a row."""
        label = self.labels[row] if self.labels else ""
        return LogError(self.path, int(self.lines[row]), label + name, message)

    def keep(self, good: NDArray[np.bool_]) -> None:
        """Drop the rows that are not `good`, [n]."""
        self.ids = self.ids if self.counts is None else self.ids[np.repeat(good, self.counts)]
        self.counts = None if self.counts is None else self.counts[good]
        if self.output_counts is not None:
            self.output_ids = self.output_ids[np.repeat(good, self.output_counts)]
            self.output_counts = self.output_counts[good]
        self.block_size = None if self.block_size is None else self.block_size[good]
        self.labels = [label for label, ok in zip(self.labels, good.tolist(), strict=True) if ok] if self.labels else ()
        self.extra = {name: column[good] for name, column in self.extra.items()}
        self.lines, self.timestamp_ms = self.lines[good], self.timestamp_ms[good]
        self.input_tokens, self.output_tokens = self.input_tokens[good], self.output_tokens[good]


def leading(ids: IntArray, counts: IntArray, wanted: IntArray) -> IntArray:
    """Return the first `wanted[i]` of each row's `counts[i]` ids, end to end; wanted <= counts, [n] each."""
    if (wanted == counts).all():
        return ids
    excess = counts - wanted
    kept = np.ones(len(ids), bool)
    ends = offsets(counts)[1:]
    while len(ends):  # one round where at most a trailing partial block goes
        ends, excess = ends[excess > 0], excess[excess > 0]
        kept[ends - excess] = False
        excess = excess - 1
    return ids[kept]
