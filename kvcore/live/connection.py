"""One DEALER socket to a server, and the synchronous client that tools use."""

import itertools
import time
import weakref
from dataclasses import dataclass

import zmq

from kvcore.live.wire import MAX_MESSAGE_BYTES, Error, ErrorKind, Message, Pong, Reply, WireError, decode_reply, encode

_QUEUE_MESSAGES = 10_000


class ServerAwayError(ConnectionError):
    """No reply within the time allowed, or no room to queue another message: the server is away."""


class RemoteError(RuntimeError):
    """The server's error reply; `kind` as in `wire.Error`."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveKeys:
    """CURVE keys (Z85 text) of a client: the server's public key and the client's own pair."""

    server: str
    public: str
    secret: str


class Connection:
    """A socket that sends messages and hands out replies with their correlation ids.

    Not to be shared by threads. Nothing blocks but `receive`, and that no longer than told.
    """

    def __init__(
        self, endpoint: str, curve: CurveKeys | None = None, context: "zmq.Context[zmq.Socket[bytes]] | None" = None
    ) -> None:
        self.endpoint = endpoint
        used = zmq.Context() if context is None else context
        self._socket = used.socket(zmq.DEALER)
        self._end = weakref.finalize(self, _end, self._socket, used if context is None else None)
        self._end.atexit = False
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, _QUEUE_MESSAGES)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        if curve is not None:
            self._socket.curve_serverkey = curve.server.encode()
            self._socket.curve_publickey = curve.public.encode()
            self._socket.curve_secretkey = curve.secret.encode()
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"no endpoint to connect to: {endpoint!r} ({error})") from None
        self._ids = itertools.count(1)

    def send(self, message: Message) -> int:
        """Queue a message and return its correlation id. Raises ServerAwayError where the queue is full."""
        correlation = next(self._ids)
        try:
            self._socket.send_multipart(encode(message, correlation), zmq.NOBLOCK, copy=True)
        except zmq.Again:
            raise ServerAwayError(f"{_QUEUE_MESSAGES} messages wait for {self.endpoint}") from None
        return correlation

    def receive(self, timeout_s: float = 0.0) -> list[tuple[int, Reply]]:
        """Return the replies that are here; where there is none, wait for the first, `timeout_s` at most.

        A reply that cannot be read is returned as an `Error`.
        """
        replies: list[tuple[int, Reply]] = []
        if not self._socket.poll(round(timeout_s * 1000) if timeout_s > 0 else 0):
            return replies
        more = True
        while more:
            try:
                replies.append(decode_reply(self._socket.recv_multipart(zmq.NOBLOCK)))
            except WireError as error:
                replies.append((error.id, Error(error.kind, f"a reply that cannot be read: {error}")))
            more = bool(int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN)
        return replies

    def close(self) -> None:
        """Drop what is queued and close the socket; so does the collection of one that nobody has closed.

        Left to pyzmq, a context that is collected together with its socket, as what an exception's traceback holds can
        be, waits for ever for that socket to be closed.
        """
        self._end()


def _end(socket: "zmq.Socket[bytes]", context: "zmq.Context[zmq.Socket[bytes]] | None") -> None:
    socket.close(linger=0)
    if context is not None:
        context.term()


class Client:
    """Calls a server and waits for each reply; for tools and tests, not for an engine's scheduler."""

    def __init__(self, endpoint: str, curve: CurveKeys | None = None) -> None:
        self._connection = Connection(endpoint, curve)

    def call(self, request: Message, timeout_s: float = 2.0) -> Reply:
        """Send a request and return its reply.

        Raises ServerAwayError where none comes within `timeout_s`, RemoteError for an error reply.
        """
        correlation = self._connection.send(request)
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ServerAwayError(f"no reply from {self._connection.endpoint} within {timeout_s:g} s")
            for answered, reply in self._connection.receive(max(left, 0.001)):
                if answered != correlation:
                    continue
                if isinstance(reply, Error):
                    raise RemoteError(reply.kind, reply.message)
                return reply

    def ping(self, timeout_s: float = 2.0) -> Pong:
        """Return the server's Pong; raises as `call`."""
        from kvcore.live.wire import Ping  # noqa: PLC0415

        reply = self.call(Ping(), timeout_s)
        if not isinstance(reply, Pong):
            raise RemoteError("internal", f"a ping was answered with {type(reply).__name__}")
        return reply

    def close(self) -> None:
        """Close the socket."""
        self._connection.close()

    def __enter__(self) -> "Client":
        """Return the client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the socket."""
        self.close()
