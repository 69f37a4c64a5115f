"""Time the exact sweep of a log, in a fresh process, and print one JSON object.

    python benchmarks/make_big_log.py mooncake_conversation.jsonl big.jsonl
    python benchmarks/sweep.py big.jsonl

Sweeps 6 chunk sizes x 20 capacities, spread by equal factors from a thousandth of the log's chunks to all of them, and
the given policies. `seconds` is one call of `kvsim.sweep.sweep`, from the log in memory to the last point, best of
`--repeats`, compiled code warm; `cpu_seconds` is what all threads used of it. `policies` are the seconds of each
policy alone, from chains in memory, and `chains_seconds` those of making the chains from the log. Peak RSS is the
whole process's, the log and its reading included.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import kvtraces
from kvsim.sweep import Chains, Point, chains_of_sizes, sweep, sweep_chains

SIZES = [512, 1024, 2048, 4096, 8192, 16384]
POLICIES = ["lru", "fifo", "lfu", "sieve"]


def timed(work: Callable[[], Any], repeats: int) -> tuple[float, float, Any]:
    """Return the least seconds, the least CPU seconds, and what `work` returned."""
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        begun, cpu_begun = time.perf_counter(), time.process_time()
        found = work()
        seconds.append(time.perf_counter() - begun)
        cpu_seconds.append(time.process_time() - cpu_begun)
    return round(min(seconds), 3), round(min(cpu_seconds), 3), found


def spread(chains: Chains, points: int) -> list[int | None]:
    capacities: list[int | None] = (
        np.geomspace(max(1, chains.unique // 1000), chains.unique, points).astype(int).tolist()
    )
    return capacities


def alone(chains: dict[int, Chains], policy: str, arguments: argparse.Namespace) -> float:
    """Return the least seconds of a sweep of one policy."""
    capacities = {size: spread(each, arguments.points) for size, each in chains.items()}

    def work() -> list[Point]:
        return sweep_chains(chains, capacities=capacities, policies=[policy], threads=arguments.threads)

    return timed(work, arguments.repeats)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", nargs="+")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    policies = arguments.policies.split(",")
    begun = time.perf_counter()
    log = kvtraces.read(arguments.log)
    read_seconds = round(time.perf_counter() - begun, 3)
    sweep(log, chunk_tokens=SIZES[-1:], capacities=[1, 2], policies=policies)  # loads or compiles the kernels
    chains_seconds, _, chains = timed(lambda: chains_of_sizes(log, SIZES), arguments.repeats)
    capacities = {size: spread(each, arguments.points) for size, each in chains.items()}
    policy_seconds = {policy: alone(chains, policy, arguments) for policy in policies}
    accesses = sum(each.accesses for each in chains.values())
    del chains
    seconds, cpu_seconds, points = timed(
        lambda: sweep(log, chunk_tokens=SIZES, capacities=capacities, policies=policies, threads=arguments.threads),
        arguments.repeats,
    )
    print(
        json.dumps(
            {
                "requests": len(log),
                "chunk_accesses_of_all_sizes": accesses,
                "settings": len(points),
                "threads": arguments.threads,
                "read_seconds": read_seconds,
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "chains_seconds": chains_seconds,
                "policies": policy_seconds,
                "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
