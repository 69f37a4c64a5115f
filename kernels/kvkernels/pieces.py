"""Cutting a transfer into pieces that fit a staging buffer, and the order to run them in.

A piece is a box of planes x chunks x blocks whose rows lie in staging as `[chunk][plane][block]`. Since a slot is
plane-major, each of its chunks is one contiguous range of its slot, so a piece needs one host copy a chunk (more where
the slot's arena pages are not adjacent).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from kvkernels.arena import Ints
from kvkernels.errors import LayoutError
from kvkernels.layouts import PagedLayout
from kvkernels.slots import SlotTable, merge_copies, ordinals

__all__ = [
    "CopyRanges",
    "PieceBatch",
    "PieceCopies",
    "StagedPiece",
    "copy_ranges",
    "load_pieces",
    "piece_batch",
    "piece_copies",
    "plane_groups",
    "store_pieces",
]


@dataclass(frozen=True, slots=True)
class StagedPiece:
    """Rows of `row_bytes` for these planes, chunks of the request and blocks of each chunk."""

    planes: range
    chunks: range
    blocks: range
    row_bytes: int

    @property
    def rows(self) -> int:
        """Rows in staging."""
        return len(self.planes) * len(self.chunks) * len(self.blocks)

    @property
    def chunk_bytes(self) -> int:
        """Contiguous bytes of each chunk's slot that this piece covers."""
        return len(self.planes) * len(self.blocks) * self.row_bytes


def store_pieces(layout: PagedLayout, chunks: int, planes: range, capacity: int) -> Iterator[StagedPiece]:
    """Chunk after chunk with as many planes as fit, for the longest contiguous copies out."""
    for run in _uniform_runs(layout, planes):
        for group in _fitting(layout, run, capacity):
            yield from _pieces(layout, group, chunks, capacity)


def load_pieces(
    layout: PagedLayout, chunks: int, planes: range, capacity: int, *, copy_bytes: int, group_bytes: int
) -> Iterator[StagedPiece]:
    """Layers in order, every chunk of one group of planes before the next group.

    `copy_bytes` is the length of one copy that makes groups grow no further: longer copies waste less of the bus,
    smaller groups let attention start sooner. The first and the last groups are the smallest: one layer each, or as
    many as make `group_bytes` over all chunks, since a small load is better in few steps than in fine ones.
    """
    for run in _uniform_runs(layout, planes):
        plane_bytes = layout.planes[run.start].row_bytes * layout.chunk_blocks
        fitting = max(1, capacity // plane_bytes)
        layer = len(layout.planes_of_layer(layout.planes[run.start].layer))
        unit = min(fitting, max(layer, -(-group_bytes // (plane_bytes * max(1, chunks)))))
        most = min(fitting, max(unit, -(-copy_bytes // plane_bytes)))
        for group in plane_groups(run, unit=unit, most=most):
            yield from _pieces(layout, group, chunks, capacity)


@dataclass(frozen=True, slots=True)
class PieceCopies:
    """The host copies of one piece: arena offsets, offsets in its staging buffer, lengths."""

    host: Ints
    staged: Ints
    length: Ints


@dataclass(frozen=True, slots=True)
class PieceBatch:
    """Some pieces, and the range of every chunk in each of them: what does not depend on where the chunks lie.

    `starts` are virtual (see `SlotTable`), `staged` offsets in the piece's staging buffer, `owner` the piece's place.
    """

    pieces: tuple[StagedPiece, ...]
    starts: Ints
    staged: Ints
    length: Ints
    owner: Ints


def piece_batch(layout: PagedLayout, pieces: Sequence[StagedPiece]) -> PieceBatch:
    """Lay several pieces out for `piece_copies`."""
    starts = layout.plane_starts()
    counts = np.array([len(piece.chunks) for piece in pieces], np.int64)
    owner = np.repeat(np.arange(len(pieces)), counts)
    ordinal = ordinals(counts)
    chunk = np.array([piece.chunks.start for piece in pieces], np.int64)[owner] + ordinal
    first = [starts[piece.planes.start] + piece.blocks.start * piece.row_bytes for piece in pieces]
    length = np.array([piece.chunk_bytes for piece in pieces], np.int64)[owner]
    virtual = chunk * layout.slot_bytes + np.array(first, np.int64)[owner]
    return PieceBatch(tuple(pieces), virtual, ordinal * length, length, owner)


@dataclass(frozen=True, slots=True)
class CopyRanges:
    """The host copies of several pieces: as of one, and where each piece's begin and the last one's end."""

    host: Ints
    staged: Ints
    length: Ints
    bounds: Ints


def copy_ranges(batch: PieceBatch, table: SlotTable, *, split_bytes: int) -> CopyRanges:
    """The copies of several pieces, resolved at once: a call a piece costs more than the pieces.

    No copy crosses a multiple of `split_bytes` in the arena.
    """
    found = table.resolve(batch.starts, batch.length)
    staged, owner = batch.staged[found.index] + found.within, batch.owner[found.index]
    heads, host, staged, length = merge_copies(found.offset, staged, found.length, split_bytes=split_bytes, owner=owner)
    return CopyRanges(host, staged, length, owner[heads].searchsorted(np.arange(len(batch.pieces) + 1)))


def piece_copies(batch: PieceBatch, table: SlotTable, *, split_bytes: int) -> list[PieceCopies]:
    """The copies of several pieces, piece by piece."""
    found = copy_ranges(batch, table, split_bytes=split_bytes)
    host, staged, length = found.host, found.staged, found.length
    return [PieceCopies(host[a:b], staged[a:b], length[a:b]) for a, b in pairwise(found.bounds.tolist())]


def plane_groups(planes: range, *, unit: int, most: int) -> Iterator[range]:
    """Split planes into groups that grow from `unit` to `most` and shrink again towards the end."""
    at = planes.start
    while at < planes.stop:
        done, left = at - planes.start, planes.stop - at
        size = min(most, max(unit, done), max(unit, left // 2), left)
        yield range(at, at + size)
        at += size


def _uniform_runs(layout: PagedLayout, planes: range) -> Iterator[range]:
    for _, same in groupby(planes, key=lambda index: layout.planes[index].row_bytes):
        run = list(same)
        yield range(run[0], run[-1] + 1)


def _fitting(layout: PagedLayout, run: range, capacity: int) -> Iterator[range]:
    """As few groups as hold the run with one chunk's planes of a group in the buffer, of even sizes."""
    most = max(1, capacity // (layout.planes[run.start].row_bytes * layout.chunk_blocks))
    count = -(-len(run) // most)
    size = -(-len(run) // count)
    for at in range(run.start, run.stop, size):
        yield range(at, min(at + size, run.stop))


def _pieces(layout: PagedLayout, group: range, chunks: int, capacity: int) -> Iterator[StagedPiece]:
    row_bytes = layout.planes[group.start].row_bytes
    plane_bytes = row_bytes * layout.chunk_blocks
    if row_bytes > capacity:
        raise LayoutError(f"a row of {row_bytes} bytes does not fit a staging buffer of {capacity}")
    every = range(layout.chunk_blocks)
    if plane_bytes > capacity:
        step = capacity // row_bytes
        for chunk in range(chunks):
            for first in range(0, layout.chunk_blocks, step):
                blocks = range(first, min(first + step, layout.chunk_blocks))
                yield StagedPiece(group, range(chunk, chunk + 1), blocks, row_bytes)
        return
    step = capacity // (plane_bytes * len(group))
    for chunk in range(0, chunks, step):
        yield StagedPiece(group, range(chunk, min(chunk + step, chunks)), every, row_bytes)
