"""Packed slots on one CUDA GPU. For kernels_h100.py; rates are of unpacked bytes, and `ratio` may exceed 1."""

import time
from statistics import median

import numpy as np
import torch
from kernels_h100_beside import beside_matmul, small_copies_beside

from kvkernels.cases import CASE_FORMS
from kvkernels.cuda_streams import CudaRuntime
from kvkernels.packed_cases import packable_case, packed_round_trip_faults
from kvkernels.packing import packed_layout
from kvkernels.pieces import StagedPiece

MIB = 1 << 20
PAGE = 2 * MIB
PROGRAMS = (4, 8, 16)
SERVES = 8


class Packed:
    """The bench's cache with values that can be packed, and packed slots in its arena."""

    def __init__(self, bench):
        from kvkernels.triton_pack import TritonPackMover, triton_pack_transfer  # noqa: PLC0415  (Triton may be absent)

        self.bench = bench
        self.mover, self.transfer = TritonPackMover, triton_pack_transfer
        self.layout = packed_layout(bench.layout)
        slot = self.layout.slot_bytes
        self.adjacent = [[(chunk * slot, slot)] for chunk in range(bench.chunks)]
        each = -(-slot // PAGE)
        pages = bench.rng.permutation(bench.nbytes // PAGE)[: each * bench.chunks].reshape(bench.chunks, each)
        self.scattered = [[(int(page) * PAGE, PAGE) for page in mine] for mine in pages]

    def fill(self):
        """Gaussian values of channels whose scales differ by up to 2^7, and what a store says of them."""
        for layer in self.bench.cache:
            scales = torch.exp2(torch.rand(layer.shape[-1], device=layer.device) * 7).to(layer.dtype)
            layer.normal_().mul_(scales)
        transfer = self.make()(self.bench.cache)
        handle = transfer.store(self.bench.ids, self.adjacent)
        handle.wait()
        transfer.close()
        if handle.rejected():
            raise AssertionError(f"{len(handle.rejected())} chunks were rejected")
        counts = self.counts()
        return {
            "slot_bytes": self.layout.slot_bytes,
            "share": round(self.layout.slot_bytes / self.bench.layout.slot_bytes, 4),
            "escapes_per_row": {"median": int(np.median(counts)), "max": int(counts.max())},
            "row_bytes": [self.bench.layout.planes[0].row_bytes, self.layout.planes[0].row_bytes],
        }

    def counts(self):
        """The escapes of every row of the first chunk's slot."""
        row = self.layout.planes[0].row_bytes
        slot = np.frombuffer(self.bench.mapping, np.uint8)[: self.layout.slot_bytes].reshape(-1, row)
        return slot[:, :4].copy().view(np.int32)[:, 0]

    def make(self, **options):
        """A builder of the backend over a cache."""
        runtime = CudaRuntime(self.bench.device)
        return lambda cache: self.transfer(self.bench.layout, cache, self.bench.arena, runtime, **options)

    def kernels_alone(self, programs):
        """Packing and unpacking between the cache and 64 MiB of staging, without the bus."""
        bench, row = self.bench, self.layout.planes[0].row_bytes
        mover = self.mover(bench.layout, bench.cache, programs=programs)
        stream = bench.runtime.stream(urgent=False)
        chunks = 64 * MIB // (row * bench.layout.chunk_blocks)
        piece = StagedPiece(range(1), range(chunks), range(bench.layout.chunk_blocks), row)
        staging = bench.runtime.staging(piece.rows * row)
        ids = torch.from_numpy(bench.ids).to(bench.device)
        marks = bench.runtime.pinned(4 * chunks).view(np.int32)
        marks[:] = 0
        torch.cuda.synchronize()
        nbytes = piece.rows * bench.layout.planes[0].row_bytes

        def seconds(work):
            times = []
            for _ in range(8):
                began = time.perf_counter()
                work()
                stream.record().synchronize()
                times.append(time.perf_counter() - began)
            return median(times[2:])

        pack = seconds(lambda: mover.gather(stream, ids, piece, staging, marks))
        unpack = seconds(lambda: mover.scatter(stream, ids, piece, staging))
        return {"pack_gbps": round(nbytes / pack / 1e9, 1), "unpack_gbps": round(nbytes / unpack / 1e9, 1)}

    def random_shapes(self, budget_s):
        """Random caches of every form, of which some blocks cannot be packed, for so long."""
        began = time.perf_counter()
        checked, faults = 0, []

        def small(layout, tensors, arena):
            row = max(plane.row_bytes for plane in packed_layout(layout).planes)
            options = {"staging_bytes": 6 * row * int(self.bench.rng.integers(1, 12)), "group_bytes": row}
            return self.transfer(layout, tensors, arena, self.bench.runtime, copy_bytes=4 * row, **options)

        while checked < len(CASE_FORMS) or time.perf_counter() - began < budget_s:
            form = CASE_FORMS[checked % len(CASE_FORMS)]
            case = packable_case(self.bench.rng, form=form, spoilt=0.1 * (checked % 2), device="cuda")
            found = packed_round_trip_faults(case, small, small, self.bench.rng, allocate=self.bench.runtime.pinned)
            faults += [f"{form}: {fault}" for fault in found]
            checked += 1
            if time.perf_counter() - began > 3 * budget_s:
                break
        if faults:
            raise AssertionError(f"{len(faults)} faults in {checked} caches: {faults[:5]}")
        return {"caches": checked, "faults": 0, "seconds": round(time.perf_counter() - began, 1)}


def packed_sections(bench, arguments):
    """All of it; the bench's cache holds other values afterwards."""
    section = bench.section
    built = []
    section("triton_pack", lambda: built.append(Packed(bench)) or {})
    if not built:
        return
    (packed,) = built
    section("triton_pack cache", packed.fill)
    section("triton_pack random shapes", lambda: packed.random_shapes(arguments.check_seconds))
    for n in PROGRAMS:
        section(f"triton_pack kernels alone, {n} programs", lambda n=n: packed.kernels_alone(n))
    for n in PROGRAMS:
        make = packed.make(programs=n)
        section(f"triton_pack, 32000 tokens, {n} programs", lambda m=make: bench.whole(m, packed.adjacent))
        section(
            f"triton_pack, {n} programs, beside a matmul",
            lambda m=make, rounds=60 if n == SERVES else 20: beside_matmul(
                bench, m, slots=packed.adjacent, rounds=rounds, products=30
            ),
        )
    section("triton_pack, small copies beside", lambda: small_copies_beside(bench, packed.make(), packed.scattered))
    section("triton_pack, 32000 tokens, pages of 2 MiB", lambda: bench.whole(packed.make(), packed.scattered))
    section(
        "triton_pack, 2048 tokens, pages of 2 MiB", lambda: bench.whole(packed.make(), packed.scattered, tokens=2048)
    )
