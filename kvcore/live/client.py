"""Clients of the server, one a role, for an engine's connector.

The scheduler's client asks what is cached and where to write; a worker's client says what it has copied. Neither ever
waits for long: a server that does not answer is away, for the whole instance, and then every lookup is a miss until a
background thread has registered again.
"""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Generic, TypeAlias, TypeVar

from kvcore.live.connection import Client, Connection, CurveKeys, RemoteError, ServerAwayError
from kvcore.live.held import HeldView
from kvcore.live.presence import Presence, RegistrationRefused, Session
from kvcore.live.wire import (
    ALL_RANKS,
    Aborted,
    Ask,
    Committed,
    End,
    Error,
    Found,
    Granted,
    Loaded,
    LoadFailed,
    Lookup,
    Message,
    Places,
    Poll,
    Record,
    Register,
    Registered,
    Reply,
    Where,
    ipc_endpoint,
)

__all__ = [
    "MISS",
    "NOT_YET",
    "Client",
    "CurveKeys",
    "Found",
    "Granted",
    "NotYet",
    "Record",
    "Register",
    "Registered",
    "RegistrationRefused",
    "RemoteError",
    "SchedulerClient",
    "ServerAwayError",
    "WorkerClient",
    "ipc_endpoint",
]

_LOG = logging.getLogger("kvcore.client")
_PATIENCE_S = 0.02
"""A wait for an answer that only a server in trouble exceeds."""


class NotYet:
    """The answer is not here yet: ask again in the next step."""

    def __repr__(self) -> str:
        return "NOT_YET"


NOT_YET: Final = NotYet()
MISS: Final = Found()
"""Nothing is cached, or nobody knows: what a server that is away answers."""


_Answer = TypeVar("_Answer", Found, Places)


class _Asked(Generic[_Answer]):
    """A question: under way (an id), or answered."""

    __slots__ = ("answer", "id")

    def __init__(self, correlation: int) -> None:
        self.id = correlation
        self.answer: _Answer | None = None


_Pending: TypeAlias = tuple[float, str, str]
"""When it was sent, what it was, and the request's name."""


class SchedulerClient:
    """The scheduler's side of an instance. One thread owns it: the scheduler's.

    Args:
        endpoint: Where the server listens, `ipc_endpoint()` by default on one host, or `tcp://host:port`.
        register: Who the instance is; `role` must be "scheduler".
        deadline_s: A reply that is missing for longer marks the server away.
        wait_s: How long `lookup` waits for its reply before it says NOT_YET.
        curve: Keys, for a server that is not on this host's loopback.

    """

    def __init__(
        self,
        endpoint: str,
        register: Register,
        *,
        deadline_s: float = 0.5,
        wait_s: float = 0.002,
        curve: CurveKeys | None = None,
    ) -> None:
        if register.role != "scheduler":
            raise ValueError(f"a SchedulerClient registers as scheduler, not as {register.role}")
        self._endpoint = endpoint
        self._curve = curve
        self._deadline_s = deadline_s
        self._wait_s = wait_s
        self._presence = Presence(endpoint, register, deadline_s=deadline_s, curve=curve)
        self._session: Session | None = None
        self._connection: Connection | None = None
        self._pending: dict[int, _Pending] = {}
        self._lookups: dict[str, _Asked[Found]] = {}
        self._grants: list[tuple[str, Granted]] = []
        self._sought: _Asked[Places] = _Asked(0)
        """Where a chunk lies: the question at hand."""
        self._held: HeldView | None = None
        """What the server of the session at hand holds, roughly."""

    def register(self, timeout_s: float = 5.0) -> Registered | None:
        """Register the instance's scheduler; return what the server says, None where it is away (a warning is logged).

        Raises RegistrationRefused. Called once; whatever happens later, the client comes back by itself.
        """
        registered = self._presence.start(timeout_s)
        self._current()  # the server's table may lose its name next
        return registered

    @property
    def registered(self) -> Registered | None:
        """What the server said at the last registration, None while it is away. A new object after each."""
        session = self._presence.session
        return None if session is None else session.registered

    @property
    def away(self) -> bool:
        """Whether the server is away, so that lookups are misses and nothing is stored."""
        return self._presence.session is None

    def lookup(  # noqa: PLR0913 - one a field of the message
        self,
        request: str,
        chunks: Sequence[bytes],
        *,
        computed_chunks: int = 0,
        salt: str = "",
        input_tokens: int = 0,
        resumed: bool = False,
        queued_bytes: int = 0,
        probe: bytes = b"",
        waited_ms: float = 0.0,
        patient: bool = False,
        wait: bool = True,
    ) -> Found | NotYet:
        """Return what is cached of a prompt, or NOT_YET: then call again, in the next step, with the same arguments.

        Args:
            request: The request's id; the same in every later call about it.
            chunks: Names of every full chunk of the prompt, head first (`kvcore.policy.hashing.chunk_names`).
            computed_chunks: Leading chunks that the engine's own cache holds whole.
            salt: The tenant, for quotas and counters.
            input_tokens: The prompt's length.
            resumed: Whether the request was preempted and comes back.
            queued_bytes: Bytes waiting on the link to the engine, for load-or-recompute.
            probe: A digest of the first chunk's tokens alone, without the namespace.
            waited_ms: Milliseconds since the request arrived, for the recorded log.
            patient: Wait longer before saying NOT_YET, since nothing else is to be done.
            wait: Wait at all.

        Every chunk of `Found`'s run is to be acknowledged: by the workers (`loaded`, `load_failed`), or by
        `drop_load` where no worker is told of it. The lookup pins what it found until then and until `end`.

        """
        session = self._current()
        if session is None:
            return MISS
        asked = self._lookups.get(request)
        if asked is None:
            message = Lookup(
                session.registered.member,
                request,
                tuple(chunks),
                computed_chunks,
                salt,
                input_tokens,
                resumed,
                queued_bytes,
                probe,
                waited_ms,
            )
            asked = _Asked(self._send(message, "lookup", request))
            self._lookups[request] = asked
        elif asked.answer is not None and asked.answer.pending:
            asked.answer = None
            asked.id = self._send(Poll(session.registered.member, request), "lookup", request)
        found = self._answer(asked, patient, wait)
        if isinstance(found, Found) and found.pending:
            return NOT_YET
        if isinstance(found, Found):
            self._lookups.pop(request, None)
        return MISS if found is None else found

    def held(self, chunk: bytes, *, patient: bool = False) -> bool | NotYet:
        """Return whether a chunk can be matched, in any tier, or NOT_YET, and then no answer will come.

        It decides nothing and pins nothing: a prompt whose first chunk is nowhere has no hit, whatever else is cached,
        and its `lookup` can be made when there is time for it. A server that is away holds nothing. The server is asked
        only where its table (`kvcore.live.held`) does not say that it is nowhere.
        """
        if self._current() is None or (self._held is not None and not self._held.may_hold(chunk)):
            return False
        self._sought = _Asked(self._send(Where((chunk,)), "where", ""))
        places = self._answer(self._sought, patient)
        if isinstance(places, NotYet):
            return NOT_YET
        return places is not None and places.tiers[0] >= 0

    def ask(self, request: str, chunks: Sequence[bytes]) -> None:
        """Ask room for chunks of the request's prompt, head first; the answer comes by `granted`."""
        session = self._current()
        if session is not None and chunks:
            self._send(Ask(session.registered.member, request, tuple(chunks)), "ask", request)

    def granted(self) -> list[tuple[str, Granted]]:
        """Return the answers to `ask` that have come since the last call, in the order of the asks.

        Every granted chunk is to be acknowledged: by the workers (`committed`, `aborted`), or by `drop_store` where no
        worker is told of it.
        """
        if self._current() is not None:
            self._pump(0.0)
        grants, self._grants = self._grants, []
        return grants

    def drop_load(self, request: str, chunks: Sequence[bytes]) -> None:
        """Say that chunks of a `Found` run are not loaded, and that no worker was told of them."""
        session = self._current()
        if session is not None and chunks:
            self._send(LoadFailed(session.registered.member, request, ALL_RANKS, tuple(chunks)), "note", request)

    def drop_store(self, request: str, chunks: Sequence[bytes]) -> None:
        """Say that granted chunks are not written, and that no worker was told of them."""
        session = self._current()
        if session is not None and chunks:
            self._send(Aborted(session.registered.member, request, ALL_RANKS, tuple(chunks)), "note", request)

    def end(self, request: str) -> None:
        """Say that the request asks for no more room: its prompt is computed, or it was cancelled."""
        session = self._current()
        self._lookups.pop(request, None)
        if session is not None:
            self._send(End(session.registered.member, request), "note", request)

    def record(self, request: str, *, input_length: int, **fields: object) -> None:
        """Tell the recorder of a finished request; `fields` as in `wire.Record`. Nothing where none is wanted."""
        session = self._current()
        if session is not None and session.registered.record:
            message = Record(session.registered.member, request, input_length, **fields)  # type: ignore[arg-type]
            self._send(message, "note", request)

    def leave(self) -> None:
        """Leave the server and stop the background thread."""
        self._presence.close()
        self._disconnect()

    # One thread's business

    def _current(self) -> Session | None:
        """Return the session at hand; one that has changed takes everything that was pending with it."""
        session = self._presence.session
        if session is not self._session:
            self._disconnect()
            self._session = session
            if session is not None:
                self._connection = Connection(self._endpoint, self._curve)
                registered = session.registered
                table = Path(registered.arena_path).with_suffix(".held")
                self._held = HeldView.attach(table, registered.held_token)
        return session

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._held is not None:
            self._held.close()
            self._held = None
        self._pending.clear()
        self._lookups.clear()
        self._grants.clear()

    def _lose(self, why: str) -> None:
        if self._session is not None:
            self._presence.lost(self._session, why)
        self._current()

    def _send(self, message: Message, what: str, request: str) -> int:
        if self._connection is None:
            return 0
        try:
            correlation = self._connection.send(message)
        except ServerAwayError as error:
            self._lose(str(error))
            return 0
        self._pending[correlation] = (time.monotonic(), what, request)
        return correlation

    def _answer(self, asked: _Asked[_Answer], patient: bool, wait: bool = True) -> _Answer | NotYet | None:
        """Wait a little for an answer, if at all; None where the server is away."""
        wait_s = max(_PATIENCE_S, self._wait_s) if patient else self._wait_s
        until = time.monotonic() + (wait_s if wait else 0.0)
        late = False
        while asked.answer is None and not late:  # it may have come with another's
            left = until - time.monotonic()
            late = left <= 0
            self._pump(max(0.0, left))
            if self._connection is None:
                return None
        return NOT_YET if asked.answer is None else asked.answer

    def _pump(self, timeout_s: float) -> None:
        """Take in the replies that are here; a reply that is overdue marks the server away."""
        if self._connection is None:
            return
        for correlation, reply in self._connection.receive(timeout_s):
            pending = self._pending.pop(correlation, None)
            if pending is not None and not self._take(correlation, reply, pending[1], pending[2]):
                return
        oldest = next(iter(self._pending.values()), None)
        if oldest is not None and time.monotonic() - oldest[0] > self._deadline_s:
            self._lose(f"no reply to a {oldest[1]} within {self._deadline_s:g} s")

    def _take(self, correlation: int, reply: Reply, what: str, request: str) -> bool:
        """Take in a reply; return whether the server is still there."""
        if isinstance(reply, Error):
            if reply.kind == "unknown_instance":
                self._lose(reply.message)
                return False
            _LOG.error("kvcore server: %s of %s: %s: %s", what, request, reply.kind, reply.message)
            reply = Granted() if what == "ask" else MISS
        if isinstance(reply, Granted):
            self._grants.append((request, reply))
        elif isinstance(reply, Places):
            if correlation == self._sought.id:
                self._sought.answer = reply
        elif isinstance(reply, Found):
            asked = self._lookups.get(request)
            if asked is not None and asked.id == correlation:
                asked.answer = reply
        return True


class WorkerClient:
    """A worker's side of an instance: says what has been copied. Any thread may call it; nothing waits.

    Args:
        endpoint: Where the server listens.
        register: Who the worker is; `role` must be "worker".
        drain: Called, in the background thread, before the worker registers again after the server was away; it
            returns when no copy of before is under way any more. Only then may the server give the pages to others.
        back: Called there when it has registered again; meanwhile its lease is not renewed.
        deadline_s: A reply that is missing for longer marks the server away.
        curve: Keys, for a server that is not on this host's loopback.

    """

    def __init__(
        self,
        endpoint: str,
        register: Register,
        *,
        drain: Callable[[], None] | None = None,
        back: Callable[[], None] | None = None,
        deadline_s: float = 0.5,
        curve: CurveKeys | None = None,
    ) -> None:
        if register.role != "worker":
            raise ValueError(f"a WorkerClient registers as worker, not as {register.role}")
        self._rank = register.rank
        self._presence = Presence(endpoint, register, deadline_s=deadline_s, drain=drain, back=back, curve=curve)

    def register(self, timeout_s: float = 5.0) -> Registered | None:
        """Register the worker, connect its liveness socket and start its heartbeat; None where the server is away.

        Raises RegistrationRefused. Called once; whatever happens later, the client comes back by itself.
        """
        return self._presence.start(timeout_s)

    @property
    def registered(self) -> Registered | None:
        """What the server said at the last registration, None while it is away. A new object after each.

        Pages that a `Found` or `Granted` names mean nothing unless its `epoch` equals this one's.
        """
        session = self._presence.session
        return None if session is None else session.registered

    @property
    def away(self) -> bool:
        """Whether the server is away."""
        return self._presence.session is None

    def committed(
        self,
        request: str,
        chunks: Sequence[bytes],
        *,
        tokens: int = 0,
        nbytes: int = 0,
        seconds: float = 0.0,
        epoch: int = 0,
    ) -> None:
        """Say that this rank's shards of granted chunks are written: `nbytes` bytes in `seconds`.

        `epoch` is the `Granted`'s: what was granted by an earlier server is not reported to a later one; 0 for any.
        """
        if (member := self._member(epoch)) is not None:
            self._presence.post(Committed(member, request, self._rank, tuple(chunks), tokens, nbytes, seconds))

    def aborted(self, request: str, chunks: Sequence[bytes], *, epoch: int = 0) -> None:
        """Say that this rank writes no more to granted chunks, which are not whole."""
        if (member := self._member(epoch)) is not None:
            self._presence.post(Aborted(member, request, self._rank, tuple(chunks)))

    def loaded(
        self,
        request: str,
        chunks: Sequence[bytes],
        *,
        tokens: int = 0,
        nbytes: int = 0,
        seconds: float = 0.0,
        epoch: int = 0,
    ) -> None:
        """Say that this rank has loaded chunks of a `Found` run: `tokens` tokens beyond the engine's own cache."""
        if (member := self._member(epoch)) is not None:
            self._presence.post(Loaded(member, request, self._rank, tuple(chunks), tokens, nbytes, seconds))

    def load_failed(self, request: str, chunks: Sequence[bytes], *, epoch: int = 0) -> None:
        """Say that this rank could not load chunks of a `Found` run."""
        if (member := self._member(epoch)) is not None:
            self._presence.post(LoadFailed(member, request, self._rank, tuple(chunks)))

    def register_again(self, after_s: float = 0.0) -> None:
        """Register anew, in the background, so that the server takes back what was granted and is not being written.

        For an instance whose scheduler has come back, or, after some seconds, a worker that cannot use the arena. Until
        it is done, the server is away.
        """
        if (session := self._presence.session) is not None:
            self._presence.register_again(session, after_s)

    def flush(self, timeout_s: float = 5.0) -> bool:
        """Wait until everything said so far has been answered; return whether it has. For shutdown and tests."""
        return self._presence.flush(timeout_s)

    def leave(self) -> None:
        """Leave the server, after what was said, and stop the background thread. No copy may be under way."""
        self._presence.close()

    def _member(self, epoch: int) -> int | None:
        session = self._presence.session
        if session is None or epoch not in (0, session.registered.epoch):
            return None
        return session.registered.member
