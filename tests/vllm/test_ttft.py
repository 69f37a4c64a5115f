"""`kvcore bench ttft` on the CPU: small, without peers, hits checked, and a hit that was none found out."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from servers import ROOT, environment

from kvcore.vllm.ttft import __main__ as command_line
from kvcore.vllm.ttft import child, engine, look, measure, report
from kvcore.vllm.ttft.engine import Answer, EngineError
from kvcore.vllm.ttft.measure import Sample, prompt, token_s
from kvcore.vllm.ttft.systems import Running, Sizes

SMALL = [
    "--dtype", "float32", "--eager", "--in-process", "--rounds", "1", "--repeats", "1", "--hits", "1", "--cold", "0",
    "--settle-s", "0.1", "--max-num-batched-tokens", "2048", "--engine-arg", "block_size=32",
]  # fmt: skip


def bench(model, folder, *flags):
    env = environment() | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    env.pop("CUDA_VISIBLE_DEVICES", None)
    command = [sys.executable, "-m", "kvcore", "bench", "ttft", "--model", str(model), *SMALL, *flags]
    done = subprocess.run(
        [*command, "--out", str(folder / "ttft.json"), "--logs", str(folder / "logs"), "--json"],
        env=env, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    return done, json.loads(done.stdout) if done.stdout.startswith("{") else None


@pytest.mark.vllm
def test_cold_and_every_hit_beside_no_connector(tiny_model, tmp_path):
    pytest.importorskip("vllm")
    done, result = bench(
        tiny_model, tmp_path, "--systems", "none,kvcore", "--together", "2", "--lengths", "512,1500",
        "--l1-size-gb", "0.125", "--decode-tokens", "16", "--decode-batch", "2", "--decode-repeats", "1",
        "--l2", f"files:{tmp_path}/l2", "--l2-size-gb", "0.5", "--fastest-processor",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert result["failures"] == []
    found = {(row["system"], row["situation"], row["tokens"]) for row in result["figures"]}
    hits = {"none": ("cold", "gpu"), "kvcore": ("cold", "gpu", "l1"), "kvcore-l2": ("cold", "l2")}
    expected = {(name, hit, tokens) for name, all_ in hits.items() for hit in all_ for tokens in (512, 1500)}
    assert found == expected | {("none", "decode", 1024), ("kvcore", "decode", 1024)}
    assert {(row["system"], row["situation"]): row["equal"] for row in result["outputs"]} == {
        ("none", "cold"): 2, ("none", "gpu"): 2, ("kvcore", "cold"): 2, ("kvcore", "gpu"): 2, ("kvcore", "l1"): 2,
        ("kvcore-l2", "cold"): 2, ("kvcore-l2", "l2"): 2,
    }  # fmt: skip
    assert result["command"].startswith("kvcore bench ttft --model")
    assert result["device"] == "cpu"
    saved = json.loads((tmp_path / "ttft.json").read_text())
    assert all(sample["fault"] == "" and len(sample["output"]) in (0, 8) for sample in saved["samples"])
    assert all(len(sample["looks_s"]) == 2 and 0 < min(sample["looks_s"]) < 1 for sample in saved["samples"])
    assert saved["plan"]["fastest_processor"] is True
    assert saved["quiet"]["title"].endswith(f" of {len(saved['samples'])} requests")
    assert {row["situation"] for row in saved["quiet"]["figures"]} <= {"cold", "gpu", "l1", "l2", "decode"}
    cold_prompts = [line.partition("] ")[2].split()[0] for line in done.stderr.splitlines() if " cold " in line]
    # Everything once to warm up, then by turns: each length in both engines before the next.
    assert cold_prompts[:8] == ["none", "none", "kvcore", "kvcore", "none", "kvcore", "none", "kvcore"]
    cold, l1 = (
        next(row for row in result["figures"] if (row["system"], row["situation"]) == ("kvcore", hit))
        for hit in ("cold", "l1")
    )
    assert cold["samples"] == l1["samples"] == 1


@pytest.mark.vllm
def test_a_hit_that_was_none_is_an_error_and_the_rest_goes_on(tiny_model, tmp_path):
    pytest.importorskip("vllm")
    l1_of_one_chunk = str(2 / 1024)
    done, result = bench(
        tiny_model, tmp_path, "--systems", "lmcache,kvcore", "--lengths", "1500", "--l1-size-gb", l1_of_one_chunk,
        "--decode-tokens", "0",
    )  # fmt: skip
    assert done.returncode == 1
    assert any("LMCache is not installed" in line for line in result["failures"])
    assert any("kvcore, run 1, l1, 1500 tokens" in line and "not 1248" in line for line in result["failures"])
    assert {row["situation"] for row in result["figures"]} == {"cold", "gpu"}  # the false hit counts nowhere


def test_an_engine_that_hangs_is_ended(monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "_PATIENCE_S", 0.5)
    hangs = tmp_path / "python"
    hangs.write_text("#!/bin/sh\necho 'some Error: stuck' >&2\nsleep 100 & wait\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(engine.sys, "executable", str(hangs))
    with engine.Engine({}, {}, tmp_path / "log") as hung, pytest.raises(EngineError, match="some Error: stuck"):
        hung.facts  # noqa: B018 - waits until it is up


def test_who_does_not_ask_for_the_facts_gets_answers_all_the_same(monkeypatch, tmp_path):
    child = tmp_path / "child"
    child.write_text("#!/bin/sh\nread start; echo '{\"fact\": 1}'; read first; echo '{\"count\": 2}'; read end\n")
    child.chmod(0o755)
    monkeypatch.setattr(engine.sys, "executable", str(child))
    with engine.Engine({}, {}, tmp_path / "log") as one:
        assert one.counters() == {"count": 2}
        assert one.facts == {"fact": 1}


def test_what_fails_at_the_end_of_a_group_does_not_end_the_others(monkeypatch, tmp_path):
    class Dies(engine.Engine):
        def __init__(self, *_):
            pass

        @property
        def facts(self):
            raise EngineError("does not start")

        def close(self):
            raise OSError("cannot be ended")

    monkeypatch.setattr(command_line, "Engine", Dies)
    bench = command_line.Bench(
        plan=measure.Plan(), sizes=Sizes(l1_gb=1), arguments={}, in_process=False, logs=tmp_path, budget_s=60, out=None,
        together=2,
    )  # fmt: skip
    bench.all(["none", "none", "none"])
    one = "none, run {}: does not start"
    assert bench.failures == [
        one.format(0), one.format(1), "none, run 0, none, run 1: cannot be ended",
        one.format(2), "none, run 2: cannot be ended",
    ]  # fmt: skip


def test_an_unknown_system_is_refused_in_a_line():
    command = [sys.executable, "-m", "kvcore.vllm.ttft", "--model", "x", "--systems", "nope"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no system nope" in done.stderr


def sample(system, situation, seconds, *, output=(1, 2), fault="", name="a", tokens=512):
    return Sample(
        system=system, run=0, situation=situation, tokens=tokens, prompt=name, seconds=seconds, output=output,
        fault=fault,
    )  # fmt: skip


def test_ratios_are_to_the_better_peer_and_to_no_connector():
    samples = [
        sample("kvcore", "l1", 0.4), sample("offloading", "l1", 0.8), sample("lmcache", "l1", 0.5),
        sample("kvcore", "cold", 1.01), sample("none", "cold", 1.0),
        sample("kvcore", "l1", 9.0, fault="none of it hit"),
    ]  # fmt: skip
    found = {(row["situation"], row["against"]): row["ratio"] for row in report.ratios(samples)}
    assert found == {("l1", "lmcache"): pytest.approx(0.8), ("cold", "none"): pytest.approx(1.01)}


def test_an_answer_that_differs_is_a_failure_of_ours_only():
    samples = [
        sample("none", "gpu", 1.0), sample("none", "cold", 1.0, output=(5, 6)),
        sample("kvcore", "l1", 1.0), sample("lmcache", "l1", 1.0, output=(1, 3)),
    ]  # fmt: skip
    assert report.faults(samples) == []
    samples.append(sample("kvcore", "l1", 1.0, output=(5, 6)))
    assert report.faults(samples) == ["kvcore, l1: 1 of 2 answers differ from those of vLLM alone"]


def test_requests_at_full_speed_are_told_from_others_by_looks_on_both_sides():
    looks = [(1.0, 1.19), (1.0, 1.21), (2.0, 1.0), (1.1, 1.1), ()]
    samples = [replace(sample("kvcore", "l1", float(n)), looks_s=pair) for n, pair in enumerate(looks)]
    assert [one.seconds for one in report.quiet(samples)] == [0.0, 3.0]
    assert report.quiet(samples[-1:]) == report.quiet([]) == []


@pytest.fixture
def processors(monkeypatch):
    """Three processors, the second of them the fastest; returns where this thread has been, one set after another."""
    seconds, been = {3: 2.0, 5: 1.0, 8: 3.0}, [{3, 5, 8}]
    monkeypatch.setattr(look.os, "sched_getaffinity", lambda _thread: been[-1])
    monkeypatch.setattr(look.os, "sched_setaffinity", lambda _thread, to: been.append(set(to)))
    monkeypatch.setattr(look, "_loop_s", lambda _additions: min(seconds[processor] for processor in been[-1]))
    return been


def test_an_engine_settles_on_the_fastest_of_its_processors_and_leaves_again(processors):
    worker = look.Look()
    assert worker.kvcore_settle() == [5, 3, 8]
    assert processors[1:] == [{3}, {5}, {8}, {5}]
    worker.kvcore_leave()
    assert processors[-1] == {3, 5, 8}


@pytest.mark.parametrize(("fastest", "at_work"), [(True, {3}), (False, {3, 5, 8})])
def test_who_drives_the_engine_takes_the_next_processor_for_as_long_as_a_request(processors, fastest, at_work):
    asked, worker = [], object.__new__(child.Worker)

    def collective_rpc(method):
        asked.append(method)
        return [{look.SETTLE: [5, 3, 8], look.LOOK: 0.5, look.LEAVE: None}[method]]

    def step():
        assert processors[-1] == at_work
        worker._engine.has_unfinished_requests = lambda: False
        return [SimpleNamespace(request_id="0", outputs=[SimpleNamespace(token_ids=[7])])]

    worker._requests, worker._vllm = 0, SimpleNamespace(SamplingParams=lambda **_: None)
    worker._llm = SimpleNamespace(collective_rpc=collective_rpc)
    worker._engine = SimpleNamespace(add_request=lambda *_: None, step=step, has_unfinished_requests=lambda: True)
    assert worker.run([[1, 2]], 1, fastest=fastest)["outputs"] == [[7]]
    assert processors[-1] == {3, 5, 8}
    looks = [look.LOOK, look.LOOK]
    assert asked == ([look.SETTLE, *looks, look.LEAVE] if fastest else looks)


@pytest.mark.parametrize("fastest", [True, False])
def test_nothing_settles_before_all_is_warm(fastest):
    few = {"lengths": (8,), "repeats": 1, "hits": 1, "cold": 1, "decode_tokens": 0, "settle_s": 0}
    plan = measure.Plan(**few, fastest_processor=fastest)
    fake = FakeEngine({})
    for _ in measure.Measurement(fake, Running(arguments={}), plan, "none", 0, str).turns():
        pass
    assert fake.settled == [False, False, *[fastest] * 3]


def test_an_engine_over_several_gpus_has_no_one_processor(tmp_path):
    done, _ = bench(tmp_path, tmp_path, "--fastest-processor", "--engine-arg", "tensor_parallel_size=2")
    assert done.returncode == 2
    assert "several GPUs" in done.stderr


class FakeEngine:
    """Answers at once, and counts what it is told to."""

    facts = {"kv_bytes_per_token": 2, "block_tokens": 16, "vocabulary": 4096}  # noqa: RUF012 - never changed

    def __init__(self, grows):
        self.grows, self.counted, self.settled = grows, dict.fromkeys(grows, 0.0), []

    def counters(self):
        return dict(self.counted)

    def generate(self, prompts, tokens, *, fastest=False):
        self.settled.append(fastest)
        self.counted = {name: value + self.grows[name] for name, value in self.counted.items()}
        return [Answer(ttft_s=0.5, arrivals_s=(0.5,), tokens=(1,)) for _ in prompts]


@pytest.mark.parametrize(
    ("situation", "gpu", "external", "said"),
    [
        ("cold", 0, 0, ""),
        ("cold", 16, 0, "16 tokens of 512 hit in the engine's own cache, not 0"),
        ("cold", 0, 512, "512 tokens of 512 loaded (external), not none"),
        ("gpu", 496, 0, ""),
        ("gpu", 496, 16, ""),  # one that loads the last block too
        ("gpu", 480, 0, "480 tokens of 512 hit in the engine's own cache, not 496"),
        ("gpu", 496, 512, "512 tokens of 512 loaded (external), not none"),
        ("l1", 0, 496, ""),
        ("l1", 0, 128, "128 tokens of 512 loaded (external), not 432"),
        ("l1", 496, 0, "496 tokens of 512 hit in the engine's own cache, not 0"),
    ],
)
def test_a_request_has_to_meet_what_it_is_called(monkeypatch, situation, gpu, external, said):
    monkeypatch.setattr(measure, "_ARRIVE_S", 0.0)
    fake = FakeEngine({"vllm:prefix_cache_hits": gpu, "vllm:external_prefix_cache_hits": external})
    running = Running(arguments={}, chunk_tokens=64, loaded=lambda counters, _bytes: {})
    measured = measure.Measurement(fake, running, measure.Plan(), "x", 0, lambda _line: None)
    measured._hit("a", 512, situation)
    assert [(one.fault, one.seconds) for one in measured.samples] == [(said, 0.5)]


def test_what_a_system_counts_itself_has_to_agree(monkeypatch):
    monkeypatch.setattr(measure, "_ARRIVE_S", 0.0)
    fake = FakeEngine({"vllm:external_prefix_cache_hits": 496, "loaded": 100})
    running = Running(arguments={}, chunk_tokens=64, loaded=lambda counters, size: {"l1": counters["loaded"] / size})
    measured = measure.Measurement(fake, running, measure.Plan(), "x", 0, lambda _line: None)
    measured._hit("a", 512, "l1")
    assert measured.samples[0].fault == "50 tokens of 512 loaded (l1), not 432"


def test_prompts_follow_from_their_names():
    assert prompt("a", 50, 4096) == prompt("a", 50, 4096)
    assert prompt("a", 50, 4096) != prompt("b", 50, 4096)
    assert all(100 <= word < 4096 for word in prompt("a", 5000, 4096))


def test_decoding_is_timed_while_all_requests_take_part():
    def answer(*times):
        return Answer(ttft_s=times[0], arrivals_s=times, tokens=tuple(range(len(times))))

    assert token_s([answer(1.0, 2.0, 3.0, 4.0), answer(2.0, 3.0, 4.0, 5.0)]) == pytest.approx(1.0)
    with pytest.raises(EngineError, match="never decoded together"):
        token_s([answer(1.0, 2.0), answer(3.0, 4.0)])
