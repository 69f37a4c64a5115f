"""Time `kvsim run` and `kvsim tune --simulate` as an operator runs them, process start included; print one JSON object.

    python benchmarks/simulate.py mooncake_conversation.jsonl [--repeats 5] [--settings 30] [--out FILE]

Wall seconds are the best of the repeats, CPU seconds those of that run over all its processes; on a machine with other
work the CPU time says more. `peak_rss_gib` is that of the largest process. The setting is the target's: qwen3-8b on
h100, 4 engines at half the recorded rate, an L0 of 40 GiB each, an L1 of 200 GiB, chunks of 512 tokens, lru.
"""

import argparse
import datetime as dt
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COSTS = ("--model", "qwen3-8b", "--gpu", "h100")
SERVER = ("--engines", "4", "--rate-scale", "0.5", "--max-model-len", "131072", "--l0-gb", "40")
CACHE = ("--l1-size-gb", "200", "--chunk-tokens", "512", "--policy", "lru")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--settings", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    trace = ("--trace", str(options.log))
    run = timed(("run", *trace, *COSTS, *SERVER, *CACHE, "--json"), options.repeats)
    alone = timed(("run", *trace, *COSTS, *SERVER, *CACHE, "--no-baseline", "--json"), options.repeats)
    plain = timed(("tune", *trace, *COSTS, "--json"), options.repeats)
    settled = timed(("tune", *trace, *COSTS, *SERVER, "--simulate", str(options.settings), "--json"), 1)
    keys = ("requests", "refused_requests", "output_tokens", "ttft_s", "ttft_no_cache_s", "hit_tokens", "loaded_tokens")
    simulated = settled["printed"]["simulated"]
    figures = {
        "command": f"python benchmarks/simulate.py {options.log.name}",
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "machine": machine(),
        "run": shown(run) | {"result": {key: run["printed"][key] for key in keys}},
        "run_without_the_baseline": shown(alone),
        "tune": shown(plain),
        "tune_simulated": shown(settled) | {"simulations": len(simulated["settings"]) + len(simulated["no_cache"])},
    }
    text = json.dumps(figures, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def timed(arguments: tuple[str, ...], repeats: int) -> dict[str, Any]:
    """Return the best of some runs of the command, and what it printed."""
    runs = []
    for _ in range(repeats):
        begun = time.perf_counter()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "kvsim", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            printed, _ = process.communicate()
        if process.returncode:
            sys.exit(process.returncode)
        wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        runs.append({"wall_s": round(wall, 3), "cpu_s": round(cpu, 3), "printed": printed})
    best = min(runs, key=lambda run: run["wall_s"])
    words = [Path(word).name if word.endswith((".jsonl", ".gz", ".zst")) else word for word in arguments]
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of all so far
    return {
        "command": f"kvsim {' '.join(words)}",
        **best,
        "load_average": round(os.getloadavg()[0], 2),
        "peak_rss_gib": round(peak, 3),
        "printed": json.loads(best["printed"]),
    }


def shown(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key != "printed"}


def machine() -> dict[str, Any]:
    """Return what the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    main()
