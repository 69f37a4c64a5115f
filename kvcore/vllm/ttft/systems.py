"""The systems that are compared: how vLLM is told to use each, what runs beside it, and what it counts itself."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

from kvcore.live.connection import RemoteError, ServerAwayError
from kvcore.live.tools import report, status
from kvcore.live.wire import GetMetrics
from kvcore.vllm.embedded import embedded_settings
from kvcore.vllm.ttft.engine import EngineError, last_words

_START_S = 120.0
_OFFLOADING_BLOCK = 64
"""Tokens of an offloaded block in the example of vLLM's own guide to KV offloading."""
_LMCACHE_CHUNK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What every system gets.

    Attributes:
        l1_gb: Host memory for KV, in 2^30 bytes.
        chunk_tokens: Chunk of the kvcore server.
        l2: Store behind kvcore's L1, such as `files:/path`; empty for none.
        l2_gb: Its size.
        evictable_l1_gb: L1 of the system `kvcore-l2`: so small that a longest prompt drives out another.
    """

    l1_gb: float
    chunk_tokens: int = 256
    l2: str = ""
    l2_gb: float = 0.0
    evictable_l1_gb: float = 0.0


Loaded: TypeAlias = Mapping[str, float]
"""Tokens that a system says it has loaded so far, by tier (`l1`, `l2`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A system at work.

    Attributes:
        arguments: vLLM's engine arguments for it.
        environment: Variables of the engine's process.
        chunk_tokens: Hits are multiples of it; 0 where there is no cache beyond the engine's own.
        loaded: Reads the system's own counters; takes vLLM's and the KV bytes of a token.
        ready: Waits until everything that is prepared in the background is.
        resident: Returns the chunks held at each tier by its name; None: cannot be told.
    """

    arguments: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)
    chunk_tokens: int = 0
    loaded: Callable[[Mapping[str, float], int], Loaded] = lambda _counters, _bytes: {}
    ready: Callable[[], None] = lambda: None
    resident: Callable[[], Mapping[str, int]] | None = None


Starter: TypeAlias = Callable[[Sizes, Path], "Any"]


def connector(name: str, **extra: Any) -> dict[str, Any]:
    """Return vLLM's `kv_transfer_config` for one of kvcore's connectors."""
    return {
        "kv_connector": name,
        "kv_connector_module_path": "kvcore.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }


@contextmanager
def _none(_sizes: Sizes, _folder: Path) -> Iterator[Running]:
    yield Running(arguments={})


@contextmanager
def _kvcore(sizes: Sizes, _folder: Path) -> Iterator[Running]:
    """Run the server inside the engine's process, which starts and ends it."""
    given = {"l1_size_gb": sizes.l1_gb, "chunk_size": sizes.chunk_tokens}
    engine_id = f"kvcore-bench-{os.getpid()}-{time.monotonic_ns()}"
    config = {**connector("KVCoreConnector", **given), "engine_id": engine_id}
    yield _with_kvcore(embedded_settings(engine_id, given).endpoints[0], config, sizes.chunk_tokens)


@contextmanager
def _kvcore_mp(sizes: Sizes, folder: Path) -> Iterator[Running]:
    with kvcore_server(folder, **{"l1-size-gb": sizes.l1_gb, "chunk-size": sizes.chunk_tokens}) as endpoint:
        yield _with_kvcore(endpoint, connector("KVCoreMPConnector", endpoint=endpoint), sizes.chunk_tokens)


@contextmanager
def _kvcore_l2(sizes: Sizes, folder: Path) -> Iterator[Running]:
    flags: dict[str, Any] = {"l1-size-gb": sizes.evictable_l1_gb, "chunk-size": sizes.chunk_tokens, "l2": sizes.l2}
    flags |= {"l2-size-gb": sizes.l2_gb, "l2-queue-gb": max(1.0, sizes.evictable_l1_gb)}
    with kvcore_server(folder, **flags) as endpoint:
        yield _with_kvcore(endpoint, connector("KVCoreMPConnector", endpoint=endpoint), sizes.chunk_tokens)


def _with_kvcore(endpoint: str, config: dict[str, Any], chunk_tokens: int) -> Running:
    return Running(
        arguments={"kv_transfer_config": config},
        chunk_tokens=chunk_tokens,
        loaded=lambda _counters, _bytes: kvcore_loaded(endpoint),
        ready=lambda: wait_until_touched(endpoint),
        resident=lambda: {tier["name"]: tier["chunks"] for tier in status(endpoint, 5.0)["tiers"]},
    )


@contextmanager
def _offloading(sizes: Sizes, _folder: Path) -> Iterator[Running]:
    """Run vLLM's own offloading as its guide starts it: one CPU tier, blocks of 64 tokens."""
    yield _offloaded(sizes, _OFFLOADING_BLOCK)


@contextmanager
def _offloading_plain(sizes: Sizes, _folder: Path) -> Iterator[Running]:
    """Run it as `--kv-offloading-size` alone does: blocks of the engine's own size."""
    yield _offloaded(sizes, None)


def _offloaded(sizes: Sizes, block_tokens: int | None) -> Running:
    extra: dict[str, Any] = {"cpu_bytes_to_use": int(sizes.l1_gb * (1 << 30))}
    if block_tokens is not None:
        extra["block_size"] = block_tokens
    config = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}

    def loaded(counters: Mapping[str, float], kv_bytes: int) -> Loaded:
        return {"l1": counters.get("vllm:kv_offload_load_bytes", 0.0) / kv_bytes}

    return Running(arguments={"kv_transfer_config": config}, chunk_tokens=block_tokens or 16, loaded=loaded)


@contextmanager
def _lmcache(sizes: Sizes, folder: Path) -> Iterator[Running]:
    """Run LMCache's server beside the engine, as its guide does: LRU, chunks of 256."""
    if find_spec("lmcache") is None:
        raise EngineError("LMCache is not installed")
    with lmcache_server(folder, sizes.l1_gb) as (port, http_port):
        extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
        config = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}

        def loaded(_counters: Mapping[str, float], _bytes: int) -> Loaded:
            chunks = prometheus_sum(f"http://127.0.0.1:{http_port}/metrics", "lmcache_mp_num_chunks_loaded")
            # Counted where the server copies, which is on a GPU; elsewhere what vLLM counts has to do.
            return {} if chunks is None else {"l1": chunks * _LMCACHE_CHUNK}

        yield Running(arguments={"kv_transfer_config": config}, chunk_tokens=_LMCACHE_CHUNK, loaded=loaded)


SYSTEMS: Mapping[str, tuple[str, Starter]] = {
    "none": ("vLLM without a connector", _none),
    "kvcore": ("KVCoreConnector, the server in the engine's process", _kvcore),
    "kvcore-mp": ("KVCoreMPConnector and `kvcore serve`", _kvcore_mp),
    "kvcore-l2": ("the same with an L1 that keeps little, for hits in L2 (needs --l2)", _kvcore_l2),
    "offloading": (f"vLLM's OffloadingConnector, blocks of {_OFFLOADING_BLOCK} tokens as in its guide", _offloading),
    "offloading-plain": ("the same with --kv-offloading-size alone", _offloading_plain),
    "lmcache": ("LMCacheMPConnector and `lmcache server`", _lmcache),
}


@contextmanager
def started(name: str, sizes: Sizes, folder: Path) -> Iterator[Running]:
    """Run what a system needs beside the engine, for as long as the context lasts.

    Raises EngineError where it does not start.
    """
    with SYSTEMS[name][1](sizes, folder) as running:
        yield running


@contextmanager
def kvcore_server(folder: Path, **flags: Any) -> Iterator[str]:
    """Run a `kvcore serve` and yield its endpoint."""
    endpoint = f"ipc://{folder}/kvcore.ipc"
    given = {"bind": endpoint, "http": "off", "name": f"bench-{os.getpid()}-{time.monotonic_ns()}", **flags}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "kvcore", "serve", *words]
    with process(command, folder / "kvcore-serve.log", lambda: _answers(endpoint)):
        yield endpoint


@contextmanager
def lmcache_server(folder: Path, l1_gb: float) -> Iterator[tuple[int, int]]:
    """Run an `lmcache server` and yield its ports: of its messages, and of HTTP."""
    port, http_port, metrics_port = free_port(), free_port(), free_port()
    given: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": port,
        "http-host": "127.0.0.1",
        "http-port": http_port,
        "prometheus-port": metrics_port,
        "l1-size-gb": l1_gb,
        "chunk-size": _LMCACHE_CHUNK,
        "eviction-policy": "LRU",
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-c", "from lmcache.cli.main import main; main()", "server", *words]
    metrics = f"http://127.0.0.1:{http_port}/metrics"
    with process(command, folder / "lmcache-server.log", lambda: _fetch(metrics) is not None):
        yield port, http_port


@contextmanager
def process(command: list[str], log: Path, up: Callable[[], bool]) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a process until the context ends; it has begun when `up` says so. Raises EngineError where it does not."""
    with log.open("a") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)  # noqa: S603 - our own
    try:
        until = time.monotonic() + _START_S
        while not up():
            if server.poll() is not None:
                raise EngineError(f"{log.stem} ended with {server.returncode}: {last_words(log)}")
            if time.monotonic() > until:
                raise EngineError(f"{log.stem} did not answer within {_START_S:g} s: {last_words(log)}")
            time.sleep(0.2)
        yield server
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def kvcore_counts(endpoint: str) -> dict[tuple[str, ...], float]:
    """Return a server's counters by name and labels."""
    values = report(endpoint, GetMetrics(), 5.0)["values"]
    return {tuple(key): float(value) for *key, value in values}


def kvcore_loaded(endpoint: str) -> Loaded:
    """Return the tokens that a kvcore server's engines have loaded, by tier."""
    loaded: dict[str, float] = {}
    for key, value in kvcore_counts(endpoint).items():
        if key[0] == "kvcore_loaded_tokens":
            loaded[key[1]] = loaded.get(key[1], 0.0) + value
    return loaded


def wait_until_touched(endpoint: str) -> None:
    """Wait until a server has faulted its arena in; it serves before, but slower."""
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        arena = status(endpoint, 5.0)["arena"]
        if arena["touched_bytes"] is None or arena["touched_bytes"] >= arena["pages"] * arena["page_bytes"]:
            return
        time.sleep(0.2)
    raise EngineError(f"the arena was not faulted in within {_START_S:g} s")


def prometheus_sum(url: str, prefix: str) -> float | None:
    """Return the sum over labels of the counter whose name begins so, None where nothing was counted yet.

    Raises EngineError where nobody answers.
    """
    text = _fetch(url)
    if text is None:
        raise EngineError(f"{url} does not answer")
    lines = [line for line in text.splitlines() if line.startswith(prefix) and "_created" not in line]
    return None if not lines else sum(float(line.rpartition(" ")[2]) for line in lines)


def free_port() -> int:
    """Return a port of the loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def kv_bytes_per_token(model: str, dtype: str) -> int | None:
    """Return the KV bytes of a token by a model folder's config.json, for elements of `dtype` (`auto`: the model's)."""
    file = Path(model) / "config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text())
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    own = config.get("dtype") or config.get("torch_dtype")
    element = 4 if (own if dtype == "auto" else dtype) == "float32" else 2
    return int(2 * config["num_hidden_layers"] * heads * head * element)


def model_limit(model: str) -> int | None:
    """Return the longest prompt and output that a model folder's config.json allows; None where there is none."""
    file = Path(model) / "config.json"
    return json.loads(file.read_text()).get("max_position_embeddings") if file.is_file() else None


def _answers(endpoint: str) -> bool:
    try:
        status(endpoint, 0.5)
    except (ServerAwayError, RemoteError):
        return False
    return True


def _fetch(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:  # noqa: S310 - http on the loopback
            return str(reply.read().decode())
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None
