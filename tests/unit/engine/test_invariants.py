"""What holds of every run: nothing is lost, nothing is drawn twice, the same seed gives the same run."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as settings_of
from hypothesis import strategies as st

from kvcore.policy import Core, LoadDone, Place, RequestEnded, StoreCommitted
from kvsim.engine.settings import GIB, RunSettings
from kvsim.engine.shell import OUTPUT
from kvsim.engine.simulation import prepare, simulate
from kvsim.profiles import TransferCurve, lookup
from kvsim.runner import run
from kvtraces import Chat, Log, Poisson, generate

PROFILE = lookup("qwen3-8b", "h100")
LOG = generate(Chat(requests=400, seed=3, block_tokens=16, arrivals=Poisson(sessions_per_s=2.0)), output_hashes=True)


def settings(**changes):
    defaults = {
        "profile": PROFILE,
        "chunk_tokens": 64,
        "engines": 2,
        "l0_gb": 3.0,
        "l1_gb": 4.0,
        "max_model_len": 16_384,
    }
    return RunSettings(**(defaults | changes))


VARIANTS = [
    {},
    {"load": "async", "routing": "least-loaded"},
    {"load": "sync", "routing": "prefix-aware", "max_num_batched_tokens": 512},
    {"l2_gb": 30.0, "placement": "write-back", "load": "async"},
    {"l2_gb": 30.0, "l1_gb": 1.0, "promote_on_hit": False},
    {"l2_gb": None, "l2_kind": "network", "policy": "arc", "admission": "second-use"},
    {"ttl_s": 60.0, "load_or_recompute": True},
    {"l0_gb": 2.35, "rate_scale": 8.0, "max_num_seqs": 8},
    {"l1_gb": 0.01},
    {"async_scheduling": False, "l0_gb": 2.35, "rate_scale": 8.0, "max_num_seqs": 8, "load": "async"},
    {"l0_prefix_caching": False, "chunked_prefill": False},
    {"store_output": True, "load": "async"},
    {"load": "async", "l0_gb": 2.35, "rate_scale": 8.0, "max_num_seqs": 3, "l0_prefix_caching": False},
    {"load": "async", "l0_gb": 2.35, "rate_scale": 8.0, "l2_gb": 30.0, "l1_gb": 0.5, "max_num_batched_tokens": 300},
    {"store_output": True, "l0_gb": 2.35, "rate_scale": 8.0, "l2_gb": 30.0},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_nothing_is_lost(changes, monkeypatch):
    chosen = settings(**changes)
    seen = []

    class Checked(Core):
        def handle(self, event):
            decisions = super().handle(event)
            seen.append((event, decisions))
            if len(seen) % 97 == 0:
                self.check()
            return decisions

    monkeypatch.setattr("kvsim.engine.shell.Core", Checked)
    finished = simulate(prepare(LOG, 64), chosen)
    jobs = [job for job in finished.jobs if job is not None]
    assert jobs
    for job in jobs:
        assert job.arrived <= job.enqueued <= job.first_scheduled <= job.first_token <= job.finished
        assert job.produced == max(1, job.output)
        assert job.computed == job.target
        assert not job.run
        assert not job.stores
    for engine in finished.engines:
        assert engine.cache.held == 0
        assert engine.cache.free == engine.cache.capacity
        assert engine.unfinished == 0
        assert engine.pending_tokens == 0
        assert engine.link.queued_bytes == [0, 0]
    core = finished.shell.driver.core
    core.check()
    assert not list(core.requests())  # no pin outlives its request
    placed = [decision for _, decisions in seen for decision in decisions if isinstance(decision, Place)]
    committed = [event for event, _ in seen if isinstance(event, StoreCommitted)]
    for tier in range(len(core.tiers)):
        stored = sum(len(place.chunks) for place in placed if place.tier == tier)
        if chosen.placement == "write-through" or tier == 0:
            assert stored == sum(len(event.chunks) for event in committed if event.tier == tier)
    chunk_bytes = chosen.chunk_bytes(64)
    assert sum(e.link.bytes[1] for e in finished.engines) == chunk_bytes * finished.shell.stored
    assert sum(e.link.bytes[0] for e in finished.engines) == PROFILE.kv_bytes(sum(job.loaded for job in jobs))
    fetched = sum(len(event.chunks) for event, _ in seen if isinstance(event, LoadDone) and event.tier == 1)
    assert (finished.lower.bytes[0] if finished.lower else 0) == chunk_bytes * fetched
    ended = [event.request for event, _ in seen if isinstance(event, RequestEnded)]
    assert {name.removesuffix(OUTPUT) for name in ended} == {job.name for job in jobs}


@pytest.mark.parametrize("changes", VARIANTS)
def test_the_parts_of_ttft_add_up(changes):
    columns = run(LOG, settings(**changes), baseline=False).columns
    parts = sum(columns[name] for name in ("handling_s", "queue_s", "load_s", "prefill_s"))
    np.testing.assert_allclose(parts, columns["ttft_s"], atol=1e-9)
    served = ~columns["refused"]
    assert served.any()
    for name in ("handling_s", "queue_s", "load_s", "prefill_s"):
        assert (columns[name][served] >= -1e-9).all(), name


def test_there_is_preemption_in_what_is_checked():
    assert run(LOG, settings(**VARIANTS[7]), baseline=False).total("preemptions") > 0


def test_the_same_seed_gives_the_same_run_and_another_one_another():
    def ttft(seed):
        chosen = settings(arrivals="poisson", rate_per_s=4.0, seed=seed, routing="least-loaded")
        return run(LOG, chosen, baseline=False).columns["ttft_s"]

    np.testing.assert_array_equal(ttft(1), ttft(1))
    assert not np.array_equal(ttft(1), ttft(2))


def test_a_prepared_workload_changes_nothing():
    chosen = settings()
    workload = prepare(LOG, 64)
    first, again = (run(LOG, chosen, workload=workload) for _ in range(2))
    fresh = run(LOG, chosen)
    assert first.summary() == again.summary() == fresh.summary()


def test_no_cache_is_the_run_without_l1():
    with_cache = run(LOG, settings())
    without = run(LOG, settings(l1_gb=0.0))
    assert with_cache.ttft_no_cache_s == without.ttft_s == without.ttft_no_cache_s
    assert without.total("matched_l1") == without.total("loaded_tokens") == 0


def test_extrapolations_are_told_once_with_the_range():
    small = dataclasses.replace(PROFILE, prefill=None)
    assert not run(LOG, settings(profile=small)).warnings
    grid = PROFILE.decode
    short = dataclasses.replace(grid_of(grid, 3))
    warnings = run(LOG, settings(profile=dataclasses.replace(PROFILE, decode=short))).warnings
    assert len(warnings) == 1
    assert "extrapolated" in warnings[0]
    assert f"{grid.y[2]:,}" in warnings[0]


def grid_of(grid, columns):
    return type(grid)(grid.x, grid.y[:columns], tuple(row[:columns] for row in grid.seconds))


def test_bytes_are_gib():
    assert settings(l0_gb=1.0).l0_blocks == GIB // (PROFILE.kv_bytes_per_token * 16)


@settings_of(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 0.2), st.integers(1, 160), st.integers(0, 60), st.integers(0, 3)),
        min_size=1,
        max_size=30,
    ),
    st.sampled_from(["auto", "layerwise", "sync", "async"]),
    st.integers(1, 4),
    st.sampled_from([40, 200]),
    st.booleans(),
)
# One runs, and preempts itself, since one whose load has arrived holds the blocks and waits for its turn.
@example([(0.0, 65, 0, 0), (0.0, 145, 49, 0), (0.125, 17, 0, 0)], "async", 1, 40, False)
# The second prompt is cached whole, and needs all of the GPU's blocks for its output.
@example([(0.0, 160, 60, 0), (0.0, 160, 60, 0)], "layerwise", 1, 40, True)
def test_every_request_ends_however_little_room_there_is(rows, load, seqs, budget, reuse):
    # Prompts of one of four families, 14 engine blocks for all; slow links, so that copies are always under way.
    times = np.cumsum([gap for gap, *_ in rows])
    chains = [[100 * family + i for i in range(prompt // 16)] for _, prompt, _, family in rows]
    log = Log(
        block_tokens=16,
        timestamp_ms=1e3 * times,
        input_tokens=np.array([row[1] for row in rows]),
        output_tokens=np.array([row[2] for row in rows]),
        starts=np.cumsum([0, *map(len, chains)]),
        blocks=np.array([name for chain in chains for name in chain], dtype=np.int64),
    )
    slow = TransferCurve(sizes=(1,), bytes_per_s=(2e7,))
    profile = dataclasses.replace(PROFILE, transfers=dict.fromkeys(PROFILE.transfers, slow))
    chosen = RunSettings(
        profile=profile,
        l0_gb=14 * 16 * profile.kv_bytes_per_token / GIB + 1e-9,
        l1_gb=0.03,
        l2_gb=0.2,
        load=load,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        l0_prefix_caching=reuse,
    )
    finished = simulate(prepare(log, 16), chosen)
    assert all(job.finished >= job.first_token >= job.arrived for job in finished.jobs if job is not None)
    engine = finished.engines[0]
    assert (engine.cache.held, engine.pending_tokens, engine.unfinished) == (0, 0, 0)
    assert not list(finished.shell.driver.core.requests())
