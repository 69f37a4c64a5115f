"""One contract for every store, against a real folder, a real Redis (or Valkey) and a real server of S3's protocol."""

import http.client
import http.server
import itertools
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvcore.live.stores.base import Store, StoreError, StoreFull, frame
from kvcore.live.stores.files import FileStore
from kvcore.live.stores.registry import open_store

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(moto|boto|werkzeug|responses).*")

NAME = bytes(range(32))
OTHER = bytes(range(32, 64))
DATA = random.Random(0).randbytes(3000)


class RedisServer:
    """A server of its own on a free loopback port, with nothing on disk."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            pytest.skip("NEITHER redis-server NOR valkey-server IS ON PATH: the Redis store stays untested")
        self._command = [program, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", str(folder)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self.process = subprocess.Popen([*self._command, "--port", str(self.port)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
            except OSError:
                assert time.monotonic() < deadline
                assert self.process.poll() is None, "the server did not start"
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """One that a test may kill."""
    server = RedisServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    moto_server = pytest.importorskip(
        "moto.server", reason="moto[server] IS NOT INSTALLED: the S3 store stays untested"
    )
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    make_bucket(endpoint)
    yield endpoint
    server.stop()


def make_bucket(endpoint: str) -> None:
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/bucket", method="PUT"), timeout=20).close()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


_BEDS = itertools.count()
"""Of a number each, so that one does not see what another has left on a server."""


@dataclass
class Bed:
    """A store, and how to put any value under a chunk's name behind its back."""

    store: Store
    poke: Callable[[bytes, bytes], None]


@pytest.fixture(params=["files", "redis", "s3"])
def bed(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bed]:
    kind, number = request.param, next(_BEDS)
    if kind == "files":
        store = open_store(f"files:{tmp_path}/store")

        def poke(chunk: bytes, value: bytes) -> None:
            place = tmp_path / "store" / f"{chunk[0]:02x}" / chunk.hex()
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(value)

    elif kind == "redis":
        server = request.getfixturevalue("redis_server")
        store = open_store(f"{server.url}?prefix=test{number}:")

        def poke(chunk: bytes, value: bytes) -> None:
            store._client.set(b"test%d:" % number + chunk, value)

    else:
        endpoint = request.getfixturevalue("s3_endpoint")
        obstore = pytest.importorskip("obstore")
        store = open_store(f"s3://bucket/a/prefix{number}?endpoint={endpoint}&timeout=20")

        def poke(chunk: bytes, value: bytes) -> None:
            obstore.put(store._bucket, chunk.hex(), value)

    yield Bed(store, poke)
    store.close()


def cut(data: bytes | bytearray, *at: int) -> list[memoryview]:
    bounds = [0, *at, len(data)]
    return [memoryview(data)[a:b] for a, b in itertools.pairwise(bounds)]


def put_all(store: Store, names: list[bytes], data: bytes) -> None:
    for name in names:
        store.put(name, [memoryview(data)])


def read(store: Store, chunk: bytes, size: int = len(DATA)) -> bytes | None:
    into = bytearray(size)
    return bytes(into) if store.get(chunk, cut(into, size // 3)) else None


# --- the contract ---


def test_what_was_put_is_got_however_it_is_cut(bed: Bed) -> None:
    bed.store.put(NAME, cut(DATA, 0, 1, 1000, 1000))
    into = bytearray(len(DATA))
    assert bed.store.get(NAME, cut(into, 7, 2999))
    assert into == DATA
    assert bed.store.corrupt == 0


def test_what_is_not_there_is_a_miss(bed: Bed) -> None:
    assert read(bed.store, NAME) is None
    assert bed.store.corrupt == 0


def test_the_last_put_counts(bed: Bed) -> None:
    bed.store.put(NAME, [memoryview(DATA)])
    bed.store.put(NAME, [memoryview(DATA[::-1])])
    assert read(bed.store, NAME) == DATA[::-1]


def test_deleted_chunks_are_gone_and_others_stay(bed: Bed) -> None:
    bed.store.put(NAME, [memoryview(DATA)])
    bed.store.put(OTHER, [memoryview(DATA)])
    bed.store.delete([NAME, b"\xff" * 32])
    bed.store.delete([])
    assert read(bed.store, NAME) is None
    assert read(bed.store, OTHER) == DATA


@pytest.mark.parametrize("position", [0, 5, 15, 20, 1000, -1])
def test_a_changed_byte_is_a_miss(bed: Bed, position: int) -> None:
    value = bytearray(frame(NAME, [memoryview(DATA)]) + DATA)
    bed.poke(NAME, bytes(value))
    assert read(bed.store, NAME) == DATA, "the poked value was not good to begin with"
    value[position] ^= 1
    bed.poke(NAME, bytes(value))
    assert read(bed.store, NAME) is None
    assert bed.store.corrupt == 1
    bed.store.put(NAME, [memoryview(DATA)])
    assert read(bed.store, NAME) == DATA


@pytest.mark.parametrize("size", [0, 3, 20, 1000, len(DATA) + 19, len(DATA) + 21])
def test_a_short_or_long_value_is_a_miss(bed: Bed, size: int) -> None:
    bed.poke(NAME, (frame(NAME, [memoryview(DATA)]) + DATA + b"more")[:size])
    assert read(bed.store, NAME) is None
    assert bed.store.corrupt == 1


def test_a_chunk_of_another_size_or_name_is_a_miss(bed: Bed) -> None:
    bed.store.put(NAME, [memoryview(DATA)])
    assert read(bed.store, NAME, len(DATA) + 1) is None
    bed.poke(OTHER, frame(NAME, [memoryview(DATA)]) + DATA)
    assert read(bed.store, OTHER) is None
    assert bed.store.corrupt == 2


def test_chunks_of_the_usual_size(bed: Bed) -> None:
    data = random.Random(1).randbytes(1 << 20) * 36
    bed.store.put(NAME, cut(data, 2 << 20, 20 << 20))
    assert read(bed.store, NAME, len(data)) == data


def test_threads_share_a_store(bed: Bed) -> None:
    def work(number: int) -> bool:
        chunk, data = bytes([number]) * 32, random.Random(number).randbytes(3000)
        for _ in range(3):
            bed.store.put(chunk, [memoryview(data)])
            if read(bed.store, chunk) != data:
                return False
            bed.store.delete([chunk])
        return read(bed.store, chunk) is None

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(12))) == [True] * 12


def test_a_redis_store_keeps_to_its_prefix(redis_server: RedisServer) -> None:
    ours, others = open_store(f"{redis_server.url}?prefix=a*:"), open_store(f"{redis_server.url}?prefix=ab:")
    ours.put(NAME, [memoryview(DATA)])
    others.delete([NAME])
    assert read(others, NAME) is None
    assert read(ours, NAME) == DATA
    ours.close()
    others.close()


# --- faults ---


def test_a_killed_redis_is_a_store_error_until_it_is_back(own_redis: RedisServer) -> None:
    store = open_store(f"{own_redis.url}?timeout=1")
    store.put(NAME, [memoryview(DATA)])
    own_redis.kill()
    start = time.monotonic()
    for call in (
        lambda: store.put(NAME, [memoryview(DATA)]),
        lambda: read(store, NAME),
        lambda: store.delete([NAME]),
    ):
        with pytest.raises(StoreError, match=str(own_redis.port)):
            call()
    assert time.monotonic() - start < 4
    own_redis.start()
    assert read(store, NAME) is None
    store.put(NAME, [memoryview(DATA)])
    assert read(store, NAME) == DATA
    store.close()


def test_a_stopped_redis_costs_no_more_than_its_timeouts(own_redis: RedisServer) -> None:
    store = open_store(f"{own_redis.url}?timeout=0.3")
    store.put(NAME, [memoryview(DATA)])
    own_redis.process.send_signal(signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(StoreError, match=r"(?i)time"):
        read(store, NAME)
    assert time.monotonic() - start < 2
    own_redis.process.send_signal(signal.SIGCONT)
    assert read(store, NAME) == DATA
    store.close()


def test_a_full_redis_is_store_full(own_redis: RedisServer) -> None:
    store = open_store(own_redis.url)
    store._client.config_set("maxmemory-policy", "noeviction")
    store._client.config_set("maxmemory", "6mb")
    big = bytes(1 << 20)
    names = [bytes([number]) * 32 for number in range(10)]
    with pytest.raises(StoreFull, match="maxmemory"):
        put_all(store, names, big)
    store.delete(names)
    store.put(NAME, [memoryview(big)])
    store.close()


def test_a_small_quota_of_files_is_store_full(tmp_path: Path) -> None:
    store = FileStore(tmp_path, 10_000)
    for number in range(3):
        store.put(bytes([number]) * 32, [memoryview(DATA)])
    with pytest.raises(StoreFull):
        store.put(NAME, [memoryview(DATA)])
    assert read(store, NAME) is None
    store.close()


def test_s3_away_or_without_the_bucket_is_a_store_error(s3_endpoint: str) -> None:
    store = open_store(f"s3://no-such-bucket?endpoint={s3_endpoint}&retries=0")
    with pytest.raises(StoreError, match=r"no-such-bucket.* not found"):
        store.put(NAME, [memoryview(DATA)])
    store.close()
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: refused
        store = open_store(f"s3://bucket?endpoint=http://127.0.0.1:{unused.getsockname()[1]}&retries=1")
        for call in (
            lambda: store.put(NAME, [memoryview(DATA)]),
            lambda: read(store, NAME),
            lambda: store.delete([NAME]),
        ):
            with pytest.raises(StoreError, match=r"^s3://bucket/"):
                call()
        store.close()


class Flaky(http.server.BaseHTTPRequestHandler):
    """Forwards to a real server, but answers 503 to the first two requests of each method."""

    upstream = ""
    refused: dict[str, int]

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refused.setdefault(self.command, 0) < 2:
            self.refused[self.command] += 1
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        upstream = http.client.HTTPConnection(self.upstream.removeprefix("http://"), timeout=20)
        upstream.request(self.command, self.path, body, dict(self.headers))
        reply = upstream.getresponse()
        content = reply.read()
        upstream.close()
        self.send_response(reply.status)
        for header in ("ETag", "Last-Modified"):
            if reply.headers[header]:
                self.send_header(header, reply.headers[header])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = _answer  # noqa: N815 - named by http.server

    def log_message(self, *_: object) -> None:
        pass


def test_failed_requests_to_s3_are_tried_again(s3_endpoint: str) -> None:
    handler = type("Handler", (Flaky,), {"upstream": s3_endpoint, "refused": {}})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"s3://bucket/flaky?endpoint=http://127.0.0.1:{server.server_port}"
            store = open_store(f"{url}&retries=3")
            store.put(NAME, [memoryview(DATA)])
            assert read(store, NAME) == DATA
            assert handler.refused == {"PUT": 2, "GET": 2}
            store.close()
            handler.refused.clear()
            impatient = open_store(f"{url}&retries=1")
            with pytest.raises(StoreError):
                impatient.put(NAME, [memoryview(DATA)])
            impatient.close()
        finally:
            server.shutdown()
            thread.join()
