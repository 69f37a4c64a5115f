# ruff: noqa: E402  (skipped before its imports where torch is absent)
import json
import subprocess
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from kvkernels import HostArena, LayoutError, describe
from kvkernels.cases import random_case
from kvkernels.choose import backend_of, best_backend, preferred
from kvkernels.streams import HostRuntime


def test_the_choice_serves_and_leaves_everything_as_it_was():
    case = random_case(np.random.default_rng(1), form="joined", block_tokens=16)
    layout = case.layout
    before = [memory.clone().view(torch.uint8) for memory in case.memory]
    arena = HostArena(np.full(layout.slot_bytes, 9, np.uint8))
    choice = best_backend(layout, case.tensors, arena, scratch_bytes=3 * layout.slot_bytes)
    assert (arena.array == 9).all()
    assert all(torch.equal(memory.view(torch.uint8), old) for memory, old in zip(case.memory, before, strict=True))
    ids = np.arange(layout.chunk_blocks)
    choice.transfer.store(ids, [[(0, layout.slot_bytes)]]).wait()
    assert np.array_equal(arena.array, case.slot(ids))


def test_the_profile_is_plain_json_with_every_backends_curve():
    case = random_case(np.random.default_rng(2), form="planes_nhd", block_tokens=16)
    layout = case.layout
    arena = HostArena(np.zeros(layout.slot_bytes, np.uint8))
    choice = best_backend(layout, case.tensors, arena, scratch_bytes=2 * layout.slot_bytes)
    profile = json.loads(json.dumps(choice.profile))
    assert profile == choice.profile
    assert profile["layout"] == layout.fingerprint()
    assert set(profile["curves"]) == {"reference", "memmove"}
    most = min(2, layout.num_blocks // layout.chunk_blocks)
    for curve in profile["curves"].values():
        for points in (curve["store"], curve["load"]):
            assert [size for size, _ in points] == [n * layout.slot_bytes for n in sorted({1, most})]
            assert all(rate > 0 for _, rate in points)
    rated = {name: 1 / curve["store"][-1][1] + 1 / curve["load"][-1][1] for name, curve in profile["curves"].items()}
    assert choice.transfer.name == profile["backend"] == min(rated, key=rated.get)


@pytest.mark.parametrize("name", ["reference", "memmove"])
def test_a_known_backend_is_built_without_touching_anything(name):
    case = random_case(np.random.default_rng(3))
    layout = case.layout
    before = [memory.clone().view(torch.uint8) for memory in case.memory]
    arena = HostArena(np.full(layout.slot_bytes, 9, np.uint8))
    transfer = backend_of(name, layout, case.tensors, arena)
    assert transfer.name == name
    assert (arena.array == 9).all()
    assert all(torch.equal(memory.view(torch.uint8), old) for memory, old in zip(case.memory, before, strict=True))
    ids = np.arange(layout.chunk_blocks)
    transfer.store(ids, [[(0, layout.slot_bytes)]]).wait()
    assert np.array_equal(arena.array, case.slot(ids))
    with pytest.raises(LayoutError, match="no backend 'triton' on device cpu: there are reference, memmove"):
        backend_of("triton", layout, case.tensors, arena)


def test_a_cache_smaller_than_a_chunk_is_refused():
    tensors = [torch.zeros(3, 2, 16, 8)]
    layout = describe(tensors, num_blocks=3, block_tokens=16, chunk_tokens=64)
    with pytest.raises(LayoutError, match="smaller than a chunk"):
        best_backend(layout, tensors, HostArena(np.zeros(layout.slot_bytes, np.uint8)))


@pytest.mark.parametrize("threads", [1, 3])
def test_host_copies_by_several_threads(threads):
    rng = np.random.default_rng(threads)
    source, target = rng.integers(0, 256, 6 << 20, dtype=np.uint8), np.zeros(6 << 20, np.uint8)
    size = 6 << 10
    order = rng.permutation(1 << 10)
    lengths = np.full(len(order), size)
    stream = HostRuntime(threads=threads).current()
    stream.copy(target.ctypes.data + np.arange(1 << 10) * size, source.ctypes.data + order * size, lengths)
    assert np.array_equal(target.reshape(-1, size), source.reshape(-1, size)[order])


def test_importing_the_package_imports_no_framework():
    script = (
        "import sys, kvkernels, kvkernels.registered, kvkernels.choose;"
        "print([m for m in ('torch', 'triton', 'jax', 'cuda') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("block_tokens", "seconds", "chosen"),
    [
        (16, {"triton": 1.05, "cuda_batch": 1.0}, "triton"),  # a difference that the next measurement may not show
        (16, {"triton": 1.2, "cuda_batch": 1.0}, "cuda_batch"),
        (128, {"triton": 1.0, "cuda_batch": 1.05}, "cuda_batch"),
        (128, {"triton": 1.0, "cuda_batch": 1.2}, "triton"),
        (128, {"triton": 1.0}, "triton"),
        (16, {"reference": 1.05, "memmove": 1.0}, "memmove"),
    ],
)
def test_a_difference_that_is_noise_does_not_decide(block_tokens, seconds, chosen):
    tensors = [torch.zeros(2, block_tokens, 8, 256, dtype=torch.bfloat16)]  # rows of 64 and 512 KiB
    layout = describe(tensors, num_blocks=2, block_tokens=block_tokens, chunk_tokens=block_tokens, block_dim=0)
    assert preferred(layout, seconds) == chosen
