"""What the scheduler's half of a connector remembers of a request."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from kvcore.live.wire import Found, Registered
from kvcore.vllm.jobs import Copy

_DAY_S = 86_400.0
"""An arrival longer ago is by another clock: who calls the engine may say what it likes."""

EngineRequest: TypeAlias = Any
"""vLLM's `Request`."""


class Life:
    """One stay of a request in the engine: from its lookup until it is preempted or finished.

    Attributes:
        name: The request's name on the wire; a life after a preemption has another one, so that what is late from the
            life before cannot be taken for it.
        session: The registration in which it was looked up; with another one nothing of it counts any more.
        chunks: Names of the prompt's full chunks; none while its lookup is put off.
        found: What the lookup found, None until it is known.
        computed: Leading tokens that the engine's own cache held at the last lookup.
        blocks: The engine's block ids, of the prompt's blocks at least.
        asked: Chunks from the head for which room was asked, or which were found.
        upto: Tokens that are computed when the steps planned so far have run.
    """

    __slots__ = (
        "allocated",
        "asked",
        "asks",
        "asynchronous",
        "blocks",
        "chunks",
        "computed",
        "ended",
        "found",
        "loading",
        "name",
        "session",
        "stored",
        "tainted",
        "unawaited",
        "upto",
    )

    def __init__(self, name: str, session: Registered, chunks: tuple[bytes, ...]) -> None:
        self.name = name
        self.session = session
        self.chunks = chunks
        self.found: Found | None = None
        self.computed = 0
        self.blocks: list[int] = []
        self.asked = 0
        self.upto = 0
        self.unawaited = False
        """Its lookup was sent and nobody waited for the answer, which cannot bring anything to load."""
        self.asks: list[tuple[int, int]] = []
        """Unanswered asks: ranges of chunks, in the order in which they were asked."""
        self.allocated = False
        self.asynchronous = False
        """Whether its hit is loaded outside the batch."""
        self.loading = False
        """An asynchronous load is under way."""
        self.stored = False
        """Some of it was handed to the workers to store."""
        self.ended = False
        self.tainted = False
        """What it computes may rest on blocks that were not loaded: nothing more is stored of it."""

    def load(self, request: str, external: int, block_tokens: int) -> tuple[Copy | None, tuple[bytes, ...]]:
        """Plan the copy of `external` tokens behind those computed; return it and the found chunks left out."""
        found = self.found
        if found is None or not found.load_chunks:
            return None, ()
        blocks_a_chunk = self.session.chunk_tokens // block_tokens
        first, last = self.computed // block_tokens, (self.computed + external) // block_tokens
        ids = _block_table(self.blocks, found.load_start, found.load_chunks, blocks_a_chunk, first, last)
        wanted: NDArray[np.bool_] = np.any(ids >= 0, axis=1)
        names = self.chunks[found.load_start : found.load_start + found.load_chunks]
        left_out = tuple(name for name, want in zip(names, wanted.tolist(), strict=True) if not want)
        if not wanted.any():
            return None, left_out
        pages, generations = unpack(found.pages, found.generations, found.load_chunks)
        copy = Copy(
            request=request,
            name=self.name,
            chunks=tuple(name for name, want in zip(names, wanted.tolist(), strict=True) if want),
            epoch=found.epoch,
            pages=pages[wanted],
            generations=generations[wanted],
            blocks=ids[wanted],
            tokens=int((ids >= 0).sum()) * block_tokens,
            tiers=found.hits,
            asynchronous=self.asynchronous,
        )
        return copy, left_out

    def store(
        self, request: str, chunks: Sequence[int], pages: bytes, generations: bytes, epoch: int, block_tokens: int
    ) -> Copy:
        """Plan the copy of granted `chunks` (indices into the prompt's) to the arena."""
        per_chunk = self.session.chunk_tokens // block_tokens
        page_ids, page_generations = unpack(pages, generations, len(chunks))
        ids = np.array([self.blocks[i * per_chunk : (i + 1) * per_chunk] for i in chunks], dtype=np.int64)
        return Copy(
            request=request,
            name=self.name,
            chunks=tuple(self.chunks[i] for i in chunks),
            epoch=epoch,
            pages=page_ids,
            generations=page_generations,
            blocks=ids,
            tokens=len(chunks) * self.session.chunk_tokens,
        )


class Tracked:
    """A request from its arrival until it is finished; times are seconds of the wall clock."""

    __slots__ = (
        "arrived_s",
        "first_token_s",
        "hashes",
        "id",
        "l0_tokens",
        "life",
        "lives",
        "load_s",
        "load_started_s",
        "preemptions",
        "prompt_tokens",
        "request",
        "salt",
        "scheduled_s",
        "unlucky",
    )

    def __init__(self, request: EngineRequest, hashes: list[bytes] | None, now_s: float) -> None:
        self.request = request
        self.id: str = request.request_id
        self.hashes = hashes
        """Of the prompt's full blocks; None while they are put off."""
        self.prompt_tokens: int = request.num_prompt_tokens
        self.salt: str = getattr(request, "cache_salt", None) or ""
        arrived_s: float = getattr(request, "arrival_time", None) or now_s
        self.arrived_s = arrived_s if 0 <= now_s - arrived_s < _DAY_S else now_s
        self.preemptions = 0
        self.lives = 0
        self.life: Life | None = None
        self.unlucky = False
        """Its load failed: it is computed, and not looked up again."""
        self.l0_tokens: int | None = None
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.load_started_s: float | None = None
        self.load_s = 0.0

    def end_life(self) -> None:
        """Leave the life at hand; the next one bears another name."""
        self.life = None
        self.lives += 1

    def wire_name(self) -> str:
        """Return the name of the life at hand."""
        return self.id if self.lives == 0 else f"{self.id}~{self.lives}"

    def outcome(self) -> dict[str, Any]:
        """Return what the log says of it beside its prompt (`kvcore.live.wire.Record`), now that it is finished."""
        first, started = self.first_token_s, self.scheduled_s
        queue_s = None if started is None else max(0.0, started - self.arrived_s)
        ttft_s = None if first is None else max(0.0, first - self.arrived_s)
        prefill_s = None if ttft_s is None or queue_s is None else max(0.0, ttft_s - queue_s - self.load_s)
        reason = self.request.get_finished_reason()
        return {
            "output_length": self.request.num_output_tokens,
            "session_id": getattr(self.request, "session_id", None),
            "status": None if reason is None else str(reason),
            "l0_tokens": self.l0_tokens,
            "queue_ms": _ms(queue_s),
            "load_ms": _ms(self.load_s),
            "prefill_ms": _ms(prefill_s),
            "ttft_ms": _ms(ttft_s),
        }


def unpack(pages: bytes, generations: bytes, chunks: int) -> tuple[NDArray[np.uint32], NDArray[np.uint64]]:
    """Return page ids and generations as arrays, (chunks, pages a chunk)."""
    ids = np.frombuffer(pages, dtype="<u4").reshape(chunks, -1)
    return ids, np.frombuffer(generations, dtype="<u8").reshape(chunks, -1)


def _block_table(
    blocks: Sequence[int], start: int, chunks: int, per_chunk: int, first: int, last: int
) -> NDArray[np.int64]:
    """Return the block ids of `chunks` chunks from `start`; -1 outside blocks `first` to `last`."""
    table = np.full(chunks * per_chunk, -1, dtype=np.int64)
    offset = start * per_chunk
    low, high = max(first, offset), min(last, offset + len(table), len(blocks))
    if low < high:
        table[low - offset : high - offset] = blocks[low:high]
    return table.reshape(chunks, per_chunk)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000.0 * seconds
