"""Multi-turn sessions whose working set is three times the GPU's cache, under each way to keep KV in host memory.

    python benchmarks/load_h100.py --out benchmarks/results/load-h100.json

Each system gets the same sessions (from kvtraces' generator, real token ids, think times included), the same host
memory, its recommended flags, and a fresh `vllm serve`. A session sends its next turn when the last one has been
answered and thought about. With the defaults about two minutes a system on an H100, most of it the engine's start. A
system that fails is reported and the next goes on; exit code 1 then. With --go-on the results of an --out of the same
setting are kept and only the systems that it lacks are run: on the same machine, or they cannot be compared.
"""

import argparse
import asyncio
import json
import shlex
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from vllm_gpu import Serve, client, complete, facts, interrupt_on_term, model_folder, quantiles, say, warm_up, write

from kvcore.vllm.ttft.engine import EngineError
from kvcore.vllm.ttft.systems import SYSTEMS, Sizes, started
from kvtraces import Chat, Poisson, Spread, workload

BLOCK = 16
GRAPHS = [1, 2, 4, 8, 16, 24, 32, 64, 128, 256, 512]
FEW_GRAPHS = f"""--compilation-config '{{"cudagraph_capture_sizes": {GRAPHS}}}'"""
"""A graph for every batch that comes up, padded more than by vLLM's own sizes, and an engine that is up sooner."""


def sessions_of(given):
    """[session][turn] of (prompt token ids, output tokens, think time in s before the turn)."""
    config = Chat(
        requests=40 * given.sessions * given.turns,
        seed=given.seed,
        arrivals=Poisson(sessions_per_s=1.0),
        block_tokens=BLOCK,
        vocabulary=given.vocabulary,
        system_prompts=8,
        system_tokens=Spread(median=given.system_tokens, sigma=0.4, high=4 * given.system_tokens),
        turns=2.0 * given.turns,
        user_tokens=Spread(median=given.user_tokens, sigma=0.5, high=8 * given.user_tokens),
        output_tokens=Spread(median=given.output_tokens, sigma=0.0, high=given.output_tokens),
        max_context_tokens=given.max_context,
    )
    generated = workload(config)
    by_session = defaultdict(list)
    for number, request in enumerate(generated.requests):
        by_session[request.session].append(number)
    chosen = [numbers for numbers in by_session.values() if len(numbers) >= given.turns][: given.sessions]
    if len(chosen) < given.sessions:
        raise SystemExit(f"only {len(chosen)} sessions of {given.turns} turns came out: fewer turns or more context")
    rng = np.random.default_rng(given.seed)
    return [
        [(generated.tokens_of(number).tolist(), given.output_tokens, float(rng.exponential(given.think_s)))
         for number in numbers[: given.turns]]
        for numbers in chosen
    ]  # fmt: skip


def working_set(sessions):
    """Tokens of all distinct full blocks of all prompts."""
    seen = set()
    for turns in sessions:
        prompt, name = turns[-1][0], 0
        for start in range(0, len(prompt) - BLOCK + 1, BLOCK):
            name = hash((name, tuple(prompt[start : start + BLOCK])))
            seen.add(name)
    return BLOCK * len(seen)


async def play(url, sessions, duration_s):
    """All sessions at once; no turn begins after `duration_s`. Returns (turn, prompt tokens, Timed) of each request."""
    done, begun = [], time.perf_counter()

    async def one(session, turns):
        for turn, (prompt, tokens, think_s) in enumerate(turns):
            await asyncio.sleep(think_s)
            if time.perf_counter() - begun > duration_s:
                return
            done.append((turn, len(prompt), await complete(session, url, prompt, tokens)))

    async with client() as session:
        await asyncio.gather(*(one(session, turns) for turns in sessions))
    return done, time.perf_counter() - begun


def figures(done, elapsed_s, planned):
    """What one system brought."""
    prompt_tokens = sum(tokens for _, tokens, _ in done)
    output_tokens = sum(timed.output_tokens for _, _, timed in done)
    return {
        "requests": len(done),
        "requests_planned": planned,
        "elapsed_s": elapsed_s,
        "ttft_s": quantiles([timed.ttft_s for _, _, timed in done]),
        "ttft_later_turns_s": quantiles([timed.ttft_s for turn, _, timed in done if turn]),
        "latency_s": quantiles([timed.end_s - timed.sent_s for _, _, timed in done]),
        "tokens_per_s": (prompt_tokens + output_tokens) / elapsed_s,
        "output_tokens_per_s": output_tokens / elapsed_s,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
    }


def run(name, given, model, sessions, gpu_blocks, longest):
    """One system in a fresh engine."""
    folder = Path(tempfile.mkdtemp(prefix="kvcore-load-"))
    flags = ["--max-model-len", longest, "--num-gpu-blocks-override", gpu_blocks, "--dtype", given.dtype]
    flags += ["--load-format", given.load_format, "--gpu-memory-utilization", given.gpu_memory_utilization]
    flags += ["--max-num-batched-tokens", given.max_num_batched_tokens, "--block-size", given.block_size]
    flags += ["--enforce-eager"] if given.eager else []
    flags += shlex.split(given.serve_flags)
    sizes = Sizes(l1_gb=given.l1_gb, chunk_tokens=given.chunk)
    with started(name, sizes, folder) as running:
        config = running.arguments.get("kv_transfer_config")
        with Serve(model, given.logs / f"load-{name}.log", *flags, kv_transfer_config=config) as serve:
            say(f"{name}: up after {serve.start_s:.0f} s")
            running.ready()
            if config and not given.no_pin_wait:
                time.sleep(0.25 * given.l1_gb)
            warm_up(serve, [min(512, longest // 2), longest // 2], given.vocabulary)
            before = serve.metrics()
            done, elapsed_s = asyncio.run(play(serve.url, sessions, given.duration_s))
            after = serve.metrics()
    found = figures(done, elapsed_s, sum(map(len, sessions)))
    counted = ("vllm:prefix_cache_hits_total", "vllm:external_prefix_cache_hits_total", "vllm:num_preemptions_total")
    found["counters"] = {key: after.get(key, 0.0) - before.get(key, 0.0) for key in counted}
    found["engine_start_s"] = serve.start_s
    ttft = found["ttft_s"]
    say(f"{name}: {len(done)} requests in {elapsed_s:.1f} s, TTFT p50 {ttft['p50']:.3f} p95 {ttft['p95']:.3f} s, "
        f"{found['tokens_per_s']:,.0f} tokens/s, {found['counters']}")  # fmt: skip
    if found["counters"]["vllm:external_prefix_cache_hits_total"] == 0 and name != "none":
        raise EngineError(f"no hit beyond the GPU's cache: {found}")
    return found


def ratios(results):
    """Ours over each of the others."""
    found = {}
    for ours in (name for name in results if name.startswith("kvcore")):
        for other in (name for name in results if not name.startswith("kvcore")):
            mine, theirs = results[ours], results[other]
            found[f"{ours} / {other}"] = {
                "ttft_p50": mine["ttft_s"]["p50"] / theirs["ttft_s"]["p50"],
                "ttft_p95": mine["ttft_s"]["p95"] / theirs["ttft_s"]["p95"],
                "tokens_per_s": mine["tokens_per_s"] / theirs["tokens_per_s"],
            }
    return found


def gone_on(before, result):
    """The result with what an earlier run found; SystemExit where that was of another setting or device."""
    apart = {"systems", "budget_s", "go_on", "logs", "out"}
    settings = [
        {name: value for name, value in one["setting"].items() if name not in apart} for one in (before, result)
    ]
    if settings[0] != settings[1] or before["device"] != result["device"]:
        raise SystemExit("--go-on: the results in --out are of another setting or device")
    commands = [*before.get("commands", [before["command"]]), result["command"]]
    return {**result, "commands": commands, "results": before["results"], "ratios": before["ratios"]}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "load-h100.json")
    parser.add_argument("--model", default="qwen3-8b", help="a model of vllm_gpu.py, or a folder")
    parser.add_argument("--systems", default="none,offloading,lmcache,kvcore-mp", help=", ".join(SYSTEMS))
    parser.add_argument("--sessions", type=int, default=32)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--think-s", type=float, default=1.0, help="mean, exponentially distributed")
    parser.add_argument("--system-tokens", type=int, default=3000)
    parser.add_argument("--user-tokens", type=int, default=600)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--max-context", type=int, default=32_000)
    parser.add_argument("--duration-s", type=float, default=75.0, help="no turn begins later")
    parser.add_argument("--working-sets", type=float, default=3.0, help="the working set over the GPU's cache")
    parser.add_argument("--l1-gb", type=float, default=40.0, help="host memory of every system, 2^30 bytes")
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--serve-flags", default=FEW_GRAPHS, help="more flags of vllm serve")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--block-size", type=int, default=BLOCK)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--no-pin-wait", action="store_true", help="do not wait until host memory is pinned")
    parser.add_argument("--budget-s", type=float, default=540.0, help="start no system that would probably end later")
    parser.add_argument("--go-on", action="store_true", help="keep the results that are in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()) / "kvcore-load-logs")
    return parser.parse_args()


def main():
    given = arguments()
    interrupt_on_term()
    given.logs.mkdir(parents=True, exist_ok=True)
    model = model_folder(given.model, tempfile.gettempdir())
    sessions = sessions_of(given)
    longest = max(len(turns[-1][0]) + turns[-1][1] for turns in sessions) + 64
    tokens = working_set(sessions)
    gpu_blocks = max(int(tokens / given.working_sets), longest) // given.block_size + 2
    result = {
        **facts(),
        "setting": {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()},
        "working_set_tokens": tokens,
        "gpu_cache_tokens": gpu_blocks * given.block_size,
        "longest_tokens": longest,
        "results": {},
        "ratios": {},
        "failures": {},
    }
    say(f"working set {tokens:,} tokens, GPU cache {gpu_blocks * given.block_size:,}, longest request {longest:,}")
    if given.go_on and given.out.exists():
        result = gone_on(json.loads(given.out.read_text()), result)
    begun, slowest = time.perf_counter(), 0.0
    for name in given.systems.split(","):
        if name in result["results"]:
            continue
        if time.perf_counter() - begun + slowest > given.budget_s:
            result["failures"][name] = "not run: out of time"
            continue
        at = time.perf_counter()
        try:
            result["results"][name] = run(name, given, model, sessions, gpu_blocks, longest)
        except (EngineError, OSError, ValueError, KeyError) as error:
            result["failures"][name] = f"{type(error).__name__}: {error}"
            say(f"{name} FAILED: {result['failures'][name][:600]}")
        slowest = max(slowest, time.perf_counter() - at)
        result["ratios"] = ratios(result["results"])
        write(given.out, result)
    for pair, values in result["ratios"].items():
        say(pair, {name: round(value, 3) for name, value in values.items()})
    for name, why in result["failures"].items():
        say(f"FAILED {name}: {why[:300]}")
    raise SystemExit(1 if result["failures"] else 0)


if __name__ == "__main__":
    main()
