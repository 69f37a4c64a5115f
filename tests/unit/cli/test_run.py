"""`kvsim run`: its JSON, its files, what it says under overload, and what it refuses."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import kvsim
from kvsim.profiles import lookup
from kvsim.profiles.load import to_json
from kvtraces import Chat, Poisson, generate, read, write

COSTS = ("--model", "qwen3-8b", "--gpu", "h100")
CACHE = ("--chunk-tokens", 64, "--l1-size-gb", 20, "--l0-gb", 4)


@pytest.fixture
def command(chat_trace):
    return ("run", "--trace", chat_trace, *COSTS, *CACHE)


def test_the_json_has_what_was_promised(kvsim_command, command):
    found = kvsim_command.json(*command, "--engines", 2, "--rate-scale", 0.5)
    for times in (found["ttft_s"], found["ttft_no_cache_s"]):
        assert list(times) == ["p50", "p90", "p95", "p99", "mean"]
        assert 0 < times["p50"] <= times["p90"] <= times["p95"] <= times["p99"]
    assert set(found["hit_tokens"]) == {"l0", "l1", "l2"}
    assert 0 < found["loaded_tokens"] <= found["hit_tokens"]["l1"] <= found["prompt_tokens"]
    assert found["hit_tokens"]["l2"] == 0
    assert {"p50", "p95", "mean"} <= set(found["queue_s"])
    assert {"gpu", "pcie_h2d", "pcie_d2h"} <= set(found["utilisation"])
    assert all(0 <= share <= 1 for share in found["utilisation"].values())
    assert (found["requests"], found["refused_requests"]) == (400, 0)
    assert found["load"]["sustained"]
    settings = found["settings"]
    assert (settings["engines"], settings["rate_scale"], settings["l1_gb"], settings["policy"]) == (2, 0.5, 20, "lru")


def test_it_is_what_python_says_and_the_same_twice(kvsim_command, command, chat_trace):
    found = kvsim_command.json(*command)
    assert found == kvsim_command.json(*command)
    costs = kvsim.costs(model="qwen3-8b", gpu="h100")
    settings = kvsim.RunSettings(profile=costs.run_profile, chunk_tokens=64, l0_gb=4.0, l1_gb=20.0)
    alone = json.loads(json.dumps(kvsim.run(read(chat_trace), settings).summary()))
    assert {name: found[name] for name in alone} == alone


def test_seeds_and_other_arrivals(kvsim_command, command):
    poisson = (*command, "--no-baseline", "--arrivals", "poisson", "--rate-per-s", 3, "--seed")
    one, same, other = (kvsim_command.json(*poisson, seed) for seed in (1, 1, 2))
    assert one == same
    assert one["ttft_s"] != other["ttft_s"]
    assert one["ttft_no_cache_s"] is None


def test_what_if_without_a_cache(kvsim_command, command):
    found = kvsim_command.json(*command, "--l1-size-gb", 0)
    assert found["ttft_s"] == found["ttft_no_cache_s"]
    assert found["hit_tokens"]["l1"] == found["loaded_tokens"] == 0


def test_tiers_and_sizes(kvsim_command, command):
    bare = (*command, "--no-baseline")
    small = kvsim_command.json(*bare, "--l1-size-gb", 2)
    tiers = kvsim_command.json(*bare, "--l1-size-gb", 2, "--l2-size-gb", 50)
    without_end = kvsim_command.json(*bare, "--l1-size-gb", "inf")
    assert small["hit_tokens"]["l1"] < without_end["hit_tokens"]["l1"]
    assert tiers["hit_tokens"]["l2"] > 0
    assert without_end["settings"]["l1_gb"] is None
    assert without_end["evicted_chunks"] == 0


def test_kv_of_half_the_size_moves_half_the_bytes(kvsim_command, command):
    whole, half = (
        kvsim_command.json(*command, "--no-baseline", "--l1-size-gb", "inf", "--kv-dtype", dtype)
        for dtype in ("bf16", "fp8")
    )
    assert half["stored_chunks"] == whole["stored_chunks"]
    assert 2 * half["copied_bytes"]["pcie_d2h"] == whole["copied_bytes"]["pcie_d2h"]


def test_more_than_one_engine_can_do(kvsim_command, command):
    many = (*command, "--rate-scale", 60)
    found = kvsim_command.json(*many)
    assert found["ttft_s"] == dict.fromkeys(("p50", "p90", "p95", "p99", "mean"))
    load = found["load"]
    assert not load["sustained"]
    assert load["offered_prompt_tokens_per_s"] > load["served_prompt_tokens_per_s"] > 0
    assert "one engine serves" in load["says"]
    shown = kvsim_command.shown(*many)
    assert "the queue grows" in shown
    assert f"{load['served_requests_per_s']:.2f} requests/s" in " ".join(shown.replace("│", " ").split())


@pytest.mark.usefixtures("narrow")
def test_for_a_person(kvsim_command, command):
    shown = kvsim_command.shown(*command, "--l2-size-gb", 20)
    for word in ("queue", "load", "prefill", "TTFT without L1", "L2, not in L1", "GPU, prefill alone", "█"):
        assert word in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_long_requests_are_refused_and_counted(kvsim_command, command, chat_trace):
    log = read(chat_trace)
    refused = int((log.input_tokens + log.output_tokens > 2000).sum())
    assert 0 < refused < 400
    found = kvsim_command.json(*command, "--max-model-len", 2000)
    assert found["refused_requests"] == refused
    assert f"{refused} of 400 requests refused" in kvsim_command.shown(*command, "--max-model-len", 2000)


@pytest.mark.filterwarnings("error")
def test_all_requests_refused_is_said_and_is_json(kvsim_command, command):
    given = (*command, "--max-model-len", 10, "--l2-size-gb", 5)
    found = kvsim_command.json(*given)
    assert set(found["ttft_s"].values()) == set(found["queue_s"].values()) == {None}
    assert set(found["utilisation"].values()) == {0.0}
    assert found["load"]["says"] == "nothing is served: every request is refused, all 400"
    assert "Nothing is served: every request is refused, all 400" in kvsim_command.shown(*given)


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.parquet"])
def test_the_timeline_has_a_row_a_request(kvsim_command, command, tmp_path, name):
    path = tmp_path / name
    found = kvsim_command.json(*command, "--no-baseline", "--timeline", path)
    if name.endswith("parquet"):
        ttft = pytest.importorskip("pyarrow.parquet").read_table(path)["ttft_s"].to_numpy()
    else:
        text = gzip.decompress(path.read_bytes()).decode() if name.endswith("gz") else path.read_text()
        ttft = np.array([json.loads(line)["ttft_s"] for line in text.splitlines()])
    assert len(ttft) == 400
    assert np.percentile(ttft, 95) == found["ttft_s"]["p95"]
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_the_chrome_trace_has_every_request(kvsim_command, command, tmp_path):
    for name, opened in (("c.json", open), ("c.json.gz", gzip.open)):
        assert kvsim_command(*command, "--no-baseline", "--json", "--chrome-trace", tmp_path / name)[0] == 0
        with opened(tmp_path / name, "rt") as file:
            events = json.load(file)["traceEvents"]
        assert len({event["id"] for event in events if event.get("cat") == "request"}) == 400
        assert any(event["ph"] == "X" for event in events)


def test_progress(kvsim_command, command):
    assert "running" in kvsim_command(*command, "--no-baseline", "--json", "--progress")[2]


def test_a_grid_that_extrapolates_is_told_with_its_range(kvsim_command, tmp_path):
    path = tmp_path / "long.jsonl"
    row = {"timestamp": 0, "input_length": 60_000, "output_length": 5, "hash_ids": list(range(100)), "block_size": 600}
    path.write_text(json.dumps(row) + "\n")
    costs = ("--model", "llama-3.1-8b", "--gpu", "h100")  # of tables that reach further than what was measured
    given = ("run", "--trace", path, *costs, "--max-model-len", 100_000, "--l0-block-tokens", 600)
    budget = ("--max-num-batched-tokens", 65_536)
    (warning,) = kvsim_command.json(*given, *budget)["warnings"]
    assert "60,000" in warning
    assert "measured are 1 to 32,768" in warning
    assert "Extrapolated" in kvsim_command.shown(*given, *budget) or "extrapolated" in kvsim_command.shown(
        *given, *budget
    )
    assert kvsim_command.json(*given)["warnings"] == []


def test_bad_settings(kvsim_command, command, chat_trace, tmp_path):
    bare = ("run", "--trace", chat_trace)
    for arguments, word in (
        ((*bare, "--gpu", "h100"), "--model and --gpu"),
        ((*bare, "--model", "llama-3.1-8b", "--gpu", "h200"), "there are: llama-3.1-8b on h100"),
        ((*bare, "--model", "qwen3-8b", "--gpu", "a100"), "qwen3-8b on h200"),
        ((*command, "--chunk-tokens", 96), "96 is no multiple of the log's block of 64"),
        ((*command, "--chunk-tokens", 0), "0 is no multiple"),
        ((*command, "--l1-size-gb", -1), "--l1-size-gb is -1"),
        ((*command, "--l1-size-gb", "nan"), "--l1-size-gb is nan"),
        ((*command, "--l1-size-gb", 0, "--l2-size-gb", 5), "L2 needs an L1"),
        ((*command, "--l0-gb", 0), "--l0-gb is 0"),
        ((*command, "--l0-block-tokens", 48), "multiple"),
        ((*command, "--rate-scale", 0), "--rate-scale is 0"),
        ((*command, "--rate-per-s", 3), "--rate-per-s goes with"),
        ((*command, "--arrivals", "poisson"), "--rate-per-s goes with"),
        ((*command, "--engines", 0), "engines is 0"),
        ((*command, "--max-num-seqs", 0), "--max-num-seqs is 0"),
        ((*command, "--seed", -1), "--seed is -1"),
        ((*command, "--ttl-s", 1e300), "--ttl-s is 1e+300"),
        ((*command, "--lookup-s", 1e300), "--lookup-s is 1e+300"),
        ((*command, "--l1-size-gb", 1e300), "--l1-size-gb is 1e+300"),
        ((*command, "--l0-gb", 1e300), "--l0-gb is 1e+300"),
        ((*command, "--rate-scale", 1e-300), "--rate-scale is 1e-300"),
        ((*command, "--arrivals", "poisson", "--rate-per-s", 1e-300), "--rate-per-s is 1e-300"),
        ((*command, "--engines", 10**23), "--engines is 1"),
        ((*command, "--chunk-tokens", 64 * 10**20), "at most"),
        ((*command, "--l1-size-gb", 0, "--policy", "mru"), "--policy: no eviction policy 'mru'"),
        ((*command, "--l2-policy", "mru"), "--l2-policy: no eviction policy 'mru'"),
        ((*command, "--routing", "random"), "random"),
        ((*command, "--routing", "recorded"), "no instance column"),
        ((*command, "--policy", "belady"), "no eviction policy 'belady'; there are"),
        ((*command, "--store-output"), "output_hash_ids"),
        ((*command, "--timeline", tmp_path / "t.csv"), ".parquet, .jsonl"),
        ((*command, "--timeline", tmp_path / "no" / "t.jsonl"), "no folder"),
        ((*command, "--chrome-trace", tmp_path), "is a folder"),
    ):
        assert word in kvsim_command.refused(*arguments), arguments


def test_the_issues_own_words(kvsim_command, shared):
    trace = shared / "traces" / "mooncake_conversation.jsonl"
    assert "the log's block of 512" in kvsim_command.refused("run", "--trace", trace, *COSTS, "--chunk-tokens", 256)


def test_lengths_alone_can_be_run_without_a_cache(kvsim_command, tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("timestamp,input_length,output_length\n" + "".join(f"{1000 * i},1000,20\n" for i in range(60)))
    found = kvsim_command.json("run", "--trace", path, *COSTS)
    assert found["ttft_s"]["p50"] > 0
    assert "no hash_ids" in kvsim_command.refused("run", "--trace", path, *COSTS, "--l1-size-gb", 4)


def test_a_profile_of_ones_own(kvsim_command, command, chat_trace, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(to_json(lookup("qwen3-8b", "h100")))
    own = kvsim_command.json("run", "--trace", chat_trace, "--profile", path, *CACHE)
    assert own == kvsim_command.json(*command)


def living(group):
    """The processes of a group that have not ended, whether or not anybody has asked for their exit codes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, leader = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(leader) == group and state != "Z":
            found.append(stat.parent.name)
    return found


def stopped_worker(group, deadline):
    """Stop a pool's process before it takes its work; return it."""
    while time.monotonic() < deadline:
        for pid in living(group):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGSTOP)
                return int(pid)
    raise AssertionError("no worker was started")


@pytest.mark.parametrize(
    ("at", "stop", "sent"),
    [
        ("[1-9]", False, "INT"),
        ("([3-9]|\\d\\d)", False, "INT"),
        ("[1-9]", True, "INT"),
        ("[1-9]", False, "TERM"),
        ("[1-9]", False, "HUP"),
    ],
)
def test_ctrl_c_sigterm_and_sighup_end_every_process_and_leave_nothing(tmp_path, at, stop, sent):
    """Ctrl-C and a closed terminal's SIGHUP go to the whole group; SIGTERM to the command alone."""
    log, out, temporary = tmp_path / "log.jsonl", tmp_path / "out", tmp_path / "temporary"
    out.mkdir()
    temporary.mkdir()
    write(generate(Chat(requests=20_000, seed=3, arrivals=Poisson(sessions_per_s=2.0))), log)
    arguments = ("run", "--trace", log, *COSTS, *CACHE, "--engines", 4, "--progress", "--timeline", out / "t.jsonl")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "kvsim", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, start_new_session=True, text=True, **pipes) as process:
        seen = ""
        deadline = time.monotonic() + 60
        worker = stopped_worker(process.pid, deadline) if stop else None
        while not re.search(f"running.* {at}%", seen) and time.monotonic() < deadline:
            seen += os.read(process.stderr.fileno(), 4096).decode(errors="replace")
        if worker is not None:
            os.kill(worker, signal.SIGKILL)
        if sent == "TERM":
            process.terminate()
        else:
            os.killpg(process.pid, signal.Signals[f"SIG{sent}"])
        try:
            printed, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == {"HUP": 129, "INT": 130, "TERM": 143}[sent], seen + err
    assert "Traceback" not in seen + err
    assert (printed, list(out.iterdir()), list(temporary.iterdir())) == ("", [], [])
    deadline = time.monotonic() + 20
    while living(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert living(process.pid) == []


def test_sighup_is_passed_over_under_nohup(tmp_path, chat_trace):
    arguments = ("tune", "--trace", chat_trace, *COSTS, "--l1-points", 300, "--progress", "--json")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = ["nohup", sys.executable, "-m", "kvsim", *map(str, arguments)]
    pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with (
        (tmp_path / "out").open("w") as out,
        subprocess.Popen(command, env=environment, text=True, stdout=out, **pipes) as process,
    ):
        seen = ""
        deadline = time.monotonic() + 60
        while not re.search("sweeping", seen) and time.monotonic() < deadline:
            seen += os.read(process.stderr.fileno(), 4096).decode(errors="replace")
        process.send_signal(signal.SIGHUP)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 0, seen + err
    assert json.loads((tmp_path / "out").read_text())["sweep"]
