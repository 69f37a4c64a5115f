"""A whole tuning run: its figures against `simulate` run alone, and against TTFT worked out from what it prints."""

import dataclasses
import json
import math
import random
from itertools import pairwise

import numpy as np
import pytest

import kvsim
from kvsim.errors import UsageError
from kvsim.profiles.load import to_json
from kvsim.report.tune_words import frontier_rows, further_notes, sentences
from kvsim.tuner import Costs, KvSize, costs, tune
from kvsim.tuner.run import engine_of
from kvtraces import Bursty, Chat, Log, generate

CHUNKS = (64, 128, 512)
POLICIES = ("lru", "fifo", "s3fifo")


@pytest.fixture(scope="module")
def log():
    return generate(Chat(requests=700, seed=11, arrivals=Bursty(sessions_per_s=0.5), system_prompts=20))


@pytest.fixture(scope="module")
def priced():
    return costs(model="qwen3-8b", gpu="h100")


@pytest.fixture(scope="module")
def result(log, priced):
    return tune(log, priced, chunk_sizes=CHUNKS, policies=POLICIES, l1_points=7)


@pytest.fixture(scope="module")
def printed(result):
    return json.loads(json.dumps(result.to_dict(), allow_nan=False))


class Printed:
    """TTFT from a result's JSON alone, in plain Python: nothing of the code under test."""

    def __init__(self, printed):
        self.profile = printed["profile"]
        self.moved = printed["kv"]["moved_bytes_per_token"]

    def prefill_s(self, new, cached):
        grid = self.profile["prefill"]
        x, y = grid["x"], grid["y"]
        a, b = max(new, x[0]), max(cached, y[0])
        i = max(k for k in range(len(x) - 1) if k == 0 or x[k] <= a)
        j = max(k for k in range(len(y) - 1) if k == 0 or y[k] <= b)
        u, v = (a - x[i]) / (x[i + 1] - x[i]), (b - y[j]) / (y[j + 1] - y[j])
        t = [[grid["seconds"][i + di][j + dj] for dj in (0, 1)] for di in (0, 1)]
        low, high = (row[0] + v * (row[1] - row[0]) for row in t)
        return low + u * (high - low)

    def copy_s(self, size):
        curve = self.profile["transfers"]["h2d"]
        points = [(0, curve["latency_s"])]
        points += [(s, s / rate) for s, rate in zip(curve["sizes"], curve["bytes_per_s"], strict=True)]
        for (s0, t0), (s1, t1) in pairwise(points):
            if size <= s1:
                return t0 + (t1 - t0) * (size - s0) / (s1 - s0)
        return points[-1][1] + (size - points[-1][0]) / curve["bytes_per_s"][-1]

    def ttft_s(self, prompt, hit):
        handling = self.profile["handling_base_s"] + self.profile["handling_token_s"] * prompt
        anew = self.prefill_s(prompt, 0) + handling
        if not hit:
            return anew
        cached = min(hit, prompt - 1)
        return min(anew, self.prefill_s(prompt - cached, cached) + self.copy_s(hit * self.moved) + handling)


def quantile(values, level):
    ordered = sorted(values)
    place = level * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def entries(printed, count):
    return random.Random(7).sample(printed["sweep"], count)


def test_twenty_random_entries_equal_simulate_run_alone(log, printed):
    for entry in entries(printed, 20):
        alone = kvsim.simulate(
            log,
            chunk_tokens=entry["chunk_tokens"],
            capacity_chunks=entry["capacity_chunks"],
            policy=entry["policy"],
        ).to_dict()
        for name in ("hit_chunks", "hit_tokens", "token_hit_ratio"):
            assert entry[name] == alone[name], (entry["chunk_tokens"], entry["capacity_chunks"], entry["policy"])


def test_capacity_follows_from_the_size(printed):
    for entry in printed["sweep"]:
        pages = -(-entry["chunk_tokens"] * 147_456 // (2 << 20))
        assert entry["capacity_chunks"] == int(entry["l1_size_gb"] * 2**30) // (pages * (2 << 20))


def test_ttft_follows_from_the_printed_profile(log, printed):
    by_hand = Printed(printed)
    prompts = log.input_tokens.tolist()
    no_cache = [by_hand.ttft_s(prompt, 0) for prompt in prompts]
    for entry in entries(printed, 5):
        hits = kvsim.simulate(
            log,
            chunk_tokens=entry["chunk_tokens"],
            capacity_chunks=entry["capacity_chunks"],
            policy=entry["policy"],
        ).hit_tokens.tolist()
        times = [by_hand.ttft_s(prompt, hit) for prompt, hit in zip(prompts, hits, strict=True)]
        loaded = sum(hit for hit, time, anew in zip(hits, times, no_cache, strict=True) if time < anew)
        assert entry["loaded_tokens"] == loaded
        for first, figures in ((0, entry), (entry["warm"]["from_request"], entry["warm"])):
            with_, without = times[first:], no_cache[first:]
            assert figures["ttft_mean_s"] == pytest.approx(sum(with_) / len(with_), abs=2e-9)
            assert figures["ttft_mean_saved_s"] == pytest.approx((sum(without) - sum(with_)) / len(with_), abs=2e-9)
            for level, name in ((0.5, "p50"), (0.95, "p95")):
                assert figures[f"ttft_{name}_s"] == pytest.approx(quantile(with_, level), abs=2e-9)
                saved = quantile(without, level) - quantile(with_, level)
                assert figures[f"ttft_{name}_saved_s"] == pytest.approx(saved, abs=2e-9)


def test_warm_begins_when_the_cache_has_filled_but_at_half_the_log_at_the_latest(log, printed):
    filled = 0
    for entry in entries(printed, 20):
        starts, names = log.chunks(entry["chunk_tokens"])
        seen, full_at = set(), None
        for request in range(len(log)):
            seen.update(names[starts[request] : starts[request + 1]].tolist())
            if len(seen) >= entry["capacity_chunks"]:
                full_at = request + 1
                break
        early = full_at is not None and full_at <= len(log) // 2
        assert entry["warm"]["filled"] == early
        assert entry["warm"]["from_request"] == (full_at if early else len(log) // 2)
        filled += early
    assert 0 < filled < 20


def test_warm_hits_are_those_of_the_requests_after(log, printed):
    for entry in entries(printed, 5):
        found = kvsim.simulate(
            log, chunk_tokens=entry["chunk_tokens"], capacity_chunks=entry["capacity_chunks"], policy=entry["policy"]
        )
        first = entry["warm"]["from_request"]
        assert entry["warm"]["hit_tokens"] == found.hit_tokens[first:].sum()
        assert entry["warm"]["requests"] == len(log) - first


def test_recommendation_is_an_entry_of_the_sweep_with_its_bounds(log, result, printed):
    found = printed["recommendation"]
    assert found["pays"] is True
    own = ("chunk_tokens", "l1_size_gb", "policy")
    entry = next(one for one in printed["sweep"] if all(one[name] == found[name] for name in own))
    assert all(found[name] == value for name, value in entry.items())
    assert found["cold"]["token_hit_ratio"] == found["token_hit_ratio"]
    ceiling = printed["ceiling"]
    assert ceiling["unbounded"]["hit_tokens"] >= ceiling["belady"]["hit_tokens"] >= found["hit_tokens"] > 0
    assert found["of_unbounded"] == pytest.approx(found["hit_tokens"] / ceiling["unbounded"]["hit_tokens"], abs=1e-6)
    assert found["of_belady"] == pytest.approx(found["hit_tokens"] / ceiling["belady"]["hit_tokens"], abs=1e-6)
    alone = kvsim.simulate(log, chunk_tokens=found["chunk_tokens"])
    assert ceiling["unbounded"]["hit_tokens"] == alone.hit_tokens.sum()
    assert all(one["hit_tokens"] <= ceiling["unbounded_finest"]["hit_tokens"] for one in printed["sweep"])
    assert result.ttft_s.mean() == pytest.approx(found["ttft_mean_s"], abs=2e-9)
    assert result.hit_tokens.sum() == found["hit_tokens"]
    assert len(result.ttft_s) == len(result.no_cache_s) == len(result.input_tokens) == len(log)
    assert (result.ttft_s <= result.no_cache_s).all()


def test_next_gib_is_a_run_of_its_own(log, result, printed):
    found, kv = printed["recommendation"], result.costs.kv
    more = kvsim.simulate(
        log,
        chunk_tokens=found["chunk_tokens"],
        capacity_chunks=kv.capacity_chunks(found["l1_size_gb"] + 1, found["chunk_tokens"]),
        policy=found["policy"],
    )
    gain = more.token_hit_ratio - found["hit_tokens"] / log.input_tokens.sum()
    assert found["next_gib"]["gained_token_hit_ratio"] == pytest.approx(gain, abs=1e-6)


def test_alignment_is_what_whole_chunks_lose(log, priced):
    result = tune(log, priced, chunk_sizes=[512], policies=["lru"], l1_sizes_gb=[40.0])
    found = result.to_dict()["recommendation"]["alignment"]
    unbounded = {size: int(kvsim.simulate(log, chunk_tokens=size).hit_tokens.sum()) for size in (64, 512)}
    assert found["finest_chunk_tokens"] == 64
    assert found["unbounded_lost_tokens"] == unbounded[64] - unbounded[512] > 0
    here = {
        size: kvsim.simulate(log, chunk_tokens=size, capacity_chunks=priced.kv.capacity_chunks(40.0, size))
        for size in (64, 512)
    }
    lost = here[64].token_hit_ratio - here[512].token_hit_ratio
    assert found["lost_ratio"] == pytest.approx(lost, abs=1e-6)


def test_columns_are_arrays_in_the_order_of_the_points(result, printed):
    columns = result.columns()
    assert columns["token_hit_ratio"].tolist() == [entry["token_hit_ratio"] for entry in printed["sweep"]]
    assert columns["warm_ttft_p95_s"].tolist() == [entry["warm"]["ttft_p95_s"] for entry in printed["sweep"]]
    assert isinstance(columns["policy"], np.ndarray)


def test_threads_do_not_change_the_result(log, priced, result):
    again = tune(log, priced, chunk_sizes=CHUNKS, policies=POLICIES, l1_points=7, threads=1)
    assert again.to_dict() == result.to_dict()


def test_progress_reaches_the_end(log, priced):
    seen = []
    tune(log, priced, chunk_sizes=[512], policies=["lru"], l1_points=4, progress=lambda *at: seen.append(at))
    total = seen[-1][1]
    assert 3 <= total <= 6  # a chunk size, four sizes of L1, and one below those
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_default_sizes_span_the_useful_range(log, priced):
    result = tune(log, priced, policies=["lru"])
    by_size = sorted((p.l1_size_gb, p.cold.hit_tokens) for p in result.points if p.chunk_tokens == 64)
    assert 15 <= len(by_size) <= 20
    most = result.unbounded_finest.cold.hit_tokens
    assert by_size[-1][1] >= 0.99 * most
    assert by_size[0][1] <= 0.5 * most


def shared_head_log(requests=400, again=4):
    """Prompts that share their first block alone, and a few of them once more at the end."""
    own = np.arange(3 * requests, dtype=np.int64).reshape(requests, 3) + 1
    own = np.concatenate([own, own[:again]])
    blocks = np.column_stack([np.zeros(len(own), np.int64), own])
    return Log(
        block_tokens=2048,
        timestamp_ms=1e3 * np.arange(len(own), dtype=np.float64),
        input_tokens=np.full(len(own), 4 * 2048, np.int64),
        output_tokens=np.ones(len(own), np.int64),
        starts=np.arange(len(own) + 1, dtype=np.int64) * 4,
        blocks=blocks.ravel(),
    )


def test_what_a_tiny_l1_gains_is_within_the_sweep(priced):
    result = tune(shared_head_log(), priced, chunk_sizes=[2048], policies=["lru"])
    sizes = [point.l1_size_gb for point in result.points]
    assert priced.kv.capacity_chunks(sizes[0], 2048) == 1
    assert priced.kv.capacity_chunks(sizes[-1], 2048) > 1000
    assert result.point.l1_size_gb == sizes[0]
    first = frontier_rows(result)[0]
    assert float(first[-1]) == pytest.approx(100 * result.point.cold.token_hit_ratio / sizes[0], rel=0.01)
    largest = tune(shared_head_log(), priced, chunk_sizes=[2048], policies=["lru"], l1_max_gb=64.0)
    assert largest.point.l1_size_gb == sizes[0]


def test_an_l1_that_holds_no_chunk_is_refused(log, priced):
    for given in ({"l1_max_gb": 0.001}, {"l1_sizes_gb": [0.001, 0.002]}):
        with pytest.raises(UsageError, match=r"holds no chunk: one of 64 tokens takes 0\.0098 GiB"):
            tune(log, priced, chunk_sizes=[64], **given)


def test_a_larger_cache_that_hits_less_is_told_so(log, priced):
    result = tune(log, priced, chunk_sizes=[64], policies=["lru"], l1_points=3)
    worse = dataclasses.replace(result.unbounded, cold=dataclasses.replace(result.point.cold, hit_tokens=0))
    told = " ".join(sentences(dataclasses.replace(result, next_gib=worse)))
    assert "One GiB more would lose" in told
    assert "add -" not in told


def test_largest_l1_is_kept_to(log, priced):
    result = tune(log, priced, chunk_sizes=[64], policies=["lru"], l1_points=5, l1_max_gb=3.3)
    assert max(point.l1_size_gb for point in result.points) == 3.3


def unique_log(requests=50):
    blocks = np.arange(requests * 10, dtype=np.int64)
    return Log(
        block_tokens=64,
        timestamp_ms=np.arange(requests, dtype=np.float64),
        input_tokens=np.full(requests, 640, np.int64),
        output_tokens=np.ones(requests, np.int64),
        starts=np.arange(requests + 1, dtype=np.int64) * 10,
        blocks=blocks,
    )


def test_a_log_without_repeats_cannot_pay(priced):
    result = tune(unique_log(), priced)
    found = result.to_dict()["recommendation"]
    assert not result.pays
    assert found["pays"] is False
    assert (found["chunk_tokens"], found["l1_size_gb"], found["policy"]) == (None, 0.0, None)
    assert found["ttft_p50_s"] == found["no_cache"]["ttft_p50_s"]
    assert found["ttft_p50_saved_s"] == 0
    assert "no prompt begins" in found["notes"][0]


def test_a_slow_link_cannot_pay(log, priced, tmp_path):
    data = json.loads(to_json(priced.profile))
    data["transfers"]["h2d"] = {"sizes": [1 << 30], "bytes_per_s": [1e8], "latency_s": 0.01}
    path = tmp_path / "slow.json"
    path.write_text(json.dumps(data))
    slow = costs(profile=path)
    result = tune(log, slow, chunk_sizes=[64], policies=["lru"])
    assert not result.pays
    assert "computing them anew is faster" in result.notes[0]
    assert result.point.cold.hit_tokens > 0
    assert result.point.cold.loaded_tokens == 0
    assert (result.ttft_s == result.no_cache_s).all()


def test_a_larger_kv_costs_more(log, priced):
    heavy = Costs(profile=priced.profile, kv=KvSize(stored_bytes_per_token=294_912, moved_bytes_per_token=294_912))
    light_result, heavy_result = (
        tune(log, each, chunk_sizes=[128], policies=["lru"], l1_sizes_gb=[8.0]) for each in (priced, heavy)
    )
    assert heavy_result.point.capacity_chunks == light_result.point.capacity_chunks // 2
    assert heavy_result.unbounded.cold.hit_tokens == light_result.unbounded.cold.hit_tokens
    assert heavy_result.unbounded.cold.ttft.mean_s > light_result.unbounded.cold.ttft.mean_s


def test_a_hit_of_the_whole_prompt_still_takes_a_step(priced):
    prompt = np.array([512], np.int64)
    hit = priced.load_s(prompt, prompt)
    copy = float(priced.profile.transfer_s(512 * 147_456, "h2d"))
    step = float(priced.profile.prefill_s_array(1, 511))
    assert hit[0] == pytest.approx(copy + step + priced.profile.handling_s(512), rel=1e-12)


def test_logs_and_settings_that_cannot_be_tuned(log, priced):
    lengths = Log(
        block_tokens=None,
        timestamp_ms=np.zeros(1),
        input_tokens=np.ones(1, np.int64),
        output_tokens=np.ones(1, np.int64),
        starts=np.zeros(2, np.int64),
        blocks=np.zeros(0, np.int64),
    )
    with pytest.raises(UsageError, match="lengths alone"):
        tune(lengths, priced)
    for settings, word in (
        ({"chunk_sizes": [96]}, "no multiple"),
        ({"policies": ["mru"]}, "unknown policy"),
        ({"l1_sizes_gb": [-4.0]}, "above zero"),
        ({"l1_max_gb": -4.0}, "above zero"),
        ({"l1_sizes_gb": [4.0], "l1_max_gb": 4.0}, "give one"),
        ({"l1_points": 0}, "at least 1"),
        ({"threads": 0}, "at least 1"),
    ):
        with pytest.raises(UsageError, match=word):
            tune(log, priced, **settings)


def test_requests_that_the_engine_refuses_are_in_no_figure(log, priced):
    """With them left out beforehand everything is the same, but what is said of them."""
    lengths = log.input_tokens + log.output_tokens
    limit = int(np.median(lengths))
    engine = kvsim.RunSettings(profile=priced.run_profile, max_model_len=limit)
    given = {"chunk_sizes": [64], "policies": ["lru"], "l1_points": 4, "engine": engine}
    found, alone = tune(log, priced, **given), tune(log.select(lengths <= limit), priced, **given)
    count = int((lengths > limit).sum())
    assert 0 < count < len(log)
    told, plain = found.to_dict(), alone.to_dict()
    assert (told["log"].pop("refused_requests"), plain["log"].pop("refused_requests")) == (count, 0)
    note = next(note for note in told["recommendation"]["notes"] if "refused" in note)
    assert note.startswith(f"{count} of 700 requests refused by the engine")
    assert f"the model's {limit:,} tokens" in note
    told["recommendation"]["notes"].remove(note)
    assert told == plain
    assert len(found.hit_tokens) == len(found.input_tokens) == len(log) - count
    assert sentences(found)[0] == f"{note}."
    assert not any("refused" in one for one in further_notes(found))


def test_the_profiles_length_is_the_limit_where_nothing_else_is_said(log, priced):
    short = dataclasses.replace(priced, profile=dataclasses.replace(priced.profile, max_model_len=1000))
    count = int((log.input_tokens + log.output_tokens > 1000).sum())
    assert 0 < count < len(log)
    found = tune(log, short, chunk_sizes=[64], policies=["lru"], l1_points=2)
    assert found.log.refused_requests == count
    with pytest.raises(UsageError, match="every request is refused, all 700: longer"):
        tune(log, dataclasses.replace(priced, profile=dataclasses.replace(priced.profile, max_model_len=1)))


def test_a_profile_without_room_for_kv_still_has_an_engine(log, priced):
    full = dataclasses.replace(priced, profile=dataclasses.replace(priced.profile, gpu_memory_bytes=2**30))
    assert tune(log, full, chunk_sizes=[64], policies=["lru"], l1_points=2).log.refused_requests == 0
    with pytest.raises(UsageError, match="l0_gb is 0"):
        engine_of(full, l0_gb=0.0)


def test_costs_that_are_not_known():
    with pytest.raises(UsageError, match="--model and --gpu"):
        costs(model="qwen3-8b")
    with pytest.raises(ValueError, match=r"no profile of gemma-3-27b on h100.*there are"):
        costs(model="gemma-3-27b", gpu="h100")


def test_a_prompt_that_names_a_block_twice_is_refused(priced):
    broken = Log(
        block_tokens=64,
        timestamp_ms=np.zeros(1),
        input_tokens=np.full(1, 192, np.int64),
        output_tokens=np.ones(1, np.int64),
        starts=np.array([0, 3]),
        blocks=np.array([1, 2, 1]),
    )
    with pytest.raises(UsageError, match="names a block twice"):
        tune(broken, priced, chunk_sizes=[64])
