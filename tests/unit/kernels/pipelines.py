"""Transfers by pieces with kernels of torch's, and what they are tested on."""

from functools import partial

import numpy as np
import torch

from kvkernels import HostArena
from kvkernels.cases import random_case, random_ids, random_slots
from kvkernels.cuda_batch import BatchTransfer
from kvkernels.reference import plane_views
from kvkernels.staged import StagedTransfer


class TorchMover:
    """Rows by torch indexing, in single bytes."""

    rejects = False

    def __init__(self, layout, tensors):
        self.views = [view.view(torch.uint8) for view in plane_views(layout, tensors)]
        self.blocks = layout.chunk_blocks

    def rows(self, ids, piece, staging):
        staged = staging[: piece.rows * piece.row_bytes].view(
            len(piece.chunks), len(piece.planes), len(piece.blocks), piece.row_bytes
        )
        for c, chunk in enumerate(piece.chunks):
            start = chunk * self.blocks
            for p, plane in enumerate(piece.planes):
                yield self.views[plane], ids[start + piece.blocks.start : start + piece.blocks.stop], staged[c, p]

    def gather(self, stream, ids, piece, staging, rejected):
        assert rejected is None
        stream.launch(partial(self.gather_now, ids, piece, staging))

    def scatter(self, stream, ids, piece, staging):
        stream.launch(partial(self.scatter_now, ids, piece, staging))

    def written(self, piece, *, gather):
        return None

    def gather_now(self, ids, piece, staging):
        for view, blocks, rows in self.rows(ids, piece, staging):
            rows.copy_(view[blocks])

    def scatter_now(self, ids, piece, staging):
        for view, blocks, rows in self.rows(ids, piece, staging):
            view[blocks[blocks >= 0]] = rows[blocks >= 0]


def staged(runtime, layout, tensors, arena, *, rows=3, buffers=2, **options):
    row = max(plane.row_bytes for plane in layout.planes)
    return StagedTransfer(
        layout,
        arena,
        runtime,
        TorchMover(layout, tensors),
        name="staged",
        staging_bytes=2 * buffers * rows * row,
        buffers=buffers,
        copy_bytes=row * 4,
        group_bytes=row,
        **options,
    )


def batched(runtime, layout, tensors, arena, **options):
    return BatchTransfer(layout, tensors, arena, runtime, **{"batch_rows": 2, "call_copies": 3, **options})


def setting(seed, chunks=2):
    rng = np.random.default_rng(seed)
    case = random_case(rng, block_tokens=16)
    slots, nbytes = random_slots(rng, case.layout, chunks)
    return case, random_ids(rng, case.layout, chunks), slots, HostArena(np.zeros(nbytes, np.uint8))


def stored_right(case, ids, slots, arena):
    size = case.layout.slot_bytes
    got = [np.concatenate([arena.array[o : o + n] for o, n in slot])[:size] for slot in slots]
    wanted = [case.slot(mine) for mine in ids.reshape(len(slots), -1)]
    return all(map(np.array_equal, got, wanted))


def loaded_right(case, empty, ids):
    return all(all(map(np.array_equal, empty.rows(b), case.rows(b))) for b in ids.tolist())
