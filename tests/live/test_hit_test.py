"""The doctor's two-request hit test, against a stand-in for vLLM's HTTP that reuses KV through a real server."""

import json
import threading
import time
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from live_fakes import SyncEngine

from kvcore.live.hittest import hit_test
from kvcore.policy.hashing import block_hashes, chunk_names


class StandIn:
    """Answers as `vllm serve` does; a prompt takes 0.1 ms a token that is not cached."""

    def __init__(self, engine, *, connected):
        self.engine, self.connected = engine, connected
        self.hits = self.prefill_s = 0.0
        self.requests = 0
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if self.path == "/v1/models":
                    self.reply(json.dumps({"data": [{"id": "tiny"}]}))
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
                stand_in.serve(body["prompt"])
                self.reply('data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n')

            def reply(self, text):
                self.send_response(200)
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


def test_a_url_that_is_none(start):
    with pytest.raises(ValueError, match="not an http URL"):
        hit_test("ipc:///none", "file:///etc/passwd", "", 100)
