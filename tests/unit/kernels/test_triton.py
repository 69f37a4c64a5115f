# ruff: noqa: E402  (skipped before its imports where Triton is absent)
"""The Triton kernel in Triton's interpreter, and compiled (not run) for the GPUs it is meant for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from pipelines import faults_of_blocks_far_apart

from kvkernels.cases import CASE_DTYPES, CASE_FORMS, random_case, round_trip_faults
from kvkernels.streams import HostRuntime

NAME = "kvkernels.triton_gather"


@pytest.fixture(scope="module")
def interpreted(fresh):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield fresh(monkeypatch, NAME, interpret=True)


@pytest.mark.parametrize("form", CASE_FORMS)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**32), dtype=st.sampled_from(CASE_DTYPES), programs=st.integers(1, 5))
def test_round_trip(interpreted, form, seed, dtype, programs):
    rng = np.random.default_rng(seed)
    case = random_case(rng, form=form, dtype=dtype, block_tokens=16)
    row = max(plane.row_bytes for plane in case.layout.planes)
    staging = 2 * 3 * row * int(rng.integers(1, 12))

    def make(layout, tensors, arena):
        options = {"programs": programs, "staging_bytes": staging, "copy_bytes": 4 * row, "group_bytes": row}
        return interpreted.triton_transfer(layout, tensors, arena, HostRuntime(), **options)

    assert round_trip_faults(case, make, rng) == []


def test_blocks_may_be_gigabytes_apart(interpreted):
    def make(layout, tensors, arena):
        return interpreted.triton_transfer(layout, tensors, arena, HostRuntime(), programs=3, staging_bytes=1 << 20)

    assert faults_of_blocks_far_apart(make) == ([], ())


def test_compiled_code_moves_sixteen_bytes_at_a_time(compile_for_h100):
    """Rows are read and written by independent 16-byte accesses, eight in flight a thread, without spills."""
    pointers = {"addresses": "*i64", "strides": "*i64", "ids": "*i64", "staging": "*u8"}
    fixed = {"WORD": triton.language.int64, "ALIGN": 16, "TILE": 8192}
    jobs = [
        (NAME, "_move_rows", {**fixed, "ROW_WORDS": row_bytes // 8, "GATHER": gather}, pointers, 16, ())
        for row_bytes in (65536, 41984, 36 * 65536)
        for gather in (True, False)
    ]
    for built in compile_for_h100(*jobs):
        ptx = built["ptx"]
        assert ptx.count("ld.global.v2.b64") + ptx.count("ld.global.v4.b32") == 8
        assert ptx.count("st.global.v2.b64") + ptx.count("st.global.v4.b32") == 8
        assert ".local" not in ptx
