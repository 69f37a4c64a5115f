"""Real server processes, and engines without a model, for the tests of this folder."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np

from kvcore.live import wire
from kvcore.live.arena import Arena, Reader, Writer
from kvcore.live.client import Register, SchedulerClient, WorkerClient
from kvcore.live.connection import Client, ServerAwayError
from kvcore.live.presence import connect_liveness
from kvcore.live.settings import Settings

START_S = 30


def chain(seed, count):
    """Names of `count` chunks of one prompt."""
    return tuple(sha256(f"{seed}/{i}".encode()).digest() for i in range(count))


def content(chunk, nbytes):
    """What an engine writes for a chunk: its name over and over, so that anybody can tell whose bytes these are."""
    return np.frombuffer((chunk * (nbytes // len(chunk) + 1))[:nbytes], np.uint8)


def wait_for(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return found


def settings_in(folder, **changes):
    """Of a server in this process, with all that it makes in a folder: 64 pages of 64 KiB, no HTTP."""
    sizes = {"page_size": "65536", "l1_size_gb": 64 * 65536 / 2**30, "pretouch": False}
    return Settings(**{"bind": (f"ipc://{folder}/s.ipc",), "arena_dir": str(folder), "http": "off", **sizes, **changes})


def environment():
    """As here, but for what is said to the tests: a server would say that those are no settings of its own."""
    own = {
        name: value for name, value in os.environ.items() if not name.startswith(("KVCORE_TEST_", "KVCORE_REQUIRE_"))
    }
    return {**own, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


class ServerProcess:
    """`kvcore serve` in a process of its own; everything it makes lies in `folder`."""

    def __init__(self, folder, *flags, l1_pages=64, page_bytes=65536):
        self.folder = Path(folder)
        self.endpoint = f"ipc://{folder}/s.ipc"
        self.arena = self.folder / "kvcore-t.arena"
        self.command = [
            sys.executable,
            "-m",
            "kvcore",
            "serve",
            *("--bind", self.endpoint),
            *("--arena-dir", str(folder)),
            *("--name", "t"),
            *("--http", "off"),
            *("--page-size", str(page_bytes)),
            *("--l1-size-gb", repr(l1_pages * page_bytes / 2**30)),
            "--no-pretouch",
            *flags,
        ]
        self.start()

    def start(self):
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(self.command, stderr=log, env=environment())
        deadline = time.monotonic() + START_S
        while True:
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            try:
                with Client(self.endpoint) as client:
                    client.ping(0.2)
                    return
            except ServerAwayError:
                assert time.monotonic() < deadline, "the server does not answer"

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(20)
        return self.process.returncode

    def status(self):
        with Client(self.endpoint) as client:
            return client.call(wire.Status(), 5).data

    def counters(self):
        """Sums by (name, first label) and by name."""
        with Client(self.endpoint) as client:
            report = client.call(wire.GetMetrics(), 5).data
        found = {}
        for name, *labels, value in report["values"]:
            for key in {name, (name, *labels[:1])}:
                found[key] = found.get(key, 0) + value
        return found


class SyncEngine:
    """An engine that awaits every reply: a scheduler and `world` workers, with real bytes in the arena."""

    def __init__(
        self,
        endpoint,
        name="engine",
        *,
        chunk_bytes=4096,
        world=1,
        shards=None,
        block_tokens=16,
        chunk_tokens=256,
        drained=0,
        facts=None,
    ):
        self.client = Client(endpoint)
        self.shards = world if shards is None else shards
        blocks = chunk_tokens // block_tokens
        self.nbytes = chunk_bytes
        self.sockets = []

        def register(role, rank):
            request = wire.Register(
                name,
                role,
                block_tokens,
                chunk_bytes // blocks // self.shards,
                rank,
                world,
                self.shards,
                {"model": "fake"},
                os.getpid(),
                drained,
                facts or {},
            )
            registered = self.client.call(request, 5)
            self.sockets.append(connect_liveness(registered, 5))
            return registered

        self.scheduler = register("scheduler", 0)
        self.workers = [register("worker", rank) for rank in range(world)]
        self.registered = self.scheduler
        self.arena = Arena.attach(Path(self.registered.arena_path))

    def close(self):
        for peer in self.sockets:
            peer.close()
        self.arena.close()
        self.client.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def lookup(self, request, chunks, **fields):
        found = self.client.call(wire.Lookup(self.scheduler.member, request, tuple(chunks), **fields), 5)
        while found.pending:
            time.sleep(0.005)
            found = self.client.call(wire.Poll(self.scheduler.member, request), 5)
        return found

    def ask(self, request, chunks):
        return self.client.call(wire.Ask(self.scheduler.member, request, tuple(chunks)), 5)

    def write(self, granted, chunks):
        """Write granted chunks' contents; return the chunks."""
        placed = [chunks[at] for at in granted.chunks]
        for chunk, pages, generations in self.rooms(granted, placed):
            Writer(self.arena).scatter(pages, generations, content(chunk, self.nbytes))
        return placed

    def read(self, found, chunks):
        """Read what a lookup found; raises StaleChunk, AssertionError for other bytes than were written."""
        run = chunks[found.load_start : found.load_start + found.load_chunks]
        for chunk, pages, generations in self.rooms(found, run):
            data = np.zeros(self.nbytes, np.uint8)
            Reader(self.arena).gather(pages, generations, data)
            assert np.array_equal(data, content(chunk, self.nbytes)), "another chunk's bytes"
        return run

    def rooms(self, told, chunks):
        pages = np.frombuffer(told.pages, "<u4").reshape(len(chunks), self.registered.chunk_pages)
        generations = np.frombuffer(told.generations, "<u8").reshape(len(chunks), self.registered.chunk_pages)
        return zip(chunks, pages, generations, strict=True)

    def committed(self, request, chunks, rank=0, **fields):
        return self.client.call(wire.Committed(self.workers[rank].member, request, rank, tuple(chunks), **fields), 5)

    def aborted(self, request, chunks, rank=0):
        return self.client.call(wire.Aborted(self.workers[rank].member, request, rank, tuple(chunks)), 5)

    def loaded(self, request, chunks, rank=0, **fields):
        return self.client.call(wire.Loaded(self.workers[rank].member, request, rank, tuple(chunks), **fields), 5)

    def load_failed(self, request, chunks, rank=0):
        return self.client.call(wire.LoadFailed(self.workers[rank].member, request, rank, tuple(chunks)), 5)

    def end(self, request):
        return self.client.call(wire.End(self.scheduler.member, request), 5)

    def renew(self):
        for member in (self.scheduler, *self.workers):
            self.client.call(wire.Renew(member.member), 5)

    def serve(self, request, chunks, *, real=True, **fields):
        """A whole request: look up, load, store what is missing, end. Returns what was found and granted."""
        chunks = tuple(chunks)
        found = self.lookup(request, chunks, **fields)
        run = self.read(found, chunks) if real else chunks[found.load_start : found.load_start + found.load_chunks]
        if run:
            for rank in range(len(self.workers)):
                self.loaded(request, run, rank, tokens=256 * len(run))
        missing = chunks[sum(found.hits) :]
        granted = wire.Granted()
        if missing:
            granted = self.ask(request, missing)
            placed = self.write(granted, missing) if real else [missing[at] for at in granted.chunks]
            if placed:
                for rank in range(len(self.workers)):
                    self.committed(request, placed, rank, tokens=256 * len(placed))
        self.end(request)
        return found, granted


@contextmanager
def clients(server, **scheduling):
    """The clients of an engine of one rank; both leave in the end."""
    scheduler = SchedulerClient(server.endpoint, Register("e", "scheduler", 16, 256), **scheduling)
    worker = WorkerClient(server.endpoint, Register("e", "worker", 16, 256))
    try:
        assert scheduler.register() is not None
        assert worker.register() is not None
        yield scheduler, worker
    finally:
        worker.leave()
        scheduler.leave()
