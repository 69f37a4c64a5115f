"""HTTP beside the wire."""

import json
import re
import select
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from http.client import HTTPConnection, HTTPResponse

import pytest
from live_fakes import SyncEngine, chain, wait_for

from kvcore.live import server as server_module
from kvcore.live import wire
from kvcore.live.connection import Client
from kvcore.live.metrics import veiled
from kvcore.live.openapi import MAX_BODY_BYTES, OPERATIONS
from kvcore.live.server import Server
from kvcore.live.settings import load
from kvcore.live.stores.files import FileStore


@pytest.fixture
def serve(start):
    def served(*flags, host="127.0.0.1"):
        with socket.socket() as free:
            free.bind((host, 0))
            port = free.getsockname()[1]
        server = start("--http", f"{host}:{port}", *flags)
        server.url = f"http://127.0.0.1:{port}"
        return server

    return served


@pytest.fixture
def served(serve):
    return serve()


def in_process(folder, port, **more):
    flags = {"arena_dir": str(folder), "http": f"127.0.0.1:{port}", "l1_size_gb": 0.01, "pretouch": "false"}
    return load({"bind": (f"ipc://{folder}/s.ipc",), **flags, **more}, {})


def ask(server, path, method="GET", body=None, timeout=5, headers=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, headers or {}, method=method)
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
    with Server(in_process(folder, port)) as server:
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
    assert "bob" not in text  # nobody but the tenant has named it
    bob = veiled("bob")
    labels = f'model="fake",salt="{bob}"'
    assert float(samples[f"kvcore_requested_tokens_total{{{labels}}}"]) == 1600
    assert float(samples[f"kvcore_aligned_tokens_total{{{labels}}}"]) == 1536
    assert float(samples[f'kvcore_matched_tokens_total{{{labels},tier="l1"}}']) == 768
    assert float(samples[f'kvcore_loaded_tokens_total{{{labels},tier="l1"}}']) == 768
    assert float(samples[f'kvcore_missed_tokens_total{{model="fake",reason="tail",salt="{bob}"}}']) == 64
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
        pinned = ask(served, "/pin", "POST", {"chunks": [*names, "00"]})
        assert (pinned[0], json.loads(pinned[1])) == (200, {"status": "done", "pinned": 3, "missing": 1})
        assert ask(served, "/pin", "POST", {"chunks": ["00"]})[0] == 404
        assert ask(served, "/unpin", "POST", {"chunks": names})[0] == 200
        assert ask(served, "/quotas/bob", "PUT", {"pages": 2})[0] == 200
        assert len(engine.serve("2", chain("b", 3), salt="bob")[1].chunks) == 2
        assert json.loads(ask(served, "/status")[1])["quotas"] == {"bob": {"pages": 2, "used_pages": 2}}
        assert ask(served, "/quotas/bob", "DELETE")[0] == 200
        for salt, path in (("", ""), ("a/b", "a/b"), ("a b", "a%20b")):  # the first is the tenant of no salt
            assert ask(served, f"/quotas/{path}", "PUT", {"pages": 9})[0] == 200
            assert json.loads(ask(served, "/status")[1])["quotas"][salt]["pages"] == 9
            assert ask(served, f"/quotas/{path}", "DELETE")[0] == 200
            assert json.loads(ask(served, "/status")[1])["quotas"] == {}
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
        ("/quotas/bob", "PUT", {"pages": 1 << 70}),
    ):
        status, text = ask(served, path, method, body)
        assert status == 400, path
        assert json.loads(text)["error"]
    for path, expected in (("/nothing", 404), ("/clear", 405)):
        status, text = ask(served, path)
        assert status == expected
        assert json.loads(text)["error"]


def test_the_settings_shown_hold_no_password(folder, monkeypatch):
    monkeypatch.setattr(server_module, "open_store", lambda *_: FileStore(folder / "l2", None))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = in_process(folder, port, l2="redis://user:s3cr3t@127.0.0.1:1/0?password=s3cr3t")
    with Server(settings) as server:
        server.url = f"http://127.0.0.1:{port}"
        text = ask(server, "/config")[1]
        with Client(settings.bind[0]) as client:
            report = client.call(wire.GetConfig(), 5).data
    assert json.loads(text)["l2"] == "redis://127.0.0.1:1/0"
    assert "s3cr3t" not in text + str(report)


def test_a_page_of_elsewhere_changes_nothing(served):
    prompt, port = chain("a", 1), served.url.rpartition(":")[2]
    with SyncEngine(served.endpoint) as engine:
        engine.serve("1", prompt)
        for headers, status in (
            ({"Host": f"evil.example:{port}"}, 400),  # whose name was made to lead here
            ({"Host": f"127.evil.example:{port}"}, 400),
            ({"Host": "[::1"}, 400),
            ({"Origin": "http://evil.example"}, 403),
            ({"Origin": "null"}, 403),
            ({"Origin": "http://[::1"}, 403),
        ):
            answer, text = ask(served, "/clear", "POST", headers=headers)
            assert (answer, list(json.loads(text))) == (status, ["error"]), headers
        assert served.status()["tiers"][0]["chunks"] == 1
        assert ask(served, "/status", headers={"Host": "evil.example"})[0] == 400
        for host in (f"localhost:{port}", "localhost", f"[::1]:{port}"):
            assert ask(served, "/status", headers={"Host": host})[0] == 200
        own = {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}
        assert ask(served, "/clear", "POST", headers=own)[0] == 200
        assert ask(served, "/clear", "POST")[0] == 200
        assert served.status()["tiers"][0]["chunks"] == 0


def test_beyond_loopback_it_says_who_may_clear_and_takes_any_host(serve):
    server = serve(host="0.0.0.0")
    assert ask(server, "/status", headers={"Host": "kvcore.example"})[0] == 200
    assert ask(server, "/clear", "POST", headers={"Origin": "http://evil.example"})[0] == 403
    log = (server.folder / "server.log").read_text()
    assert "WARNING kvcore.http: HTTP on 0.0.0.0:" in log
    assert "open to everybody" in log


def test_a_large_body_is_refused_before_it_is_read(served):
    port = int(served.url.rpartition(":")[2])
    for head, body in (
        (f"Content-Length: {300 << 20}", b""),
        ("Transfer-Encoding: chunked", b"100001\r\n" + b" " * (1 + (1 << 20)) + b"\r\n"),
    ):
        with socket.create_connection(("127.0.0.1", port), 5) as peer:
            peer.sendall(f"POST /chunks HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode())
            for _ in range(4 if body else 0):
                peer.sendall(body)
            answer = HTTPResponse(peer)
            answer.begin()
            assert answer.status == 413
            assert "a body has at most" in json.loads(answer.read())["error"]
    names = [chunk.hex() for chunk in chain("many", 50_000)]
    assert len(json.loads(ask(served, "/chunks", "POST", {"chunks": names})[1])["tiers"]) == 50_000


def test_connections_without_a_request_are_few_and_end(folder, monkeypatch, capfd):
    monkeypatch.setattr("kvcore.live.http._MOST_CONNECTIONS", 8)
    monkeypatch.setattr("kvcore.live.http._QUIET_S", 1.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sent = [
        "",
        "GET /healthz HTTP/1.1\r\nHost: localhost\r\n",
        "POST /pin HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{",
    ]
    with Server(in_process(folder, port)), ExitStack() as stack:
        peers = []
        for at in range(30):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            peers.append(peer)
            peer.settimeout(20)
            with suppress(ConnectionError):
                peer.sendall(sent[at % 3].encode())
        ended = [at for at, peer in enumerate(peers) if select.select([peer], [], [], 0.02 if at < 8 else 20)[0]]
        assert ended == [*range(8, 30)]
        for peer in peers[:8]:
            with suppress(ConnectionError):
                while peer.recv(4096):
                    pass
        client = HTTPConnection("127.0.0.1", port, timeout=20)
        stack.callback(client.close)
        client.connect()
        kept, until = client.sock, time.monotonic() + 4
        while time.monotonic() < until:  # one that is used stays
            client.request("GET", "/healthz")
            answer = client.getresponse()
            assert (answer.status, bool(answer.read())) == (200, True)
        assert client.sock is kept
    assert "Traceback" not in capfd.readouterr().err


def test_a_clear_that_takes_its_time_is_done_not_refused(folder, monkeypatch):
    monkeypatch.setattr("kvcore.live.http._QUIET_S", 0.3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Server(in_process(folder, port)) as server:
        server.url = f"http://127.0.0.1:{port}"

        def slow(_):
            time.sleep(1.5)  # of many chunks: longer than any other answer is waited for
            return wire.Done()

        server.service._handlers[wire.Clear] = slow
        status, text = ask(server, "/clear", "POST")
        assert (status, json.loads(text)) == (200, {"status": "done"})


def test_openapi_describes_every_route(served):
    document = json.loads(ask(served, "/openapi.json")[1])
    described = {(method, path) for path, operations in document["paths"].items() for method in operations}
    assert described == {(method, path) for method, path, *_ in OPERATIONS}
    for method, path in described - {("post", "/clear")}:
        status, _ = ask(served, path.replace("{chunk}", "00").replace("{salt}", "s"), method.upper())
        assert status != 405, path
    answers = {
        path: set(operation["responses"])
        for path, (operation, *_) in ((path, [*operations.values()]) for path, operations in document["paths"].items())
    }
    assert answers["/status"] == {"200", "400", "500", "503"}
    assert answers["/pin"] == {"200", "400", "403", "404", "413", "500", "503"}
    assert str(MAX_BODY_BYTES) in document["paths"]["/pin"]["post"]["requestBody"]["description"]
    assert "OpenAPI" in ask(served, "/docs")[1]


@pytest.mark.parametrize(
    "sent", ["", "POST /chunks HT", "POST /chunks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"]
)
def test_a_request_that_never_ends_does_not_hold_up_a_stop(served, sent):
    address = served.url.removeprefix("http://").split(":")
    with socket.create_connection(address) as client:
        client.sendall(sent.encode())
        ask(served, "/healthz")
        start_s = time.monotonic()
        assert served.stop() == 0
        assert time.monotonic() - start_s < 8
