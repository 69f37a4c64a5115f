"""How fast the core alone decides.

    python benchmarks/core.py [--out FILE]

Two figures, of LRU with one tier and chunks named by digests as in a live server: missing chunks admitted a second,
each evicting another; and resident chunks a second looked up, pinned, loaded, touched and released. Chains have 391
chunks (a prompt of 100,000 tokens in chunks of 256) and 24 (the conversation log's mean).
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

from kvcore.policy import (
    Core,
    CoreConfig,
    InstanceRegistered,
    Load,
    LoadDone,
    LookedUp,
    Place,
    RequestEnded,
    RoomAsked,
    StoreCommitted,
    TierConfig,
)

CAPACITY = 20_000


def names(start: int, count: int) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(i.to_bytes(8, "little")).digest() for i in range(start, start + count))


def serve(core: Core, request: str, chunks: tuple[bytes, ...], now_ns: int) -> None:
    """Take one request through the core with copies that end at once."""
    decisions = core.handle(LookedUp(now_ns=now_ns, request=request, instance="engine", chunks=chunks))
    hits = decisions[0].hits[0]
    for decision in decisions:
        if isinstance(decision, Load):
            core.handle(LoadDone(now_ns=now_ns, request=request, tier=0, chunks=decision.chunks))
    if hits < len(chunks):
        for decision in core.handle(RoomAsked(now_ns=now_ns, request=request, chunks=chunks[hits:])):
            if isinstance(decision, Place):
                core.handle(StoreCommitted(now_ns=now_ns, request=request, tier=0, chunks=decision.chunks))
    core.handle(RequestEnded(now_ns=now_ns, request=request))


def rate(chains: Iterator[tuple[bytes, ...]], core: Core) -> float:
    work = list(chains)
    began = time.perf_counter()
    for number, chunks in enumerate(work):
        serve(core, str(number), chunks, number)
    return sum(map(len, work)) / (time.perf_counter() - began)


def measure(length: int, policy: str) -> dict[str, float]:
    core = Core(CoreConfig(tiers=(TierConfig(name="l1", pages=CAPACITY, eviction=policy),)))
    core.handle(InstanceRegistered(now_ns=0, instance="engine", chunk_pages=1))
    full = CAPACITY // length
    rate((names(i * length, length) for i in range(full)), core)
    missing = rate((names(i * length, length) for i in range(full, 6 * full)), core)
    # Equal names in other objects, as they come off a wire: their hashes have to be computed again.
    resident = rate((names(i * length, length) for _ in range(5) for i in range(5 * full, 6 * full)), core)
    core.check()
    return {"missing_chunks_per_s": round(missing), "resident_chunks_per_s": round(resident)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--policy", default="lru")
    options = parser.parse_args()
    figures = {f"chain_of_{length}": measure(length, options.policy) for length in (391, 24)}
    result = {"policy": options.policy, **figures}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
