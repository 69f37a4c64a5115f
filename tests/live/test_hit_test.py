"""The doctor's two-request hit test, against a stand-in for vLLM's HTTP that reuses KV through a real server."""

import json
import threading
import time
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from live_fakes import SyncEngine, chain, wait_for

from kvcore.live.breakeven import break_even, prefill_points
from kvcore.live.hittest import hit_test
from kvcore.policy.hashing import block_hashes, chunk_names


class StandIn:
    """Answers as `vllm serve` does; a prompt takes 0.1 ms a token that is not cached."""

    def __init__(self, engine, *, connected):
        self.engine, self.connected = engine, connected
        self.hits = self.prefill_s = 0.0
        self.requests = 0
        self.longest, self.takes = None, 10_000
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/v1/models":
                    self.reply(json.dumps({"data": [{"id": "tiny", "max_model_len": stand_in.longest}]}))
                elif self.path != "/metrics":
                    self.send_error(404)
                else:
                    self.reply(
                        f'vllm:external_prefix_cache_hits_total{{engine="0"}} {stand_in.hits}\n'
                        f'vllm:request_prefill_time_seconds_sum{{engine="0"}} {stand_in.prefill_s}\n'
                    )

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path != "/v1/completions":
                    self.send_error(404)
                    return
                assert body["model"] == "tiny"
                if len(body["prompt"]) >= stand_in.takes:
                    self.reply(json.dumps({"error": {"message": "the prompt is too long", "code": 400}}), 400)
                    return
                stand_in.serve(body["prompt"])
                self.reply('data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n')

            def reply(self, text, code=200):
                self.send_response(code)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/"

    def serve(self, prompt):
        hits = 0
        if self.connected:
            self.requests += 1
            names = chunk_names(block_hashes(prompt, 16, sha256(b"root").digest()), 16)
            found, _ = self.engine.serve(f"r{self.requests}", names, input_tokens=len(prompt))
            hits = sum(found.hits) * 256
        took_s = (len(prompt) - hits) * 1e-4
        time.sleep(took_s)
        self.hits += hits
        self.prefill_s += took_s

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.mark.parametrize("connected", [True, False])
def test_it_tells_a_hit_from_none(start, connected):
    server = start()
    with SyncEngine(server.endpoint) as engine:
        vllm = StandIn(engine, connected=connected)
        try:
            (found, timing) = hit_test(server.endpoint, vllm.url, "", 2100)
        finally:
            vllm.close()
    assert found[1] == ("ok" if connected else "fail"), found
    if connected:
        assert "matched 2048 of 2100 tokens, vLLM loaded 2048" in found[2]
        assert timing[1] == "ok"
        assert "0.210, 0.005, 0.210 s" in timing[2], "prefill apart"


def test_prompts_are_as_long_as_the_model_takes_and_a_refusal_is_told(start):
    server = start()
    with SyncEngine(server.endpoint) as engine:
        vllm = StandIn(engine, connected=True)
        vllm.longest = vllm.takes = 1500
        try:
            (found, _) = hit_test(server.endpoint, vllm.url, "", 4096)
            assert "matched 1280 of 1499 tokens" in found[2]
            assert prefill_points(vllm.url, "", 4096)[-1][0] == 1499
            vllm.takes = 1000
            with pytest.raises(OSError, match="/v1/completions answers 400: the prompt is too long"):
                hit_test(server.endpoint, vllm.url, "", 4096)
            with pytest.raises(OSError, match="answers 404: "):
                hit_test(server.endpoint, vllm.url + "none", "", 4096)
            with pytest.raises(ValueError, match="serves tiny, not large"):
                hit_test(server.endpoint, vllm.url, "large", 4096)
        finally:
            vllm.close()


@contextmanager
def standing_in(server):
    """An engine and a vLLM in front of it."""
    with SyncEngine(server.endpoint) as engine:
        vllm = StandIn(engine, connected=True)
        try:
            yield engine, vllm.url
        finally:
            vllm.close()


def load(engine, nbytes, seconds):
    """Store a prompt and load it, in so many seconds."""
    prompt = chain(f"loaded in {seconds}", 4)
    engine.serve("stored", prompt)
    engine.lookup("loaded", prompt)
    engine.loaded("loaded", prompt, tokens=4 * 256, bytes=nbytes, seconds=seconds)
    engine.end("loaded")


def test_it_says_from_which_length_on_a_hit_is_worth_its_copy(start, tmp_path):
    server = start()
    with standing_in(server) as (engine, url):
        ((_, result, seen, _),) = break_even(server.endpoint, url, "", 2048, tmp_path / "none.json")
        assert (result, seen) == ("skip", "nothing has been loaded from L1 yet")
        assert not (tmp_path / "none.json").exists()
        load(engine, 4 * 4096, 1e-6)
        ((name, result, seen, advice),) = break_even(server.endpoint, url, "", 2048, None)
    assert (name, result, advice) == ("load or recompute", "ok", "")
    assert seen.startswith("L1 at 16.4 GB/s: faster from 256 tokens on (computed: 16 in 0.00")
    assert "2,048 in 0.2" in seen


def test_a_server_with_the_written_costs_leaves_what_is_not_worth_it(start, tmp_path):
    server, costs = start(), tmp_path / "cost.json"
    with standing_in(server) as (engine, url):
        load(engine, 4096, 10.0)
        ((_, result, seen, advice),) = break_even(server.endpoint, url, "", 1024, costs)
    assert result == "warn"
    assert "never faster than computing" in seen
    assert f"--load-cost {costs}" in advice
    server.stop()
    for more, loaded in ((), 4), (("--load-cost", str(costs)), 0):
        other = start(*more)
        with SyncEngine(other.endpoint) as engine:
            engine.serve("stored", chain("a", 4))
            found = engine.lookup("again", chain("a", 4))
            assert (found.hits, found.load_chunks) == ((4,), loaded)
        assert other.counters().get(("kvcore_refused_chunks", "recompute"), 0) == 4 - loaded
        other.stop()


def test_reads_of_l2_have_a_rate_of_their_own(start, folder):
    server = start("--l2", f"files:{folder}/l2", "--l2-size-gb", "0.01", "--l2-threads", "2", l1_pages=6)
    with standing_in(server) as (engine, url):
        load(engine, 4 * 4096, 1e-6)
        ((_, result, seen, _),) = break_even(server.endpoint, url, "", 1024, None)
        assert (result, seen) == ("skip", "nothing has been loaded from L2 yet")
        for name, prompt in (("other", chain("what drives it out of L1", 5)), ("again", chain("loaded in 1e-06", 4))):
            # What is on its way to L2 keeps its pages, and L1 has hardly any.
            wait_for(lambda: all(tier["idle_pages"] == tier["pages"] for tier in server.status()["tiers"]))
            found, _ = engine.serve(name, prompt)
        assert found.hits[1] > 0
        assert found.load_chunks == 4
        ((_, result, seen, _),) = break_even(server.endpoint, url, "", 1024, None)
    assert result in ("ok", "warn"), seen
    assert "; L2 at " in seen


def test_a_url_that_is_none(start):
    with pytest.raises(ValueError, match="not an http URL"):
        hit_test("ipc:///none", "file:///etc/passwd", "", 100)
    with pytest.raises(ValueError, match="not an http URL"):
        prefill_points("file:///etc/passwd", "", 100)
