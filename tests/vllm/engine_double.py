"""Stand-ins for vLLM's scheduler objects and for the server's line, enough to drive the scheduler's half by hand."""

import hashlib
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from kvcore.live.client import MISS, NOT_YET
from kvcore.live.wire import Found, Granted, Registered
from kvcore.policy.hashing import Namespace, chunk_names
from kvcore.vllm.namespace import Hasher

BLOCK = 16
CHUNK = 64
PAGES = 2
NAMESPACE = Namespace(model="m", kv_dtype="float32", layout="x", block_tokens=BLOCK)


def names(request):
    return chunk_names(Hasher(NAMESPACE)(request), CHUNK // BLOCK)


def blocks(tokens, first=10):
    return list(range(first, first + -(-tokens // BLOCK)))


def registered(epoch=1, record=False):
    return Registered(
        member=epoch,
        chunk_tokens=CHUNK,
        chunk_pages=PAGES,
        shard_bytes=CHUNK * 10,
        arena_path="",
        page_bytes=4096,
        pages=1000,
        epoch=epoch,
        lease_ms=1000,
        liveness_path="",
        record=record,
    )


def page_bytes(chunks, first=0):
    ids = np.arange(first, first + len(chunks) * PAGES, dtype="<u4")
    return ids.tobytes(), np.full(ids.size, 7, dtype="<u8").tobytes()


class Line:
    """A server whose answers a test decides: `resident` chunks hit, asks are granted when `deliver` is called."""

    def __init__(self):
        self.registered = registered()
        self.resident = set()
        self.calls = []
        self.waiting = []
        self.ready = []
        self.pending = 0
        self.at_once = True
        self.silent = False
        self.recorded = []
        self.unawaited = []
        """Lookups that were sent without a wait: they are answered when they are asked for again."""

    def lookup(
        self, request, chunks, *, computed_chunks=0, queued_bytes=0, waited_ms=0.0, patient=False, wait=True, **_
    ):
        self.queued_bytes, self.waited_ms, self.patient = queued_bytes, waited_ms, patient
        if self.registered is None:
            return MISS
        if not wait and request not in self.unawaited:
            self.unawaited.append(request)
            self.calls.append(("sent", request))
            return NOT_YET
        if self.pending:
            self.pending -= 1
            return NOT_YET
        hits = 0
        while hits < len(chunks) and chunks[hits] in self.resident:
            hits += 1
        start = min(computed_chunks, hits)
        self.calls.append(("lookup", request, hits, start))
        pages, generations = page_bytes(chunks[start:hits])
        return Found((hits,), False, start, hits - start, pages, generations, self.registered.epoch)

    def held(self, chunk, *, patient=False):
        self.calls.append(("held", chunk in self.resident))
        if self.registered is None:
            return False
        return NOT_YET if self.silent else chunk in self.resident

    def ask(self, request, chunks):
        self.calls.append(("ask", request, len(chunks)))
        new = [i for i, chunk in enumerate(chunks) if chunk not in self.resident]
        pages, generations = page_bytes(new, 100)
        self.waiting.append((request, Granted(tuple(new), pages, generations, {}, self.registered.epoch)))
        if self.at_once:
            self.deliver()

    def deliver(self):
        self.ready += self.waiting
        self.waiting = []

    def granted(self):
        ready, self.ready = self.ready, []
        return ready

    def drop_load(self, request, chunks):
        if chunks:
            self.calls.append(("drop_load", request, len(chunks)))

    def drop_store(self, request, chunks):
        self.calls.append(("drop_store", request, len(chunks)))

    def end(self, request):
        self.calls.append(("end", request))

    def record(self, request, **fields):
        self.recorded.append((request, fields))

    def leave(self):
        self.calls.append(("leave",))

    def named(self, kind):
        return [call for call in self.calls if call[0] == kind]


class Late(Line):
    """A server that grants only when it has been asked for its answers so many times."""

    def __init__(self, polls):
        super().__init__()
        self.at_once = False
        self.polls = polls

    def granted(self):
        self.polls -= 1
        if self.polls == 0:
            self.deliver()
        return super().granted()


def engine_hashes(tokens, *extra, block=BLOCK):
    """What an engine names full blocks: chained digests of the tokens and what else it tells prompts apart by."""
    parent, found = repr(extra).encode(), []
    for start in range(0, len(tokens) // block * block, block):
        parent = hashlib.sha256(parent + repr(tokens[start : start + block]).encode()).digest()
        found.append(parent)
    return found


@dataclass(eq=False)
class EngineRequest:
    request_id: str
    prompt_token_ids: list[int]
    arrival_time: float = 1.0
    num_preemptions: int = 0
    cache_salt: str | None = None
    num_output_tokens: int = 0
    lora_request: object = None
    mm_features: list = field(default_factory=list)
    prompt_embeds: object = None
    session_id: str | None = None
    max_tokens: int | None = None

    @property
    def num_prompt_tokens(self):
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self):
        return self.num_prompt_tokens + self.num_output_tokens

    def get_finished_reason(self):
        return "stop"


def decode(one):
    """The step of a request's next token."""
    return step(cached=[(one.request_id, (), one.num_tokens, 1, False)])


def finish(side, one):
    """A request's first token behind its first step, and its end."""
    one.num_output_tokens = 1
    side.reported(None, (), ())
    side.plan(decode(one))
    side.finished(one)
    side.plan(step())


def step(*, new=(), cached=(), preempted=()):
    """A SchedulerOutput: `new` of (id, block ids, computed, scheduled), `cached` of those and whether resumed."""
    counts = {row[0]: row[3] for row in [*new, *cached]}
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=(list(blocks),), num_computed_tokens=computed)
            for name, blocks, computed, _ in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[row[0] for row in cached],
            new_block_ids=[(list(row[1]),) if row[1] else None for row in cached],
            num_computed_tokens=[row[2] for row in cached],
            resumed_req_ids={row[0] for row in cached if row[4]},
        ),
        num_scheduled_tokens=counts,
        preempted_req_ids=set(preempted),
    )
