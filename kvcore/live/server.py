"""The server: one thread's request loop over sockets, liveness connections and L2's completions.

A turn of the loop takes in what has come; before a reply goes out, the journal is written, with one write for what has
been collected: what an engine is told, the journal knows. HTTP runs in a thread of its own and talks to the loop
through the same wire.
"""

import errno
import fcntl
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import zmq

from kvcore.live import wire
from kvcore.live.allocator import PageAllocator
from kvcore.live.arena import Arena, ArenaPaths
from kvcore.live.book import page_ids
from kvcore.live.held import HeldTable
from kvcore.live.limits import ArenaError
from kvcore.live.liveness import Liveness
from kvcore.live.members import Member, RefusedError, UnknownMemberError
from kvcore.live.recorder import Recorder
from kvcore.live.service import MonotonicClock, Parts, Service
from kvcore.live.settings import GB, Settings, check, http_address, naming
from kvcore.live.stores.base import Store, StoreError
from kvcore.live.stores.files import FileStore
from kvcore.live.stores.pool import StorePool
from kvcore.live.stores.registry import open_store
from kvcore.live.takeover import Found, State, go_on, recover
from kvtraces.collector import without_collection
from kvtraces.journal import Head, JournalWriter, take_snapshot

_LOG = logging.getLogger("kvcore.server")
_TURN_MESSAGES = 256
"""Messages taken from one socket before the replies go out."""
_TURN_S = 0.05
"""After so long the others have their turn; a message under way is answered."""
_LONGEST_WITHOUT_SWEEP = 8
"""Sweep intervals after which leases are looked at, however long turns are."""
_SLOW_TURN_S = 0.2
_LAST_COPIES_S = 5.0
"""How long a server that stops waits for what is on its way to L2."""
_LAST_SCAN_S = 3.0
_HANDSHAKE_MS = 5000
"""Whoever connects and does not speak ZMQ is let go of then: descriptors are few."""
_AWAITED = (wire.Found, wire.Granted, wire.Error)
"""Replies that an engine's scheduler waits for: they go out at once, the others with the end of the turn.

An error may be the answer to an ask, and those keep their order.
"""


class StartError(Exception):
    """The server cannot start; the message is one line. Nothing is left behind."""


class Server:
    """A server that can run in the calling thread (`run`) or in one of its own (`start`).

    `open` acquires everything or nothing; `close` lets go of it, the arena included, unless `run` ended by a fault.

    Raises SettingsError for settings that do not go together.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = check(settings)
        self._resources = ExitStack()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._sockets: list[zmq.Socket[bytes]] = []
        self._poller = zmq.Poller()
        self._authenticates = False
        self._stop_fd = -1
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._store: Store | None = None
        self._logged: set[str] = set()
        self._journal_s = 0.0
        self._failed = False
        """Whether the loop has ended by a fault."""
        self._keeps_arena = False
        """Whether the arena is left to the next server, as a journal tells of it."""

    # Start and stop

    def open(self) -> None:
        """Make the arena, take over what the journal proves, and listen. Raises StartError."""
        try:
            with ExitStack() as stack:
                self._open(stack)
                self._resources = stack.pop_all()
        except (ArenaError, StoreError, OSError, ValueError, zmq.ZMQError) as error:
            raise StartError(str(error)) from error

    def run(self) -> None:
        """Serve until `stop`. The calling thread owns everything that `open` made.

        Whatever this raises, `close` then leaves the arena to the next server, if there is a journal to tell of it.
        """
        try:
            self._serve()
        except BaseException:
            self._failed = True
            self._keeps_arena = bool(self.settings.journal)
            raise

    def _serve(self) -> None:
        next_sweep = last_turn = time.monotonic()
        sweep_s = min(0.25, self.settings.lease_s / 8)
        while not self._stopping:
            ready = dict(self._poller.poll(max(0, round((next_sweep - time.monotonic()) * 1000))))
            now = time.monotonic()
            if now - last_turn > 4 * sweep_s:  # this process did not run, or was busy: it could hear nobody
                self.service.members.forgive(round((now - last_turn - sweep_s) * 1e9))
            last_turn = now
            self._turn(ready)
            took_s = time.monotonic() - now
            waits_s = now - next_sweep
            # After a long turn those who renewed are heard first; where every turn is long, leases end all the same.
            if waits_s >= 0 and (took_s < sweep_s or waits_s >= _LONGEST_WITHOUT_SWEEP * sweep_s):
                self._survive(self.service.sweep)
                self._survive(self._liveness.sweep)
                self._flush()
                next_sweep = now + sweep_s
            self._time_turn(took_s)
        self._finish_copies()

    def start(self) -> None:
        """Open, and run in a thread. Raises StartError."""
        self.open()
        self._thread = threading.Thread(target=self._run_and_close, name="kvcore-server", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask the loop to end; any thread, or a signal's handler, may."""
        self._stopping = True
        with suppress(OSError):
            os.eventfd_write(self._stop_fd, 1)

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the thread of `start`; return whether it has ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def close(self) -> None:
        """Let go of everything, in reverse order."""
        self._resources.close()

    def _close_arena(self, arena: Arena) -> None:
        arena.close(unlink=not self._keeps_arena)

    def _close_journal(self, journal: JournalWriter) -> None:
        """Close it; after a fault without what nobody was told of, which may be half of a step."""
        if self._failed:
            journal.abandon()
            return
        try:
            journal.close()
        except OSError as error:
            _LOG.error("the end of the journal may be lost, and chunks in L2 with it: %s", error)
            journal.abandon()

    def __enter__(self) -> "Server":
        """Start in a thread."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop and wait."""
        self.stop()
        self.join()

    def _run_and_close(self) -> None:
        try:
            self.run()
        finally:
            self.close()

    # What open makes

    def _open(self, stack: ExitStack) -> None:
        settings = self.settings
        self._stop_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        stack.callback(os.close, self._stop_fd)
        self._poller = zmq.Poller()
        self._poller.register(self._stop_fd, zmq.POLLIN)
        self._authenticates = False
        self._context = zmq.Context()
        stack.callback(self._context.destroy, 0)
        self._sockets = []
        for endpoint in settings.endpoints:
            self._listen(endpoint, stack)
        try:
            paths = ArenaPaths(Path(settings.arena_dir), settings.name)
        except ArenaError as error:
            raise StartError(f"--name: {error}") from error
        with naming("journal", settings.journal):
            found = self._recover(paths, stack)
        arena = Arena.open(paths, size_bytes=settings.l1_bytes, page_bytes=settings.page_bytes)
        self._keeps_arena = arena.taken_over and bool(settings.journal)  # a start that fails leaves it as it was
        stack.callback(self._close_arena, arena)
        if found is not None and found.has_l1 and not arena.taken_over:
            found = found.without_l1()
        pool = self._open_pool(stack)  # before the journal, which is closed first: a store may keep its threads
        with naming("journal", settings.journal), _journal_needs_room(settings.journal):
            journal, state = self._open_journal(arena, found, stack)
        clock = MonotonicClock(state.now_ns)
        allocator = PageAllocator(arena.generations, arena.page_writers, page_ids(state.book.resident.values()))
        held = HeldTable(paths.held)
        stack.callback(held.close)
        held.follow(state.core)
        recorder = None
        if settings.record:
            with naming("record", settings.record):
                recorder = Recorder(settings.record, max_bytes=settings.record_max_mb << 20)
            stack.callback(recorder.close)
        parts = Parts(
            settings=settings,
            arena=arena,
            allocator=allocator,
            state=state,
            clock=clock,
            liveness_path=str(paths.socket),
            journal=journal,
            recorder=recorder,
            pool=pool,
            held=held,
        )
        self.service = Service(parts)
        self._scan_l2(stack)
        self._watch_members(paths.socket, stack)
        self._flush()
        if settings.pretouch:
            self.service.pretouch = arena.pretouch(huge_pages=settings.huge_pages)
        self._open_http(stack)
        self._keeps_arena = False

    def _listen(self, endpoint: str, stack: ExitStack) -> None:
        if self._context is None:
            raise AssertionError("no context to listen in")
        socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_REQUEST_BYTES)
        socket.setsockopt(zmq.SNDHWM, 100_000)
        socket.setsockopt(zmq.RCVHWM, 100_000)
        if endpoint.startswith("tcp://") and self.settings.curve_key:
            self._protect(socket, stack)
        path = Path(endpoint.removeprefix("ipc://")) if endpoint.startswith("ipc://") else None
        if path is not None:
            with naming("bind", endpoint):
                _lock_ipc(path, stack)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise StartError(f"cannot listen on {endpoint}: {error.strerror}") from error
        if path is not None:
            os.chmod(path, stat.S_IRUSR | stat.S_IWUSR)
        self._sockets.append(socket)
        self._poller.register(socket, zmq.POLLIN)

    def _protect(self, socket: "zmq.Socket[bytes]", stack: ExitStack) -> None:
        """Admit only the clients whose certificates are in the folder."""
        from zmq.auth import load_certificate  # noqa: PLC0415 - rarely needed

        with naming("curve_key", self.settings.curve_key):
            public, secret = load_certificate(self.settings.curve_key)
        if secret is None:
            raise StartError(f"--curve-key {self.settings.curve_key}: holds no secret key")
        if not self._authenticates:
            self._authenticate(stack)
            self._authenticates = True
        socket.curve_publickey, socket.curve_secretkey, socket.curve_server = public, secret, True

    def _authenticate(self, stack: ExitStack) -> None:
        """Start what libzmq asks about clients: one a context, whatever the number of its sockets."""
        from zmq.auth.thread import ThreadAuthenticator  # noqa: PLC0415

        folder = self.settings.curve_clients
        if not folder or not Path(folder).is_dir():
            raise StartError(f"--curve-clients {folder or '(none)'}: no such folder")
        authenticator = ThreadAuthenticator(self._context)
        authenticator.start()
        stack.callback(authenticator.stop)
        authenticator.configure_curve(domain="*", location=folder)

    def _recover(self, paths: ArenaPaths, stack: ExitStack) -> Found | None:
        """Return what the journal tells, which is ours from now on; arena and L2 are still as they were left."""
        settings = self.settings
        if not settings.journal:
            return None
        _lock_journal(Path(settings.journal), stack)
        return recover(Path(settings.journal), self._head(epoch=0), epoch=_epoch_of(paths))

    def _head(self, epoch: int) -> Head:
        settings = self.settings
        meta = {
            "epoch": epoch,
            "page_bytes": settings.page_bytes,
            "name": settings.name,
            "chunk_tokens": settings.chunk_size,
            "l2": settings.l2_place,
        }
        return Head(config=settings.core_config(), meta=meta)

    def _open_journal(self, arena: Arena, found: Found | None, stack: ExitStack) -> tuple[JournalWriter | None, State]:
        """Return the journal to write to, and the state in which the server starts."""
        settings, head = self.settings, self._head(arena.epoch)
        if not settings.journal:
            return None, State.empty(head.config)
        journal = JournalWriter(
            settings.journal,
            head if found is None else found.head_for(head),
            None if found is None else take_snapshot(found.state.core, found.state.book.dump()),
            segment_bytes=settings.journal_segment_mb << 20,
            keep=settings.journal_segments,
        )
        stack.callback(self._close_journal, journal)
        if found is None:
            return journal, State.empty(head.config)
        now_ns = MonotonicClock(found.state.now_ns).now_ns()
        state = go_on(journal, found, head, arena.generations, now_ns)
        _LOG.info(
            "took over from an earlier server: chunks in %s",
            ", ".join(f"{tier.name} {len(tier.resident)}" for tier in state.core.tiers),
        )
        return journal, state

    def _open_pool(self, stack: ExitStack) -> StorePool | None:
        if not self.settings.l2:
            return None
        settings = self.settings
        queue_bytes = int(settings.l2_queue_gb * GB)
        # A delete may come after the put that it makes room for, so the store itself is allowed a little more.
        size_bytes = settings.l2_bytes + queue_bytes if settings.l2_size_gb else None
        try:
            store = open_store(settings.l2, size_bytes)
        except StoreError as error:
            raise StartError(f"--l2: {error}") from error
        threads = settings.copying_threads
        pool = StorePool(store, queue_bytes=queue_bytes, writers=threads, readers=threads)
        stack.callback(pool.close, finish=False)
        self._poller.register(pool.fileno(), zmq.POLLIN)
        self._store = store
        return pool

    def _scan_l2(self, stack: ExitStack) -> None:
        """Find what an earlier server left in a folder, which is locked; another store's prefix may be in use."""
        if not isinstance(self._store, FileStore):
            return
        thread = threading.Thread(target=self._look_for_strays, args=(self._store,), name="kvcore-l2-scan", daemon=True)
        thread.start()
        stack.callback(thread.join, _LAST_SCAN_S)

    def _look_for_strays(self, store: FileStore) -> None:
        """Hand the request loop every chunk that lies in L2."""
        try:
            for chunk, _ in store.scan():
                if self._stopping:
                    return
                self.service.strays.append(chunk)
        except StoreError as error:
            _LOG.warning("L2 cannot be looked through: %s", error)

    def _watch_members(self, path: Path, stack: ExitStack) -> None:
        self._liveness = Liveness(
            path,
            here=self._here,
            gone=self._gone,
            watch=lambda fd: self._poller.register(fd, zmq.POLLIN),
            unwatch=self._poller.unregister,
        )
        self.service.look = self._liveness.look
        stack.callback(self._liveness.close)

    def _open_http(self, stack: ExitStack) -> None:
        address = http_address(self.settings)
        if address is None:
            return
        from kvcore.live.http import HttpThread  # noqa: PLC0415 - starlette and uvicorn load slowly

        endpoint = f"inproc://kvcore-http-{id(self)}"
        self._listen(endpoint, stack)
        if self._context is None:
            raise AssertionError("no context to serve HTTP in")
        http = HttpThread(self._context, endpoint, *address)
        http.start()
        stack.callback(http.stop)

    # The loop

    def _turn(self, ready: dict[Any, int]) -> None:
        """Take in what has come, then write the journal, then reply."""
        replies: list[tuple[zmq.Socket[bytes], list[bytes]]] = []
        for source in ready:
            if isinstance(source, zmq.Socket):
                self._receive(source, replies)
            elif source == self._stop_fd:
                continue
            else:
                self._survive(partial(self._take_in, source))
        self._flush()
        for socket, frames in replies:
            _send(socket, frames)
        if self.service.later:
            later, self.service.later = self.service.later, []
            for task in later:
                self._survive(task)

    def _take_in(self, fd: int) -> None:
        if not self._liveness.ready(fd):
            self.service.collect()

    def _survive(self, task: Callable[[], object]) -> None:
        """Do what is nobody's request: a fault of ours there must not end the server either."""
        try:
            task()
        except Exception as error:  # it is logged
            self._log_once("the request loop met a fault, and goes on", error)

    def _finish_copies(self) -> None:
        """Let what is on its way to L2 arrive and the journal know of it, for the next server to find."""
        parts, tiers = self.service.parts, self.service.parts.state.core.tiers
        if parts.pool is None or parts.journal is None:
            return
        poller, until = zmq.Poller(), time.monotonic() + _LAST_COPIES_S
        poller.register(parts.pool.fileno(), zmq.POLLIN)
        while tiers[1].writing and (left := until - time.monotonic()) > 0:
            poller.poll(round(left * 1000) + 1)
            self.service.collect()
            self._flush()

    def _time_turn(self, took_s: float) -> None:
        self.service.metrics.histograms["kvcore_turn_seconds",].add(took_s)
        if took_s > _SLOW_TURN_S:
            _LOG.warning("a turn of the request loop took %.2f s, %.2f s of it the journal", took_s, self._journal_s)
        self._journal_s = 0.0

    def _receive(self, socket: "zmq.Socket[bytes]", replies: "list[tuple[zmq.Socket[bytes], list[bytes]]]") -> None:
        until = time.monotonic() + _TURN_S
        for _ in range(_TURN_MESSAGES):
            identity, *frames = socket.recv_multipart(zmq.NOBLOCK)
            correlation, reply = self._answer(frames)
            answer = [identity, *self._encoded(reply, correlation)]
            if isinstance(reply, _AWAITED):
                self._flush()
                _send(socket, answer)
            else:
                replies.append((socket, answer))
            if time.monotonic() >= until:
                return
            if (
                not int(socket.get(zmq.EVENTS)) & zmq.POLLIN
            ):  # an exception, which recv would raise, costs ten times more
                return

    def _answer(self, frames: list[bytes]) -> tuple[int, wire.Reply]:
        """Return the reply to a message, whatever it is."""
        correlation = 0
        try:
            correlation, message = wire.decode_request(frames)
            return correlation, self.service.handle(message)
        except wire.WireError as error:
            correlation, reply = error.id, wire.Error(error.kind, str(error))
        except RefusedError as error:
            reply = wire.Error("refused", str(error))
        except UnknownMemberError as error:
            reply = wire.Error("unknown_instance", str(error))
        except Exception as error:  # a fault of ours must cost one request, not the server; it is logged and told
            reply = wire.Error("internal", f"{type(error).__name__}: {error}")
            self._log_once("a request failed", error)
        self.service.metrics.counts["kvcore_errors", reply.kind] += 1
        return correlation, reply

    def _encoded(self, reply: wire.Reply, correlation: int) -> list[bytes]:
        """Return a reply's frames; those of an error where it cannot be encoded."""
        try:
            return wire.encode(reply, correlation)
        except Exception as error:  # a fault of ours, as above
            self._log_once("a reply cannot be encoded", error)
            self.service.metrics.counts["kvcore_errors", "internal"] += 1
            return wire.encode(wire.Error("internal", f"{type(error).__name__}: {error}"), correlation)

    def _log_once(self, what: str, error: Exception) -> None:
        """Log a fault with its traceback, once for every place it comes from."""
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        if place not in self._logged:
            self._logged.add(place)
            _LOG.error(what, exc_info=error)

    def _here(self, token: int, pid: int) -> Member:
        return self.service.here(token, pid)

    def _gone(self, member: Member) -> None:
        if self.service.members.find_token(member.token) is member:
            _LOG.info("%s is gone", member.name)
            self.service.gone(member)

    def _flush(self) -> None:
        """Write what the journal has collected; a new segment where one is full."""
        journal = self.service.parts.journal
        if journal is None:
            return
        start = time.monotonic()
        try:
            journal.flush()
            if journal.due and not journal.settling:  # the disk may take seconds, and the segment grows meanwhile
                state = self.service.parts.state
                with without_collection():
                    journal.rotate(take_snapshot(state.core, state.book.dump()))
        except OSError as error:
            _LOG.error("going on without the journal, which cannot be written: %s", error)
            self.service.lose_journal(str(error))
            journal.abandon()
        self._journal_s += time.monotonic() - start


def _send(socket: "zmq.Socket[bytes]", frames: list[bytes]) -> None:
    with suppress(zmq.Again):  # a client that takes no replies
        socket.send_multipart(frames, zmq.NOBLOCK)


def _epoch_of(paths: ArenaPaths) -> int:
    """Return the epoch of an arena that an earlier server left, 0 where there is none that a journal may tell of."""
    try:
        with Arena.attach(paths.arena) as arena:
            return 0 if arena.unjournaled else arena.epoch
    except ArenaError:
        return 0


def _lock_ipc(path: Path, stack: ExitStack) -> None:
    """Hold an ipc endpoint for ourselves: ZMQ itself would take it from another server without a word."""
    lock = path.with_name(path.name + ".lock")
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StartError(f"cannot listen on ipc://{path}: another server does") from None

    def release() -> None:
        for left in (path, lock):
            with suppress(FileNotFoundError):
                left.unlink()
        os.close(fd)

    stack.callback(release)


@contextmanager
def _journal_needs_room(folder: str) -> Iterator[None]:
    """Say what to do where the disk is full; a server that went on without its journal would delete what L2 holds."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StartError(
            f"--journal {folder}: {error.strerror}: make room there, and L1 and L2 are as they were; a start without "
            f"--journal gives up what they hold"
        ) from error


def _lock_journal(folder: Path, stack: ExitStack) -> None:
    """Hold a journal for ourselves: a second server would take its end for the first one's, and L2 for its own."""
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    stack.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StartError(f"--journal {folder}: another server uses this journal") from None
