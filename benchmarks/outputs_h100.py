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
from contextlib import ExitStack
from pathlib import Path

from vllm_gpu import facts, interrupt_on_term, say, wait_until_registered, write

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
    found, loaded = {}, {}
    flags = {"l1-size-gb": 2, "chunk-size": CHUNK}
    with ExitStack() as engines:
        with kvcore_server(folder, **flags) as endpoint:
            alone = engines.enter_context(engine(model, given, dtype, folder / f"none-{dtype}.log"))
            log = folder / f"kvcore-{dtype}.log"
            reuses = engines.enter_context(engine(model, given, dtype, log, **reusing(endpoint)))  # both start at once
            found["cold"] = answers(alone, given.tokens)
            found["gpu"] = answers(alone, given.tokens)
            loaded["l1"] = reused(reuses, given, endpoint, found, "")
            arena = Arena.attach(Path(status(endpoint, 5.0)["arena"]["path"]))
            arena.data[:] = 0
            arena.close()
            reuses.reset()
            found["zeros in l1"] = answers(reuses, given.tokens)
        with kvcore_server(folder, **flags) as endpoint:
            wait_until_registered(endpoint)
            reuses.reset()
            loaded["l1 of the next server"] = reused(reuses, given, endpoint, found, " of the next server")
    names = [name for name in found if name.startswith("kvcore")]
    equal_to_cold = {f"{name}, to cold": equal(found[name], found["cold"]) for name in names}
    hits = [name for name in names if "l1" in name]
    equal_to_hit = {f"{name}, to a hit in the engine's cache": equal(found[name], found["gpu"]) for name in hits}
    return {
        "loaded_tokens": loaded,
        "prompts": len(LENGTHS),
        "equal": {
            **equal_to_cold,
            **equal_to_hit,
            "a hit in the engine's cache, to cold": equal(found["gpu"], found["cold"]),
        },
        "changed by zeros in l1": len(LENGTHS) - equal(found["zeros in l1"], found["cold"]),
    }


def reused(reuses, given, endpoint, found, where):
    """Answer cold and with hits in L1; return the loaded tokens."""
    found[f"kvcore cold{where}"] = answers(reuses, given.tokens)
    time.sleep(1.0)  # the last stores
    reuses.reset()
    before = kvcore_loaded(endpoint).get("l1", 0.0)
    found[f"kvcore l1{where}"] = answers(reuses, given.tokens)
    return settled(endpoint) - before


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
            as_good = [count for name, count in row["equal"].items() if name.endswith("to a hit in the engine's cache")]
            loaded = min(row["loaded_tokens"].values()) > 0
            met = min(as_good) >= wanted and loaded and row["changed by zeros in l1"] > 0
            good &= met
            say(f"{'met   ' if met else 'MISSED'} {dtype}: {row}")
            write(given.out, result)
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
