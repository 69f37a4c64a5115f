"""The two-request hit test through a real vLLM: the same prompt twice, a fresh one beside it, time to first token."""

import json
import re
import time
import urllib.error
import urllib.request
from typing import Any, Literal, TypeAlias

import numpy as np

from kvcore.live import wire
from kvcore.live.tools import report

Row: TypeAlias = tuple[str, Literal["ok", "warn", "fail", "skip"], str, str]
_TIMEOUT_S = 600


def hit_test(endpoint: str, vllm_url: str, model: str, prompt_tokens: int) -> list[Row]:
    """Return the checks' rows: name, result, seen, advice.

    Raises OSError where vLLM is not reachable, ValueError or KeyError for an answer that is none of its API's.
    """
    base = base_of(vllm_url)
    model, prompt_tokens = asked(base, model, prompt_tokens)
    random = np.random.default_rng()
    warm, prompt, fresh = (random.integers(100, 1000, prompt_tokens).tolist() for _ in range(3))
    _first_token(base, model, warm)  # the first request of a length may compile
    before = _matched(endpoint)
    cold_s, cold_prefill_s = timed(base, model, prompt)
    time.sleep(1.0)  # stores end after the request
    reset = _reset(base)
    hits = _external_hits(base)
    hit_s, hit_prefill_s = timed(base, model, prompt)
    matched = _matched(endpoint) - before
    loaded = _external_hits(base) - hits
    fresh_s, fresh_prefill_s = timed(base, model, fresh)
    rest = "" if reset else " (its own prefix cache held the rest)"
    found: Row = (
        "hit test through vLLM",
        "ok" if matched else "fail",
        f"second request matched {matched:.0f} of {prompt_tokens} tokens, vLLM loaded {loaded:.0f}{rest}",
        "" if matched else "is KVCoreMPConnector configured, with this server? is the prompt longer than a chunk?",
    )
    slower = hit_s > fresh_s
    prefills = f"{cold_prefill_s:.3f}, {hit_prefill_s:.3f}, {fresh_prefill_s:.3f}"
    timing: Row = (
        "TTFT",
        "warn" if slower else "ok",
        f"cold {cold_s:.3f}, with a hit {hit_s:.3f}, another fresh prompt {fresh_s:.3f} s; of it prefill {prefills} s",
        "the hit was slower: see whether it is worth its copy, below" if slower else "",
    )
    return [found, timing]


def base_of(vllm_url: str) -> str:
    """Return a vLLM's URL as paths are put behind it. Raises ValueError where it is no http URL."""
    base = vllm_url.rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise ValueError(f"not an http URL: {vllm_url}")
    return base


def asked(base: str, model: str, prompt_tokens: int) -> tuple[str, int]:
    """Return the model to ask a vLLM for, by default its first, and the prompt's length, at most what the model takes.

    Raises ValueError where it does not serve that model.
    """
    served = {str(one["id"]): one.get("max_model_len") for one in _json(f"{base}/v1/models")["data"]}
    model = model or next(iter(served), "")
    if model not in served:
        raise ValueError(f"{base} serves {', '.join(served) or 'no model'}, not {model or 'any'}")
    longest = served[model]
    return model, prompt_tokens if longest is None else min(prompt_tokens, longest - 1)


def _json(url: str) -> Any:
    with _open(url) as answer:
        return json.load(answer)


def _open(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - http(s) only
    try:
        return urllib.request.urlopen(request, timeout=_TIMEOUT_S)  # noqa: S310
    except urllib.error.HTTPError as error:
        raise OSError(f"{url} answers {error.code}: {_reason(error)}") from error


def _reason(error: urllib.error.HTTPError) -> str:
    """Return what an answer says went wrong: `error.message` of OpenAI's API, else its text."""
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text.strip()[:300] or error.reason


def _first_token(base: str, model: str, prompt: list[int]) -> float:
    """Return the seconds until the first streamed token."""
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "stream": True}
    start = time.perf_counter()
    first = 0.0
    with _open(f"{base}/v1/completions", body) as answer:
        for line in answer:
            if not first and line.startswith(b"data: {"):
                first = time.perf_counter() - start
    if not first:
        raise ValueError("no token came")
    return first


def timed(base: str, model: str, prompt: list[int]) -> tuple[float, float]:
    """Return time to first token, and vLLM's own prefill time of it, in s."""
    before = _vllm_metric(base, "vllm:request_prefill_time_seconds_sum")
    first_s = _first_token(base, model, prompt)
    return first_s, _vllm_metric(base, "vllm:request_prefill_time_seconds_sum") - before


def _reset(base: str) -> bool:
    """Empty vLLM's own prefix cache, where it lets us (VLLM_SERVER_DEV_MODE=1)."""
    try:
        with _open(f"{base}/reset_prefix_cache", {}):
            return True
    except OSError:
        return False


def _external_hits(base: str) -> float:
    return _vllm_metric(base, "vllm:external_prefix_cache_hits_total")


def _vllm_metric(base: str, name: str) -> float:
    with _open(f"{base}/metrics") as answer:
        text = answer.read().decode()
    return sum(float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE))


def _matched(endpoint: str) -> float:
    values = report(endpoint, wire.GetMetrics(), 5.0)["values"]
    return float(sum(value for name, *_, value in values if name == "kvcore_matched_tokens"))
