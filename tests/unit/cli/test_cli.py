"""The command: what it prints, what it refuses, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from kvsim.cli import main
from kvtraces import Chat, Poisson, generate, write

GOOD = {"timestamp": 0, "input_length": 1300, "output_length": 5, "hash_ids": [1, 2, 3]}
COSTS = ("--model", "qwen3-8b", "--gpu", "h100")


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "chat.jsonl"
    write(generate(Chat(requests=400, seed=3, arrivals=Poisson(sessions_per_s=0.5))), path)
    return str(path)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def parsed(capsys, *arguments):
    code, out, err = run(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def refused(capsys, *arguments):
    """Return the one line on stderr of a command that must exit with 2."""
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"kvsim: error: [^\n]+\n", err), err
    assert "Traceback" not in err
    return err


def rows(tmp_path, *lines):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_simulate_prints_one_object_and_both_engines_agree(capsys, trace):
    command = ("simulate", "--trace", trace, "--chunk-tokens", 128, "--capacity-chunks", 300, "--policy", "sieve")
    swept = parsed(capsys, *command, "--engine", "sweep")
    assert swept == parsed(capsys, *command, "--engine", "core")
    assert {"requests", "chunk_accesses", "hit_chunks", "hit_tokens", "input_tokens", "token_hit_ratio"} <= set(swept)
    assert swept["requests"] == 400
    assert 0 < swept["hit_chunks"] < swept["chunk_accesses"]
    assert swept["hit_tokens"] == 128 * swept["hit_chunks"]
    assert swept["token_hit_ratio"] == round(swept["hit_tokens"] / swept["input_tokens"], 6)


def test_simulate_without_end_and_by_size(capsys, trace):
    command = ("simulate", "--trace", trace, "--chunk-tokens", 64)
    unbounded = parsed(capsys, *command)
    assert unbounded["capacity_chunks"] is None
    assert unbounded == parsed(capsys, *command, "--engine", "core")
    sized = parsed(capsys, *command, "--l1-size-gb", 4.5, "--model", "Qwen/Qwen3-8B")
    assert sized["capacity_chunks"] == int(4.5 * 2**30) // (10 << 20)  # 9 MiB of KV are five pages of 2 MiB
    assert sized["hit_chunks"] < unbounded["hit_chunks"]
    halved = parsed(capsys, *command, "--l1-size-gb", 4.5, "--model", "qwen3-8b", "--kv-dtype", "fp8")
    assert halved["capacity_chunks"] == int(4.5 * 2**30) // (6 << 20)


def test_simulate_of_no_capacity_hits_nothing(capsys, trace):
    for engine in ("sweep", "core"):
        found = parsed(
            capsys, "simulate", "--trace", trace, "--chunk-tokens", 64, "--capacity-chunks", 0, "--engine", engine
        )
        assert found["hit_chunks"] == 0


@pytest.mark.parametrize("row", range(0, 112, 16))
def test_simulate_reproduces_golden_rows(capsys, shared, row):
    wanted = json.loads((shared / "golden" / "conversation.json").read_text())["rows"][row]
    capacity = () if wanted["capacity_chunks"] is None else ("--capacity-chunks", wanted["capacity_chunks"])
    trace = shared / "traces" / "mooncake_conversation.jsonl"
    found = parsed(
        capsys,
        *("simulate", "--trace", trace, "--chunk-tokens", wanted["chunk_tokens"], *capacity),
        *("--policy", wanted["policy"], "--engine", "sweep"),
    )
    assert found == {name: value for name, value in wanted.items() if name != "trace"}


def test_simulate_for_a_person(capsys, trace):
    code, out, err = run(capsys, "simulate", "--trace", trace, "--chunk-tokens", 64, "--policy", "LRU")
    assert (code, err) == (0, "")
    assert "token hit ratio" in out


def test_tune_json(capsys, trace):
    found = parsed(
        capsys,
        *("tune", "--trace", trace, *COSTS, "--chunk-sizes", "64,256", "--l1-sizes-gb", "1,2.5,40"),
        *("--policies", "lru,ARC"),
    )
    assert set(found) >= {"recommendation", "sweep", "ceiling", "profile", "log"}
    wanted = {"chunk_tokens", "l1_size_gb", "policy", "token_hit_ratio", "ttft_p50_s", "ttft_p95_s", "ttft_p50_saved_s"}
    assert wanted <= set(found["recommendation"])
    assert {"unbounded", "belady"} <= set(found["ceiling"])
    settings = {(one["chunk_tokens"], one["l1_size_gb"], one["policy"]) for one in found["sweep"]}
    assert settings == {(c, gb, p) for c in (64, 256) for gb in (1, 2.5, 40) for p in ("lru", "arc")}
    assert len(found["sweep"]) == len(settings)
    assert all(wanted <= set(one) for one in found["sweep"])
    assert found["log"]["requests"] == 400
    assert found["profile"]["transfers"]["h2d"]["bytes_per_s"]


@pytest.mark.usefixtures("narrow")
def test_tune_for_a_person(capsys, trace):
    code, out, err = run(capsys, "tune", "--trace", trace, *COSTS, "--l1-points", 4, "--policies", "lru")
    assert (code, err) == (0, "")
    assert "Recommendation" in out
    assert re.search(r"Chunks of [\d,]+ tokens .* policy lru", out)
    assert max(map(len, out.splitlines())) <= 80


def test_tune_by_a_profile_of_ones_own(capsys, trace, tmp_path):
    command = ("tune", "--trace", trace, "--l1-points", 3, "--policies", "lru", "--chunk-sizes", "128")
    shipped = parsed(capsys, *command, *COSTS)
    path = tmp_path / "own.json"
    path.write_text(json.dumps(shipped["profile"]))
    assert parsed(capsys, *command, "--profile", path) == shipped
    assert parsed(capsys, *command, "--profile", path, *COSTS) == shipped
    assert "is of h100" in refused(capsys, *command, "--profile", path, "--gpu", "h200")
    assert "is of 1" in refused(capsys, *command, "--profile", path, "--tensor-parallel", 2)


def test_a_long_table_is_thinned_around_the_recommendation(capsys, trace):
    code, out, _ = run(capsys, "tune", "--trace", trace, *COSTS, "--l1-points", 150, "--policies", "lru")
    assert code == 0
    size = re.search(r"an L1 of ([\d.,]+) GiB", out).group(1)
    table = out[out.index("L1 GiB") : out.index("Prompt tokens found")]
    assert 15 <= table.count("lru") <= 25
    assert re.search(rf"^\s*{re.escape(size)}", table, flags=re.MULTILINE)


def test_tune_writes_plots(capsys, trace, tmp_path):
    folder = tmp_path / "new" / "plots"
    code, _, _ = run(capsys, "tune", "--trace", trace, *COSTS, "--l1-points", 4, "--json", "--plot", folder)
    assert code == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {"hit_ratio.svg", "ttft_cdf.svg", "marginal_gain.svg", "policies.svg"}
    assert all(path.read_text().startswith("<svg ") for path in folder.iterdir())


def test_progress_only_when_somebody_looks(capsys, trace):
    command = ("tune", "--trace", trace, *COSTS, "--l1-points", 3, "--policies", "lru", "--json")
    assert run(capsys, *command)[2] == ""
    shown = run(capsys, *command, "--progress")[2]
    assert "reading" in shown
    assert "sweeping" in shown


def test_describe(capsys, trace):
    found = parsed(capsys, "describe", "--trace", trace)
    assert found["requests"] == 400
    assert found["block_tokens"] == 64
    code, out, _ = run(capsys, "describe", "--trace", trace)
    assert code == 0
    assert "hit without end" in out


@pytest.mark.parametrize("kind", ["chat", "rag", "agent", "mixed"])
def test_generate_is_seeded_and_read_back(capsys, tmp_path, kind):
    paths = [tmp_path / f"{i}.jsonl.gz" for i in range(3)]
    for path, seed in zip(paths, (5, 5, 6), strict=True):
        command = ("generate", path, "--kind", kind, "--requests", 60, "--seed", seed, "--block-size", 32, "--bursty")
        assert run(capsys, *command)[0] == 0
    first, same, other = (parsed(capsys, "describe", "--trace", path) for path in paths)
    assert first == same != other
    assert first["block_tokens"] == 32
    assert 0 < first["requests"] <= 180


def test_generate_writes_over_nothing(capsys, tmp_path):
    path = rows(tmp_path, GOOD)
    assert "is there already" in refused(capsys, "generate", path, "--requests", 5)
    assert "no folder" in refused(capsys, "generate", tmp_path / "no" / "a.jsonl")
    assert "--requests 0" in refused(capsys, "generate", tmp_path / "b.jsonl", "--requests", 0)
    assert "--sessions-per-s" in refused(capsys, "generate", tmp_path / "b.jsonl", "--sessions-per-s", -1)
    assert not (tmp_path / "b.jsonl").exists()


BAD_ROWS = {
    "truncated": ('{"timestamp": 1, "input_len', "log.jsonl:2"),
    "not JSON": ("hello\n", "log.jsonl:2"),
    "wrong count": ({**GOOD, "hash_ids": [1]}, "log.jsonl:2: hash_ids"),
    "negative": ({**GOOD, "input_length": -5}, "log.jsonl:2: input_length"),
    "missing": ({"timestamp": 1, "output_length": 5, "hash_ids": []}, "log.jsonl:2: input_length"),
    "mistyped": ({**GOOD, "output_length": "five"}, "log.jsonl:2: output_length"),
    "absurd": ({**GOOD, "input_length": 10**15}, "log.jsonl:2: input_length"),
    "backwards": ({**GOOD, "timestamp": -1.0}, "log.jsonl:2: timestamp"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_are_named_or_counted(capsys, tmp_path, kind):
    bad, named = BAD_ROWS[kind]
    path = rows(tmp_path, GOOD, bad)
    command = ("simulate", "--trace", path, "--chunk-tokens", 512, "--block-size", 512)
    assert named in refused(capsys, *command)
    assert named in refused(capsys, "tune", "--trace", path, "--block-size", 512, *COSTS)
    code, out, err = run(capsys, *command, "--json", "--skip-bad")
    assert code == 0
    assert json.loads(out)["requests"] == 1
    assert "1 bad row left out" in err


def test_bad_logs(capsys, tmp_path):
    empty = rows(tmp_path)
    assert "empty log" in refused(capsys, "describe", "--trace", empty)
    assert "nothing.jsonl" in refused(capsys, "describe", "--trace", tmp_path / "nothing.jsonl")
    lengths = tmp_path / "lengths.csv"
    lengths.write_text("timestamp,input_length,output_length\n0,100,5\n1,200,6\n")
    for command in (("simulate", "--chunk-tokens", 64), ("tune", *COSTS)):
        assert "lengths alone" in refused(capsys, *command, "--trace", lengths)


def test_bad_settings(capsys, trace):
    simulate = ("simulate", "--trace", trace, "--chunk-tokens", 64)
    for arguments, word in (
        (("simulate", "--trace", trace, "--chunk-tokens", 96), "96 is no multiple of the log's block of 64"),
        ((*simulate, "--policy", "mru"), "unknown policy 'mru'; there are lru"),
        ((*simulate, "--capacity-chunks", -1), "-1 chunks"),
        ((*simulate, "--engine", "core", "--policy", "belady"), "--engine sweep"),
        ((*simulate, "--engine", "magic"), "magic"),
        ((*simulate, "--l1-size-gb", 4), "needs --model"),
        ((*simulate, "--l1-size-gb", -4, "--model", "qwen3-8b"), "negative"),
        ((*simulate, "--l1-size-gb", 4, "--capacity-chunks", 3, "--model", "qwen3-8b"), "give one"),
        ((*simulate, "--l1-size-gb", 4, "--model", "qwen3-9b"), "did you mean"),
        ((*simulate, "--l1-size-gb", 4, "--model", "qwen3-8b", "--kv-dtype", "int3"), "unknown KV dtype"),
        ((*simulate, "--l1-size-gb", 4, "--model", "qwen3-8b", "--tensor-parallel", 3), "8 KV heads"),
        ((*simulate, "--l1-size-gb", 4, "--model", "qwen3-8b", "--tensor-parallel", 0), "at least 1"),
        ((*simulate, "--l1-size-gb", 1e300, "--model", "qwen3-8b"), "--l1-size-gb 1e+300"),
        ((*simulate, "--capacity-chunks", 10**30), "2^62"),
        ((*simulate, "--tensor-parallel", 0), "give --model"),
        ((*simulate, "--model", "qwen3-9b"), "did you mean"),
        ((*simulate, "--block-size", 0), "--block-size 0"),
        ((*simulate, "--block-size", 128), "block_size"),
        (("simulate", "--trace", trace), "--chunk-tokens"),
        (("simulate", "--chunk-tokens", 64), "--trace"),
        (("simulate", "--trace", trace, "--chunk-tokens", "many"), "--chunk-tokens"),
    ):
        assert word in refused(capsys, *arguments)


def test_bad_settings_of_tune(capsys, trace, tmp_path):
    tune = ("tune", "--trace", trace)
    for arguments, word in (
        (tune, "--model and --gpu"),
        ((*tune, "--model", "qwen3-8b", "--gpu", "h999"), "unknown GPU 'h999'"),
        ((*tune, "--model", "phi-4", "--gpu", "h100"), "no profile of phi-4"),
        ((*tune, "--model", "qwen3-8b", "--gpu", "h100", "--tensor-parallel", 0), "tensor parallel 0"),
        ((*tune, "--profile", tmp_path / "none.json"), "none.json"),
        ((*tune, *COSTS, "--chunk-sizes", "64,many"), "whole numbers"),
        ((*tune, *COSTS, "--chunk-sizes", "64,96"), "no multiple"),
        ((*tune, *COSTS, "--chunk-sizes", ","), "empty"),
        ((*tune, *COSTS, "--l1-sizes-gb", "1,-2"), "above zero"),
        ((*tune, *COSTS, "--l1-sizes-gb", "1,inf"), "finite"),
        ((*tune, *COSTS, "--l1-points", 0), "--l1-points 0"),
        ((*tune, *COSTS, "--l1-points", 0, "--l1-sizes-gb", 4), "--l1-points 0"),
        ((*tune, *COSTS, "--l1-sizes-gb", 1e300), "--l1-sizes-gb 1e+300"),
        ((*tune, *COSTS, "--l1-max-gb", 1e300), "--l1-max-gb 1e+300"),
        ((*tune, *COSTS, "--l1-max-gb", 0.001), "holds no chunk"),
        ((*tune, *COSTS, "--chunk-sizes", 64 * 10**20), "at most"),
        ((*tune, *COSTS, "--policies", "lru,mru"), "unknown policy 'mru'"),
        ((*tune, *COSTS, "--policies", "belady"), "belady"),
        ((*tune, *COSTS, "--within", 2), "--within 2"),
        ((*tune, *COSTS, "--report", tmp_path / "no" / "r.html"), "no folder"),
        ((*tune, *COSTS, "--report", tmp_path), "is a folder"),
        ((*tune, *COSTS, "--plot", trace), "cannot be made"),
    ):
        assert word in refused(capsys, *arguments)


def test_an_error_of_ours_keeps_its_traceback(monkeypatch, trace):
    def broken(*arguments, **settings):
        raise RuntimeError("a defect")

    monkeypatch.setattr("kvsim.api.simulate", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["simulate", "--trace", trace, "--chunk-tokens", "64"])


def test_help_names_every_command(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in ("tune", "simulate", "describe", "generate"):
        assert name in out
        assert run(capsys, name, "--help")[0] == 0


def command(*arguments, **settings):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-m", "kvsim", *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **settings,
    )


def test_exit_codes_of_the_process(trace, tmp_path):
    with command("simulate", "--trace", trace, "--chunk-tokens", 96) as bad:
        out, err = bad.communicate(timeout=60)
    assert (bad.returncode, out) == (2, "")
    assert err.startswith("kvsim: error: ")
    with command("simulate", "--trace", trace, "--chunk-tokens", 64, "--json") as good:
        out, err = good.communicate(timeout=60)
    assert (good.returncode, err) == (0, "")
    assert json.loads(out)["requests"] == 400


def test_ctrl_c_exits_130_and_leaves_nothing(tmp_path):
    log = tmp_path / "log.jsonl"
    write(generate(Chat(requests=3000, seed=3)), log)
    folder = tmp_path / "out"
    folder.mkdir()
    arguments = ("tune", "--trace", log, *COSTS, "--l1-points", 2000, "--progress", "--report", folder / "r.html")
    with command(*arguments, start_new_session=True) as process:
        seen = ""
        deadline = time.monotonic() + 60
        while not re.search(r"sweeping.* [1-9]\d?%", seen) and time.monotonic() < deadline:
            seen += os.read(process.stderr.fileno(), 4096).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, seen + err
    assert "Traceback" not in seen + err
    assert out == ""
    assert list(folder.iterdir()) == []


def test_rows_of_other_models_are_told(capsys, tmp_path):
    path = rows(tmp_path, *({**GOOD, "block_size": 512, "timestamp": i, "model": "Qwen/Qwen3-8B"} for i in range(3)))
    command = ("tune", "--trace", path, "--policies", "lru", "--gpu", "h100")
    assert run(capsys, *command, "--model", "qwen3-8b")[2] == ""
    err = run(capsys, *command, "--model", "qwen3-1.7b")[2]
    assert err == "kvsim: the log has rows of Qwen/Qwen3-8B, and is priced as qwen3-1.7b's\n"
    with path.open("a") as file:
        file.write(json.dumps({**GOOD, "timestamp": 3, "model": "b"}) + "\n")
    code, _, err = run(capsys, "describe", "--trace", path)
    assert code == 0
    assert "rows of Qwen/Qwen3-8B, b: equal hash_ids are taken for the same KV" in err
