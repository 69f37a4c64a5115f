"""TTFT of Qwen3-8B with and without reuse, beside the peers, against this project's targets.

    python benchmarks/ttft_h100.py eager --out benchmarks/results/ttft-eager-h100.json
    python benchmarks/ttft_h100.py graphs --out benchmarks/results/ttft-graphs-h100.json
    python benchmarks/ttft_h100.py l2 --out benchmarks/results/ttft-l2-h100.json

It runs `kvcore bench ttft` with what each question needs and writes its result with the targets, met or missed:
`eager` and `graphs` run every system once, cold prompts, hits and decoding, without and with CUDA graphs; `l2` measures
hits on disk. Starting engines takes most of the time, so one engine a system answers everything, and two start at
once. A rented host's processors run at half their speed now and then, so every request's engine, whatever the system,
is put on the one that is the fastest right before (`--fastest-processor`). `eager` asks for one token: with more, vLLM
launches the kernels of the next step before it reads the first token, which a slow processor takes 30 ms for, in every
system. The targets are also held against the requests during which the engine's processor was at full speed (`quiet`).
Further flags go to `kvcore bench ttft`. Exit code 1 where something failed or a target is missed, over all requests.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from vllm_gpu import facts, interrupt_on_term, model_folder, say, write

ALL = "--lengths 8192,32000 --rounds 1 --repeats 2 --hits 4 --cold 6 --decode-tokens 32 --decode-repeats 12 "
ALL += "--settle-s 0.6 --l1-size-gb 24 "
# Two engines at a time, each with KV for two of the longest prompts: their starts overlap, and what has to be equal
# within a percent (cold prompts, decoding) is measured by turns.
ALL += "--fastest-processor --together 2 --gpu-memory-utilization 0.4 --engine-arg kv_cache_memory_bytes=10737418240"
QUESTIONS = {
    "eager": f"--eager --output-tokens 1 --systems none,kvcore-mp,lmcache,offloading {ALL}",
    "graphs": f"--graphs --systems none,kvcore-mp,lmcache,offloading {ALL}",
    "l2": "--eager --systems kvcore-l2 --l2 files:/var/tmp/kvcore-ttft-l2 --l2-size-gb 30 --l1-size-gb 24 "
    "--rounds 1 --repeats 1 --hits 2 --cold 0 --decode-tokens 0 --settle-s 1 --fastest-processor",
}
L1_TARGETS_S = {8192: 0.043, 32_000: 0.110}
OF_BEST_PEER = 0.8
OVERHEAD = 1.01


def targets(result):
    """[(what, value, bound, met)] of what a result has figures for."""
    found = []
    for row in result["figures"]:
        bound = L1_TARGETS_S.get(row["tokens"])
        if bound and row["situation"] == "l1" and row["system"].startswith("kvcore"):
            found.append((f"{row['system']} L1 hit of {row['tokens']:,}, s", row["median_s"], bound))
    for row in result["ratios"]:
        what = f"{row['system']} {row['situation']} of {row['tokens']:,} over {row['against']}"
        if row["situation"] == "l1" and row["tokens"] in L1_TARGETS_S:
            found.append((what, row["ratio"], OF_BEST_PEER))
        elif row["situation"] == "cold":
            found.append((what, row["ratio"], OVERHEAD))
        elif row["situation"] == "decode":  # seconds a token: tokens a second are their inverse
            found.append((what, row["ratio"], 1 / (2 - OVERHEAD)))
    return [{"what": what, "value": value, "at_most": bound, "met": value <= bound} for what, value, bound in found]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen3-8b", help="a model of vllm_gpu.py, or a folder")
    parser.add_argument("--budget-s", type=float, default=590.0)
    given, more = parser.parse_known_args()
    interrupt_on_term()
    model = model_folder(given.model, tempfile.gettempdir())
    command = [sys.executable, "-m", "kvcore.vllm.ttft", "--model", str(model), "--load-format", "dummy"]
    command += ["--dtype", "bfloat16", "--budget-s", str(given.budget_s), "--out", str(given.out)]
    command += [*QUESTIONS[given.question].split(), *more]
    run = subprocess.Popen(command)
    try:
        code = run.wait()
    except KeyboardInterrupt:
        run.terminate()  # it ends its engines before it goes
        run.wait(60)
        raise
    result = json.loads(given.out.read_text())
    result = {**facts(), "ran": result.pop("command"), **_without(result, "date")}
    result["targets"] = targets(result)
    result["quiet"]["targets"] = targets(result["quiet"])
    write(given.out, result)
    for row in result["targets"]:
        say(f"{'met   ' if row['met'] else 'MISSED'} {row['what']}: {row['value']:.4f}, at most {row['at_most']:.4f}")
    for row in result["quiet"]["targets"]:
        say(f"at full speed: {'met' if row['met'] else 'missed'} {row['what']}: {row['value']:.4f}")
    raise SystemExit(1 if code or not all(row["met"] for row in result["targets"]) else 0)


def _without(result, *names):
    return {name: value for name, value in result.items() if name not in names}


if __name__ == "__main__":
    main()
