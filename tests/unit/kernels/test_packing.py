# ruff: noqa: E402  (skipped before its imports where torch is absent)
"""Packed rows: torch against plain Python, Triton's interpreter against torch, and transfers of both."""

import re
import struct
from dataclasses import replace
from itertools import accumulate, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from pipelines import faults_of_blocks_far_apart

from kvkernels import HostArena, LayoutError, RequestError, describe
from kvkernels.cases import CASE_FORMS, random_ids
from kvkernels.choose import UnpackableError, best_backend, measure
from kvkernels.packed_cases import count_escapes, fill, packable_case, packed_round_trip_faults, rejected_chunks
from kvkernels.packing import PackedRow, packable, packed_layout
from kvkernels.reference import ReferenceTransfer
from kvkernels.reference_pack import PackMover, pack_rows, reference_pack_transfer, unpack_rows
from kvkernels.registered import BounceTransfer
from kvkernels.staged import StagedTransfer
from kvkernels.streams import HostRuntime

KINDS = ("bits", "gauss", "scaled", "zeros", "denormal", "equal", "special", "edge")


def naive_pack(row):
    """The format, value after value; and the number of escapes."""
    values = struct.unpack(f"<{len(row) // 2}H", row)
    n = len(values)
    sizes = [4, 4 * (n // 64), n // 128, n // 2, n]
    _, _, bases, codes, rest, end = accumulate((-(-size // 16) * 16 for size in sizes), initial=0)
    packed, escapes = bytearray(end), []
    for place, bits in enumerate(values):
        vector, j = divmod(place, 128)
        of_vector = [(one >> 7) & 255 for one in values[vector * 128 : vector * 128 + 128]]
        base = packed[bases + vector] = max(max(of_vector) - 15, 0)
        exponent = of_vector[j]
        code = max(exponent - base, 0)
        if exponent and not code:
            escapes.append(place << 16 | bits)
        packed[codes + vector * 64 + j % 64] |= code << 4 * (j // 64)
        packed[rest + place] = (bits >> 15) << 7 | bits & 127
    struct.pack_into("<i", packed, 0, len(escapes))
    for slot, entry in enumerate(escapes[: n // 64]):
        struct.pack_into("<I", packed, 16 + 4 * slot, entry)
    return bytes(packed), len(escapes)


def values(rng, kind, n):
    """So many bf16 values, as int16."""
    normal = torch.from_numpy(rng.standard_normal(n).astype(np.float32))
    if kind == "scaled":
        normal *= torch.from_numpy(2.0 ** rng.integers(0, 9, 128).astype(np.float32)).repeat(n // 128)
    bits = normal.to(torch.bfloat16).view(torch.int16).numpy().copy()
    anything = rng.integers(-(1 << 15), 1 << 15, n).astype(np.int16)
    some = rng.random(n) < 0.005
    match kind:
        case "bits":
            return anything
        case "zeros":
            return np.where(rng.random(n) < 0.5, np.int16(0), np.int16(-(1 << 15)))
        case "denormal":  # among others, of which zeros must not be
            return np.where(rng.random(n) < 0.5, anything & np.int16(-32641), bits)
        case "equal":
            return np.full(n, anything[0])
        case "special":
            return np.where(some, anything | np.int16(0x7F80), bits)
        case "edge":  # about as many escapes as fit, the vectors' largest exponents being 255
            exponents = np.where(rng.random(n) < 1 / 64, 240, rng.integers(241, 256, n))
            exponents[::128] = 255
            return ((anything & np.int16(-32641)) | (exponents << 7)).astype(np.int16)
    return bits


def as_rows(rng, kinds, n):
    return torch.from_numpy(np.stack([values(rng, kind, n) for kind in kinds])).view(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), vectors=st.integers(1, 9), kinds=st.lists(st.sampled_from(KINDS), max_size=8))
def test_rows_come_back_bit_for_bit_or_are_refused(seed, vectors, kinds):
    n = 128 * vectors
    kinds = kinds or ["bits"]
    rows = as_rows(np.random.default_rng(seed), kinds, n)
    packed, counts = pack_rows(rows)
    assert packed.shape == (len(kinds), PackedRow(n).nbytes)
    back = unpack_rows(packed, 2 * n)
    for row, one, count, got in zip(rows, packed, counts.tolist(), back, strict=True):
        wanted, escapes = naive_pack(row.numpy().tobytes())
        assert (one.numpy().tobytes(), count) == (wanted, escapes)
        assert torch.equal(got, row) or count > n // 64
    assert counts.tolist() == [count_escapes(row.numpy()) for row in rows]


@given(pattern=st.binary(min_size=256, max_size=256))
def test_any_vector_of_few_escapes_comes_back(pattern):
    rows = torch.frombuffer(bytearray(pattern), dtype=torch.uint8)[None]
    packed, counts = pack_rows(rows)
    assert counts.item() > 2 or torch.equal(unpack_rows(packed, 256), rows)


@pytest.mark.parametrize("values_", [65536, 32768, 128])
def test_the_largest_and_smallest_rows(values_):
    row = torch.ones(1, values_, dtype=torch.bfloat16).view(torch.uint8)
    row.view(torch.int16)[0, [0, -1]] = torch.tensor([1 << 7, -32640], dtype=torch.int16)  # exponent 1: the least
    packed, counts = pack_rows(row)
    assert counts.item() == 2
    assert torch.equal(unpack_rows(packed, 2 * values_), row)


def test_channels_of_very_different_scales_fit():
    rng = np.random.default_rng(5)
    rows = as_rows(rng, ["scaled"] * 32, 32768)
    packed, counts = pack_rows(rows)
    assert 0 < counts.min() <= counts.max() <= 512
    assert torch.equal(unpack_rows(packed, 65536), rows)


def test_what_was_not_packed_is_unpacked_within_its_row():
    rows = torch.from_numpy(np.random.default_rng(2).integers(0, 256, (64, PackedRow(1024).nbytes), dtype=np.uint8))
    assert unpack_rows(rows, 2048).shape == (64, 2048)


def test_the_packed_size():
    row = PackedRow.of(65536)
    assert (row.nbytes, row.capacity, row.escapes, row.bases, row.codes, row.rest) == (
        51472,
        512,
        16,
        2064,
        2320,
        18704,
    )
    for row_bytes in (0, 255, 384, 131072 + 256):
        with pytest.raises(LayoutError):
            PackedRow.of(row_bytes)


def cache(dtype=torch.bfloat16, tokens=16, dim=64):
    tensors = [torch.zeros(8, tokens, 2, dim, dtype=dtype) for _ in range(3)]
    return describe(tensors, num_blocks=8, block_tokens=tokens, chunk_tokens=2 * tokens, block_dim=0)


def test_layouts():
    layout = cache()
    packed = packed_layout(layout)
    assert packable(layout)
    assert [plane.row_bytes for plane in packed.planes] == [PackedRow.of(4096).nbytes] * 3
    assert [(p.offset, p.block_stride, p.layer) for p in packed.planes] == [
        (p.offset, p.block_stride, p.layer) for p in layout.planes
    ]
    assert packed.fingerprint() != layout.fingerprint()
    assert packed.fingerprint().endswith("/packed-4")
    assert packed.slot_bytes < 0.8 * layout.slot_bytes
    unpackable = [cache(torch.float16), cache(torch.uint8), cache(dim=20, tokens=17), cache(tokens=1024)]
    for other in unpackable:
        assert not packable(other)
        with pytest.raises(LayoutError, match="not packable"):
            packed_layout(other)


def drawn(seed, form=None, spoilt=0.0):
    rng = np.random.default_rng(seed)
    return packable_case(rng, form=form, spoilt=spoilt), rng


def pipeline(rng, layout):
    row = max(plane.row_bytes for plane in packed_layout(layout).planes)
    return {"staging_bytes": 6 * row * int(rng.integers(1, 12)), "copy_bytes": 4 * row, "group_bytes": row}


def reference_pack(rng, runtime=None, **options):
    def make(layout, tensors, arena):
        chosen = {**pipeline(rng, layout), **options}
        return reference_pack_transfer(layout, tensors, arena, runtime or HostRuntime(), **chosen)

    return make


@pytest.mark.parametrize("form", CASE_FORMS)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), spoilt=st.sampled_from([0.0, 0.3]))
def test_transfers_of_packed_slots(form, seed, spoilt):
    case, rng = drawn(seed, form, spoilt)
    assert packed_round_trip_faults(case, reference_pack(rng), reference_pack(rng), rng) == []


@pytest.mark.parametrize("form", CASE_FORMS)
def test_some_planes(form):
    case, rng = drawn(8, form, 0.2)
    for layer in range(case.layout.num_layers):
        planes = case.layout.planes_of_layer(layer)
        assert packed_round_trip_faults(case, reference_pack(rng), reference_pack(rng), rng, planes=planes) == []


def test_loads_equal_those_of_plain_slots():
    """The same request through packed slots and through the reference's."""
    case, rng = drawn(9, "cross_layer")
    layout, packed = case.layout, packed_layout(case.layout)
    chunks = layout.num_blocks // layout.chunk_blocks
    ids = random_ids(rng, layout, chunks)
    caches = []
    for slot_bytes, make in ((layout.slot_bytes, ReferenceTransfer), (packed.slot_bytes, reference_pack(rng))):
        arena = HostArena(np.zeros(chunks * slot_bytes, np.uint8))
        slots = [[(i * slot_bytes, slot_bytes)] for i in range(chunks)]
        stored = make(layout, case.tensors, arena).store(ids, slots)
        stored.wait()
        assert stored.rejected() == ()
        caches.append(case.emptied())
        make(layout, caches[-1].tensors, arena).load(slots, ids).wait()
    for plain, unpacked in zip(*(cache.memory for cache in caches), strict=True):
        assert torch.equal(plain.view(torch.uint8), unpacked.view(torch.uint8))


def test_the_rejected_are_named():
    case, rng = drawn(2, "joined")
    layout = replace(case.layout, chunk_blocks=2)
    packed = packed_layout(layout)
    row = case.memory[0][5]
    row.view(torch.int16).copy_(torch.arange(row.numel()).to(torch.int16).view(row.shape) << 7)  # every exponent
    arena = HostArena(np.zeros(3 * packed.slot_bytes, np.uint8))
    slots = [[(i * packed.slot_bytes, packed.slot_bytes)] for i in range(3)]
    transfer = reference_pack(rng)(layout, case.tensors, arena)
    handles = [transfer.store(ids, slots) for ids in ([0, 1, 2, 3, 4, 5], [5, 0, 2, 3, 1, 5], [0, 1, 2, 3, 4, 6])]
    assert [handle.rejected() for handle in handles] == [(2,), (0, 2), ()]
    assert transfer.store([], []).rejected() == ()
    assert transfer.load(slots, [0, 1, 2, 3, 4, 6]).rejected() == ()
    plain = HostArena(np.zeros(layout.slot_bytes, np.uint8))
    stored = ReferenceTransfer(layout, case.tensors, plain).store([4, 5], [[(0, layout.slot_bytes)]])
    assert stored.rejected() == ()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_order_that_events_allow(lazy_runtime, seed):
    case, rng = drawn(seed, None, 0.2)
    make = reference_pack(rng, lazy_runtime(seed), buffers=2)
    assert packed_round_trip_faults(case, make, make, rng) == []


class PartlyPinned(HostArena):
    """An arena whose first bytes are pinned."""

    def __init__(self, buffer, pinned_bytes):
        super().__init__(buffer)
        self._pinned_bytes = pinned_bytes

    def pinned(self, offsets, lengths):
        return not len(offsets) or int((offsets + lengths).max()) <= self._pinned_bytes


@pytest.mark.parametrize("seed", range(6))
def test_bounced_chunks_are_rejected_by_their_own_places(seed):
    case, rng = drawn(seed, "planes_nhd", 0.1)
    layout = case.layout
    packed = packed_layout(layout)
    chunks = layout.num_blocks // layout.chunk_blocks
    ids = random_ids(rng, layout, chunks)
    order = rng.permutation(chunks).tolist()
    slots = [[(place * packed.slot_bytes, packed.slot_bytes)] for place in order]
    arena = PartlyPinned(np.zeros(chunks * packed.slot_bytes, np.uint8), chunks // 3 * packed.slot_bytes)
    runtime = HostRuntime()

    def bounced(tensors):
        inner = reference_pack(rng)(layout, tensors, arena)
        return BounceTransfer(inner, arena, runtime, bounce_bytes=4 * packed.slot_bytes)

    source = bounced(case.tensors)
    handle = source.store(ids, slots)
    handle.wait()
    assert handle.done()
    rejected = handle.rejected()
    assert rejected == rejected_chunks(case, ids)
    good = [chunk for chunk in range(chunks) if chunk not in rejected]
    loaded = ids.reshape(chunks, -1)[good].ravel()
    empty = case.emptied()
    target = bounced(empty.tensors)
    handle = target.load([slots[i] for i in good], loaded)
    handle.wait()
    assert handle.rejected() == ()
    assert all(all(map(np.array_equal, empty.rows(b), case.rows(b))) for b in loaded.tolist())
    source.close()
    target.close()


def test_the_choice_packs_and_leaves_the_cache_as_it_was():
    case, rng = drawn(3, "joined")
    packed = packed_layout(case.layout)
    before = [memory.clone().view(torch.uint8) for memory in case.memory]
    arena = HostArena(np.full(packed.slot_bytes, 9, np.uint8))
    choice = best_backend(case.layout, case.tensors, arena, packed=True, scratch_bytes=3 * packed.slot_bytes)
    assert (arena.array == 9).all()
    assert all(torch.equal(m.view(torch.uint8), old) for m, old in zip(case.memory, before, strict=True))
    assert choice.transfer.layout == packed
    assert choice.transfer.name == choice.profile["backend"] == "reference_pack"
    assert choice.profile["layout"] == packed.fingerprint()
    assert choice.profile["slot_bytes"] == packed.slot_bytes
    assert all(rate > 0 for _, rate in choice.profile["curves"]["reference_pack"]["load"])
    ids = np.arange(case.layout.chunk_blocks)
    choice.transfer.store(ids, [[(0, packed.slot_bytes)]]).wait()
    empty = case.emptied()
    reference_pack(rng)(case.layout, empty.tensors, arena).load([[(0, packed.slot_bytes)]], ids).wait()
    assert all(all(map(np.array_equal, empty.rows(b), case.rows(b))) for b in ids.tolist())


def test_a_cache_that_cannot_be_packed_is_served_and_left_as_it_was():
    case, _ = drawn(3, "joined", 1.0)
    packed = packed_layout(case.layout)
    before = [memory.clone().view(torch.uint8) for memory in case.memory]
    arena = HostArena(np.zeros(packed.slot_bytes, np.uint8))
    choice = best_backend(case.layout, case.tensors, arena, packed=True)
    assert all(torch.equal(m.view(torch.uint8), old) for m, old in zip(case.memory, before, strict=True))
    assert "cannot be packed" in choice.profile["curves"]["reference_pack"]["error"]
    assert choice.profile["backend"] == "reference_pack"
    fill(case, np.random.default_rng(1))
    handle = choice.transfer.store(range(case.layout.chunk_blocks), [[(0, packed.slot_bytes)]])
    handle.wait()
    assert handle.rejected() == ()
    fill(case, np.random.default_rng(1), spoilt=1.0)
    with pytest.raises(UnpackableError):
        measure(choice.transfer, [1])


def test_no_choice_for_what_is_not_packable():
    tensors = [torch.zeros(8, 16, 2, 64, dtype=torch.float16)]
    layout = describe(tensors, num_blocks=8, block_tokens=16, chunk_tokens=16, block_dim=0)
    with pytest.raises(LayoutError, match="not packable"):
        best_backend(layout, tensors, HostArena(np.zeros(8, np.uint8)), packed=True)


def test_plain_slots_are_too_large_a_claim_and_packed_ones_too_small():
    """A transfer checks slots by its own layout: packed ones are refused by a plain transfer."""
    case, rng = drawn(6, "joined")
    packed = packed_layout(case.layout)
    arena = HostArena(np.zeros(case.layout.slot_bytes, np.uint8))
    ids = range(case.layout.chunk_blocks)
    with pytest.raises(RequestError, match="where a chunk takes"):
        ReferenceTransfer(case.layout, case.tensors, arena).store(ids, [[(0, packed.slot_bytes)]])
    with pytest.raises(LayoutError, match="does not fit"):
        StagedTransfer(packed, arena, HostRuntime(), PackMover(case.layout, case.tensors), name="x", staging_bytes=64)
    reference_pack(rng)(case.layout, case.tensors, arena).store(ids, [[(0, packed.slot_bytes)]]).wait()


NAME = "kvkernels.triton_pack"


@pytest.fixture(scope="module")
def interpreted(fresh):
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield fresh(monkeypatch, NAME, interpret=True)


@pytest.mark.parametrize("ways", ["pack", "unpack", "both"])
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), form=st.sampled_from(CASE_FORMS), spoilt=st.sampled_from([0.0, 0.1]))
def test_triton_and_torch_read_each_other(interpreted, ways, seed, form, spoilt):
    case, rng = drawn(seed, form, spoilt)

    def triton_pack(layout, tensors, arena):
        options = {"programs": int(rng.integers(1, 5)), **pipeline(rng, layout)}
        return interpreted.triton_pack_transfer(layout, tensors, arena, HostRuntime(), **options)

    store = reference_pack(rng) if ways == "unpack" else triton_pack
    load = reference_pack(rng) if ways == "pack" else triton_pack
    assert packed_round_trip_faults(case, store, load, rng) == []


@pytest.mark.parametrize("vectors", [1, 3, 100, 130, 512])
def test_triton_packs_what_torch_does(interpreted, vectors):
    """All kinds of rows, of less and more than a tile, against torch: the whole of it but the order of the escapes."""
    rng = np.random.default_rng(vectors)
    kinds = [*KINDS, "edge"] if vectors < 100 else ["scaled", "edge", "bits"]
    n = 128 * vectors
    rows = as_rows(rng, kinds, n)
    tensors = [rows.clone().view(torch.bfloat16)]
    layout = describe(tensors, num_blocks=len(kinds), block_tokens=1, chunk_tokens=1, block_dim=0)
    packed = PackedRow(n)
    arena = HostArena(np.zeros(len(kinds) * packed.nbytes, np.uint8))
    options = {"staging_bytes": 6 * len(kinds) * packed.nbytes, "programs": 2}
    slots = [[(i * packed.nbytes, packed.nbytes)] for i in range(len(kinds))]
    transfer = interpreted.triton_pack_transfer(layout, tensors, arena, HostRuntime(), **options)
    handle = transfer.store(range(len(kinds)), slots)
    wanted, counts = pack_rows(rows)
    good = [i for i, count in enumerate(counts.tolist()) if count <= packed.capacity]
    assert handle.rejected() == tuple(i for i in range(len(kinds)) if i not in good)
    got = arena.array.reshape(len(kinds), -1)
    assert got[:, :4].copy().view(np.int32)[:, 0].tolist() == counts.tolist()
    for i in good:
        for start, size in ((packed.bases, vectors), (packed.codes, n // 2), (packed.rest, n)):
            assert np.array_equal(got[i, start : start + size], wanted[i, start : start + size])
        lists = [np.sort(one[16 : 16 + 4 * counts[i]].copy().view(np.int32)) for one in (got[i], wanted[i].numpy())]
        assert np.array_equal(*lists)
    tensors[0].zero_()
    transfer.load([slots[i] for i in good], good).wait()
    assert torch.equal(tensors[0].view(torch.uint8)[good], rows[good])


def test_triton_unpacks_what_was_not_packed_within_its_row(interpreted):
    """Garbage in a slot spoils the blocks that it is loaded into, and no others."""
    n = 1024
    tensors = [torch.zeros(5, n, dtype=torch.bfloat16)]
    layout = describe(tensors, num_blocks=5, block_tokens=1, chunk_tokens=1, block_dim=0)
    size = PackedRow(n).nbytes
    rng = np.random.default_rng(0)
    arena = HostArena(rng.integers(0, 256, size, dtype=np.uint8))
    arena.array[:4] = [255, 255, 255, 127]
    interpreted.triton_pack_transfer(layout, tensors, arena, HostRuntime()).load([[(0, size)]], [2]).wait()
    assert tensors[0][2].view(torch.uint8).any()
    assert not tensors[0][[0, 1, 3, 4]].view(torch.uint8).any()


def test_blocks_may_be_gigabytes_apart(interpreted):
    def make(layout, tensors, arena):
        return interpreted.triton_pack_transfer(layout, tensors, arena, HostRuntime(), staging_bytes=1 << 20)

    wrong = faults_of_blocks_far_apart(make, slot_bytes_of=lambda layout: packed_layout(layout).slot_bytes)
    assert wrong == ([], ())


POINTERS = {"addresses": "*i64", "strides": "*i64", "ids": "*i64", "staging": "*u8"}


def test_compiled_code_is_wide_and_within_registers(monkeypatch, fresh, compile_for_h100):
    """Eight values a thread by 16-byte accesses, their bytes by 8-byte ones; threads exchange nothing to unpack."""
    pytest.importorskip("triton")
    constants = fresh(monkeypatch, NAME, interpret=False).row_constants
    pack, unpack = compile_for_h100(
        (NAME, "_pack_rows", constants(65536, 16, packing=True), POINTERS, 32, ("rejected",)),
        (NAME, "_unpack_rows", constants(65536, 16, packing=False), POINTERS, 32, ()),
    )
    assert unpack["ptx"].count("ld.global.v2.b32") == 6
    assert unpack["ptx"].count("st.global.v4.b32") == 4
    assert "shared" not in unpack["ptx"].split(".visible .entry")[1]
    assert pack["ptx"].count("ld.global.v4.b32") == 4
    assert pack["ptx"].count("st.global.v2.b32") == 6
    assert pack["ptx"].count("atom.global.add") == 4 * 4 * 2  # four words of two values a thread, four times
    for built in (pack, unpack):
        assert ".local" not in built["ptx"]
        assert not built["scratch"]


def tiles_of_bases(ttgir):
    """How many values a thread has in a row of vectors and columns, and which of the two goes first.

    `_store_bases` is right for four neighbours of a vector alone: it takes four values of a thread, and stores the base
    for the first.
    """
    tile = r"(#\w+) = #ttg\.blocked<{sizePerThread = \[(.*?)\].*?, order = \[(.*?)\]"
    named = {name: (size, order) for name, size, order in re.findall(tile, ttgir)}
    stores = [line for line in ttgir.splitlines() if "elementwise_inline_asm" in line and "st.global.u8" in line]
    return [named[re.search(r"-> tensor<[^,]*, (#\w+)>", line).group(1)] for line in stores]


def test_every_row_size_compiles(monkeypatch, fresh, compile_for_h100):
    pytest.importorskip("triton")
    module = fresh(monkeypatch, NAME, interpret=False)
    jobs = []
    for row_bytes, align in product((256, 768, 41984, 131072), (4, 16)):
        for kernel, packing in (("_pack_rows", True), ("_unpack_rows", False)):
            constants = module.row_constants(row_bytes, align, packing=packing)
            warps = module.warps_of(constants["VECTORS"])
            jobs.append((NAME, kernel, constants, POINTERS, warps, ("rejected",) if packing else ()))
    compiled = compile_for_h100(*jobs)
    assert all(built["binary"] for built in compiled)
    for packing in compiled[::2]:
        assert tiles_of_bases(packing["ttgir"]) == [("1, 4", "1, 0")]
