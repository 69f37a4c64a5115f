"""HTTP beside the wire: health, metrics, status, and what an operator does. It asks the request loop for everything.

It runs in a thread of its own and speaks the wire protocol over `inproc://`, so that `/healthz` tells of the loop, not
of the web thread.
"""

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, TypeAlias

import msgspec
import uvicorn
import zmq
import zmq.asyncio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from kvcore.live import wire
from kvcore.live.metrics import render
from kvcore.live.openapi import PAGE, document

_PATIENCE_S = 1.0
_LAST_REQUESTS_S = 2
"""How long a server that stops waits for requests under way; an upload may never end."""
_STATUS_OF = {"refused": 409, "bad_message": 400, "unknown_operation": 400, "unknown_instance": 409, "internal": 500}


class _LoopSilentError(Exception):
    """The request loop did not answer in time."""


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

    async def ask(self, message: wire.Message) -> wire.Reply:
        """Return the reply, an error reply included. Raises _LoopSilentError."""
        correlation = next(self._ids)
        future: asyncio.Future[wire.Reply] = asyncio.get_running_loop().create_future()
        self._waiting[correlation] = future
        try:
            await self._socket.send_multipart(wire.encode(message, correlation))
            return await asyncio.wait_for(future, _PATIENCE_S)
        except TimeoutError:
            raise _LoopSilentError(f"the request loop did not answer within {_PATIENCE_S:g} s") from None
        finally:
            self._waiting.pop(correlation, None)

    async def _read(self) -> None:
        while True:
            correlation, reply = wire.decode_reply(await self._socket.recv_multipart())
            future = self._waiting.get(correlation)
            if future is not None and not future.done():
                future.set_result(reply)


class HttpThread:
    """Serves HTTP from a thread of its own.

    Raises OSError from `start` where the address cannot be had.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, host: str, port: int) -> None:
        self._loop = _Loop(context, endpoint)
        config = uvicorn.Config(
            self._app(),
            host=host,
            port=port,
            log_level="warning",
            lifespan="off",
            access_log=False,
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
            raise OSError(f"cannot serve HTTP on {address}: {error.strerror}") from error
        self.port = int(self._socket.getsockname()[1])
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

    def _app(self) -> Starlette:
        return Starlette(routes=_routes(self._loop))


_Handler: TypeAlias = Callable[[_Loop, Request], Awaitable[Response]]


def _routes(loop: _Loop) -> list[Route]:
    def route(path: str, handler: _Handler, method: str = "GET") -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                return await handler(loop, request)
            except _LoopSilentError as error:
                return JSONResponse({"error": str(error)}, 503)
            except (msgspec.MsgspecError, ValueError) as error:
                return JSONResponse({"error": str(error)}, 400)

        return Route(path, endpoint, methods=[method])

    return [
        route("/healthz", _health),
        route("/metrics", _metrics),
        route("/status", _plain(wire.Status())),
        route("/config", _plain(wire.GetConfig())),
        route("/chunks/{chunk}", _chunk),
        route("/chunks", _chunks, "POST"),
        route("/clear", _clear, "POST"),
        route("/pin", _pin(wire.Pin), "POST"),
        route("/unpin", _pin(wire.Unpin), "POST"),
        route("/quotas/{salt}", _set_quota, "PUT"),
        route("/quotas/{salt}", _lift_quota, "DELETE"),
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
    digests = await _digests(request)
    reply = await loop.ask(wire.Where(digests))
    if not isinstance(reply, wire.Places):
        return _shown(reply)
    return JSONResponse({"tiers": [_tier(tier) for tier in reply.tiers]})


async def _clear(loop: _Loop, request: Request) -> Response:
    everything = not await request.body()
    return _shown(await loop.ask(wire.Clear(None if everything else await _digests(request))))


def _pin(operation: type[wire.Pin] | type[wire.Unpin]) -> _Handler:
    async def handler(loop: _Loop, request: Request) -> Response:
        return _shown(await loop.ask(operation(await _digests(request))))

    return handler


class _Quota(msgspec.Struct, forbid_unknown_fields=True):
    pages: int


async def _set_quota(loop: _Loop, request: Request) -> Response:
    quota = msgspec.json.decode(await request.body(), type=_Quota)
    if quota.pages < 0:
        raise ValueError(f"a quota of {quota.pages} pages")
    return _shown(await loop.ask(wire.SetQuota(request.path_params["salt"], quota.pages)))


async def _lift_quota(loop: _Loop, request: Request) -> Response:
    return _shown(await loop.ask(wire.SetQuota(request.path_params["salt"], None)))


async def _openapi(_loop: _Loop, _: Request) -> Response:
    return JSONResponse(document())


async def _docs(_loop: _Loop, _: Request) -> Response:
    return HTMLResponse(PAGE)


class _ChunkList(msgspec.Struct, forbid_unknown_fields=True):
    chunks: list[str]


async def _digests(request: Request) -> tuple[bytes, ...]:
    body = msgspec.json.decode(await request.body(), type=_ChunkList)
    return tuple(map(_digest, body.chunks))


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
