"""The commands as users start them."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from live_fakes import SyncEngine, chain, environment, wait_for


def kvcore(*words, timeout=60, **extra):
    return subprocess.run(
        [sys.executable, "-m", "kvcore", *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**environment(), **extra},
        check=False,
    )


def serve(folder, *flags):
    defaults = ["--bind", f"ipc://{folder}/other.ipc", "--arena-dir", str(folder), "--name", "other", "--http", "off"]
    return kvcore("serve", "--l1-size-gb", "0.01", *defaults, *flags)


def test_a_server_that_cannot_start_says_why_in_one_line_and_leaves_nothing(start, folder):
    server = start()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = [
            (["--bind", server.endpoint], "another server does"),
            (["--bind", f"tcp://127.0.0.1:{port}"], "Address already in use"),
            (["--http", f"127.0.0.1:{port}"], "Address already in use"),
            (["--name", "t"], "is held by the server with process id"),
            (["--arena-dir", str(folder / "none")], "No such file"),
            (["--l1-size-gb", "100000"], "does not fit"),
            (["--eviction-policy", "random"], "no eviction policy 'random'"),
            (["--l1-size-gb", "-1"], "--l1-size-gb"),
            (["--chunk-size", "many"], "--chunk-size"),
            (["--page-size", "2 parsecs"], "--page-size"),
            (["--bind", "tcp://0.0.0.0:5999"], "--curve-key"),
            (["--l2", "tape:/dev/st0"], "no such store"),
            (["--record", str(folder / "log.csv")], "--record"),
            (["--record", str(folder / "none" / "log.jsonl")], "--record"),
            (["--record", str(folder / "server.log" / "log.jsonl.zst")], "Not a directory"),
            (["--config", str(folder / "none.toml")], "none.toml"),
            (["--quota", "bob"], "SALT=GB"),
            (["--page-size", "0"], "--page-size 0"),
            (["--l1-size-gb", "inf"], "--l1-size-gb"),
            (["--name", "a/b"], "--name"),
            (["--journal", str(folder / "server.log")], f"--journal {folder / 'server.log'}: File exists"),
            (["--l2", f"files:{folder / 'server.log'}"], "--l2: files:"),
            (["--bind", f"ipc://{folder}/none/x.ipc"], f"--bind ipc://{folder}/none/x.ipc: No such file"),
            (["--http", f"127.0.0.1:{port}"], f"--http 127.0.0.1:{port}"),
            (["--bind", "tcp://0.0.0.0:0", "--curve-key", "/none", "--curve-clients", "/none"], "--curve-key /none"),
        ]
        before = sorted(os.listdir(folder))
        for flags, message in cases:
            done = serve(folder, *flags)
            assert done.returncode == 2, (flags, done.stderr)
            assert message in done.stderr, (flags, done.stderr)
            assert done.stderr.count("\n") == 1, done.stderr
            assert sorted(os.listdir(folder)) == before, flags
    assert kvcore("serve", "--no-such-flag").returncode == 2
    server.status()


def test_numbers_that_are_none_are_refused_with_the_flag():
    for words in (
        ("ping", "--timeout", "inf"),
        ("ping", "--timeout", "nan"),
        ("status", "--timeout", "1e300"),
        ("top", "--every", "inf"),
        ("bench", "--seconds", "nan"),
    ):
        done = kvcore(*words)
        assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
        assert words[1] in done.stderr.splitlines()[-1]


def test_a_variable_that_is_no_setting_is_told_at_the_start(folder):
    done = kvcore("serve", "--l1-size-gb", "0", KVCORE_L1_SIZE="50")
    assert done.stderr.splitlines()[0] == (
        "kvcore: warning: KVCORE_L1_SIZE is no setting: did you mean KVCORE_L1_SIZE_GB?"
    )


def test_settings_come_from_flags_then_environment_then_file(start, folder):
    (folder / "kvcore.toml").write_text('eviction-policy = "fifo"\nchunk_size = 512\nttl-s = 60\n')
    endpoint = f"ipc://{folder}/c.ipc"
    command = [sys.executable, "-m", "kvcore", "serve", "--config", str(folder / "kvcore.toml")]
    more = {"KVCORE_CHUNK_SIZE": "128", "KVCORE_EVICTION_POLICY": "sieve", "KVCORE_PRETOUCH": "false"}
    flags = ["--chunk-size", "64", "--bind", endpoint, "--arena-dir", str(folder), "--http", "off"]
    process = subprocess.Popen(
        [*command, *flags, "--l1-size-gb", "0.01"], env={**environment(), **more}, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            done = kvcore("status", "--server", endpoint, "--timeout", "0.3", "--json")
            if done.returncode == 0:
                break
        assert json.loads(done.stdout)["chunk_tokens"] == 64
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


def test_the_small_commands(start):
    server = start()
    with SyncEngine(server.endpoint) as engine:
        engine.serve("1", chain("a", 3))
        ping = json.loads(kvcore("ping", "--server", server.endpoint, "--json").stdout)
        assert ping["pid"] == server.process.pid
        assert 0 < ping["min_ms"] <= ping["median_ms"] <= ping["max_ms"]
        shown = kvcore("status", "--server", server.endpoint).stdout
        assert "engine" in shown
        assert "scheduler 0" in shown
        one = chain("a", 3)[0].hex()
        assert kvcore("clear", one, "--server", server.endpoint).returncode == 0
        assert server.status()["tiers"][0]["chunks"] == 2
        assert kvcore("clear", KVCORE_SERVER=server.endpoint).returncode == 0
        assert server.status()["tiers"][0]["chunks"] == 0
        top = json.loads(kvcore("top", "--once", "--every", "0.2", "--json", "--server", server.endpoint).stdout)
        assert top["rates"]["requests_per_s"] == 0
    away = kvcore("ping", "--server", f"ipc://{server.folder}/none.ipc", "--timeout", "0.2")
    assert away.returncode == 2
    assert away.stderr.startswith("kvcore: no reply")
    assert kvcore("clear", "no digest").returncode == 2


def test_doctor_passes_on_a_sound_server_and_fails_without_one(start):
    server = start()
    with SyncEngine(server.endpoint):
        done = kvcore("doctor", "--server", server.endpoint, "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0, checks
    assert checks["hash agreement"]["result"] == "ok"
    assert checks["hit test"]["result"] == "ok"
    assert "16 blocks of 16" in checks["chunk and block"]["seen"]
    assert server.status()["tiers"][0]["chunks"] == 0, "the hit test leaves nothing"
    done = kvcore("doctor", "--server", f"ipc://{server.folder}/none.ipc", "--json")
    assert done.returncode == 1
    assert [check["name"] for check in json.loads(done.stdout) if check["result"] == "fail"] == ["server"]


@pytest.mark.parametrize("how", ["second-use", "load-cost"])
def test_doctor_passes_where_chunks_are_stored_or_loaded_by_rule(start, folder, how):
    cost = {"chunk_tokens": 256, "prefill_floor_ns": 1, "prefill_base_ns": 0, "prefill_linear_ns": 1}
    (folder / "cost.json").write_text(
        json.dumps({**cost, "prefill_quadratic_ns": 0, "latency_ns": [1e9], "bytes_per_s": [1e9]})
    )
    flags = {"second-use": ("--admission", "second-use"), "load-cost": ("--load-cost", str(folder / "cost.json"))}
    server = start(*flags[how])
    done = kvcore("doctor", "--server", server.endpoint, "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0, checks
    assert checks["hit test"]["result"] == "ok"
    assert checks["shared memory"]["seen"].startswith(f"{folder}: "), "where the server's arena lies"
    assert server.status()["tiers"][0]["chunks"] == 0


def test_bench_that_fails_leaves_nothing_in_the_cache(start):
    server = start()
    done = kvcore("bench", "--server", server.endpoint, "--tokens", "60000", "--copy-mb", "1")
    assert done.returncode == 2
    assert "chunks fit in L1" in done.stderr
    assert server.status()["tiers"][0]["chunks"] == 0
    done = kvcore("bench", "--server", server.endpoint, "--tokens", "2000", "--seconds", "0.1", "--copy-mb", "512")
    assert done.returncode == 2, done.stdout
    assert server.status()["tiers"][0]["chunks"] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_bench_that_is_ended_ends_its_server(number):
    command = [sys.executable, "-m", "kvcore", "bench", "--tokens", "1000", "--copy-mb", "1", "--seconds", "60"]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        (own, *_) = wait_for(lambda: children.read_text().split(), 30)
        wait_for(lambda: b"serve" in Path(f"/proc/{own}/cmdline").read_bytes())
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert not Path(f"/proc/{own}").exists()
    assert not [name for name in os.listdir("/dev/shm") if f"bench-{process.pid}" in name]


def test_bench_measures_a_running_server(start):
    server = start(l1_pages=200)
    flags = ["--tokens", "5000", "--clients", "2", "--seconds", "0.3", "--copy-mb", "2", "--json"]
    done = kvcore("bench", "--server", server.endpoint, *flags)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["chunks"] == 20
    assert figures["lookups"] > 10
    assert 0 < figures["round_trip_p50_ms"] <= figures["round_trip_p99_ms"]
    assert min(figures[name] for name in ("hash_ms", "memcpy_gb_per_s", "store_gb_per_s", "retrieve_gb_per_s")) > 0
    assert server.status()["tiers"][0]["chunks"] == 0


@pytest.mark.parametrize("command", ["serve", "ping", "status", "clear", "bench", "doctor", "top"])
def test_every_command_has_help_with_an_example(command):
    done = kvcore(command, "--help", COLUMNS="200")
    assert done.returncode == 0
    assert f"kvcore {command}" in done.stdout
    assert "Example" in done.stdout


def test_the_command_line_imports_little():
    program = (
        "import sys, kvcore.live.cli; heavy = {'zmq', 'starlette', 'uvicorn', 'numba', 'numpy', 'rich', "
        "'prometheus_client', 'asyncio', 'torch'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.strip() == "[]"
