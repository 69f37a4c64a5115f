"""Transfers by pieces with kernels of torch's, and what they are tested on."""

import mmap
from functools import partial

import numpy as np
import pytest
import torch

from kvkernels import HostArena, describe
from kvkernels.cases import random_case, random_ids, random_slots
from kvkernels.cuda_batch import BatchTransfer
from kvkernels.reference import plane_views
from kvkernels.staged import StagedTransfer

NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which older Pythons have no name for


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


def faults_of_blocks_far_apart(make, *, slot_bytes_of=lambda layout: layout.slot_bytes):
    """What comes back wrong over blocks of three gigabytes, of which few pages are ever touched."""
    blocks, stride = 8, (3 << 30) + 512
    try:
        memory = mmap.mmap(-1, blocks * stride, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    except OSError as error:
        pytest.skip(f"no room for {blocks * stride} bytes of addresses: {error}")
    base = torch.from_numpy(np.frombuffer(memory, np.uint8)).view(torch.bfloat16)
    tensor = torch.as_strided(base, (blocks, 16, 2, 64), (stride // 2, 128, 64, 1))
    ids, others = np.array([7, 1, 3, 6]), np.array([5, 2, 4, 0])
    for block in ids:
        tensor[block] = torch.randn(16, 2, 64).to(torch.bfloat16)
    layout = describe([tensor], num_blocks=blocks, block_tokens=16, chunk_tokens=32, block_dim=0)
    size = slot_bytes_of(layout)
    transfer = make(layout, [tensor], HostArena(np.zeros(2 * size, np.uint8)))
    slots = [[(0, size)], [(size, size)]]
    stored = transfer.store(ids, slots)
    stored.wait()
    transfer.load(slots, others).wait()
    transfer.close()
    pairs = zip(ids.tolist(), others.tolist(), strict=True)
    wrong = [pair for pair in pairs if not torch.equal(*(tensor[block].view(torch.int16) for block in pair))]
    return wrong, stored.rejected()
