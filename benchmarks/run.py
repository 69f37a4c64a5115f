"""Every benchmark that needs no GPU, one after the other; each writes its figures to benchmarks/results/NAME-cpu.json.

    python benchmarks/run.py --trace mooncake_conversation.jsonl [--only core,sweep]

The log is Mooncake's conversation trace (kvcache-ai/Mooncake, FAST25-release/traces). The big log of `read_log` and
`sweep` is made from it in a temporary folder. Run it on an idle machine: the load average is noted too.
"""

import argparse
import datetime as dt
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT_TRACE = HERE.parents[1] / "shared" / "traces" / "mooncake_conversation.jsonl"


def commands(trace: str, big: str, file: str) -> dict[str, list[str]]:
    """Return each benchmark's arguments; all print one JSON object, but for the server's, which writes it to `file`."""
    return {
        "core": ["core.py"],
        "tune": ["tune.py", trace],
        "read_log": ["read_log.py", big],
        "sweep": ["sweep.py", big],
        "simulate": ["simulate.py", trace],
        "server": ["server.py", file],
    }


def run(name: str, arguments: list[str], shown: list[str], file: Path) -> bool:
    """Run one benchmark, write its figures, and return whether it ended well."""
    print(f"{name} ...", flush=True)
    load = os.getloadavg()[0]
    done = subprocess.run(
        [sys.executable, str(HERE / arguments[0]), *arguments[1:]], capture_output=True, text=True, check=False
    )
    said = file.read_text() if file.exists() else done.stdout
    file.unlink(missing_ok=True)
    if done.returncode or "{" not in said:
        print(done.stdout + done.stderr, file=sys.stderr)
        return False
    result = {
        "command": "python benchmarks/" + " ".join(shown),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "load_average_before": round(load, 2),
        },
        "result": json.loads(said[said.index("{") :]),
    }
    (HERE / "results" / f"{name}-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, default=DEFAULT_TRACE)
    parser.add_argument("--only", help="names, separated by commas")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(commands("", "", ""))
    with tempfile.TemporaryDirectory() as folder:
        big = str(Path(folder) / "big.jsonl")
        file = Path(folder) / "figures.json"
        shown = commands(options.trace.name, "big.jsonl", "server.json")
        every = commands(str(options.trace), big, str(file))
        if {"read_log", "sweep"} & set(chosen):
            subprocess.run([sys.executable, str(HERE / "make_big_log.py"), str(options.trace), big], check=True)
        failed = [name for name in chosen if not run(name, every[name], shown[name], file)]
    print("failed: " + ", ".join(failed) if failed else "all figures are in benchmarks/results/")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
