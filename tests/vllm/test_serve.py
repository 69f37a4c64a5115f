"""`vllm serve` and `kvcore serve` as users start them: two instances share one server."""

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("vllm")

from servers import ServerProcess, counters, environment, wait_for

from kvcore.live.settings import Settings
from kvcore.policy import LoadCost
from kvcore.vllm.embedded import remove_leftovers
from kvcore.vllm.ttft.systems import free_port
from kvsim.calibration import HttpEndpoint

pytestmark = pytest.mark.vllm

CHUNK = 128
TEXT = "the cache holds keys and values of every token that a prompt shares with another " * 40


class Serve:
    """One `vllm serve`, until `stop`; it can be asked when it is `up`."""

    def __init__(self, model, log, connector="KVCoreMPConnector", **settings):
        self.port, self.log = free_port(), Path(log)
        config = {"kv_connector": connector, "kv_connector_module_path": "kvcore.vllm", "kv_role": "kv_both"}
        command = [
            str(Path(sys.executable).with_name("vllm")), "serve", str(model),
            "--host", "127.0.0.1", "--port", str(self.port),
            "--enforce-eager", "--dtype", "float32", "--max-model-len", "3072", "--served-model-name", "tiny",
            "--kv-transfer-config", json.dumps(config),
        ]  # fmt: skip
        env = environment() | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            **settings,
        }
        self.process = subprocess.Popen(command, env=env, stdout=self.log.open("w"), stderr=subprocess.STDOUT)

    def up(self):
        until = time.monotonic() + 180
        while not self._healthy():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def _healthy(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2) as reply:
                return reply.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def ask(self, text, count=8):
        body = {"model": "tiny", "prompt": text, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        return self._post("/v1/completions", body)["choices"][0]["text"]

    def _post(self, path, body):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def tokens(self, text):
        return self._post("/tokenize", {"model": "tiny", "prompt": text})["tokens"]

    def metric(self, name):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:\{{.*\}})? ([0-9.e+]+)$", text, re.MULTILINE))

    def logged(self, verb):
        return sum(int(n) for n in re.findall(rf"{verb} (\d+) tokens", self.log.read_text()))

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = ServerProcess(
        tmp_path_factory.mktemp("server"), "--chunk-size", str(CHUNK), "--l1-size-gb", "0.125", "--page-size", "512KiB"
    )
    yield made
    made.stop()


def started(stack, model, server, log):
    one = Serve(model, log, KVCORE_ENDPOINT=server.endpoint)
    stack.callback(one.stop)
    return one


def test_two_instances_share_one_server(tiny_model, server, tmp_path):
    with ExitStack() as stack:
        first, second = (started(stack, tiny_model, server, tmp_path / f"{name}.log") for name in ("first", "second"))
        first.up()
        alone = first.ask(TEXT + "one")
        other = first.ask(TEXT + "two")
        assert first.metric("vllm:external_prefix_cache_hits_total") == 0
        whole = len(first.tokens(TEXT + "one")) // CHUNK * CHUNK
        wait_for(lambda: counters(server.endpoint)["stored_tokens"] >= whole)
        stored = counters(server.endpoint)["stored_tokens"]
        wait_for(lambda: first.metric("vllm:kvcore_stored_tokens_total") == stored)
        assert first.logged("Stored") == stored
        second.up()
        assert second.ask(TEXT + "one") == alone
        hits = second.metric("vllm:external_prefix_cache_hits_total")
        assert hits >= whole - CHUNK
        assert second.ask(TEXT + "two") == other
        assert second.metric("vllm:kvcore_loaded_tokens_total") == hits
        assert second.logged("Retrieved") == hits
        assert counters(server.endpoint)["loaded_tokens"] == hits
        assert first.ask("shorter than a chunk") == second.ask("shorter than a chunk")
        check_calibration(first)
        check_doctor(first, server, tmp_path / "cost.json")


def check_doctor(serve, server, costs):
    """Whether a hit is worth its copy is told by what this vLLM and this server have measured, and can be written."""
    url = f"http://127.0.0.1:{serve.port}"
    command = [sys.executable, "-m", "kvcore", "doctor", "--server", server.endpoint, "--vllm", url]
    command += ["--prompt-tokens", "8192", "--write-load-cost", str(costs), "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    row = checks["load or recompute"]
    assert row["result"] in ("ok", "warn"), row
    assert "3,071 in " in row["seen"], "what --max-model-len takes"
    cost = msgspec.json.decode(costs.read_bytes(), type=LoadCost)
    assert cost.chunk_tokens == CHUNK
    assert len(cost.bytes_per_s) == 1
    assert cost.prefill_ns(3071, 0) > cost.prefill_ns(1, 0) > 0
    assert Settings(load_cost=str(costs)).core_config().load_cost == cost


def check_calibration(serve):
    """A calibration takes vLLM's own time of each prompt, which is shorter than the one seen from here."""
    endpoint = HttpEndpoint(f"http://127.0.0.1:{serve.port}")
    sums = "vllm:time_to_first_token_seconds_sum"
    told = []
    for number in range(3):
        before, begun = serve.metric(sums), time.perf_counter()
        told.append(endpoint.first_token_s([number + 5] * 300))
        assert 0 < told[-1] < time.perf_counter() - begun
        assert told[-1] == pytest.approx(serve.metric(sums) - before, rel=1e-6)
    assert len(set(told)) == 3
    nbytes, seconds = endpoint.copied()["d2h"]
    assert nbytes == serve.metric("vllm:kvcore_stored_bytes_total") > 0
    assert 0 < seconds < 60


def test_server_inside_vllm_serve_ends_with_it(tiny_model, tmp_path, tmp_path_factory):
    arena = tmp_path_factory.mktemp("arena")  # a short name: it holds a socket
    settings = {"KVCORE_CHUNK_SIZE": str(CHUNK), "KVCORE_L1_SIZE_GB": "0.125", "KVCORE_ARENA_DIR": str(arena)}
    one = Serve(tiny_model, tmp_path / "one.log", "KVCoreConnector", **settings)
    try:
        one.up()
        assert not list(arena.glob("*.arena"))  # it has no name, so that it ends with vLLM, however that ends
        answer = one.ask(TEXT)
        wait_for(lambda: one.metric("vllm:kvcore_stored_tokens_total") > 0)
        assert one.ask(TEXT) == answer
    finally:
        one.stop()
    remove_leftovers(arena)
    assert not list(arena.iterdir())
