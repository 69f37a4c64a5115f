"""A benchmark of a running server: lookups from several processes, and copies through the arena beside one memcpy."""

import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvcore.live.arena import Arena, Reader, Writer
from kvcore.live.client import Client, Found, NotYet, SchedulerClient, ServerAwayError, WorkerClient
from kvcore.live.tools import status
from kvcore.live.wire import Clear, Granted, Register, Registered
from kvcore.policy.hashing import block_hashes, chunk_names

_BLOCK_TOKENS = 16
_COPY_CHUNKS = 32
_COPY_ROUNDS = 5
_START_S = 60.0
_PATIENCE_S = 10.0
"""A busy machine may stop a process for longer than an engine would wait; here that is measured, not fled from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to measure."""

    tokens: int = 100_000
    clients: int = 2
    seconds: float = 5.0
    copy_bytes: int = 512 << 20
    chunk_tokens: int = 256
    """Of a server that is started for the benchmark."""


def run(endpoint: str | None, load: Load) -> dict[str, Any]:
    """Measure and return figures; without an endpoint a server with a journal is started, and stopped.

    What was stored for it is cleared in the end, well or not.

    Raises ServerAwayError, RegistrationRefused, RemoteError, ArenaError as clients do.
    """
    if endpoint is not None:
        return _measure(endpoint, load, journal=None)
    with own_server(load) as (own, journal):
        return _measure(own, load, journal=journal)


@contextmanager
def own_server(load: Load) -> Iterator[tuple[str, bool]]:
    """Run a server, with a journal, for as long as the context lasts; yield its endpoint."""
    folder = Path(tempfile.mkdtemp(prefix="kvcore-bench-"))
    endpoint = f"ipc://{folder}/bench.ipc"
    chunks = load.tokens // load.chunk_tokens + 1
    size_gb = (chunks * (2 << 20) + load.copy_bytes * 1.25) / 2**30 + 0.1
    flags = {
        "--bind": endpoint,
        "--http": "off",
        "--name": f"bench-{os.getpid()}",
        "--l1-size-gb": f"{size_gb:.3f}",
        "--chunk-size": str(load.chunk_tokens),
        "--journal": str(folder / "journal"),
        "--log-level": "warning",
    }
    command = [sys.executable, "-m", "kvcore", "serve", *(part for pair in flags.items() for part in pair)]
    with _ending_well() as from_here:
        process = subprocess.Popen(command)  # noqa: S603 - this very program
        try:
            from_here()
            _wait_for(endpoint, process)
            _wait_until_touched(endpoint)
            yield endpoint, True
        finally:
            process.terminate()
            process.wait(30)
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _ending_well() -> Iterator[Callable[[], None]]:
    """Have SIGTERM and SIGHUP end this process by way of its `finally`s, as Ctrl-C does: its server is to end too.

    Not before the function that is yielded has been called: a server that is just being started is nobody's yet.
    """
    came, waits = list[int](), True

    def end(number: int, _: FrameType | None) -> None:
        came.append(number)
        if not waits:
            raise SystemExit(128 + number)

    def from_here() -> None:
        nonlocal waits
        waits = False
        if came:
            raise SystemExit(128 + came[0])

    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield from_here
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait_for(endpoint: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerAwayError(f"the server ended with exit code {process.returncode}")
        try:
            with Client(endpoint) as client:
                client.ping(0.5)
                return
        except ServerAwayError:
            continue
    raise ServerAwayError(f"no server within {_START_S:g} s")


def _wait_until_touched(endpoint: str) -> None:
    """Let the server fault its arena in, so that this is not measured with the rest."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        arena = status(endpoint, 5.0)["arena"]
        if (arena["touched_bytes"] or 0) >= arena["pages"] * arena["page_bytes"]:
            return
        time.sleep(0.2)


def _measure(endpoint: str, load: Load, *, journal: bool | None) -> dict[str, Any]:
    hash_ms, chunks = _hash_prompt(endpoint, load)
    figures: dict[str, Any] = {
        "prompt_tokens": load.tokens,
        "chunks": len(chunks),
        "clients": load.clients,
        "journal": "as the server has it" if journal is None else "on" if journal else "off",
        "hash_ms": hash_ms,
    }
    figures.update(_lookups(endpoint, load, chunks))
    figures.update(_copies(endpoint, load))
    return figures


def _hash_prompt(endpoint: str, load: Load) -> tuple[float, tuple[bytes, ...]]:
    """Return the time to name a prompt's chunks, in ms, and the names; the last chunk is filled up."""
    root = sha256(f"bench {os.getpid()}".encode()).digest()
    with Engine(endpoint, "bench-hash", 4096) as engine:
        chunk_tokens = engine.registered.chunk_tokens
    per_chunk = chunk_tokens // engine.block_tokens
    whole = -(-load.tokens // chunk_tokens) * chunk_tokens
    tokens = np.random.default_rng(os.getpid()).integers(0, 128_000, whole)
    took = []
    for _ in range(5):
        start = time.perf_counter()
        names = chunk_names(block_hashes(tokens, engine.block_tokens, root), per_chunk)
        took.append((time.perf_counter() - start) * 1000)
    return statistics.median(took), names


class Engine:
    """An engine of one rank, scheduler and worker, without a model: registered for as long as the context lasts.

    Raises ServerAwayError, RegistrationRefused.
    """

    def __init__(self, endpoint: str, name: str, chunk_bytes: int) -> None:
        self.block_tokens = _BLOCK_TOKENS
        self._name = f"{name}-{os.getpid()}"
        self.endpoint = endpoint
        self.chunk_bytes = chunk_bytes

    def __enter__(self) -> "Engine":
        chunk_tokens = int(status(self.endpoint, 5.0)["chunk_tokens"])
        if chunk_tokens % self.block_tokens:
            self.block_tokens = chunk_tokens
        block_bytes = max(1, self.chunk_bytes * self.block_tokens // chunk_tokens)
        names = {"model": "bench"}
        sizes = (self.block_tokens, block_bytes)
        self.scheduler = SchedulerClient(
            self.endpoint, Register(self._name, "scheduler", *sizes, namespace=names), deadline_s=_PATIENCE_S
        )
        self.worker = WorkerClient(
            self.endpoint, Register(self._name, "worker", *sizes, namespace=names), deadline_s=_PATIENCE_S
        )
        registered = self.scheduler.register()
        if registered is None or self.worker.register() is None:
            self.scheduler.leave()
            raise ServerAwayError(f"no server on {self.endpoint}")
        self.registered: Registered = registered
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.leave()
        self.scheduler.leave()

    def lookup(self, request: str, chunks: tuple[bytes, ...], tokens: int = 0) -> Found:
        """Look up, and wait for the answer."""
        while isinstance(found := self.scheduler.lookup(request, chunks, input_tokens=tokens), NotYet):
            pass
        return found

    def ask(self, request: str, chunks: tuple[bytes, ...]) -> Granted:
        """Ask room, and wait for the answer. Raises ServerAwayError."""
        self.scheduler.ask(request, chunks)
        while not (grants := self.scheduler.granted()):
            if self.scheduler.away:
                raise ServerAwayError("the server went away")
        return grants[0][1]

    def clear(self, chunks: tuple[bytes, ...]) -> None:
        """Drop chunks."""
        with Client(self.endpoint) as client:
            client.call(Clear(chunks))

    def store(self, request: str, chunks: tuple[bytes, ...]) -> int:
        """Have chunks resident without writing anything; return how many are."""
        self.lookup(request, chunks)
        granted = self.ask(request, chunks)
        self.worker.committed(request, [chunks[at] for at in granted.chunks])
        self.worker.flush()
        self.scheduler.end(request)
        found = self.lookup(request + "-check", chunks)
        self.worker.loaded(request + "-check", chunks[: found.load_chunks])
        self.scheduler.end(request + "-check")
        return sum(found.hits)


# Lookups


@contextmanager
def _cleared(endpoint: str, chunks: tuple[bytes, ...]) -> Iterator[None]:
    """Clear chunks in the end, whatever became of what they were for."""
    try:
        yield
    finally:
        with Client(endpoint) as client:
            client.call(Clear(chunks), _PATIENCE_S)


def _lookups(endpoint: str, load: Load, chunks: tuple[bytes, ...]) -> dict[str, Any]:
    with _cleared(endpoint, chunks):
        results = _look_up(endpoint, load, chunks)
    micros = np.concatenate([np.asarray(times) for times, _ in results]) * 1e3
    return {
        "lookups": int(micros.size),
        "lookups_per_s": sum(len(times) / took for times, took in results),
        "round_trip_p50_ms": float(np.percentile(micros, 50)),
        "round_trip_p99_ms": float(np.percentile(micros, 99)),
    }


def _look_up(endpoint: str, load: Load, chunks: tuple[bytes, ...]) -> list[tuple[list[float], float]]:
    """Have clients look up for a while; return the round trips of each in s, and its time in all."""
    with Engine(endpoint, "bench-fill", 4096) as engine:
        resident = engine.store("fill", chunks)
    if resident != len(chunks):
        raise ValueError(f"only {resident} of {len(chunks)} chunks fit in L1: run against a larger server")
    context = multiprocessing.get_context("spawn")
    pipes: list[Pipe] = []
    processes = []
    for index in range(load.clients):
        ours, theirs = context.Pipe()
        process = context.Process(target=_client, args=(theirs, endpoint, index, chunks, load), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    for pipe in pipes:
        _receive(pipe)
    for pipe in pipes:
        pipe.send("go")
    results = [_receive(pipe) for pipe in pipes]
    for process in processes:
        process.join(10)
    return results


def _receive(pipe: Pipe) -> Any:
    if not pipe.poll(_START_S):
        raise ServerAwayError("a client process does not answer")
    got = pipe.recv()
    if isinstance(got, str) and got.startswith("error"):
        raise ServerAwayError(got)
    return got


def _client(pipe: Pipe, endpoint: str, index: int, chunks: tuple[bytes, ...], load: Load) -> None:
    """Look up, take and release pins, for a while; send back each round trip in s, and the time in all."""
    try:
        with Engine(endpoint, f"bench-client-{index}", 4096) as engine:
            for at in range(20):
                _cycle(engine, f"warm-{at}", chunks, load.tokens)
            pipe.send("ready")
            pipe.recv()
            times: list[float] = []
            start = time.perf_counter()
            while (now := time.perf_counter()) - start < load.seconds:
                times.append(_cycle(engine, f"r{len(times)}", chunks, load.tokens))
            engine.worker.flush()
            pipe.send((times, now - start))
    except Exception as error:  # told to the parent, which raises it
        pipe.send(f"error in client {index}: {error}")
        raise


def _cycle(engine: Engine, request: str, chunks: tuple[bytes, ...], tokens: int) -> float:
    """Return the lookup's round trip in s; the pins are released by what an engine says after its loads."""
    start = time.perf_counter()
    found = engine.lookup(request, chunks, tokens)
    took = time.perf_counter() - start
    if found.load_chunks != len(chunks):
        raise ValueError(f"{found.load_chunks} of {len(chunks)} chunks found")
    engine.worker.loaded(request, chunks, tokens=tokens)
    engine.scheduler.end(request)
    return took


# Copies


def _copies(endpoint: str, load: Load) -> dict[str, Any]:
    """Store and retrieve through the arena, the words with the server included; beside it, one memcpy."""
    chunk_bytes = load.copy_bytes // _COPY_CHUNKS
    size = chunk_bytes * _COPY_CHUNKS
    source = np.random.default_rng(1).integers(0, 255, size, np.uint8)
    target = np.zeros_like(source)
    stores, retrieves, copies = [], [], []
    with Engine(endpoint, "bench-copy", chunk_bytes) as engine:
        arena = Arena.attach(Path(engine.registered.arena_path))
        try:
            arena.pretouch().join()  # as a worker does that registers its mapping with a device
            for at in range(_COPY_ROUNDS + 1):
                chunks = tuple(sha256(b"copy %d %d" % (at, i)).digest() for i in range(_COPY_CHUNKS))
                with _cleared(endpoint, chunks):
                    copies.append(_timed(lambda: np.copyto(target, source)))
                    target[:] = 0
                    stores.append(_timed(lambda: _store(engine, arena, f"s{at}", chunks, source)))  # noqa: B023 - called at once
                    retrieves.append(_timed(lambda: _retrieve(engine, arena, f"l{at}", chunks, target)))  # noqa: B023
                if not np.array_equal(source, target):
                    raise AssertionError("what was retrieved is not what was stored")
        finally:
            arena.close()
    memcpy, store, retrieve = (size / statistics.median(took[1:]) / 1e9 for took in (copies, stores, retrieves))
    return {
        "copy_mib": size >> 20,
        "memcpy_gb_per_s": memcpy,
        "store_gb_per_s": store,
        "retrieve_gb_per_s": retrieve,
        "store_of_memcpy": store / memcpy,
        "retrieve_of_memcpy": retrieve / memcpy,
    }


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _store(engine: Engine, arena: Arena, request: str, chunks: tuple[bytes, ...], source: NDArray[np.uint8]) -> None:
    engine.lookup(request, chunks)
    granted = engine.ask(request, chunks)
    if len(granted.chunks) != len(chunks):
        raise ValueError(f"only {len(granted.chunks)} of {len(chunks)} chunks fit: {granted.refused}")
    writer = Writer(arena)
    for pages, generations, start, stop in _rooms(granted, engine.registered):
        writer.scatter(pages, generations, source[start:stop])
    engine.worker.committed(request, chunks, tokens=1, nbytes=source.size)
    engine.worker.flush()
    engine.scheduler.end(request)


def _retrieve(engine: Engine, arena: Arena, request: str, chunks: tuple[bytes, ...], target: NDArray[np.uint8]) -> None:
    found = engine.lookup(request, chunks)
    if found.load_chunks != len(chunks):
        raise ValueError(f"only {found.load_chunks} of {len(chunks)} chunks found")
    reader = Reader(arena)
    for pages, generations, start, stop in _rooms(found, engine.registered):
        reader.gather(pages, generations, target[start:stop])
    engine.worker.loaded(request, chunks, tokens=1, nbytes=target.size)
    engine.worker.flush()
    engine.scheduler.end(request)


def _rooms(
    told: Found | Granted, registered: Registered
) -> Iterator[tuple[NDArray[np.uint32], NDArray[np.uint64], int, int]]:
    """Yield pages, their generations, and where their bytes lie in the flat buffer.

    Chunks of whole pages lie in the arena as in the buffer, so they make one copy, in which adjacent chunks are one
    piece: below some megabytes memcpy takes twice the time a byte, for it then reads what it overwrites.
    """
    pages, generations = np.frombuffer(told.pages, "<u4"), np.frombuffer(told.generations, "<u8")
    step, shard = registered.chunk_pages, registered.shard_bytes
    if shard == step * registered.page_bytes:
        yield pages, generations, 0, len(pages) // step * shard
        return
    for index, at in enumerate(range(0, len(pages), step)):
        yield pages[at : at + step], generations[at : at + step], index * shard, (index + 1) * shard
