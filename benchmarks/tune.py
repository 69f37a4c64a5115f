"""Time `kvsim tune` as an operator runs it, process start included, and print one JSON object.

    python benchmarks/tune.py mooncake_conversation.jsonl [--model qwen3-8b --gpu h100] [--repeats 5]

The first run of all compiles the kernels where they are not in numba's cache yet; it is shown apart. `seconds` is the
best of the others, `cpu_seconds` that run's CPU time over all threads: on a busy machine the wall time says more of the
neighbours. `import_seconds` is `import kvsim` alone, the best of as many fresh processes.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

IMPORT = "import time; t = time.perf_counter(); import kvsim; print(time.perf_counter() - t)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", nargs="+")
    parser.add_argument("--model", default="qwen3-8b")
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    traces = [word for log in arguments.log for word in ("--trace", log)]
    command = ["-m", "kvsim", "tune", *traces, "--model", arguments.model, "--gpu", arguments.gpu, "--json"]
    runs = [timed(command) for _ in range(1 + arguments.repeats)]
    first, warm = runs[0], min(runs[1:])
    found = json.loads(warm[2])
    imports = [float(timed(["-c", IMPORT])[2]) for _ in range(arguments.repeats)]
    recommendation = found["recommendation"]
    shown = [Path(word).name if word in arguments.log else word for word in command[2:]]
    print(
        json.dumps(
            {
                "command": f"kvsim {' '.join(shown)}",
                "requests": found["log"]["requests"],
                "settings": len(found["sweep"]),
                "first_seconds": round(first[0], 3),
                "seconds": round(warm[0], 3),
                "cpu_seconds": round(warm[1], 3),
                "import_seconds": round(min(imports), 3),
                "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 3),
                "recommendation": {
                    name: recommendation[name]
                    for name in ("chunk_tokens", "l1_size_gb", "policy", "token_hit_ratio", "ttft_p50_s", "ttft_p95_s")
                },
            },
            indent=1,
        )
    )


def timed(arguments: list[str]) -> tuple[float, float, str]:
    """Return a Python process's wall seconds, CPU seconds and output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    printed = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, printed


if __name__ == "__main__":
    main()
