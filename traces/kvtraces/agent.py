"""Reader of kv-cache-tester's recorded coding-agent sessions: one JSON object, one session, a file.

Format: github.com/callanjfox/kv-cache-tester. `requests[]` hold `t` (s), `in`, `out`, `hash_ids` of full blocks, and
some hold a sub-agent's own `requests`, at any depth. With `hash_id_scope` "local" ids mean nothing outside their
session; they are hashed together with its id, sub-agents' included.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from kvtraces.errors import BadRows, LogError
from kvtraces.jsonl import explain
from kvtraces.log import TEXT, IntArray
from kvtraces.rows import Rows
from kvtraces.schema import MAX_BLOCK_TOKENS, MAX_MS, BlockId, Text, Tokens

_Seconds = Annotated[float, msgspec.Meta(ge=0, lt=MAX_MS / 1000)]
_MEND = "mend or remove the request, or count it with --skip-bad"


class _Session(msgspec.Struct):
    id: Text
    block_size: Annotated[int, msgspec.Meta(ge=1, le=MAX_BLOCK_TOKENS)]
    requests: list[msgspec.Raw]
    hash_id_scope: Literal["local", "global"] = "local"


class _Entry(msgspec.Struct):
    """What a request and a sub-agent have in common."""

    t: _Seconds
    prompt: msgspec.Raw | msgspec.UnsetType = msgspec.field(name="in", default=msgspec.UNSET)
    requests: list[msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET

    @property
    def is_mark(self) -> bool:
        """Tell the mere mark of a sub-agent, which has no prompt, from a request."""
        return self.prompt is msgspec.UNSET and self.requests is not msgspec.UNSET


class _Request(msgspec.Struct):
    t: _Seconds
    input_length: Tokens = msgspec.field(name="in")
    output_length: Tokens = msgspec.field(name="out")
    hash_ids: list[BlockId]
    model: Text = ""


@dataclass(frozen=True, slots=True)
class _Found:
    time_ms: float
    offset: int
    """Where the request lies in the file, in bytes."""
    label: str
    request: _Request


def read_session(path: Path, pieces: Iterator[bytes], bad: BadRows) -> Iterator[Rows]:
    """Yield one session's requests in order of time; nested ones too. Raises LogError, or reports to `bad`."""
    data = b"".join(pieces)
    try:
        session = msgspec.json.decode(data, type=_Session)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        field, what = explain(error, data)
        line = data.count(b"\n") + 1 if field == "row" else 1
        bad.report(LogError(path, line, field.replace("row", "session"), f"{what}; mend or remove the file"))
        return
    found = sorted(_walk(path, bad, data, session.requests, 0, 0.0, ""), key=lambda one: one.time_ms)
    if found:
        yield _columns(path, data, session, found)


def _walk(
    path: Path, bad: BadRows, data: bytes, entries: list[msgspec.Raw], offset: int, origin_s: float, prefix: str
) -> Iterator[_Found]:
    """Yield the requests in `entries`, which lie in `data` one after another from `offset` on."""
    for i, raw in enumerate(entries):
        text = bytes(raw)
        offset = data.index(text, offset)
        label = f"{prefix}requests[{i}]."
        try:
            entry = msgspec.json.decode(text, type=_Entry)
            request = None if entry.is_mark else msgspec.json.decode(text, type=_Request)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            field, what = explain(error, text)
            line = data.count(b"\n", 0, offset) + 1
            bad.report(LogError(path, line, label + field if field != "row" else label[:-1], f"{what}; {_MEND}"))
        else:
            if request is not None:
                yield _Found((origin_s + entry.t) * 1000, offset, label, request)
            if entry.requests:
                origin = _origin(entry.t, entry.requests[0], origin_s)
                yield from _walk(path, bad, data, entry.requests, offset, origin, label)
        offset += len(text)


def _origin(spawned_s: float, first_request: msgspec.Raw, origin_s: float) -> float:
    """Return what to add to a sub-agent's times: they run from the session's start, or from its own.

    The format does not say; a sub-agent whose first request comes before its spawn counts from the spawn.
    """
    first: Any = msgspec.json.decode(first_request)
    began = first.get("t") if isinstance(first, dict) else None
    return origin_s + spawned_s if isinstance(began, int | float) and began < spawned_s else origin_s


def _columns(path: Path, data: bytes, session: _Session, found: list[_Found]) -> Rows:
    n = len(found)
    requests = [one.request for one in found]
    counts = np.array([len(request.hash_ids) for request in requests], np.int64)
    ids = np.fromiter((i for request in requests for i in request.hash_ids), np.int64, int(counts.sum()))
    return Rows(
        path=path,
        lines=_line_numbers(data, np.array([one.offset for one in found], np.int64)),
        timestamp_ms=np.array([one.time_ms for one in found], np.float64),
        input_tokens=np.array([request.input_length for request in requests], np.int64),
        output_tokens=np.array([request.output_length for request in requests], np.int64),
        counts=counts,
        ids=ids if session.hash_id_scope == "global" else namespaced(session.id, ids),
        block_size=np.full(n, session.block_size, np.int64),
        extra={
            "session_id": np.full(n, session.id, TEXT),
            "model": np.array([request.model for request in requests], TEXT),
        },
        labels=[one.label for one in found],
    )


def namespaced(session_id: str, ids: IntArray) -> IntArray:
    """Return ids that mean the same outside their session: 63 bits of a hash of session and id."""
    distinct, places = np.unique(ids, return_inverse=True)
    root = hashlib.sha256(session_id.encode()).digest()
    digests = [hashlib.sha256(root + one.to_bytes(8, "little")).digest() for one in distinct.tolist()]
    hashed = np.array([int.from_bytes(digest[:8], "big") >> 1 for digest in digests], np.int64)
    return hashed[places] if len(distinct) else ids


def _line_numbers(data: bytes, positions: IntArray) -> "np.ndarray[Any, np.dtype[np.int32]]":
    breaks = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
    return (np.searchsorted(breaks, positions) + 1).astype(np.int32)
