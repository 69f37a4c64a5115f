"""Engines that start, end and start again; servers that are away or say no; the log of what was asked."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import harness
import numpy as np
import pytest

pytest.importorskip("vllm")

from harness import BLOCK, CHUNK, assert_same, generate, metrics
from servers import ServerInThread, counters, environment, wait_for
from tiny_model import build_mixed_model, build_sliding_model

from kvcore.live.client import RegistrationRefused
from kvcore.policy.hashing import block_hashes, trace_ids
from kvcore.vllm import KVCoreMPConnector, compat
from kvcore.vllm.compat import UnsupportedModelError
from kvcore.vllm.embedded import EmbeddedServer
from kvsim.recorded_settings import served
from kvsim.tuner.pricing import KvSize

pytestmark = pytest.mark.vllm
SMALL = {"l1_size_gb": 1 / 32, "page_size": "512KiB", "chunk_size": CHUNK}


def tokens(count, seed):
    return np.random.default_rng(seed).integers(4, 300, count).tolist()


SHARED = tokens(4 * CHUNK + 50, 1)
FIRST, SECOND, SHORT = SHARED + tokens(100, 2), SHARED + tokens(130, 3), tokens(60, 4)


def test_a_cache_that_is_reset_is_not_copied_from_any_more(monkeypatch):
    """vLLM's sleep takes its memory away right behind."""
    done = []
    worker, scheduler = object.__new__(KVCoreMPConnector), object.__new__(KVCoreMPConnector)
    worker._worker = SimpleNamespace(drain=lambda: done.append("drained"))
    scheduler._scheduler = SimpleNamespace(forget=lambda mark: done.append("forgotten"))
    monkeypatch.setattr(compat, "worker_connector", lambda: worker)
    assert scheduler.reset_cache()
    assert done == ["drained", "forgotten"]
    monkeypatch.setattr(compat, "worker_connector", lambda: None)
    assert scheduler.reset_cache()
    assert done[2:] == ["forgotten"]


@pytest.fixture(scope="module")
def reference(tiny_model):
    with harness.engine(tiny_model) as llm:
        return generate(llm, [FIRST, SECOND, SHORT])


def mp(endpoint, **extra):
    # The server shares the interpreter with an engine that starts, and may be late.
    return harness.connector_config("KVCoreMPConnector", endpoint=endpoint, deadline_ms=10_000, **extra)


def test_restarted_engine_loads_what_the_first_stored(tiny_model, reference, tmp_path, caplog):
    log, journal = tmp_path / "log.jsonl", tmp_path / "journal"
    server = ServerInThread(tmp_path, **SMALL, record=str(log), journal=str(journal))
    with harness.engine(tiny_model, mp(server.endpoint)) as llm:
        assert_same(generate(llm, [FIRST]), reference[:1])
        namespace = harness.scheduler(llm).connector._scheduler._hasher.namespace
    with caplog.at_level("INFO", logger="kvcore"), harness.engine(tiny_model, mp(server.endpoint)) as llm:
        assert_same(generate(llm, [SECOND]), reference[1:2])
        hits = metrics(llm)["vllm:external_prefix_cache_hits"]
        assert hits == 4 * CHUNK
        assert f"Retrieved {4 * CHUNK} tokens of request" in caplog.text
        assert harness.scheduler(llm).connector._scheduler._hasher.namespace == namespace
        assert_same(generate(llm, [SHORT]), reference[2:])
        config, blocks = harness.scheduler(llm).vllm_config, harness.scheduler(llm).kv_cache_config.num_blocks
    assert counters(server.endpoint)["loaded_tokens"] == hits
    server.stop()
    check_log([json.loads(line) for line in log.read_text().splitlines()], namespace)
    check_settings(served(journal), config, blocks)


def check_log(rows, namespace):
    assert [row["seq"] for row in rows] == [0, 1, 2]
    for row, prompt in zip(rows, (FIRST, SECOND, SHORT), strict=True):
        assert row["input_length"] == len(prompt)
        assert row["output_length"] == 8
        assert row["block_size"] == BLOCK
        assert row["hash_ids"] == trace_ids(block_hashes(prompt, BLOCK, namespace.digest())).tolist()
        assert row["status"] == "length"
        assert 0 < row["prefill_ms"] <= row["ttft_ms"]
        assert row["queue_ms"] + row["load_ms"] + row["prefill_ms"] == pytest.approx(row["ttft_ms"], abs=0.01)
    assert [row["matched_l1"] for row in rows] == [0, 4 * CHUNK, 0]
    assert [row["loaded_tokens"] for row in rows] == [0, 4 * CHUNK, 0]
    assert [row["l0_tokens"] for row in rows] == [0, 0, 0]
    assert rows[1]["load_ms"] > 0


def check_settings(found, config, blocks):
    """What `kvsim validate` is told of the server and its engines."""
    assert (found.l1_gb, found.chunk_tokens, found.page_bytes) == (1 / 32, CHUNK, 512 << 10)
    assert found.engine == {
        "l0_blocks": blocks - 1,
        "l0_block_tokens": BLOCK,
        "l0_prefix_caching": 1,
        "max_model_len": config.model_config.max_model_len,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "chunked_prefill": 1,
        "async_scheduling": int(config.scheduler_config.async_scheduling),
    }
    assert not found.unlike
    a_token = KvSize(stored_bytes_per_token=found.chunk_bytes // CHUNK, moved_bytes_per_token=0)
    assert found.packing(a_token) == "none"


def test_server_that_comes_after_the_engine(tiny_model, reference, tmp_path):
    with harness.engine(tiny_model, mp(f"ipc://{tmp_path}/kvcore.ipc")) as llm:
        assert_same(generate(llm, [FIRST]), reference[:1])
        server = ServerInThread(tmp_path, **SMALL)
        connector = harness.scheduler(llm).connector
        wait_for(lambda: connector._scheduler._link.registered is not None)

        def hit():
            assert llm.reset_prefix_cache()
            before = metrics(llm)["vllm:external_prefix_cache_hits"]
            assert_same(generate(llm, [FIRST]), reference[:1])
            return metrics(llm)["vllm:external_prefix_cache_hits"] - before == 5 * CHUNK

        wait_for(hit)
    server.stop()


def test_registration_that_is_refused_ends_the_start(tiny_model, tmp_path):
    server = ServerInThread(tmp_path, **{**SMALL, "chunk_size": 48})
    with pytest.raises(RegistrationRefused, match=r"48.*32|32.*48"), harness.engine(tiny_model, mp(server.endpoint)):
        pass
    server.stop()


def test_unknown_setting_ends_the_start(tiny_model):
    with pytest.raises(ValueError, match="no key chunk_size"), harness.engine(tiny_model, mp("ipc:///x", chunk_size=1)):
        pass


def test_model_that_forgets_tokens_is_refused(tmp_path):
    with (
        pytest.raises(UnsupportedModelError, match="SlidingWindowSpec"),
        harness.engine(build_sliding_model(tmp_path / "sliding"), mp("ipc:///x")),
    ):
        pass


def test_model_that_mixes_sliding_and_full_attention(tmp_path):
    """With a connector vLLM keeps every token in every layer of such a model, so that it is reused as any other."""
    model = build_mixed_model(tmp_path / "mixed")
    with harness.engine(model) as llm:
        assert len(harness.scheduler(llm).kv_cache_config.kv_cache_groups) > 1
        expected = generate(llm, [FIRST])
    server = ServerInThread(tmp_path, **{**SMALL, "page_size": "1MiB"})
    with harness.engine(model, mp(server.endpoint)) as llm:
        assert_same(generate(llm, [FIRST]), expected)
        assert llm.reset_prefix_cache()
        assert_same(generate(llm, [FIRST]), expected)
        assert metrics(llm)["vllm:external_prefix_cache_hits"] == 5 * CHUNK
    server.stop()


def test_another_configuration_of_the_same_weights_finds_nothing(tiny_model, tmp_path):
    """As when YaRN is written into config.json for longer prompts."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    server = ServerInThread(tmp_path, **SMALL)
    answers = []
    for name in ("plain", "yarn"):
        if name == "yarn":
            told = json.loads((model / "config.json").read_text())
            yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
            told["rope_parameters"] = {**(told.get("rope_parameters") or {}), **yarn}
            (model / "config.json").write_text(json.dumps(told))
        with harness.engine(model, mp(server.endpoint)) as llm:
            answers.append(generate(llm, [FIRST]))
            assert metrics(llm)["vllm:external_prefix_cache_hits"] == 0, name
            assert llm.reset_prefix_cache()
    server.stop()
    assert answers[0][0].logprobs != answers[1][0].logprobs, "it is another model"


def test_what_a_killed_embedded_server_left_is_removed_by_the_next(tmp_path):
    code = (
        "import os, signal, sys; from kvcore.vllm.embedded import EmbeddedServer;"
        "server = EmbeddedServer('first', {'arena_dir': sys.argv[1], 'l1_size_gb': 1 / 64});"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment(), check=False)
    assert killed.returncode == -9
    assert len(list(tmp_path.glob("*.arena"))) == 1
    alive = EmbeddedServer("second", {"arena_dir": str(tmp_path), "l1_size_gb": 1 / 64})
    third = EmbeddedServer("third", {"arena_dir": str(tmp_path), "l1_size_gb": 1 / 64})
    assert len(list(tmp_path.glob("*.arena"))) == 2
    alive.stop()
    third.stop()
    assert not list(tmp_path.iterdir())


def test_embedded_server_ends_with_its_engine(tiny_model, reference, tmp_path):
    config = harness.connector_config("KVCoreConnector", arena_dir=str(tmp_path), **SMALL)
    with harness.engine(tiny_model, config) as llm:
        assert list(tmp_path.glob("*.ipc"))
        assert not list(tmp_path.glob("*.arena"))
        assert not list(tmp_path.glob("*.held"))
        assert harness.scheduler(llm).connector._scheduler._link._held is not None, "it was there when it had a name"
        assert_same(generate(llm, [FIRST]), reference[:1])
    assert not list(tmp_path.iterdir())


def simulated(log, chunks, policy, engine):
    """In a process of its own: a vLLM that starts where numba was imported stumbles over its functions."""
    code = (
        "import json, sys; from kvsim.api import simulate; from kvtraces import read;"
        "path, tokens, chunks, policy, engine = sys.argv[1:];"
        "sizes = {'chunk_tokens': int(tokens), 'capacity_chunks': int(chunks)};"
        "found = simulate(read(path), **sizes, policy=policy, engine=engine);"
        "print(json.dumps(found.hit_tokens.tolist()))"
    )
    command = [sys.executable, "-c", code, str(log), str(CHUNK), str(chunks), policy, engine]
    return json.loads(subprocess.run(command, env=environment(), check=True, stdout=subprocess.PIPE).stdout)


@pytest.mark.parametrize("policy", ["lru", "s3fifo"])
def test_simulating_the_recorded_log_gives_what_the_live_run_matched(tiny_model, tmp_path, policy):
    """A sequential run over an L1 of 12 chunks: every request's matched tokens, by the sweep and by the core."""
    log, chunks = tmp_path / "log.jsonl", 12
    options = {**SMALL, "l1_size_gb": chunks / 2048, "eviction_policy": policy}
    server = ServerInThread(tmp_path, **options, record=str(log))
    shared = [tokens(3 * CHUNK, 70 + i) for i in range(4)]
    with harness.engine(tiny_model, mp(server.endpoint), max_num_batched_tokens=256) as llm:
        for i in range(24):
            prompt = shared[i * i % 4][: (1 + i % 3) * CHUNK + 7 * i] + tokens(CHUNK + 90, 80 + i % 5)
            generate(llm, [prompt], 1)
            if i % 3 == 0:
                assert llm.reset_prefix_cache()
    evicted = counters(server.endpoint)["evicted_chunks"]
    server.stop()
    assert evicted > 0
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    matched = [row["matched_l1"] for row in rows]
    assert len(rows) == 24
    assert len(set(matched)) > 2
    for engine in ("sweep", "core"):
        assert simulated(log, chunks, policy, engine) == matched
