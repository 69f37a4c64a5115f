"""What the GPU benchmarks share: models made of a config alone, `vllm serve` as a process, requests that are timed.

Prompts are token ids and weights are random (`--load-format dummy`), so no tokenizer and no download is needed. Times
of a dense model do not depend on its weights.
"""

import asyncio
import contextlib
import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from kvcore.live.tools import status
from kvcore.vllm.ttft.engine import EngineError, last_words
from kvcore.vllm.ttft.systems import free_port

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_REGISTER_S = 40.0
MODELS = {
    "qwen3-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "intermediate_size": 12288,
        "tie_word_embeddings": False,
    },
    "qwen3-1.7b": {
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 6144,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "intermediate_size": 3072,
        "tie_word_embeddings": True,
    },
}
started = time.perf_counter()


def say(*words):
    print(f"[{time.perf_counter() - started:6.1f} s]", *words, flush=True)


def model_folder(name, scratch):
    """The folder of a known model, made in `scratch`; any other name is taken for a folder."""
    if name not in MODELS:
        return Path(name)
    folder = Path(scratch) / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**QWEN3, **MODELS[name]}))
    return folder


def parameters(config):
    """The number of a Qwen3's weights."""
    hidden, layers, wide = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    head, heads, kv_heads = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    layer = hidden * head * (2 * heads + 2 * kv_heads) + 3 * hidden * wide + 2 * hidden + 2 * head
    embeddings = config["vocab_size"] * hidden * (1 if config["tie_word_embeddings"] else 2)
    return layers * layer + embeddings + hidden


def interrupt_on_term():
    """Let `timeout` end a benchmark as Ctrl-C does, so that nothing that it started is left."""

    def interrupted(_signal, _frame):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)


def facts():
    """What every result says of itself."""
    versions = {"python": platform.python_version()}
    for name in ("vllm", "torch", "triton", "lmcache", "numpy", "kvcore"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "device": device(),
        "host": {"processors": os.cpu_count(), "loop_s": loop_s()},
        "versions": versions,
    }


def loop_s():
    """Median time of adding up a million integers, in seconds: on a slow host, what Python launches takes longer."""

    def once():
        begun = time.perf_counter()
        sum(range(10**6))
        return time.perf_counter() - begun

    return statistics.median(once() for _ in range(7))


def device():
    """The GPU's name, without a context on it; the processor's where there is none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()
        return found[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return platform.processor() or platform.machine()


def write(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


class Serve:
    """A `vllm serve` in a session of its own; a context manager, which ends it with all it started."""

    def __init__(self, model, log, *flags, environment=(), kv_transfer_config=None, start_s=240.0):
        self.port, self.log = free_port(), Path(log)
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "model"]
        command += ["--skip-tokenizer-init", "--uvicorn-log-level", "warning", *map(str, flags)]
        if kv_transfer_config:
            command += ["--kv-transfer-config", json.dumps(kv_transfer_config)]
        env = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache
            **dict(environment),
        }
        with self.log.open("a") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
        begun = time.perf_counter()
        try:
            self._wait(start_s)
        except BaseException:
            self.close()
            raise
        self.start_s = time.perf_counter() - begun

    def _wait(self, start_s):
        until = time.monotonic() + start_s
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"{self.url}/health", timeout=2).close()
                return
            if self.process.poll() is not None:
                raise EngineError(f"vllm serve ended with {self.process.returncode}: {last_words(self.log)}")
            if time.monotonic() > until:
                raise EngineError(f"vllm serve was not up within {start_s:g} s: {last_words(self.log)}")
            time.sleep(0.3)

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        self.close()

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(25)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def reset(self):
        """Empty the engine's own prefix cache; the connector's stays."""
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/reset_prefix_cache", b""), timeout=30).close()

    def metrics(self):
        """vLLM's counters and gauges by name, summed over labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as reply:
            text = reply.read().decode()
        found = {}
        for name, value in re.findall(r"^([a-zA-Z_:]+)(?:\{.*\})? ([0-9.e+-]+)$", text, re.MULTILINE):
            found[name] = found.get(name, 0.0) + float(value)
        return found


@dataclass(frozen=True)
class Timed:
    """One request as its client saw it; seconds."""

    sent_s: float
    ttft_s: float
    end_s: float
    output_tokens: int


async def complete(session, url, prompt, tokens):
    """Stream one completion of token ids; raises EngineError for a reply that is none."""
    import aiohttp  # noqa: PLC0415 - vLLM brings it

    try:
        return await _complete(session, url, prompt, tokens)
    except (aiohttp.ClientError, TimeoutError) as error:
        raise EngineError(f"{type(error).__name__}: {error}") from None


async def _complete(session, url, prompt, tokens):
    body = {
        "model": "model",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    sent, first, count = time.perf_counter(), None, 0
    async with session.post(f"{url}/v1/completions", json=body) as reply:
        if reply.status != 200:
            raise EngineError(f"status {reply.status}: {(await reply.text())[:300]}")
        async for line in reply.content:
            if not line.startswith(b"data:") or line.startswith(b"data: [DONE]"):
                continue
            if b'"error"' in line:
                raise EngineError(line.decode(errors="replace")[:300])
            count += 1
            first = time.perf_counter() if first is None else first
    if first is None:
        raise EngineError("a completion without a token")
    return Timed(sent, first - sent, time.perf_counter(), tokens)


@contextlib.asynccontextmanager
async def client():
    """A session of as many connections as there are requests."""
    import aiohttp  # noqa: PLC0415 - vLLM brings it

    limits = aiohttp.ClientTimeout(total=None, sock_read=300)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=limits) as session:
        yield session


def warm_up(serve, lengths, vocabulary, tokens=8):
    """Answer a few prompts that nothing else shares, twice and after a reset: what is compiled on first use is done."""
    from kvcore.vllm.ttft.measure import prompt  # noqa: PLC0415

    async def answer():
        async with client() as session:
            for round_ in range(2):
                for n in lengths:
                    for _ in range(2):
                        await complete(session, serve.url, prompt(f"warm {round_} {n}", n, vocabulary), tokens)
                        await asyncio.sleep(0.5)
                    serve.reset()
                    await complete(session, serve.url, prompt(f"warm {round_} {n}", n, vocabulary), tokens)
            batch = [prompt(f"warm batch {n}", min(lengths), vocabulary) for n in range(16)]
            await asyncio.gather(*(complete(session, serve.url, one, tokens) for one in batch))

    asyncio.run(answer())
    serve.reset()


def wait_until_registered(endpoint):
    """Wait until an engine has registered, scheduler and worker."""
    until = time.monotonic() + _REGISTER_S
    while not any(instance["ready"] for instance in status(endpoint, 5.0)["instances"]):
        if time.monotonic() > until:
            raise EngineError(f"no engine registered within {_REGISTER_S:g} s")
        time.sleep(0.2)


def quantiles(values):
    import numpy as np  # noqa: PLC0415

    if not len(values):
        return None
    p50, p90, p95, p99 = np.percentile(values, [50, 90, 95, 99]).tolist()
    return {"count": len(values), "mean": float(np.mean(values)), "p50": p50, "p90": p90, "p95": p95, "p99": p99}
