"""The command line of the benchmark; `kvcore bench ttft` runs it."""

import datetime as dt
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TypeAlias

import typer

from kvcore.live.arena import DEFAULT_PAGE_BYTES
from kvcore.vllm.ttft import report
from kvcore.vllm.ttft.engine import Engine, EngineError
from kvcore.vllm.ttft.measure import Measurement, Plan, Sample
from kvcore.vllm.ttft.systems import SYSTEMS, Running, Sizes, kv_bytes_per_token, model_limit, started

_PEER_PACKAGES = {"vllm", "torch", "lmcache", "numpy", "kvcore"}
_SYSTEMS_HELP = (
    "What to run, in this order, with commas; a name may come again; those that can run by default. "
    + "; ".join(f"{name}: {about}" for name, (about, _) in SYSTEMS.items())
)
Run: TypeAlias = tuple[int, str]
"""A run's number and its system."""
_FAILURES = (EngineError, OSError, ValueError)
"""What ends one system's run, and not the others'."""
_SPREAD = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
_EVICTABLE = 1.25
"""L1 of kvcore-l2 over what the longest prompt takes."""


@dataclass(slots=True)
class Bench:
    """All runs of one command, and what they brought."""

    plan: Plan
    sizes: Sizes
    arguments: dict[str, Any]
    in_process: bool
    logs: Path
    budget_s: float
    out: Path | None
    together: int = 1
    samples: list[Sample] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def all(self, order: list[str]) -> None:
        """Run the systems in order, so many at a time; one that fails is reported and the others go on."""
        runs, longest = [*enumerate(order)], 0.0
        for first in range(0, len(runs), self.together):
            group = runs[first : first + self.together]
            begun = time.monotonic()
            if begun - self.began + longest > self.budget_s:
                self._failed("not run, out of time", *group)
                continue
            try:
                with ExitStack() as stack:
                    self._take_turns(self._started(group, stack))
            except _FAILURES as error:  # of ending them: what fails before is caught for its own run
                self._failed(error, *group)
            longest = max(longest, time.monotonic() - begun)
            self.write()

    def _failed(self, why: object, *runs: Run) -> None:
        which = ", ".join(f"{name}, run {number}" for number, name in runs)
        self.failures.append(f"{which}: {' '.join(str(why).split())}")
        self.say(f"FAILED: {self.failures[-1]}")

    def _started(self, group: list[Run], stack: ExitStack) -> dict[Run, Measurement]:
        """Start a group's engines, all at once, and return a measurement of each that is up."""
        starting: dict[Run, tuple[Engine, Running]] = {}
        for run in group:
            self.say(f"{run[1]}: starting")
            try:
                starting[run] = self._start(run, stack)
            except _FAILURES as error:
                self._failed(error, run)
        up: dict[Run, Measurement] = {}
        pins = False
        for run, (engine, running) in starting.items():
            try:
                facts = engine.facts
            except _FAILURES as error:
                self._failed(error, run)
                continue
            number, name = run
            self.say(f"{name}: engine up after {facts['start_s']:.1f} s")
            self.runs.append({"system": name, "run": number, "engine": facts})
            pins |= bool(facts["cuda"] and running.chunk_tokens)
            up[run] = Measurement(engine, running, self.plan, name, number, self.say)
        if pins:
            time.sleep(0.25 * self.sizes.l1_gb)  # pinning goes on in the background, at about 8 GB/s
        return up

    def _start(self, run: Run, stack: ExitStack) -> tuple[Engine, Running]:
        """Run what a system needs, and begin to start its engine; both end with `stack`."""
        number, name = run
        folder = Path(tempfile.mkdtemp(prefix="kvcore-ttft-"))
        self.logs.mkdir(parents=True, exist_ok=True)
        running = stack.enter_context(started(name, self.sizes, folder))
        environment = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if self.in_process else "1",
            **running.environment,
        }
        arguments = {**self.arguments, **running.arguments}
        return stack.enter_context(Engine(arguments, environment, self.logs / f"{number}-{name}.log")), running

    def _take_turns(self, measurements: dict[Run, Measurement]) -> None:
        """Measure a group: each prompt in every engine before the next, so that what drifts drifts for all."""
        turns = {run: measurement.turns() for run, measurement in measurements.items()}
        try:
            while turns:
                for run in [*turns]:
                    try:
                        next(turns[run])
                    except StopIteration:
                        del turns[run]
                    except _FAILURES as error:
                        del turns[run]
                        self._failed(error, run)
        finally:
            for measurement in measurements.values():
                self.samples += measurement.samples

    def say(self, line: str) -> None:
        """Print a progress line to standard error."""
        typer.echo(f"[{time.monotonic() - self.began:6.1f} s] {line}", err=True)

    def result(self) -> dict[str, Any]:
        """Return everything, as JSON can carry it."""
        facts = self.runs[0]["engine"] if self.runs else {}
        return {
            "command": shlex.join(["kvcore", "bench", "ttft", *sys.argv[1:]]),
            "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
            "device": facts.get("device"),
            "versions": {"python": platform.python_version(), **facts.get("versions", {}), **_versions()},
            "plan": asdict(self.plan),
            "sizes": asdict(self.sizes),
            "arguments": self.arguments,
            "engine_in_process": self.in_process,
            "together": self.together,
            "seconds": round(time.monotonic() - self.began, 1),
            "figures": report.figures(self.samples),
            "ratios": report.ratios(self.samples),
            "quiet": self._quiet(),
            "outputs": report.outputs(self.samples),
            "failures": self.failures + report.faults(self.samples),
            "runs": self.runs,
            "samples": [asdict(sample) for sample in self.samples],
        }

    def _quiet(self) -> dict[str, Any]:
        """Return the figures of requests during which the engine's processor was at full speed."""
        looked, quiet = [sample for sample in self.samples if sample.looks_s], report.quiet(self.samples)
        return {
            "title": f"The same while the engine's processor was at full speed: {len(quiet)} of {len(looked)} requests",
            "figures": report.figures(quiet),
            "ratios": report.ratios(quiet),
        }

    def write(self) -> None:
        """Write what there is so far: a run that is cut off keeps its figures."""
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.result(), indent=1) + "\n")


def main(  # noqa: PLR0913, PLR0917 - one a flag
    model: Annotated[str, typer.Option(help="Name or folder.")],
    systems: Annotated[str, typer.Option(help=_SYSTEMS_HELP)] = "",
    rounds: Annotated[int, typer.Option(min=1, help="How often to go through them, in fresh engines.")] = 2,
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens; those beyond the model's are left out.")] = (
        "2048,8192,32000"
    ),
    repeats: Annotated[int, typer.Option(min=1, help="Prompts of each length with hits, in each engine.")] = 3,
    hits: Annotated[int, typer.Option(min=1, help="Hits of each prompt in each cache.")] = 3,
    cold: Annotated[int, typer.Option(min=0, help="Further cold prompts of each length, in each engine.")] = 4,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 8,
    decode_tokens: Annotated[int, typer.Option(min=0, help="Tokens of each decoding request; 0: none.")] = 256,
    decode_batch: Annotated[int, typer.Option(min=1, help="Requests that decode together.")] = 8,
    decode_repeats: Annotated[int, typer.Option(min=1, help="Batches that decode, in each engine.")] = 4,
    settle_s: Annotated[float, typer.Option(min=0.0, help="Pause after a cold prompt.")] = 1.0,
    load_format: Annotated[str, typer.Option(help="vLLM's; dummy for random weights.")] = "auto",
    dtype: Annotated[str, typer.Option(help="vLLM's.")] = "auto",
    eager: Annotated[bool, typer.Option("--eager/--graphs", help="Without CUDA graphs, or as vLLM does.")] = False,
    gpu_memory_utilization: Annotated[float, typer.Option(help="vLLM's.")] = 0.85,
    max_num_batched_tokens: Annotated[int, typer.Option(help="vLLM's; 0 leaves its own.")] = 8192,
    engine_arg: Annotated[list[str] | None, typer.Option(help="KEY=JSON: another of vLLM's arguments.")] = None,
    fastest_processor: Annotated[
        bool, typer.Option(help="Have each request's engine run on the processor that is fastest at that moment.")
    ] = False,
    in_process: Annotated[bool, typer.Option(help="The engine's core in the process that calls it.")] = False,
    l1_size_gb: Annotated[float, typer.Option(min=0.001, help="Host memory of every system, 2^30 bytes.")] = 32.0,
    chunk_size: Annotated[int, typer.Option(min=1, help="Chunk of the kvcore server.")] = 256,
    l2: Annotated[str, typer.Option(help="files:/path and so on: kvcore-l2 is run as well, at the end.")] = "",
    l2_size_gb: Annotated[float, typer.Option(min=0.0, help="Size of L2.")] = 64.0,
    together: Annotated[
        int, typer.Option(min=1, help="So many engines at once, by turns; give each its share of the GPU.")
    ] = 1,
    budget_s: Annotated[float, typer.Option(help="Start nothing that would probably end later.")] = 3600.0,
    out: Annotated[Path | None, typer.Option(help="JSON file of everything.")] = None,
    logs: Annotated[Path | None, typer.Option(help="Folder for what the engines print; a new one in /tmp.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, without samples, instead of a table.")] = False,
) -> None:
    r"""Measure TTFT: cold, with a hit in the GPU's cache, in L1 and in L2, with and without a connector.

    Each system runs in engines of its own, one at a time or (--together) by turns, over the same prompts; what is
    compiled or pinned on first use is not measured. Hits are checked by every system's own counters, answers against
    those of vLLM alone. Exit code 1 where something failed; the rest is measured and reported all the same. On a host
    whose processors others slow down now and then, --fastest-processor keeps every system's engine out of their way.

    \b
    Examples:
      kvcore bench ttft --model Qwen/Qwen3-8B
      kvcore bench ttft --model ./qwen3-8b --load-format dummy --eager --systems none,kvcore,none,kvcore --rounds 1
      kvcore bench ttft --model ./qwen3-8b --l2 files:/var/tmp/kvcore-bench --systems none
    """
    signal.signal(signal.SIGTERM, _interrupted)
    names = _names(systems, l2)
    plan = Plan(
        lengths=_lengths(lengths, model, output_tokens),
        repeats=repeats,
        hits=hits,
        cold=cold,
        output_tokens=output_tokens,
        decode_batch=decode_batch,
        decode_tokens=decode_tokens,
        decode_repeats=decode_repeats,
        settle_s=settle_s,
        fastest_processor=fastest_processor,
    )
    arguments: dict[str, Any] = {
        "model": model,
        "load_format": load_format,
        "dtype": dtype,
        "enforce_eager": eager,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": True,
        "disable_log_stats": False,
        "max_model_len": min(plan.longest + 128, model_limit(model) or sys.maxsize),
        "gpu_memory_utilization": gpu_memory_utilization,
        "seed": 0,
    }
    if max_num_batched_tokens:
        arguments["max_num_batched_tokens"] = max_num_batched_tokens
    arguments |= _engine_arguments(engine_arg or [])
    if fastest_processor and any(arguments.get(size, 1) != 1 for size in _SPREAD):
        raise typer.BadParameter("--fastest-processor is for an engine of one process, not for one over several GPUs")
    if fastest_processor and not hasattr(os, "sched_setaffinity"):
        raise typer.BadParameter("--fastest-processor: this system does not let a thread choose its processor")
    sizes = Sizes(
        l1_gb=l1_size_gb,
        chunk_tokens=chunk_size,
        l2=l2,
        l2_gb=l2_size_gb,
        evictable_l1_gb=_evictable_gb(model, dtype, plan, chunk_size) if "kvcore-l2" in names else 0.0,
    )
    bench = Bench(
        plan=plan,
        sizes=sizes,
        arguments=arguments,
        in_process=in_process,
        logs=logs or Path(tempfile.mkdtemp(prefix="kvcore-ttft-logs-")),
        budget_s=budget_s,
        out=out,
        together=together,
    )
    try:
        bench.all([name for _ in range(rounds) for name in names])
    except KeyboardInterrupt:
        bench.failures.append("interrupted")
        bench.write()
        raise typer.Exit(130) from None
    _show(bench.result(), as_json=as_json)
    raise typer.Exit(1 if bench.result()["failures"] else 0)


def _show(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({name: value for name, value in result.items() if name != "samples"}, indent=1))
        return
    from rich.console import Console  # noqa: PLC0415 - for people only

    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(report.table(result))
    if result["quiet"]["figures"]:
        console.print(report.table(result["quiet"]))
    for row in result["outputs"]:
        if row["system"] != "none":
            console.print(f"{row['system']} {row['situation']}: {row['equal']} of {row['of']} answers as vLLM alone")
    for line in result["failures"]:
        console.print(f"FAILED {line}", markup=False)


def _names(systems: str, l2: str) -> list[str]:
    names = [name.strip() for name in systems.split(",") if name.strip()] or _all_here()
    unknown = sorted(set(names) - set(SYSTEMS))
    if unknown:
        raise typer.BadParameter(f"no system {', '.join(unknown)}; there are {', '.join(SYSTEMS)}")
    if l2 and "kvcore-l2" not in names:
        names.append("kvcore-l2")
    if not l2 and "kvcore-l2" in names:
        raise typer.BadParameter("kvcore-l2 needs --l2")
    return names


def _all_here() -> list[str]:
    """Return the systems that this machine can run: vLLM's offloading needs a GPU, LMCache has to be installed."""
    gpu = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd"))
    peers = (["offloading"] if gpu else []) + (["lmcache"] if find_spec("lmcache") else [])
    return ["none", "kvcore", "kvcore-mp", *peers]


def _lengths(text: str, model: str, output_tokens: int) -> tuple[int, ...]:
    limit = model_limit(model) or sys.maxsize
    try:
        asked = sorted({int(word) for word in text.split(",") if word.strip()})
    except ValueError:
        raise typer.BadParameter(f"--lengths {text}: numbers of tokens, with commas between") from None
    kept = tuple(tokens for tokens in asked if tokens > 0 and tokens + output_tokens <= limit)
    if not kept:
        raise typer.BadParameter(f"--lengths {text}: none that this model allows")
    return kept


def _engine_arguments(given: list[str]) -> dict[str, Any]:
    found = {}
    for item in given:
        key, equals, text = item.partition("=")
        try:
            found[key.replace("-", "_")] = json.loads(text)
        except ValueError:
            found[key.replace("-", "_")] = text
        if not equals:
            raise typer.BadParameter(f"--engine-arg {item}: not KEY=JSON")
    return found


def _evictable_gb(model: str, dtype: str, plan: Plan, chunk_tokens: int) -> float:
    token_bytes = kv_bytes_per_token(model, dtype)
    if token_bytes is None:
        raise typer.BadParameter("kvcore-l2 needs a model folder: its config.json says how much KV a prompt has")
    pages = -(-chunk_tokens * token_bytes // DEFAULT_PAGE_BYTES)
    return _EVICTABLE * (max(plan.lengths) // chunk_tokens) * pages * DEFAULT_PAGE_BYTES / 2**30


def _versions() -> dict[str, str]:
    found = {}
    for name in sorted(_PEER_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _interrupted(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    typer.run(main)
