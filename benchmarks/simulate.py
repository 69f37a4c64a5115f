"""How fast the time simulation runs: one setting over a log, with its baseline.

    python benchmarks/simulate.py LOG [--out FILE] [--repeats 5] [--workers 2]

The setting is that of the conversation log's target: qwen3-8b on h100, 4 engines at half the recorded rate, an L0 of
40 GiB each, an L1 of 200 GiB, chunks of 512 tokens, lru. CPU time stands beside wall time, for machines with
other work.
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvsim.engine.settings import RunSettings
from kvsim.engine.simulation import prepare, simulate
from kvsim.profiles import lookup
from kvsim.runner import run
from kvtraces import read


def timed(repeats: int, work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    walls, cpus, result = [], [], None
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return {"wall_s": round(min(walls), 3), "cpu_s": round(min(cpus), 3)}, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    settings = RunSettings(
        profile=lookup("qwen3-8b", "h100"),
        chunk_tokens=512,
        engines=4,
        rate_scale=0.5,
        max_model_len=131_072,
        l0_gb=40,
        l1_gb=200,
    )
    reading, log = timed(options.repeats, lambda: read(options.log))
    preparing, workload = timed(options.repeats, lambda: prepare(log, 512))
    one, _ = timed(options.repeats, lambda: simulate(workload, settings))
    whole, result = timed(options.repeats, lambda: run(log, settings, workers=options.workers))
    figures = {
        "command": f"python benchmarks/simulate.py {options.log.name} --workers {options.workers}",
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "requests": len(log),
        "output_tokens": int(log.output_tokens.sum()),
        "read": reading,
        "prepare": preparing,
        "one_run": one,
        "run_with_baseline": whole,
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "result": result.summary(),
    }
    text = json.dumps(figures, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
