"""Time the reading of a log, in a fresh process, and print one JSON object.

    python benchmarks/make_big_log.py mooncake_conversation.jsonl big.jsonl
    python benchmarks/read_log.py big.jsonl

`seconds` is the best of `--repeats` reads, `first_seconds` the first, which loads numba and its compiled kernel from
the cache (and compiles it where there is none yet). Peak RSS is the whole process's, imports included.
"""

import argparse
import json
import resource
import time

import kvtraces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    seconds, cpu_seconds = [], []
    for _ in range(arguments.repeats):
        begun, cpu_begun = time.perf_counter(), time.process_time()
        log = kvtraces.read(arguments.log)
        seconds.append(time.perf_counter() - begun)
        cpu_seconds.append(time.process_time() - cpu_begun)
        rows, blocks = len(log), len(log.blocks)
        del log
    best = min(seconds)
    print(
        json.dumps(
            {
                "rows": rows,
                "blocks": blocks,
                "first_seconds": round(seconds[0], 3),
                "seconds": round(best, 3),
                "cpu_seconds": round(min(cpu_seconds), 3),
                "rows_per_second": round(rows / best),
                "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
