"""HTTP beside the wire: health, metrics, status, and what an operator does. It asks the request loop for everything.

It runs in a thread of its own and speaks the wire protocol over `inproc://`, so that `/healthz` tells of the loop, not
of the web thread.
"""

import asyncio
import itertools
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias
from urllib.parse import urlsplit

import msgspec
import prometheus_client  # noqa: F401 - now, and not while the request loop waits for the first /metrics
import uvicorn
import zmq
import zmq.asyncio
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvcore.live import wire
from kvcore.live.metrics import render
from kvcore.live.openapi import MAX_BODY_BYTES, PAGE, document
from kvcore.live.settings import is_loopback

_LOG = logging.getLogger("kvcore.http")
_PATIENCE_S = 1.0
_CLEAR_PATIENCE_S = 30.0
"""A clear of all of a large L1 takes a second or more of the loop, and is carried out whatever the asker was told."""
_LAST_REQUESTS_S = 2
"""How long a server that stops waits for requests under way; an upload may never end."""
_MOST_CONNECTIONS = 128
"""Each takes a descriptor, and libzmq ends a process that has none left."""
_ACCEPTED_AT_ONCE = 32
"""Connections that asyncio takes before the first of them is counted."""
_QUIET_S = 10.0
"""A connection on which no request has begun for so long is closed, with half a header or half a body."""
_STATUS_OF = {"refused": 409, "bad_message": 400, "unknown_operation": 400, "unknown_instance": 409, "internal": 500}


class _LoopSilentError(Exception):
    """The request loop did not answer in time."""


class _TooLargeError(Exception):
    """A request's body is larger than any that is of use."""


class _Loop:
    """The request loop, as the web thread sees it: one DEALER, replies told apart by correlation id."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str) -> None:
        self._context: zmq.asyncio.Context = zmq.asyncio.Context.shadow(context)
        self._endpoint = endpoint
        self._waiting: dict[int, asyncio.Future[wire.Reply]] = {}
        self._ids = itertools.count(1)

    async def start(self) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(self._endpoint)
        self._reader = asyncio.create_task(self._read())

    async def stop(self) -> None:
        self._reader.cancel()
        with suppress(asyncio.CancelledError):
            await self._reader
        self._socket.close(0)

    async def ask(self, message: wire.Message, patience_s: float = _PATIENCE_S) -> wire.Reply:
        """Return the reply, an error reply included. Raises _LoopSilentError."""
        correlation = next(self._ids)
        future: asyncio.Future[wire.Reply] = asyncio.get_running_loop().create_future()
        self._waiting[correlation] = future
        try:
            await self._socket.send_multipart(wire.encode(message, correlation))
            return await asyncio.wait_for(future, patience_s)
        except TimeoutError:
            raise _LoopSilentError(f"the request loop did not answer within {patience_s:g} s") from None
        finally:
            self._waiting.pop(correlation, None)

    async def _read(self) -> None:
        while True:
            correlation, reply = wire.decode_reply(await self._socket.recv_multipart())
            future = self._waiting.get(correlation)
            if future is not None and not future.done():
                future.set_result(reply)


class _Connection(H11Protocol):
    """Closes itself when there are too many, and when nothing comes of it; uvicorn waits for a header for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _MOST_CONNECTIONS:
            transport.abort()
            return
        self.loop.call_later(_QUIET_S, self._look, self.cycle)

    def _look(self, before: object) -> None:
        """Close where the request is still that one, or none, unless it has come whole and is being answered."""
        if self.transport.is_closing():
            return
        cycle: Any = self.cycle  # None before the first request
        answering = cycle is not None and not cycle.more_body and not cycle.response_complete
        if cycle is before and not answering:
            self.transport.abort()
            return
        self.loop.call_later(_QUIET_S, self._look, cycle)


class HttpThread:
    """Serves HTTP from a thread of its own.

    Raises OSError from `start` where the address cannot be had.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, host: str, port: int) -> None:
        self._loop = _Loop(context, endpoint)
        config = uvicorn.Config(
            self._app(host),
            host=host,
            port=port,
            log_level="warning",
            lifespan="off",
            access_log=False,
            http=_Connection,
            backlog=_ACCEPTED_AT_ONCE,
            timeout_graceful_shutdown=_LAST_REQUESTS_S,
        )
        self._server = uvicorn.Server(config)
        self._config = config
        self._thread = threading.Thread(target=self._run, name="kvcore-http", daemon=True)

    def start(self) -> None:
        """Bind, and serve in the thread."""
        family = socket.AF_INET6 if ":" in self._config.host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((self._config.host, self._config.port))
            self._socket.listen(128)  # now, so that who comes before the web thread turns is served all the same
        except OSError as error:
            self._socket.close()
            address = f"{self._config.host}:{self._config.port}"
            raise OSError(f"--http {address}: {error.strerror}") from error
        self.port = int(self._socket.getsockname()[1])
        if not is_loopback(self._config.host):
            _LOG.warning(
                "HTTP on %s:%d is open to everybody who reaches it, clear, pin and quota too: keep it behind a "
                "firewall, or a proxy that asks who it is, or listen on 127.0.0.1",
                self._config.host,
                self.port,
            )
        self._thread.start()

    def stop(self) -> None:
        """Stop and wait."""
        self._server.should_exit = True
        self._thread.join(_LAST_REQUESTS_S + 3)
        self._server.force_exit = True
        self._thread.join(5)
        self._socket.close()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        await self._loop.start()
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            await self._loop.stop()

    def _app(self, host: str) -> Starlette:
        return Starlette(
            routes=_routes(self._loop),
            middleware=[Middleware(_Guard, local=is_loopback(host))],
            exception_handlers={HTTPException: _no_route},
        )


class _Guard:
    """Refuses what a web page of elsewhere has a browser ask.

    Browsers send such requests to loopback, too, with the page's origin, or, where the page's own name was made to lead
    there, with that name as the host.
    """

    def __init__(self, app: ASGIApp, *, local: bool) -> None:
        self._app = app
        self._local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope["method"], Headers(scope=scope)) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, method: str, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if self._local and not is_loopback(_name_of(host)):
            return _refused(400, f"this server listens on loopback, not as {host[:64]!r}: ask for localhost")
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2].lower() != host.lower()
        if foreign and method not in ("GET", "HEAD"):
            return _refused(403, f"a page of {origin!r:.64} may not change anything here")
        return None


def _name_of(host: str) -> str:
    """Return the host of a header `Host`, without port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _refused(status: int, why: str) -> Response:
    return JSONResponse({"error": why}, status)


async def _no_route(request: Request, error: Exception) -> Response:
    """Answer where there is no such path or method; the path is not repeated, for it may be anything."""
    if not isinstance(error, HTTPException):
        raise error
    headers = error.headers
    return JSONResponse({"error": f"{error.detail}: see /docs"}, error.status_code, headers)


_Handler: TypeAlias = Callable[[_Loop, Request], Awaitable[Response]]


def _routes(loop: _Loop) -> list[Route]:
    def route(path: str, handler: _Handler, method: str = "GET") -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                return await handler(loop, request)
            except _LoopSilentError as error:
                return _refused(503, str(error))
            except _TooLargeError as error:
                return JSONResponse({"error": str(error)}, 413, {"connection": "close"})  # what else comes goes unread
            except (msgspec.MsgspecError, ValueError) as error:
                return _refused(400, str(error))
            except ClientDisconnect:
                return _refused(400, "the body ends before its end")  # nobody reads this

        return Route(path, endpoint, methods=[method])

    return [
        route("/healthz", _health),
        route("/metrics", _metrics),
        route("/status", _plain(wire.Status())),
        route("/config", _plain(wire.GetConfig())),
        route("/chunks/{chunk}", _chunk),
        route("/chunks", _chunks, "POST"),
        route("/clear", _clear, "POST"),
        route("/pin", _pin, "POST"),
        route("/unpin", _unpin, "POST"),
        route("/quotas/{salt:path}", _set_quota, "PUT"),
        route("/quotas/{salt:path}", _lift_quota, "DELETE"),
        route("/openapi.json", _openapi),
        route("/docs", _docs),
    ]


async def _health(loop: _Loop, _: Request) -> Response:
    start = time.perf_counter()
    reply = await loop.ask(wire.Ping())
    if not isinstance(reply, wire.Pong):
        return _shown(reply)
    loop_ms = round((time.perf_counter() - start) * 1000, 3)
    return JSONResponse({"status": "ok", "epoch": reply.epoch, "pid": reply.pid, "loop_ms": loop_ms})


async def _metrics(loop: _Loop, _: Request) -> Response:
    reply = await loop.ask(wire.GetMetrics())
    if not isinstance(reply, wire.Report):
        return _shown(reply)
    return Response(render(reply.data), media_type="text/plain; version=0.0.4; charset=utf-8")


def _plain(message: wire.Message) -> _Handler:
    async def handler(loop: _Loop, _: Request) -> Response:
        return _shown(await loop.ask(message))

    return handler


async def _chunk(loop: _Loop, request: Request) -> Response:
    digest = _digest(request.path_params["chunk"])
    reply = await loop.ask(wire.Where((digest,)))
    if not isinstance(reply, wire.Places):
        return _shown(reply)
    tier = reply.tiers[0]
    return JSONResponse({"chunk": digest.hex(), "tier": _tier(tier)}, 200 if tier >= 0 else 404)


async def _chunks(loop: _Loop, request: Request) -> Response:
    digests = _digests(await _body(request))
    reply = await loop.ask(wire.Where(digests))
    if not isinstance(reply, wire.Places):
        return _shown(reply)
    return JSONResponse({"tiers": [_tier(tier) for tier in reply.tiers]})


async def _clear(loop: _Loop, request: Request) -> Response:
    body = await _body(request)
    return _shown(await loop.ask(wire.Clear(_digests(body) if body else None), _CLEAR_PATIENCE_S))


async def _pin(loop: _Loop, request: Request) -> Response:
    digests = _digests(await _body(request))
    reply = await loop.ask(wire.Pin(digests))
    if not isinstance(reply, wire.Done):
        return _shown(reply)
    if digests and reply.missing == len(digests):
        return _refused(404, "none of these chunks is in L1")
    return JSONResponse({"status": "done", "pinned": len(digests) - reply.missing, "missing": reply.missing})


async def _unpin(loop: _Loop, request: Request) -> Response:
    return _shown(await loop.ask(wire.Unpin(_digests(await _body(request)))))


class _Quota(msgspec.Struct, forbid_unknown_fields=True):
    pages: wire.Count


async def _set_quota(loop: _Loop, request: Request) -> Response:
    quota = msgspec.json.decode(await _body(request), type=_Quota)
    return _shown(await loop.ask(wire.SetQuota(request.path_params["salt"], quota.pages)))


async def _lift_quota(loop: _Loop, request: Request) -> Response:
    return _shown(await loop.ask(wire.SetQuota(request.path_params["salt"], None)))


async def _openapi(_loop: _Loop, _: Request) -> Response:
    return JSONResponse(document())


async def _docs(_loop: _Loop, _: Request) -> Response:
    return HTMLResponse(PAGE)


class _ChunkList(msgspec.Struct, forbid_unknown_fields=True):
    chunks: list[str]


async def _body(request: Request) -> bytes:
    """Return a request's body. Raises _TooLargeError, without reading on."""
    told = request.headers.get("content-length", "")
    size = int(told) if told.isdigit() else 0
    body = bytearray()
    if size <= MAX_BODY_BYTES:
        async for part in request.stream():
            body += part
            if (size := len(body)) > MAX_BODY_BYTES:
                break
    if size > MAX_BODY_BYTES:
        raise _TooLargeError(f"a body has at most {MAX_BODY_BYTES} bytes: name fewer chunks at a time")
    return bytes(body)


def _digests(body: bytes) -> tuple[bytes, ...]:
    return tuple(map(_digest, msgspec.json.decode(body, type=_ChunkList).chunks))


def _digest(text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        raise ValueError(f"{text[:64]!r} is no chunk: the hexadecimal digest of its last block") from None
    if not 1 <= len(digest) <= 64:
        raise ValueError(f"a chunk's digest has 1 to 64 bytes, not {len(digest)}")
    return digest


def _tier(tier: int) -> str | None:
    return f"l{tier + 1}" if tier >= 0 else None


def _shown(reply: wire.Message) -> Response:
    """Return any reply as JSON."""
    match reply:
        case wire.Error():
            return JSONResponse({"error": reply.message, "kind": reply.kind}, _STATUS_OF[reply.kind])
        case wire.Report():
            return Response(msgspec.json.encode(reply.data), media_type="application/json")
        case wire.Done():
            return JSONResponse({"status": "done"})
    payload: dict[str, Any] = {"error": f"an unexpected reply: {type(reply).__name__}"}
    return JSONResponse(payload, 500)
