"""Greedy answers with reuse against answers without, on a seeded small model in float32 and bf16, and a control.

    python benchmarks/outputs_h100.py --out benchmarks/results/outputs-h100.json

For each dtype one engine without a connector answers every prompt cold and with a hit in its own cache, and one with
`kvcore serve` beside it cold and, its own cache emptied, with a hit in L1. Answers with reuse must be those without; in
bf16, where another order of additions changes a token now and then, as often as vLLM's own prefix hits are. Then L1 is
filled with zeros: answers that do not change then did not come from there. Two minutes; exit code 1 where answers
differ, nothing was loaded, or the control changed nothing.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from vllm_gpu import facts, interrupt_on_term, say, write

from kvcore.live.arena import Arena
from kvcore.live.tools import status
from kvcore.vllm.ttft.engine import Engine
from kvcore.vllm.ttft.measure import prompt
from kvcore.vllm.ttft.systems import connector, kvcore_loaded, kvcore_server

LENGTHS = (300, 512, 777, 1024, 1500, 2048)  # inside a chunk, on its border, and beyond
CHUNK = 128
KV_BYTES = 1 << 30
VOCABULARY = 4000


def engine(model, given, dtype, log, **more):
    arguments = {
        "model": str(model),
        "dtype": dtype,
        "enforce_eager": not given.graphs,
        "max_model_len": max(LENGTHS) + given.tokens + 64,
        "gpu_memory_utilization": 0.3,
        "kv_cache_memory_bytes": KV_BYTES,
        "seed": 0,
        "disable_log_stats": False,
        "enable_prefix_caching": True,
        "skip_tokenizer_init": True,
        **({"block_size": given.block_size} if given.block_size else {}),
        **more,
    }
    return Engine(arguments, {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}, log)


def answers(one, tokens):
    """Every prompt's answer, one request at a time."""
    return [one.generate([prompt(f"outputs {n}", n, VOCABULARY)], tokens)[0].tokens for n in LENGTHS]


def compared(model, given, dtype, folder):
    found = {}
    with (
        kvcore_server(folder, **{"l1-size-gb": 2, "chunk-size": CHUNK}) as endpoint,
        engine(model, given, dtype, folder / f"none-{dtype}.log") as alone,  # both start at once
        engine(model, given, dtype, folder / f"kvcore-{dtype}.log", **reusing(endpoint)) as reuses,
    ):
        found["cold"] = answers(alone, given.tokens)
        found["gpu"] = answers(alone, given.tokens)
        found["kvcore cold"] = answers(reuses, given.tokens)
        time.sleep(1.0)  # the last stores
        reuses.reset()
        before = kvcore_loaded(endpoint).get("l1", 0.0)
        found["kvcore l1"] = answers(reuses, given.tokens)
        loaded = settled(endpoint) - before
        arena = Arena.attach(Path(status(endpoint, 5.0)["arena"]["path"]))
        arena.data[:] = 0
        arena.close()
        reuses.reset()
        found["zeros in l1"] = answers(reuses, given.tokens)
    return {
        "loaded_tokens": loaded,
        "prompts": len(LENGTHS),
        "equal": {
            "kvcore cold, to cold": equal(found["kvcore cold"], found["cold"]),
            "kvcore l1, to cold": equal(found["kvcore l1"], found["cold"]),
            "kvcore l1, to a hit in the engine's cache": equal(found["kvcore l1"], found["gpu"]),
            "a hit in the engine's cache, to cold": equal(found["gpu"], found["cold"]),
        },
        "changed by zeros in l1": len(LENGTHS) - equal(found["zeros in l1"], found["cold"]),
    }


def reusing(endpoint):
    return {"kv_transfer_config": connector("KVCoreMPConnector", endpoint=endpoint)}


def equal(some, others):
    return sum(a == b for a, b in zip(some, others, strict=True))


def settled(endpoint):
    """Loaded tokens, once no more are counted."""
    seen = -1.0
    while (now := kvcore_loaded(endpoint).get("l1", 0.0)) != seen:
        seen = now
        time.sleep(0.5)
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--graphs", action="store_true", help="with CUDA graphs")
    parser.add_argument("--block-size", type=int, help="vLLM's, where its own choice does not divide 128")
    given = parser.parse_args()
    interrupt_on_term()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "vllm"))
    from tiny_model import build_model  # noqa: PLC0415 - beside the tests

    result = {**facts(), "tokens": given.tokens, "lengths": LENGTHS, "dtypes": {}}
    good = True
    with tempfile.TemporaryDirectory(prefix="kvcore-outputs-") as folder:
        model = build_model(Path(folder) / "model")
        for dtype in given.dtypes.split(","):
            row = result["dtypes"][dtype] = compared(model, given, dtype, Path(folder))
            wanted = row["prompts"] if dtype == "float32" else row["equal"]["a hit in the engine's cache, to cold"]
            reuse = row["equal"]["kvcore l1, to a hit in the engine's cache"]
            met = reuse >= wanted and row["loaded_tokens"] > 0 and row["changed by zeros in l1"] > 0
            good &= met
            say(f"{'met   ' if met else 'MISSED'} {dtype}: {row}")
            write(given.out, result)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
