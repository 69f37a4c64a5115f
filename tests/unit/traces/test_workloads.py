import dataclasses
import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import PCG64, Generator

from kvcore.policy.hashing import Namespace, block_hashes, trace_ids
from kvtraces import (
    Agent,
    Bursty,
    Chat,
    Mixed,
    Poisson,
    Rag,
    Segment,
    Spread,
    describe,
    generate,
    read,
    rows_of,
    segment_tokens,
    workload,
    write,
)
from kvtraces.samples import SAMPLES
from kvtraces.workloads import Config, zipf_cumulative

SMALL = [
    Chat(requests=120),
    Rag(requests=60),
    Agent(requests=80),
    Mixed(chat=Chat(requests=60), rag=Rag(requests=80), agent=Agent(requests=30)),
]
DATA = Path(__file__).resolve().parents[3] / "traces" / "data"


def name(config: object) -> str:
    return type(config).__name__


@pytest.mark.parametrize("config", SMALL, ids=name)
def test_the_same_seed_gives_the_same_log_in_another_process(config: Config) -> None:
    program = (
        "import hashlib\nfrom kvtraces import *\n"
        f"log = generate({config!r}, output_hashes=True)\n"
        "columns = log.blocks, log.timestamp_ms, log.output_tokens, log.output_blocks\n"
        "print(hashlib.sha256(b''.join(column.tobytes() for column in columns)).hexdigest())"
    )
    log = generate(config, output_hashes=True)
    assert log.output_blocks is not None
    columns = log.blocks, log.timestamp_ms, log.output_tokens, log.output_blocks
    digest = hashlib.sha256(b"".join(column.tobytes() for column in columns))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest.hexdigest()


@pytest.mark.parametrize("config", SMALL[:3], ids=name)
def test_another_seed_gives_another_log(config: Chat | Rag | Agent) -> None:
    one, other = generate(config), generate(dataclasses.replace(config, seed=config.seed + 1))
    assert not set(one.blocks.tolist()) & set(other.blocks.tolist())


@pytest.mark.parametrize("config", SMALL, ids=name)
def test_hashes_follow_from_the_tokens(config: Config) -> None:
    made = workload(config)
    log = made.log(output_hashes=True)
    assert log.output_starts is not None
    assert log.output_blocks is not None
    for i in range(len(made)):
        tokens, output = made.tokens_of(i), made.output_tokens_of(i)
        assert len(tokens) == log.input_tokens[i]
        assert len(output) == log.output_tokens[i]
        hashes = block_hashes(np.concatenate([tokens, output]), made.block_tokens, made.root)
        full = len(tokens) // made.block_tokens
        assert made.hashes_of(i) == hashes[:full]
        assert log.blocks[log.starts[i] : log.starts[i + 1]].tolist() == trace_ids(hashes[:full]).tolist()
        outputs = log.output_blocks[log.output_starts[i] : log.output_starts[i + 1]]
        assert outputs.tolist() == trace_ids(hashes[full:]).tolist()
        assert int(tokens.max()) < made.vocabulary


@pytest.mark.parametrize("config", SMALL, ids=name)
def test_no_two_requests_share_a_millisecond(config: Config) -> None:
    times = generate(config).timestamp_ms
    assert (np.diff(times) >= 1).all()
    assert (times == np.round(times)).all()


def test_a_namespace_changes_every_hash_and_no_token() -> None:
    config = Chat(requests=30, block_tokens=16, vocabulary=4096)
    space = Namespace(model="m", kv_dtype="float32", layout="LBNHC", block_tokens=16, salt="a")
    plain, salted = workload(config), workload(config, namespace=space)
    assert salted.root == space.digest()
    assert np.array_equal(plain.tokens_of(7), salted.tokens_of(7))
    assert not set(plain.log().blocks.tolist()) & set(salted.log().blocks.tolist())


def test_a_conversation_grows_by_its_output_and_a_turn() -> None:
    made = workload(Chat(requests=400))
    sessions: dict[str, list[int]] = {}
    for i, request in enumerate(made.requests):
        sessions.setdefault(request.session, []).append(i)
    turns = [pair for rows in sessions.values() for pair in itertools.pairwise(rows)]
    assert len(turns) > 100
    for before, after in turns:
        old, new = made.requests[before], made.requests[after]
        assert new.prompt[:-1] == (*old.prompt, old.output)
        assert new.time_ms - old.time_ms > 1000 * old.output.length / 50


def test_sub_agents_share_the_tools_and_answer_their_parent() -> None:
    made = workload(Agent(requests=1500, subagent_share=0.2))
    tools = made.requests[0].prompt[0]
    assert all(request.prompt[0] == tools for request in made.requests)
    ends = {request.session: request for request in made.requests if "." in request.session}
    answered = 0
    for child in ends.values():
        parent = child.session.split(".")[0]
        later = [r for r in made.requests if r.session == parent and r.time_ms > child.time_ms]
        answered += any(child.output in request.prompt for request in later)
    assert answered > 20


def test_a_full_context_is_compacted() -> None:
    config = Agent(requests=600, max_context_tokens=20_000, steps=60)
    made = workload(config)
    assert max(request.input_tokens for request in made.requests) <= 20_000
    shrunk = 0
    for session in {request.session for request in made.requests}:
        lengths = [request.input_tokens for request in made.requests if request.session == session]
        shrunk += sum(after < before for before, after in itertools.pairwise(lengths))
    assert shrunk > 5


def test_documents_in_varying_order_break_the_prefix() -> None:
    ordered, shuffled = (
        describe(generate(Rag(requests=2000, documents=50, ordered=share))).unbounded_token_hit_ratio
        for share in (1.0, 0.0)
    )
    assert ordered is not None
    assert shuffled is not None
    assert ordered > shuffled + 0.03


# Statistics


def mean_and_variance_of_counts(arrivals: Poisson | Bursty, window_s: float) -> tuple[float, float]:
    end_ms = 50_000_000.0
    times = itertools.takewhile(lambda time_ms: time_ms < end_ms, arrivals.times_ms(Generator(PCG64(5))))
    counts = np.histogram(list(times), bins=np.arange(0, end_ms + 1, 1000 * window_s))[0]
    return float(counts.mean()) / window_s, float(counts.var() / counts.mean())


def test_poisson_arrivals() -> None:
    rate, dispersion = mean_and_variance_of_counts(Poisson(sessions_per_s=2.0), 10)
    assert rate == pytest.approx(2.0, rel=0.05)
    assert dispersion == pytest.approx(1.0, abs=0.25)


def test_bursty_arrivals_have_the_same_mean_and_more_spread() -> None:
    rate, dispersion = mean_and_variance_of_counts(Bursty(sessions_per_s=2.0), 10)
    assert rate == pytest.approx(2.0, rel=0.15)
    assert dispersion > 5


def test_zipf() -> None:
    weights = np.diff(zipf_cumulative(100, 1.0), prepend=0.0)
    assert weights[0] / weights[9] == pytest.approx(10)
    made = workload(Chat(requests=4000, system_prompts=20, turns=1.0))
    counts = sorted(np.unique([request.prompt[0].id for request in made.requests], return_counts=True)[1])[::-1]
    expected = 4000 / sum(1 / rank for rank in range(1, 21))
    assert counts[0] == pytest.approx(expected, rel=0.1)
    assert counts[4] == pytest.approx(expected / 5, rel=0.25)


@given(st.floats(1, 1e4), st.floats(0, 1), st.integers(0, 100))
def test_a_spread_keeps_its_bounds(median: float, sigma: float, seed: int) -> None:
    spread = Spread(median=median, sigma=sigma, low=5, high=500)
    rng = Generator(PCG64(seed))
    values = [spread.draw_int(rng) for _ in range(20)]
    assert all(5 <= value <= 500 for value in values)
    if sigma == 0:
        assert len(set(values)) == 1


def test_a_spreads_median() -> None:
    rng = Generator(PCG64(1))
    values = [Spread(median=300, sigma=1.0).draw(rng) for _ in range(4000)]
    assert np.median(values) == pytest.approx(300, rel=0.1)
    assert np.log(values).std() == pytest.approx(1.0, rel=0.1)


@settings(max_examples=30)
@given(st.integers(0, 2**63 - 1), st.integers(1, 300), st.integers(2, 2**32))
def test_segment_tokens_are_split_mix(segment: int, length: int, vocabulary: int) -> None:
    mask, state, expected = 2**64 - 1, segment, []
    for _ in range(length):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        expected.append((z ^ (z >> 31)) % vocabulary)
    assert segment_tokens(Segment(segment, length), vocabulary).tolist() == expected


def test_configurations_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="requests and block_tokens must be at least 1"):
        generate(Chat(requests=0))
    with pytest.raises(ValueError, match="documents_per_request"):
        generate(Rag(documents=2, documents_per_request=3))
    with pytest.raises(ValueError, match="same block_tokens"):
        generate(Mixed(chat=Chat(requests=5, block_tokens=32)))


# Samples


@pytest.mark.parametrize(("sample", "low", "high"), [("chat", 0.5, 0.75), ("rag", 0.2, 0.5), ("agent", 0.85, 1.0)])
def test_the_samples_are_what_the_generator_makes(sample: str, low: float, high: float) -> None:
    log = read(DATA / f"{sample}.jsonl.gz")
    assert list(rows_of(log)) == list(rows_of(generate(SAMPLES[sample])))
    summary = describe(log)
    assert summary.block_tokens == 64
    assert 1000 <= summary.requests <= 3000
    assert summary.unbounded_token_hit_ratio is not None
    assert summary.unique_blocks is not None
    assert low <= summary.unbounded_token_hit_ratio <= high
    assert summary.unique_blocks * 64 * 147_456 > 32 * 2**30  # larger than one would give an L1 without a thought


def test_the_samples_are_small() -> None:
    assert sum(file.stat().st_size for file in DATA.iterdir()) < 700_000


def test_a_generated_log_survives_writing(tmp_path: Path) -> None:
    log = generate(Chat(requests=50), output_hashes=True)
    write(log, tmp_path / "a.jsonl.zst")
    assert list(rows_of(read(tmp_path / "a.jsonl.zst"))) == list(rows_of(log))
