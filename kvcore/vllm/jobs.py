"""What the scheduler's half of a connector tells the workers' halves, one `StepPlan` a step: plain data."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)
class Copy:
    """Chunks of one request to copy between the engine's blocks and the arena.

    Attributes:
        request: vLLM's id of the request.
        name: The request's name on the wire; another one after every preemption.
        chunks: The chunks' names, head first.
        epoch: The server's epoch; to a worker registered at another the pages mean nothing.
        pages: uint32 page ids, (len(chunks), pages a chunk).
        generations: uint64 generation of each page, of the same shape.
        blocks: Engine block ids, (len(chunks), blocks a chunk); -1 where a block is not to be copied.
        tokens: Tokens that the copied blocks hold.
        tiers: Chunks by the tier in which they were found (loads only).
        asynchronous: The request waits for the load outside the running batch (loads only).
    """

    request: str
    name: str
    chunks: tuple[bytes, ...]
    epoch: int
    pages: NDArray[np.uint32]
    generations: NDArray[np.uint64]
    blocks: NDArray[np.int64]
    tokens: int
    tiers: tuple[int, ...] = ()
    asynchronous: bool = False


@dataclass(slots=True)
class StepPlan:
    """Everything that workers are to do in one engine step."""

    loads: list[Copy] = field(default_factory=list)
    stores: list[Copy] = field(default_factory=list)
    handed_out: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Blocks that this step may write: what still reads one of them for a store is waited for on the device."""
    load_at_once: bool = False
    """Whether the loads may begin before the engine has prepared the step: nothing else that it does there writes their
    blocks."""
    computes: bool = True
    """Whether the step runs the model. vLLM 0.26 does not call `wait_for_save` in one that does not."""
    grants_lost: bool = False
    """The scheduler lost a server that lives, and is back. Answers to its asks may be lost, or what it said of them, so
    pages may be taken that nobody knows of. Workers register anew, which gives them back."""
    failures_seen: dict[int, int] = field(default_factory=dict)
    """How many failed loads of each rank the scheduler knew of. What was computed before it knew of one may rest on
    blocks that were not loaded, so a rank that has had more does not store."""


@dataclass(slots=True)
class StepReport:
    """What workers tell the scheduler after a step."""

    load_stalls: dict[str, float] = field(default_factory=dict)
    """By request, the seconds that this step stood still for its load, where it was loaded in the step."""
    failures: dict[int, int] = field(default_factory=dict)
    """By rank, how many steps had a synchronous load that failed, ever."""

    def merge(self, other: "StepReport") -> "StepReport":
        """Return both reports in one: a request has waited for its slowest rank."""
        stalls = dict(self.load_stalls)
        for request, stalled in other.load_stalls.items():
            stalls[request] = max(stalled, stalls.get(request, 0.0))
        return StepReport(load_stalls=stalls, failures={**self.failures, **other.failures})
