"""A member's standing with the server: registered and renewing its lease, or away and coming back.

One background thread a member. It owns its own socket, so the engine's threads never wait for it, and it stops with its
process: a stopped (SIGSTOP) process renews nothing.
"""

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from msgspec import structs

from kvcore.live.connection import Connection, CurveKeys, ServerAwayError
from kvcore.live.wire import Error, Leave, Message, Register, Registered, Renew

_LOG = logging.getLogger("kvcore.client")
_FIRST_BACKOFF_S = 0.2
_LAST_BACKOFF_S = 2.0


class RegistrationRefused(RuntimeError):  # noqa: N818 - a refusal is an answer
    """The server will not have this member; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """One registration: until the server is lost or left."""

    registered: Registered
    connection: Connection
    liveness: socket.socket

    def close(self) -> None:
        """Close both sockets; the server takes it as the member's end."""
        self.connection.close()
        self.liveness.close()


class Presence:
    """Registers a member, keeps its lease, notices that the server is away and comes back by itself.

    `post` hands a message to the background thread, in order and without waiting; what was posted for a session that
    has ended is dropped.
    """

    def __init__(
        self,
        endpoint: str,
        register: Register,
        *,
        deadline_s: float = 0.5,
        drain: Callable[[], None] | None = None,
        back: Callable[[], None] | None = None,
        curve: CurveKeys | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._register = register
        self._deadline_s = deadline_s
        self._drain = drain
        self._back = back
        self._curve = curve
        self._session: Session | None = None
        self._epoch = 0
        self._queue: queue.SimpleQueue[Message | threading.Event | None] = queue.SimpleQueue()
        self._closing = False
        self._lost: Session | None = None
        self._not_before = 0.0
        self._pending: dict[int, float] = {}
        self._refusal = ""
        self._thread: threading.Thread | None = None

    @property
    def session(self) -> Session | None:
        """The session at hand, None while the server is away. A new object after every registration."""
        return self._session

    def start(self, timeout_s: float) -> Registered | None:
        """Register and go on in the background; return None where the server is away, as it may be for now.

        A refusal is asked about once more: the process that held the place may be about to end. Raises
        RegistrationRefused.
        """
        try:
            try:
                self._session = self._try_to_register(timeout_s)
            except RegistrationRefused:
                time.sleep(_FIRST_BACKOFF_S)
                self._session = self._try_to_register(timeout_s)
        except ServerAwayError as error:
            _LOG.warning("kvcore server is away (%s): every lookup is a miss until it is back", error)
        name = f"kvcore-{self._register.role}-{self._register.rank}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        session = self._session
        return None if session is None else session.registered

    def post(self, message: Message) -> None:
        """Queue a message. Never blocks; any thread may call it."""
        self._queue.put(message)

    def lost(self, session: Session, why: str) -> None:
        """Say that `session` does not answer; from now on the member is away until it has registered again."""
        if self._session is session:
            _LOG.warning("kvcore server is away (%s): lookups are misses until it is back", why)
            self.register_again(session)

    def register_again(self, session: Session, after_s: float = 0.0) -> None:
        """Give a session up and register anew, not before `after_s`; no copy of it is under way then."""
        if self._session is session:
            self._not_before = time.monotonic() + after_s
            self._session = None
            self._lost = session
            self._queue.put(None)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything posted so far has been answered; return whether it has."""
        mark = threading.Event()
        self._queue.put(mark)
        return mark.wait(timeout_s)

    def close(self) -> None:
        """Leave the server, after what was posted, and stop the thread."""
        self._closing = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # The background thread

    def _run(self) -> None:
        while not self._closing:
            if (lost := self._lost) is not None:
                if self._drain is not None:
                    self._drain()  # first: a server that lives takes the closing for the process's end
                lost.close()
                self._lost = None
            session = self._session
            if session is None:
                self._come_back()
            else:
                self._serve(session)
        self._leave()

    def _serve(self, session: Session) -> None:
        """Send what is posted and renew the lease, until the session is lost or the member closes."""
        interval = session.registered.lease_ms / 4000
        self._pending = {}
        marks: list[tuple[int, threading.Event]] = []
        renew_at = time.monotonic()
        while self._session is session and not self._closing:
            try:
                note = self._queue.get(timeout=self._patience(renew_at, bool(marks)))
                while True:
                    self._send(session, note, marks)
                    note = self._queue.get_nowait()
            except queue.Empty:
                pass
            if time.monotonic() >= renew_at:
                self._send(session, Renew(session.registered.member), marks)
                renew_at = time.monotonic() + interval
            self._take_replies(session, marks)

    def _patience(self, renew_at: float, marked: bool) -> float:
        """Return how long the thread may sleep."""
        now = time.monotonic()
        until = renew_at
        if self._pending:
            until = min(until, now + 0.002 if marked else next(iter(self._pending.values())) + self._deadline_s)
        return max(0.0, until - now)

    def _send(
        self, session: Session, note: Message | threading.Event | None, marks: list[tuple[int, threading.Event]]
    ) -> None:
        if note is None:
            return
        if isinstance(note, threading.Event):
            last = next(reversed(self._pending), 0)
            marks.append((last, note))
            return
        if getattr(note, "member", None) != session.registered.member:
            return  # of an earlier session: the server would not know what it is about
        try:
            self._pending[session.connection.send(note)] = time.monotonic()
        except ServerAwayError as error:
            self.lost(session, str(error))

    def _take_replies(self, session: Session, marks: list[tuple[int, threading.Event]]) -> None:
        for correlation, reply in session.connection.receive():
            self._pending.pop(correlation, None)
            if isinstance(reply, Error):
                if reply.kind == "unknown_instance":
                    self.lost(session, reply.message)
                else:
                    _LOG.error("kvcore server: %s: %s", reply.kind, reply.message)
        oldest = next(iter(self._pending), None)
        while marks and (oldest is None or marks[0][0] < oldest):
            marks.pop(0)[1].set()
        if oldest is not None and time.monotonic() - self._pending[oldest] > self._deadline_s:
            self.lost(session, f"no reply within {self._deadline_s:g} s")

    def _come_back(self) -> None:
        backoff = _FIRST_BACKOFF_S
        if self._drain is not None:
            self._drain()
        while not self._closing:
            if (left := self._not_before - time.monotonic()) > 0:
                self._sleep(left)
                continue
            try:
                session = self._try_to_register(1.0)
            except (ServerAwayError, OSError):
                pass
            except RegistrationRefused as error:
                if str(error) != self._refusal:
                    self._refusal = str(error)
                    _LOG.error("kvcore server refuses %s: %s", self._register.instance, error)
            else:
                self._refusal = ""
                self._session = session
                _LOG.warning("kvcore server is back (epoch %d)", session.registered.epoch)
                if self._back is not None:
                    self._back()
                return
            self._sleep(backoff)
            backoff = min(2 * backoff, _LAST_BACKOFF_S)

    def _sleep(self, seconds: float) -> None:
        """Wait, dropping what is posted, until the time is up or the member closes."""
        until = time.monotonic() + seconds
        while not self._closing and (left := until - time.monotonic()) > 0:
            try:
                self._queue.get(timeout=left)
            except queue.Empty:
                return

    def _try_to_register(self, timeout_s: float) -> Session:
        """Register anew. Raises RegistrationRefused, ServerAwayError."""
        connection = Connection(self._endpoint, self._curve)
        request = structs.replace(self._register, pid=os.getpid(), drained_epoch=self._epoch)
        try:
            registered = _registered(_answer(connection, request, timeout_s))
            liveness = connect_liveness(registered, timeout_s)
        except BaseException:
            connection.close()
            raise
        self._epoch = registered.epoch
        return Session(registered, connection, liveness)

    def _leave(self) -> None:
        session = self._session or self._lost
        if session is None:
            return
        if session is self._session:
            self._last_words(session)
        self._session = None
        session.close()

    def _last_words(self, session: Session) -> None:
        """Send what is still queued, then Leave, and wait for its reply."""
        marks: list[tuple[int, threading.Event]] = []
        while True:
            try:
                self._send(session, self._queue.get_nowait(), marks)
            except queue.Empty:
                break
        if self._session is session:
            _answer_or_none(session.connection, Leave(session.registered.member), self._deadline_s)
        for _, mark in marks:
            mark.set()


def connect_liveness(registered: Registered, timeout_s: float) -> socket.socket:
    """Connect the socket whose closing tells the server that this process is gone; the caller keeps it open.

    Raises RegistrationRefused where the path is not on this host, ServerAwayError where the server does not answer.
    """
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(timeout_s)
    try:
        peer.connect(registered.liveness_path)
        peer.sendall(registered.member.to_bytes(8, "little"))
        if peer.recv(1) != b"\x01":
            raise ServerAwayError("the server closed the liveness socket")
    except FileNotFoundError:
        peer.close()
        raise RegistrationRefused(
            f"{registered.liveness_path} is not on this host: engines share the server's host and arena"
        ) from None
    except OSError as error:
        peer.close()
        if isinstance(error, ServerAwayError):
            raise
        raise ServerAwayError(f"liveness socket: {error}") from None
    peer.setblocking(True)
    return peer


def _registered(reply: Message) -> Registered:
    if isinstance(reply, Error):
        raise RegistrationRefused(reply.message)
    if not isinstance(reply, Registered):
        raise RegistrationRefused(f"the server answered with {type(reply).__name__}")
    return reply


def _answer(connection: Connection, request: Message, timeout_s: float) -> Message:
    """Return the reply to `request`, an error reply included. Raises ServerAwayError."""
    reply = _answer_or_none(connection, request, timeout_s)
    if reply is None:
        raise ServerAwayError(f"no reply from {connection.endpoint} within {timeout_s:g} s")
    return reply


def _answer_or_none(connection: Connection, request: Message, timeout_s: float) -> Message | None:
    correlation = connection.send(request)
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        for answered, reply in connection.receive(max(left, 0.001)):
            if answered == correlation:
                return reply
    return None
