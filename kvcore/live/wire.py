"""The wire between the server and its clients: messages, frames, errors.

A message is two ZMQ frames: a header, `<BQ`, of the protocol's version and a correlation id that the sender picks, and
a payload, one tagged msgpack array. Every request gets exactly one reply under its correlation id, an `Error` included.
Chunks are named by the SHA-256 digest of their last block (`kvcore.policy.hashing`); tokens never travel.

Arrays of numbers travel as little-endian bytes: page ids as uint32, generations as uint64, a log's block ids as int64.
"""

import struct
from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta

VERSION = 1
DEFAULT_PORT = 5555
DEFAULT_ARENA_DIR = "/dev/shm"  # noqa: S108 - where shared memory lives on Linux, not a scratch file
MAX_MESSAGE_BYTES = 1 << 26
MAX_REQUEST_BYTES = 1 << 24
"""Of a frame that the server takes; whoever sends a larger one loses the connection."""
MAX_CHUNKS = 1 << 16
"""That one message names: a million tokens in chunks of 16. The request loop is at it for a tenth of a second."""
ALL_RANKS = -1
"""The rank of an acknowledgement that the scheduler gives for all of them, of copies that no worker was told of."""

_HEADER = struct.Struct("<BQ")

ErrorKind: TypeAlias = Literal["bad_message", "unknown_operation", "refused", "unknown_instance", "internal"]
Role: TypeAlias = Literal["scheduler", "worker"]
Digest: TypeAlias = Annotated[bytes, Meta(min_length=1, max_length=64)]
Digests: TypeAlias = Annotated[tuple[Digest, ...], Meta(max_length=MAX_CHUNKS)]
Name: TypeAlias = Annotated[str, Meta(max_length=1024)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**53 - 1)]
"""What counters add up: thousands of the largest fit into 64 bits, and one into a float."""
Epoch: TypeAlias = Annotated[int, Meta(ge=0, le=2**62)]
Id: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=1e9)]


class WireError(Exception):
    """A frame that is no message: wrong length or version, no msgpack, an unknown tag, a field out of range.

    `kind` is what the reply says; `id` the correlation id, 0 where it could not be read.
    """

    def __init__(self, kind: ErrorKind, message: str, correlation: int = 0) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind
        self.id = correlation


def ipc_endpoint(arena_dir: str = DEFAULT_ARENA_DIR) -> str:
    """Return the endpoint on which a server with that arena folder listens for clients of its own host, by default."""
    return f"ipc://{arena_dir.rstrip('/')}/kvcore-{DEFAULT_PORT}.ipc"


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What travels. Fields are only ever added at the end, with a default."""


# Requests


class Ping(Message, frozen=True, tag="ping"):
    """Ask whether the request loop turns. Reply: Pong."""


class Register(Message, frozen=True, tag="register"):
    """Announce a member of an engine instance: its scheduler, or the worker of one rank. Reply: Registered.

    Every member of an instance tells the same sizes. A worker that was registered before says so only after the last
    copy of that time has ended: from then on the pages it wrote can be given to others.
    """

    instance: Annotated[str, Meta(min_length=1, max_length=256)]
    role: Role
    block_tokens: Annotated[int, Meta(ge=1, le=2**24)]
    block_bytes: Annotated[int, Meta(ge=1, le=2**40)]
    """Bytes of one engine block in one shard, all layers together."""
    rank: Annotated[int, Meta(ge=0, lt=4096)] = 0
    world: Annotated[int, Meta(ge=1, le=4096)] = 1
    """Workers of the instance, each of which loads."""
    shards: Annotated[int, Meta(ge=1, le=4096)] = 1
    """Parts of a chunk: `world`, or 1 where every rank holds the same KV (MLA) and the first writes it.

    Every rank acknowledges a store, those that write nothing once their loads before it have ended.
    """
    namespace: dict[str, str] = {}
    """What the chunks' names were rooted in, to be shown; `model` is used as a label in /metrics."""
    pid: Count = 0
    drained_epoch: Epoch = 0
    """The server's epoch at the last registration, 0 for none."""
    engine: dict[str, int] = {}
    """What the journal is to tell of the engine, by a scheduler: see `kvtraces.journal.Engine`."""


class Lookup(Message, frozen=True, tag="lookup"):
    """Ask what is cached of a prompt. Reply: Found. Asked again under the same `request` it changes nothing."""

    member: Id
    request: Name
    chunks: Digests
    """Every full chunk of the prompt, head first."""
    computed_chunks: Count = 0
    """Leading chunks that the engine holds whole."""
    salt: Name = ""
    input_tokens: Count = 0
    resumed: bool = False
    """The request was preempted, and comes back."""
    queued_bytes: Count = 0
    """Bytes waiting on the link to the engine."""
    probe: Annotated[bytes, Meta(max_length=64)] = b""
    """A digest of the first chunk's tokens alone; tells a miss for want of the same namespace from a cold one."""
    waited_ms: Seconds = 0.0
    """Since the request arrived: an engine looks it up when its turn in the queue has come."""


class Poll(Message, frozen=True, tag="poll"):
    """Ask again for a lookup that was pending. Reply: Found."""

    member: Id
    request: Name


class Ask(Message, frozen=True, tag="ask"):
    """Ask room for chunks of the request's prompt, head first; others are refused as unknown. Reply: Granted."""

    member: Id
    request: Name
    chunks: Digests


class Committed(Message, frozen=True, tag="committed"):
    """A rank has written its shard of granted chunks. Reply: Done."""

    member: Id
    request: Name
    rank: int
    chunks: Digests
    tokens: Count = 0
    bytes: Count = 0
    seconds: Seconds = 0.0


class Aborted(Message, frozen=True, tag="aborted"):
    """A rank will not write (any more) to granted chunks. Reply: Done."""

    member: Id
    request: Name
    rank: int
    chunks: Digests


class Loaded(Message, frozen=True, tag="loaded"):
    """A rank has copied chunks of a `Found` run into the engine. Reply: Done.

    `tokens` counts what was copied beyond the engine's own cache, a part of a chunk included.
    """

    member: Id
    request: Name
    rank: int
    chunks: Digests
    tokens: Count = 0
    bytes: Count = 0
    seconds: Seconds = 0.0


class LoadFailed(Message, frozen=True, tag="load_failed"):
    """A rank could not, or will not, load chunks of a `Found` run. Reply: Done."""

    member: Id
    request: Name
    rank: int
    chunks: Digests


class End(Message, frozen=True, tag="end"):
    """The request asks for no more room: its prompt is computed, or it was cancelled. Reply: Done."""

    member: Id
    request: Name


class Leave(Message, frozen=True, tag="leave"):
    """A member leaves for good; its copies have ended. Reply: Done."""

    member: Id


class Renew(Message, frozen=True, tag="renew"):
    """The member's process is alive: renews the leases of its requests. Reply: Done."""

    member: Id


class Record(Message, frozen=True, tag="record"):
    """What the recorder shall know of a finished request, beside what the server knows. Reply: Done."""

    member: Id
    request: Name
    input_length: Count
    output_length: Count = 0
    block_size: Count = 0
    hash_ids: bytes = b""
    """`kvcore.policy.hashing.trace_ids` of the prompt's full blocks, little-endian int64."""
    output_hash_ids: bytes = b""
    session_id: Name | None = None
    status: Name | None = None
    l0_tokens: Count | None = None
    queue_ms: Seconds | None = None
    load_ms: Seconds | None = None
    prefill_ms: Seconds | None = None
    ttft_ms: Seconds | None = None


class Status(Message, frozen=True, tag="status"):
    """Ask for the server's state. Reply: Report."""


class GetConfig(Message, frozen=True, tag="config"):
    """Ask for the server's settings. Reply: Report."""


class GetMetrics(Message, frozen=True, tag="metrics"):
    """Ask for every counter. Reply: Report."""


class Clear(Message, frozen=True, tag="clear"):
    """Drop chunks, or everything. Reply: Done."""

    chunks: Digests | None = None


class Pin(Message, frozen=True, tag="pin"):
    """Keep chunks in L1 until they are unpinned. Reply: Done."""

    chunks: Digests


class Unpin(Message, frozen=True, tag="unpin"):
    """Give pinned chunks back to the eviction policy. Reply: Done."""

    chunks: Digests


class SetQuota(Message, frozen=True, tag="quota"):
    """Limit a tenant to `pages` pages of L1; None lifts the limit. Reply: Done."""

    salt: Name
    pages: Count | None = None


class Where(Message, frozen=True, tag="where"):
    """Ask in which tier each chunk can be matched. Reply: Places."""

    chunks: Digests


Request: TypeAlias = (
    Ping
    | Register
    | Lookup
    | Poll
    | Ask
    | Committed
    | Aborted
    | Loaded
    | LoadFailed
    | End
    | Leave
    | Renew
    | Record
    | Status
    | GetConfig
    | GetMetrics
    | Clear
    | Pin
    | Unpin
    | SetQuota
    | Where
)

# Replies


class Error(Message, frozen=True, tag="error"):
    """Why there is no other reply.

    bad_message, unknown_operation: the frames were no request. refused: it cannot be had, and why. unknown_instance:
    the member is not registered (any more) with this server: register again. internal: the server's fault.
    """

    kind: ErrorKind
    message: str


class Done(Message, frozen=True, tag="done"):
    """It was taken in."""

    missing: Count = 0
    """Of a `Pin`: how many of its chunks are not in L1, and so are not kept there."""


class Pong(Message, frozen=True, tag="pong"):
    """The request loop turns."""

    version: str = ""
    epoch: Epoch = 0
    pid: Count = 0


class Registered(Message, frozen=True, tag="registered"):
    """What a member needs to know of the server and its arena."""

    member: Id
    """Names the member in every later message; worthless to another server or epoch."""
    chunk_tokens: int
    chunk_pages: int
    """Pages of a chunk, all shards together."""
    shard_bytes: int
    """Shard r lies at offset r * shard_bytes of its chunk's pages, end to end."""
    arena_path: str
    page_bytes: int
    pages: int
    epoch: int
    lease_ms: int
    liveness_path: str
    """The unix socket that the member connects, sends its `member` to (8 bytes, little-endian) and keeps open."""
    record: bool = False
    """Whether the server records, so that `Record` is wanted."""
    held_token: int = 0
    """What the file beside the arena that tells what is held begins with (`kvcore.live.held`); 0: there is none."""


class Found(Message, frozen=True, tag="found"):
    """What is cached of a prompt, and where in the arena lies what the engine is to load."""

    hits: tuple[int, ...] = (0,)
    """Leading chunks found, by tier, those that the engine computed already included."""
    pending: bool = False
    """The run is on its way from a lower tier: poll."""
    load_start: int = 0
    """Index in the prompt's chunks of the first to load."""
    load_chunks: int = 0
    """How many, consecutive. Each is to be acknowledged: loaded, or not."""
    pages: bytes = b""
    """uint32 page ids, `load_chunks` x `chunk_pages`."""
    generations: bytes = b""
    """uint64, each page's: one that differs before or after the copy means that the bytes are not the chunk's."""
    epoch: int = 0
    """The server's epoch; the pages mean nothing to a worker registered at another."""


class Granted(Message, frozen=True, tag="granted"):
    """Where in the arena the chunks of an ask are to be written."""

    chunks: tuple[int, ...] = ()
    """Indices into the ask of the chunks that were given room. Each is to be acknowledged: committed or aborted."""
    pages: bytes = b""
    """uint32 page ids, `len(chunks)` x `chunk_pages`."""
    generations: bytes = b""
    refused: dict[str, int] = {}
    """How many chunks were not given room, by reason (`kvcore.policy.Refuse`)."""
    epoch: int = 0


class Report(Message, frozen=True, tag="report", gc=True):
    """Plain data, to be shown."""

    data: dict[str, Any]


class Places(Message, frozen=True, tag="places"):
    """The tier of each chunk asked for, -1 for none."""

    tiers: tuple[int, ...]


Reply: TypeAlias = Error | Done | Pong | Registered | Found | Granted | Report | Places

_UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises over bytes that are no message: not all of it is its own."""
_ENCODER = msgspec.msgpack.Encoder()
_REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_TAG: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(list[Any])
_TAGS = frozenset(kind.__struct_config__.tag for kind in Request.__args__)


def encode(message: Message, correlation: int) -> list[bytes]:
    """Return the two frames of a message."""
    return [_HEADER.pack(VERSION, correlation), _ENCODER.encode(message)]


def decode_request(frames: list[bytes]) -> tuple[int, Request]:
    """Return (correlation id, request). Raises WireError."""
    correlation = _header(frames)
    try:
        return correlation, _REQUESTS.decode(frames[1])
    except _UNDECODABLE as error:
        raise _not_a_request(frames[1], error, correlation) from None


def decode_reply(frames: list[bytes]) -> tuple[int, Reply]:
    """Return (correlation id, reply). Raises WireError."""
    correlation = _header(frames)
    try:
        return correlation, _REPLIES.decode(frames[1])
    except _UNDECODABLE as error:
        raise WireError("bad_message", str(error), correlation) from None


def _header(frames: list[bytes]) -> int:
    if len(frames) != 2:
        raise WireError("bad_message", f"a message has 2 frames, a header and a payload; this one has {len(frames)}")
    if len(frames[0]) != _HEADER.size:
        raise WireError("bad_message", f"a header has {_HEADER.size} bytes; this one has {len(frames[0])}")
    version, correlation = _HEADER.unpack(frames[0])
    if version != VERSION:
        raise WireError("bad_message", f"protocol version {version}; this server speaks {VERSION}", correlation)
    return int(correlation)


def _not_a_request(payload: bytes, error: Exception, correlation: int) -> WireError:
    """Tell an operation that nobody knows from one whose fields are wrong."""
    try:
        tag = next(iter(_TAG.decode(payload)), None)
    except _UNDECODABLE:
        return WireError("bad_message", f"the payload is no msgpack array: {error}", correlation)
    if isinstance(tag, str) and tag not in _TAGS:
        return WireError("unknown_operation", f"no operation {tag[:64]!r}", correlation)
    return WireError("bad_message", f"{str(tag)[:64]}: {error}", correlation)
