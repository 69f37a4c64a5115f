"""Replay a request log through `vllm serve` and `kvcore serve --record --journal`, for `kvsim validate` to predict.

    python benchmarks/predict_h100.py --log conversation.jsonl --out OUT_DIR
    python benchmarks/predict_h100.py --log conversation.jsonl --out OUT_DIR --replays 1 --settings

The first requests of a Mooncake log (of one conversation in `--every`, so that conversations come back within the
replay as they do in the log) are replayed with its structure: each of its blocks becomes `--block-tokens` tokens
that follow from the block's id, so equal prefixes stay equal; prompts and outputs shrink alike. Arrivals of one
timestamp are spread until the next one, and all are scaled to take `--seconds`. Every replay starts from empty caches
and a new server; vLLM stays up. Without --log a generated chat workload is replayed.

A connector packs KV here, so it is `kvsim validate --packing lossless` that predicts these logs; with --keep-journals,
`kvsim validate --trace LOG --journal JOURNAL --profile PROFILE` finds out by itself.

With --calibrate PROFILE the engine is measured first, as `kvsim calibrate --url` does it, for a profile of the machine
of the day (profile.json): sizes and copies are taken from PROFILE, and the grid is smaller than profile_h100.py's.

OUT_DIR gets predict.json (what was set, client-side TTFT, what the journal's replay says, hits) and logs.tar (the
recorded logs, and with --keep-journals the journals). With --settings each of several further settings is replayed
once as well, for the order in which a simulator ranks them. About 60 s to start, then 20 s a replay beside the replay.
"""

import argparse
import asyncio
import gzip
import hashlib
import json
import shlex
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from vllm_gpu import (
    Serve,
    client,
    complete,
    facts,
    interrupt_on_term,
    model_folder,
    quantiles,
    say,
    wait_until_registered,
    warm_up,
    write,
)

from kvcore.vllm.ttft.engine import EngineError
from kvcore.vllm.ttft.systems import connector, kvcore_counts, kvcore_server, wait_until_touched
from kvsim.calibration import Facts, HttpEndpoint, Plan, calibrate
from kvsim.profiles import load
from kvsim.profiles.load import to_json
from kvtraces import Chat, Poisson, Segment, Spread, read, segment_tokens, workload
from kvtraces.journal import Equal, JournalError, verify

LOG_BLOCK = 512
SETTINGS = "busy:rate=1.6 busy-none:l1=0.25,rate=1.6 crowded-none:l1=0.25,rate=1.75 none:l1=0.25"
"""With the replays' own setting five whose TTFT is a quarter or more apart, from one to the next."""
NEW = (1, 64, 256, 512, 520, 1024, 2048, 4096, 8192)
CACHED = (0, 2048, 8192, 32_768)
BATCH = (1, 4, 16, 32)
CONTEXT = (16, 2048, 8192)


class Requests:
    """What is replayed: arrival in s from the start, prompt token ids, output tokens."""

    def __init__(self, rows, seconds):
        times = spread([time_s for time_s, _, _ in rows])
        scale = seconds / max(times[-1], 1e-9)
        self.rows = [(scale * at, prompt, tokens) for at, (_, prompt, tokens) in zip(times, rows, strict=True)]
        self.time_scale = scale

    def about(self):
        lengths = [len(prompt) for _, prompt, _ in self.rows]
        return {
            "requests": len(self.rows),
            "time_scale": self.time_scale,
            "prompt_tokens": sum(lengths),
            "prompt_tokens_p50": float(np.median(lengths)),
            "prompt_tokens_max": max(lengths),
            "output_tokens": sum(tokens for _, _, tokens in self.rows),
        }


def spread(times):
    """Equal times become even steps until the next time; the last ones keep the step before."""
    times = np.asarray(times, dtype=float)
    distinct, counts = np.unique(times, return_counts=True)
    gaps = np.diff(distinct, append=distinct[-1] + (distinct[-1] - distinct[-2] if len(distinct) > 1 else 1.0))
    steps = [np.arange(count) * gap / count for gap, count in zip(gaps, counts, strict=True)]
    return (np.sort(times) + np.concatenate(steps) - times.min()).tolist()


def from_log(given):
    """The log's first requests that fit, in its order."""
    rows = []
    opened = gzip.open if given.log.suffix == ".gz" else open
    with opened(given.log, "rt") as lines:
        for line in lines:
            row = json.loads(line)
            if conversation(row["hash_ids"]) % given.every:
                continue
            tokens = max(1, round(row["input_length"] * given.block_tokens / LOG_BLOCK))
            output = max(1, round(row["output_length"] * given.block_tokens / LOG_BLOCK))
            if tokens + output > given.max_model_len - 1:
                continue
            parts = [
                segment_tokens(Segment(given.seed << 48 | int(name), given.block_tokens), given.vocabulary)
                for name in row["hash_ids"]
            ]
            rows.append((row["timestamp"] / 1000, np.concatenate(parts)[:tokens].tolist(), output))
            if len(rows) == given.requests:
                break
    return rows


def conversation(names):
    """A number of the conversation that a prompt belongs to: of its second block, for many share the first."""
    return int.from_bytes(hashlib.sha256(str(names[:2][-1:]).encode()).digest()[:4], "little")


def generated(given):
    """Chat sessions from the project's own generator."""
    made = workload(
        Chat(
            requests=2 * given.requests,  # not all fit
            seed=given.seed,
            arrivals=Poisson(sessions_per_s=1.0),
            block_tokens=16,
            vocabulary=given.vocabulary,
            max_context_tokens=given.max_model_len // 2,
            system_prompts=8,
            system_tokens=Spread(median=given.system_tokens, sigma=0.5, high=10 * given.system_tokens),
            user_tokens=Spread(median=given.user_tokens, sigma=0.8, high=20 * given.user_tokens),
            output_tokens=Spread(median=given.user_tokens, sigma=0.5, high=10 * given.user_tokens),
        )
    )
    rows = []
    for number, request in enumerate(made.requests):
        prompt, output = made.tokens_of(number).tolist(), min(request.output.length, given.max_output)
        if len(prompt) + output < given.max_model_len:
            rows.append((request.time_ms / 1000, prompt, output))
    return rows[: given.requests]


async def play(url, rows):
    """Send every request at its time, whatever has been answered. Returns Timed by row, and how late one was sent."""
    found, late = [None] * len(rows), 0.0
    begun = time.perf_counter() + 0.2

    async def one(session, number, prompt, tokens):
        found[number] = await complete(session, url, prompt, tokens)

    async with client() as session, asyncio.TaskGroup() as tasks:
        for number, (at, prompt, tokens) in enumerate(rows):
            wait = begun + at - time.perf_counter()
            late = max(late, -wait)
            await asyncio.sleep(max(0.0, wait))
            tasks.create_task(one(session, number, prompt, tokens))
    return found, late, time.perf_counter() - begun


class Replays:
    """One engine, and a new kvcore server for every replay."""

    def __init__(self, given, model, scratch):
        self.given = given
        self.model = model
        self.scratch = scratch
        self.serve = None

    def close(self):
        if self.serve is not None:
            self.serve.close()
            self.serve = None

    def replay(self, name, requests, *, l1_gb, chunk, record=True):
        """Replay once; returns figures, and the files that the server wrote. Raises EngineError."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.scratch))
        flags = {"l1-size-gb": l1_gb, "chunk-size": chunk}
        if record:
            flags |= {"record": folder / f"{name}.jsonl.gz", "journal": folder / "journal"}
        # every server listens at the same place, so that the engine finds the next one by itself
        with kvcore_server(self.scratch, **flags) as endpoint:
            wait_until_touched(endpoint)
            self._engine(endpoint, l1_gb)
            self.serve.reset()
            if not record:
                warm_up(self.serve, [256, 2048, min(8192, self.given.max_model_len // 2)], self.given.vocabulary)
                if self.given.calibrate is not None:
                    calibrated(self.given, self.serve.url)
                return {}, folder
            before = self.serve.metrics()
            done, late_s, elapsed_s = asyncio.run(play(self.serve.url, requests.rows))
            time.sleep(1.0)  # the last stores and records
            after, counts = self.serve.metrics(), kvcore_counts(endpoint)
        found = {
            "l1_gb": l1_gb,
            "chunk_tokens": chunk,
            "elapsed_s": elapsed_s,
            "sent_late_s": late_s,
            "ttft_s": quantiles([timed.ttft_s for timed in done]),
            "latency_s": quantiles([timed.end_s - timed.sent_s for timed in done]),
            "engine": {
                key: after.get(key, 0.0) - before.get(key, 0.0)
                for key in (
                    "vllm:prefix_cache_hits_total",
                    "vllm:external_prefix_cache_hits_total",
                    "vllm:num_preemptions_total",
                )
            },
            "server": {" ".join(map(str, key)): value for key, value in counts.items() if "tokens" in key[0]},
            "recorder_dropped": sum(value for key, value in counts.items() if key[0] == "kvcore_recorder_dropped"),
            "log": self._log(folder, requests),
            "journal": self._journal(folder),
        }
        ttft = found["ttft_s"]
        say(f"{name}: TTFT p50 {ttft['p50']:.4f} p95 {ttft['p95']:.4f} s, {elapsed_s:.1f} s, late {late_s:.3f} s, "
            f"journal {found['journal']}, log {found['log']}, {found['engine']}")  # fmt: skip
        return found, folder

    def _engine(self, endpoint, l1_gb):
        """The engine of before, once it has found the server; a new one where there is none, or it does not."""
        if self.serve is not None:
            try:
                wait_until_registered(endpoint)
            except EngineError as error:
                say(f"the engine starts anew: {error}")
                self.close()
        if self.serve is None:
            self._start(endpoint)
            wait_until_registered(endpoint)
        time.sleep(self.given.pin_s_per_gb * l1_gb)

    def _start(self, endpoint):
        given = self.given
        flags = ["--max-model-len", given.max_model_len, "--dtype", given.dtype, "--load-format", given.load_format]
        flags += ["--num-gpu-blocks-override", given.gpu_blocks, "--block-size", given.block_size]
        flags += ["--max-num-batched-tokens", given.max_num_batched_tokens, "--max-num-seqs", given.max_num_seqs]
        flags += ["--gpu-memory-utilization", given.gpu_memory_utilization, *(["--enforce-eager"] * given.eager)]
        flags += shlex.split(given.serve_flags)
        log = given.out / "vllm-serve.log"
        config = connector("KVCoreMPConnector", endpoint=endpoint)
        self.serve = Serve(self.model, log, *flags, kv_transfer_config=config)
        say(f"vllm serve is up after {self.serve.start_s:.0f} s")

    def _log(self, folder, requests):
        """What the recorded log holds."""
        log = read(sorted(folder.glob("*.jsonl.gz")))
        found = {"rows": len(log), "missing": len(requests.rows) - len(log), "block_tokens": log.block_tokens}
        for column in ("ttft_ms", "l0_tokens", "matched_l1", "loaded_tokens", "queue_ms", "load_ms", "prefill_ms"):
            values = log.extra.get(column)
            known = np.zeros(0) if values is None else values.astype(float)[np.isfinite(values.astype(float))]
            found[column] = {"rows": len(known), "sum": float(known.sum())} if len(known) else None
        if (ttft := log.extra.get("ttft_ms")) is not None:
            found["ttft_s"] = quantiles(1e-3 * ttft.astype(float)[np.isfinite(ttft.astype(float))])
        return found

    def _journal(self, folder):
        """Whether every decision comes out equal, decided again."""
        try:
            found = verify(folder / "journal")
        except JournalError as error:
            return {"equal": False, "error": str(error)}
        return {"equal": isinstance(found, Equal), "says": str(found)}


def calibrated(given, url):
    """Measure the engine's profile through its server, and write it to OUT_DIR."""
    known = load(given.calibrate)
    longest, tokens = given.max_model_len - 32, given.gpu_blocks * given.block_size
    plan = Plan(
        prefill=tuple((n, c) for c in CACHED for n in NEW if n + c < longest and n <= given.max_num_batched_tokens),
        decode=tuple((b, c) for c in CONTEXT for b in BATCH if c < longest and b * (c + 32) < tokens),
        decode_steps=24,
        vocabulary=given.vocabulary,
    )
    same = ("name", "model", "gpu", "layers", "kv_bytes_per_token", "weight_bytes", "gpu_memory_bytes", "max_model_len")
    facts_ = Facts(
        **{name: getattr(known, name) for name in same},
        transfers=known.transfers,
        transfers_from=known.provenance["pcie"],
        duplex=known.duplex,
    )
    profile = calibrate(HttpEndpoint(url, model="model"), plan, facts_)
    (given.out / "profile.json").write_text(to_json(profile))
    say(f"calibrated: prefill of 8,192 {profile.prefill_s(8192):.4f} s, handling {profile.handling_base_s:.5f} s + "
        f"{profile.handling_token_s:.2e} s a token")  # fmt: skip


def run_spread(results):
    """How far repeated runs lie apart, as a share of their median, by percentile of TTFT."""
    spreads = {}
    for point in ("p50", "p90", "p95", "p99"):
        values = [result["log"]["ttft_s"][point] for result in results if result["log"].get("ttft_s")]
        if len(values) > 1:
            spreads[point] = (max(values) - min(values)) / float(np.median(values))
    return spreads


def settings_of(text, given):
    """[(name, l1_gb, chunk, rate)] of NAME:key=value,... words."""
    found = []
    for word in text.split():
        name, _, rest = word.partition(":")
        values = dict(part.split("=") for part in rest.split(",") if part)
        unknown = set(values) - {"l1", "chunk", "rate"}
        if unknown:
            raise SystemExit(f"--settings {word}: no key {', '.join(sorted(unknown))}; there are l1, chunk, rate")
        l1, chunk = float(values.get("l1", given.l1_gb)), int(values.get("chunk", given.chunk))
        found.append((name, l1, chunk, float(values.get("rate", 1.0))))
    return found


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--log", type=Path, help="a Mooncake log with blocks of 512 tokens; else a generated one")
    parser.add_argument("--requests", type=int, default=550)
    parser.add_argument("--every", type=int, default=4, help="keep one conversation of the log in so many, whole")
    parser.add_argument("--seconds", type=float, default=115.0, help="of a replay's arrivals")
    parser.add_argument("--replays", type=int, default=3)
    parser.add_argument("--settings", nargs="?", const=SETTINGS, help="replay these once as well: " + SETTINGS)
    parser.add_argument("--calibrate", type=Path, help="a profile: measure the engine's own first")
    parser.add_argument("--block-tokens", type=int, default=128, help="tokens of what is a block of 512 in the log")
    parser.add_argument("--system-tokens", type=int, default=800, help="of a generated workload, in the median")
    parser.add_argument("--user-tokens", type=int, default=160, help="of a turn and an answer there, in the median")
    parser.add_argument("--max-output", type=int, default=128, help="of a generated workload")
    parser.add_argument("--model", default="qwen3-8b", help="a model of vllm_gpu.py, or a folder")
    parser.add_argument("--max-model-len", type=int, default=33_024)
    parser.add_argument(
        "--gpu-blocks",
        type=int,
        default=10_000,
        help="of the GPU's cache: few enough to hit L1, enough to preempt nobody",
    )
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--l1-gb", type=float, default=40.0)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    parser.add_argument("--serve-flags", default="", help="more flags of vllm serve")
    parser.add_argument("--pin-s-per-gb", type=float, default=0.25, help="wait for the arena to be pinned")
    parser.add_argument("--keep-journals", action="store_true")
    parser.add_argument("--budget-s", type=float, default=560.0, help="start no replay that would end later")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def main():
    given = arguments()
    interrupt_on_term()
    given.out.mkdir(parents=True, exist_ok=True)
    rows = from_log(given) if given.log else generated(given)
    plan = [(f"replay-{number}", given.l1_gb, given.chunk, 1.0) for number in range(1, given.replays + 1)]
    plan += settings_of(given.settings or "", given)
    result = {
        **facts(),
        "setting": {key: str(value) if isinstance(value, Path) else value for key, value in vars(given).items()},
        "log": Requests(rows, given.seconds).about(),
        "replays": {},
        "failures": {},
    }
    say(result["log"])
    with (
        tempfile.TemporaryDirectory(prefix="kvcore-predict-") as folder,
        tarfile.open(given.out / "logs.tar", "w") as logs,
    ):
        model = model_folder(given.model, tempfile.gettempdir())  # a new path would be compiled for anew
        replays = Replays(given, model, Path(folder))
        begun = time.perf_counter()
        try:
            replays.replay("warm-up", None, l1_gb=min(given.l1_gb, 8.0), chunk=given.chunk, record=False)
            for name, l1_gb, chunk, rate in plan:
                requests = Requests(rows, given.seconds / rate)
                if time.perf_counter() - begun + given.seconds / rate + 25 > given.budget_s:
                    result["failures"][name] = "not run: out of time"
                    continue
                one(replays, name, requests, {"l1_gb": l1_gb, "chunk": chunk, "rate": rate}, result, logs)
                write(given.out / "predict.json", result)
        except EngineError as error:
            result["failures"]["engine"] = str(error)
        finally:
            replays.close()
    replayed = [found for name, found in result["replays"].items() if name.startswith("replay-")]
    result["run_spread_of_ttft"] = run_spread(replayed)
    write(given.out / "predict.json", result)
    say("spread of the runs:", result.get("run_spread_of_ttft"))
    for name, why in result["failures"].items():
        say(f"FAILED {name}: {why[:600]}")
    raise SystemExit(1 if result["failures"] else 0)


def one(replays, name, requests, setting, result, logs):
    """Replay under one setting into the result; what fails is kept there too."""
    try:
        found, folder = replays.replay(name, requests, l1_gb=setting["l1_gb"], chunk=setting["chunk"])
    except (EngineError, OSError, ValueError, ExceptionGroup) as error:
        causes = error.exceptions if isinstance(error, ExceptionGroup) else (error,)
        result["failures"][name] = "; ".join(f"{type(cause).__name__}: {cause}" for cause in causes[:3])
        say(f"{name} FAILED: {result['failures'][name]}")
        return
    result["replays"][name] = {**found, "rate": setting["rate"], "time_scale": requests.time_scale}
    for file in sorted(folder.glob("*.jsonl.gz")):
        logs.add(file, file.name)
    if replays.given.keep_journals:
        logs.add(folder / "journal", f"{name}-journal")
    if not found["journal"]["equal"]:
        result["failures"][name] = f"the journal does not replay equal: {found['journal']}"
    elif found["log"]["missing"] or found["recorder_dropped"]:
        result["failures"][name] = f"the log misses requests: {found['log']}"


if __name__ == "__main__":
    main()
