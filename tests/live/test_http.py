"""HTTP beside the wire."""

import json
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request

import pytest
from live_fakes import SyncEngine, chain, wait_for

from kvcore.live import wire
from kvcore.live.openapi import OPERATIONS
from kvcore.live.server import Server
from kvcore.live.settings import load


@pytest.fixture
def served(start):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start("--http", f"127.0.0.1:{port}")
    server.url = f"http://127.0.0.1:{port}"
    return server


def ask(server, path, method="GET", body=None, timeout=5):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_health_tells_of_the_loop_not_of_the_web_thread(served):
    assert ask(served, "/healthz")[0] == 200
    served.process.send_signal(signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        ask(served, "/healthz", timeout=0.5)
    served.process.send_signal(signal.SIGCONT)
    wait_for(lambda: ask(served, "/healthz")[0] == 200)


def test_health_fails_while_the_loop_hangs(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = load(
        {
            "bind": (f"ipc://{folder}/s.ipc",),
            "arena_dir": str(folder),
            "http": f"127.0.0.1:{port}",
            "l1_size_gb": 0.01,
            "pretouch": "false",
        },
        {},
    )
    with Server(settings) as server:
        server.url = f"http://127.0.0.1:{port}"
        assert ask(server, "/healthz")[0] == 200
        hanging_now, hang = threading.Event(), threading.Event()

        def handler(_):
            hanging_now.set()
            hang.wait(20)
            return wire.Places((-1,))

        server.service._handlers[wire.Where] = handler
        hanging = threading.Thread(target=ask, args=(server, "/chunks/00"))
        hanging.start()
        try:
            assert hanging_now.wait(10)
            status, text = ask(server, "/healthz")
            assert status == 503
            assert "did not answer" in text
        finally:
            hang.set()
            hanging.join()
        assert ask(server, "/healthz")[0] == 200


def test_metrics_are_prometheus_and_count(served):
    prompt = chain("a", 3)
    with SyncEngine(served.endpoint) as engine:
        engine.serve("1", prompt, input_tokens=800, salt="bob")
        engine.serve("2", prompt, input_tokens=800, salt="bob")
    status, text = ask(served, "/metrics")
    assert status == 200
    samples = dict(re.findall(r"^(kvcore_\w+(?:{.*})?) (\S+)$", text, re.MULTILINE))
    labels = 'model="fake",salt="bob"'
    assert float(samples[f"kvcore_requested_tokens_total{{{labels}}}"]) == 1600
    assert float(samples[f"kvcore_aligned_tokens_total{{{labels}}}"]) == 1536
    assert float(samples['kvcore_matched_tokens_total{model="fake",salt="bob",tier="l1"}']) == 768
    assert float(samples['kvcore_loaded_tokens_total{model="fake",salt="bob",tier="l1"}']) == 768
    assert float(samples['kvcore_missed_tokens_total{model="fake",reason="tail",salt="bob"}']) == 64
    assert float(samples["kvcore_lookup_seconds_count"]) == 2
    assert float(samples['kvcore_bytes_in_use{tier="l1"}']) == 3 * 65536
    assert text.count("# TYPE") == text.count("# HELP") > 20


def test_the_operators_api(served):
    prompt = chain("a", 3)
    names = [chunk.hex() for chunk in prompt]
    with SyncEngine(served.endpoint) as engine:
        engine.serve("1", prompt)
        assert ask(served, f"/chunks/{names[0]}") == (
            200,
            json.dumps({"chunk": names[0], "tier": "l1"}, separators=(",", ":")),
        )
        assert ask(served, "/chunks/00ff")[0] == 404
        assert json.loads(ask(served, "/chunks", "POST", {"chunks": [*names, "00"]})[1]) == {
            "tiers": ["l1", "l1", "l1", None]
        }
        assert ask(served, "/pin", "POST", {"chunks": names})[0] == 200
        assert ask(served, "/unpin", "POST", {"chunks": names})[0] == 200
        assert ask(served, "/quotas/bob", "PUT", {"pages": 2})[0] == 200
        assert len(engine.serve("2", chain("b", 3), salt="bob")[1].chunks) == 2
        assert ask(served, "/quotas/bob", "DELETE")[0] == 200
        assert ask(served, "/clear", "POST", {"chunks": names[:1]})[0] == 200
        assert ask(served, f"/chunks/{names[0]}")[0] == 404
        assert ask(served, "/clear", "POST")[0] == 200
        assert json.loads(ask(served, "/status")[1])["tiers"][0]["chunks"] == 0
        assert json.loads(ask(served, "/config")[1])["chunk_size"] == 256


def test_bad_requests_are_told_apart(served):
    for path, method, body in (
        ("/pin", "POST", {"chunks": ["zz"]}),
        ("/pin", "POST", {"chunk": []}),
        ("/pin", "POST", {"chunks": [""]}),
        ("/chunks/zz", "GET", None),
        ("/quotas/bob", "PUT", {"pages": -1}),
        ("/quotas/bob", "PUT", {"gb": 1}),
    ):
        status, text = ask(served, path, method, body)
        assert status == 400, path
        assert json.loads(text)["error"]
    assert ask(served, "/nothing")[0] == 404
    assert ask(served, "/clear")[0] == 405


def test_openapi_describes_every_route(served):
    document = json.loads(ask(served, "/openapi.json")[1])
    described = {(method, path) for path, operations in document["paths"].items() for method in operations}
    assert described == {(method, path) for method, path, *_ in OPERATIONS}
    for method, path in described - {("post", "/clear")}:
        status, _ = ask(served, path.replace("{chunk}", "00").replace("{salt}", "s"), method.upper())
        assert status != 405, path
    assert "OpenAPI" in ask(served, "/docs")[1]


@pytest.mark.parametrize(
    "sent", ["", "POST /chunks HT", "POST /chunks HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"]
)
def test_a_request_that_never_ends_does_not_hold_up_a_stop(served, sent):
    address = served.url.removeprefix("http://").split(":")
    with socket.create_connection(address) as client:
        client.sendall(sent.encode())
        ask(served, "/healthz")
        start_s = time.monotonic()
        assert served.stop() == 0
        assert time.monotonic() - start_s < 8
