"""One setting in full detail: TTFT under load, hits by tier, and what every resource was doing."""

import pickle
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import active_children, get_context, resource_tracker
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias, TypeVar

import numpy as np

from kvsim.cluster import run_on_cluster
from kvsim.engine.columns import Columns, columns_of, copied_bytes, utilisation
from kvsim.engine.load import Load, offered_load
from kvsim.engine.settings import RunSettings
from kvsim.engine.simulation import Finished, Progress, Workload, prepare, simulate
from kvtraces import Log

PERCENTILES = (50, 90, 95, 99)
_T = TypeVar("_T")
_Bare: TypeAlias = tuple[dict[str, float | None], Load]
"""TTFT of a run without L1 and L2, and what it was offered and served."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RunResult:
    """What one run says.

    Attributes:
        settings: What was run.
        chunk_tokens: Tokens of a chunk; None for a log of lengths alone.
        columns: [n] each, a row a request in the log's order. Seconds: `arrived_s`, `handling_s`, `queue_s`, `load_s`,
            `prefill_s` and their sum `ttft_s`, `finished_s` (all NaN where `refused`). Tokens: `prompt_tokens`,
            `output_tokens`, `l0_tokens` (hit in L0), `matched_l1`, `matched_l2` (leading chunks found in L1, and in L2
            but not above, whatever L0 held), `loaded_tokens` (copied beyond L0). Also `engine`, `preemptions` and
            `refused`.
        load: What was offered against what was served.
        ttft_s: Percentiles of TTFT, `p50` to `p99`, and `mean`; None each where the engines cannot sustain the load,
            or all requests are refused.
        ttft_no_cache_s: The same of a run without L1 and L2, with L0 as vLLM has it; None where it was not asked for.
        load_no_cache: What that run was offered and served.
        utilisation: Busy share of each resource between the first arrival and the end, 0 to 1, averaged over engines.
        copied_bytes: Bytes by link and direction.
        stored_chunks: Chunks that engines wrote to L1.
        evicted_chunks: Chunks that left L1.
        refused_chunks: Chunks that were not stored or not loaded, by the core's reason.
        warnings: Of a log that is doubtful, of a profile that was measured beside other work, and of extrapolations
            beyond its grids.
        steps: By engine, a tuple for each event: start and end in s, prompt tokens, decodes and engine steps; empty
            unless a timeline was asked for.
    """

    settings: RunSettings
    chunk_tokens: int | None
    columns: Columns
    load: Load
    ttft_s: Mapping[str, float | None]
    ttft_no_cache_s: Mapping[str, float | None] | None
    load_no_cache: Load | None
    utilisation: Mapping[str, float]
    copied_bytes: Mapping[str, int]
    stored_chunks: int
    evicted_chunks: int
    refused_chunks: Mapping[str, int]
    warnings: tuple[str, ...]
    steps: tuple[tuple[tuple[float, float, int, int, int], ...], ...]

    def total(self, column: str) -> int:
        """Return the sum of a column of counts."""
        return int(self.columns[column].sum())

    def summary(self) -> dict[str, Any]:
        """Return the figures as an object that JSON can carry."""
        served = ~self.columns["refused"].astype(bool)
        return {
            "requests": len(served),
            "refused_requests": int((~served).sum()),
            "prompt_tokens": int(self.columns["prompt_tokens"][served].sum()),
            "output_tokens": int(self.columns["output_tokens"][served].sum()),
            "ttft_s": dict(self.ttft_s),
            "ttft_no_cache_s": None if self.ttft_no_cache_s is None else dict(self.ttft_no_cache_s),
            "hit_tokens": {
                "l0": self.total("l0_tokens"),
                "l1": self.total("matched_l1"),
                "l2": self.total("matched_l2"),
            },
            "loaded_tokens": self.total("loaded_tokens"),
            **{
                name: _spread(self.columns, name, self.load)
                for name in ("handling_s", "queue_s", "load_s", "prefill_s")
            },
            "load": self.load.as_dict(),
            "load_no_cache": None if self.load_no_cache is None else self.load_no_cache.as_dict(),
            "utilisation": dict(self.utilisation),
            "copied_bytes": dict(self.copied_bytes),
            "stored_chunks": self.stored_chunks,
            "evicted_chunks": self.evicted_chunks,
            "refused_chunks": dict(self.refused_chunks),
            "preemptions": self.total("preemptions"),
            "warnings": list(self.warnings),
        }


def _spread(columns: Columns, name: str, load: Load) -> dict[str, float | None]:
    """Return p50, p90, p95, p99 and mean of a column of times; None each without a sustained load."""
    values = columns[name].astype(np.float64)
    served = values[np.isfinite(values)]
    if not load.sustained or not len(served):
        return dict.fromkeys((*(f"p{p}" for p in PERCENTILES), "mean"))
    return {**{f"p{p}": float(np.percentile(served, p)) for p in PERCENTILES}, "mean": float(served.mean())}


def run(
    log: Log,
    settings: RunSettings,
    *,
    baseline: bool = True,
    timeline: bool = False,
    workload: Workload | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> RunResult:
    """Simulate one setting.

    Args:
        log: The requests.
        settings: What to run.
        baseline: Whether to run it again without L1 and L2, for `ttft_no_cache_s`.
        timeline: Whether to keep every step of the engines.
        workload: The log prepared for this chunk size, where several settings share it.
        workers: With 2, the baseline runs in a process beside this one (which must be importable: a script needs its
            `if __name__ == "__main__"`).
        progress: Told of the requests that have ended, and of all; not of the baseline's.

    Raises:
        SettingsError: A setting that cannot be run, with this log or at all.
        UsageError: A chunk is no whole number of the log's blocks.
    """
    cached = settings.l1_gb != 0
    if workload is None:
        workload = prepare(log, settings.chunk_tokens, reuse=cached)
    if cached and workload.chunk_tokens is not None:
        settings.core_config(workload.chunk_tokens)  # what it refuses is refused before a process is started
    work = partial(simulate, workload, settings, timeline=timeline, progress=progress)
    finished, bare = _with_baseline(log, workload, settings, work, workers) if baseline and cached else (work(), None)
    columns = columns_of(log, finished, workload.chunk_tokens)
    load = offered_load(columns, settings.engines)
    if baseline and not cached:
        bare = _spread(columns, "ttft_s", load), load  # it is its own
    without, load_without = bare or (None, None)
    shell = finished.shell
    return RunResult(
        settings=settings,
        chunk_tokens=workload.chunk_tokens,
        columns=columns,
        load=load,
        ttft_s=_spread(columns, "ttft_s", load),
        ttft_no_cache_s=without,
        load_no_cache=load_without,
        utilisation=utilisation(finished),
        copied_bytes=copied_bytes(finished),
        stored_chunks=0 if shell is None else shell.stored,
        evicted_chunks=0 if shell is None else shell.evicted,
        refused_chunks={} if shell is None else dict(shell.refused),
        warnings=(*log.doubts, *filter(None, [settings.profile.doubt()]), *finished.warnings),
        steps=tuple(tuple(engine.steps or ()) for engine in finished.engines),
    )


def _with_baseline(
    log: Log, workload: Workload, settings: RunSettings, work: Callable[[], Finished], workers: int
) -> tuple[Finished, _Bare]:
    """Do the work, and run the setting without L1 and L2: beside it, where there may be two processes."""
    if workers <= 1:
        return work(), _no_cache(log, workload, settings)
    with _file_of(log) as file, _processes(1) as pool:
        beside = _submit(pool, _with_log, file, _no_cache, None, settings)
        return work(), beside.result()


def run_many(
    log: Log,
    settings: Sequence[RunSettings],
    *,
    baseline: bool = False,
    workers: int = 2,
    cluster: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[RunResult]:
    """Simulate each of several settings; results come in their order, and are those of `run`.

    Args:
        log: The requests.
        settings: What to run.
        baseline: As in `run`, for each setting.
        workers: Processes; with 1, or one setting, everything happens in this one.
        cluster: The address of a Ray cluster that runs them instead (see `kvsim.cluster.run_on_cluster`).
        progress: Called with the settings done and all of them, from none on.

    Raises:
        SettingsError: As `run`, for the first setting that fails.
        UsageError: As `run`.
    """
    done, total = 0, len(settings)
    report = progress or (lambda done, total: None)
    report(done, total)
    if cluster is not None:
        return run_on_cluster(log, settings, address=cluster, baseline=baseline, report=report)
    if workers <= 1 or total <= 1:
        results = []
        for chosen in settings:
            results.append(run(log, chosen, baseline=baseline))
            report(len(results), total)
        return results
    with _file_of(log) as file, _processes(min(workers, total)) as pool:
        futures = [_submit(pool, _with_log, file, run, chosen, baseline=baseline) for chosen in settings]
        for future in as_completed(futures):
            future.result()
            done += 1
            report(done, total)
        return [future.result() for future in futures]


@contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Give a pool whose processes start afresh: a fork would copy the locks of whatever library has threads.

    Where the block is left by an error or a signal, their work is of no use, and they are ended with it. The pool's own
    thread is waited for then, too: one that goes on while the interpreter ends may fail there (3.11).
    """
    _start_tracker()
    before = active_children()
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_end_on_interrupt) as pool:
        try:
            yield pool
        except BaseException:
            for process in active_children():
                if process not in before:
                    process.terminate()
            raise


def _start_tracker() -> None:
    """Start multiprocessing's resource tracker with SIGHUP held back, for it passes over Ctrl-C and SIGTERM alone.

    A closed terminal ends the whole group, and a tracker that is started in its place complains of what it never saw.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        resource_tracker.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _file_of(log: Log) -> Iterator[Path]:
    """Keep a log in a file, from which processes take it.

    A pool's pipe would carry it too, but before Python 3.11.5 nothing ends the writing of more than the pipe holds
    where Ctrl-C ends the process that should read it (CPython's gh-94777).
    """
    with TemporaryDirectory(prefix="kvsim-") as folder:
        file = Path(folder) / "log"
        file.write_bytes(pickle.dumps(log))
        yield file


def _with_log(file: Path, work: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    """Do work on the log in a file of `_file_of`."""
    return work(pickle.loads(file.read_bytes()), *arguments, **options)  # noqa: S301 - only we can write there


def _submit(pool: ProcessPoolExecutor, work: Callable[..., _T], *arguments: Any, **options: Any) -> "Future[_T]":
    """Give a pool work; a process that this starts begins with Ctrl-C held back, until it can end by it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(work, *arguments, **options)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_on_interrupt() -> None:
    """Let Ctrl-C, which the whole process group gets, end this process at once and without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _no_cache(log: Log, workload: Workload | None, settings: RunSettings) -> _Bare:
    """Run a setting without L1 and L2."""
    if workload is None:
        workload = prepare(log, settings.chunk_tokens, reuse=False)
    columns = columns_of(log, simulate(workload, replace(settings, l1_gb=0.0, l2_gb=0.0)), None)
    load = offered_load(columns, settings.engines)
    return _spread(columns, "ttft_s", load), load
