"""An engine to measure: what is asked of it, and one behind an OpenAI-compatible URL."""

import http.client
import json
import re
import ssl
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, Protocol
from urllib.parse import urlsplit

from kvsim.errors import UsageError

_TTFT = "vllm:time_to_first_token_seconds"
_KVCORE = "vllm:kvcore"
_TELL_S = 1.0
"""What is counted of a request is there by then; another client's requests would spoil the count for good."""


class EndpointError(UsageError):
    """The endpoint cannot be reached or refuses; one line that names it."""


class Endpoint(Protocol):
    """An engine with prefix caching, idle but for the calibration."""

    @property
    def model(self) -> str:
        """Its model's name."""

    @property
    def where(self) -> str:
        """What to say of it in a profile's provenance."""

    def first_token_s(self, prompt: Sequence[int]) -> float:
        """Send one prompt of token ids and return the time to its first token, in seconds."""

    def decode_step_s(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """Have all prompts continued by `steps` tokens at once; return the time of a step with all of them in it."""


class HttpEndpoint:
    """`/v1/completions` of vLLM, SGLang or whatever else takes prompts as token ids and streams.

    A server that counts its times to the first token in `/metrics`, as vLLM does, is taken at its word: from the
    request's arrival there, which is what is recorded of it too, without the way between. Others are timed from here,
    and so is the rest where another client's requests are counted as well; `where` says so then.

    Args:
        url: Of the server, with or without /v1.
        model: Its name there; None: the first one that the server lists.
        api_key: Sent as a bearer token.
        timeout_s: Of a request.

    Raises:
        EndpointError: It cannot be reached.
        UsageError: The URL is none.
    """

    def __init__(
        self, url: str, *, model: str | None = None, api_key: str | None = None, timeout_s: float = 600.0
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or parts.hostname is None:
            raise UsageError(f"--url {url}: not an http:// or https:// address")
        self.where = url
        self._secure = parts.scheme == "https"
        self._host = parts.hostname
        self._port = parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s
        self._tells = True
        self._told_any = False
        self.model = self._first_model() if model is None else model

    def first_token_s(self, prompt: Sequence[int]) -> float:
        """Send one prompt of token ids and return the time to its first token, in seconds."""
        before = self._told()
        started = time.perf_counter()
        seconds = [at - started for at in self._stream(prompt, 1)]
        until = time.perf_counter() + _TELL_S
        while before is not None and (after := self._told()) is not None:
            if after[1] == before[1] + 1:
                self._told_any = True
                return after[0] - before[0]
            if time.perf_counter() > until:
                self._tells = False
                if self._told_any:  # the profile would hold both kinds of times and not say so
                    self.where += " (in part timed by the client: others used the server)"
            time.sleep(_TELL_S / 200)
        return seconds[0]

    def decode_step_s(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """Have all prompts continued by `steps` tokens at once; return the time of a step with all of them in it.

        Raises:
            EndpointError: Some had ended before all had begun: too few steps for this batch.
        """
        with ThreadPoolExecutor(len(prompts)) as pool:
            arrivals = list(pool.map(lambda prompt: list(self._stream(prompt, steps)), prompts))
        return step_s(arrivals)

    def max_model_len(self) -> int | None:
        """Ask for the longest prompt and output together; None where the server does not say, as vLLM does.

        Raises:
            EndpointError: It cannot be reached.
        """
        entry = next((entry for entry in self._models() if entry.get("id") == self.model), {})
        length = entry.get("max_model_len")
        return length if isinstance(length, int) and length > 0 else None

    def _told(self) -> tuple[float, float] | None:
        """Ask for all times to a first token so far: their sum in seconds and number; None where nothing is told."""
        if not self._tells:
            return None
        text = self._metrics()
        total, count = (_values(text, f"{_TTFT}_{what}") for what in ("sum", "count"))
        self._tells = bool(count)
        return (sum(total), sum(count)) if count else None

    def copied(self) -> dict[str, tuple[float, float]]:
        """Ask what a kvcore connector has copied: bytes and seconds, in (`h2d`) and out (`d2h`); nothing without one.

        Raises:
            EndpointError: It cannot be reached.
        """
        text, found = self._metrics(), {}
        for way, done, took in (("h2d", "loaded", "load"), ("d2h", "stored", "store")):
            nbytes = _values(text, f"{_KVCORE}_{done}_bytes_total")
            seconds = _values(text, f"{_KVCORE}_{took}_seconds_total")
            if nbytes and seconds:
                found[way] = sum(nbytes), sum(seconds)
        return found

    def _metrics(self) -> str:
        """Return what it counts, empty where it does not say."""
        with closing(self._connect()) as connection:
            try:
                connection.request("GET", f"{self._path}/metrics", headers=self._headers)
                answer = connection.getresponse()
                return answer.read().decode("utf-8", "replace") if answer.status == http.client.OK else ""
            except (OSError, http.client.HTTPException) as error:
                raise EndpointError(f"{self.where}: {type(error).__name__}: {error}") from None

    def _first_model(self) -> str:
        try:
            return str(self._models()[0]["id"])
        except LookupError:
            raise EndpointError(f"{self.where}: /v1/models lists no model; name one with --served-model") from None

    def _models(self) -> list[dict[str, Any]]:
        with closing(self._connect()) as connection:
            answer = self._answer(connection, "GET", "/v1/models", None)
            try:
                return [dict(entry) for entry in json.loads(answer.read())["data"]]
            except (OSError, http.client.HTTPException) as error:
                raise EndpointError(f"{self.where}: {type(error).__name__}: {error}") from None
            except (ValueError, LookupError, TypeError):
                raise EndpointError(f"{self.where}/v1/models: the answer is no list of models") from None

    def _connect(self) -> http.client.HTTPConnection:
        if self._secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self._host, self._port, timeout=self._timeout_s, context=context)
        return http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)

    def _answer(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: dict[str, Any] | None
    ) -> http.client.HTTPResponse:
        text = None if body is None else json.dumps(body)
        try:
            connection.request(method, self._path + path, text, self._headers)
            answer = connection.getresponse()
            if answer.status == http.client.OK:
                return answer
            reason = " ".join(answer.read(500).decode("utf-8", "replace").split())
        except (OSError, http.client.HTTPException) as error:
            raise EndpointError(f"{self.where}: {type(error).__name__}: {error}") from None
        raise EndpointError(f"{self.where}{path}: status {answer.status}: {reason}")

    def _stream(self, prompt: Sequence[int], tokens: int) -> Generator[float]:
        """Yield the arrival time of each token; a message that brings several counts for each of them."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        seen = 0
        with closing(self._connect()) as connection:
            answer = self._answer(connection, "POST", "/v1/completions", body)
            try:
                for line in answer:
                    now = time.perf_counter()
                    count = _tokens(line, seen)
                    yield from [now] * (count - seen)
                    seen = max(seen, count)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise EndpointError(f"{self.where}: the stream broke: {type(error).__name__}: {error}") from None
        if not seen:
            raise EndpointError(f"{self.where}: a completion of {tokens} tokens ended without one")


def _tokens(line: bytes, seen: int) -> int:
    """Return the tokens that have come up to a line of the stream."""
    if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
        return seen
    message = json.loads(line[5:])
    if "error" in message:
        raise ValueError(str(message["error"]))
    usage = message.get("usage")
    if usage and usage.get("completion_tokens"):
        return int(usage["completion_tokens"])
    return seen + 1 if message.get("choices") else seen


def _values(metrics: str, name: str) -> list[float]:
    """Return a metric's values, one a series."""
    return [float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", metrics, re.MULTILINE)]


def step_s(arrivals: Sequence[Sequence[float]]) -> float:
    """Return the time of a step from the arrival times of every request's tokens, while all were decoding.

    Raises:
        EndpointError: They never were.
    """
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    inside = sum(sum(begin < at <= end for at in times) for times in arrivals)
    if inside < 2 * len(arrivals):
        raise EndpointError(f"{len(arrivals)} requests were hardly ever decoding together: ask for more decode steps")
    return (end - begin) * len(arrivals) / inside
