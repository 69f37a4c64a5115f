"""One run: the log's requests through engines, caches and links, on SimPy's clock."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvsim.engine.arrivals import arrival_times, refused
from kvsim.engine.chunks import chunk_chains, output_chains, salts
from kvsim.engine.engine import Engine
from kvsim.engine.gpu_cache import GpuCache
from kvsim.engine.job import Job
from kvsim.engine.links import Link
from kvsim.engine.prefixes import Prefixes, prefixes
from kvsim.engine.routing import router
from kvsim.engine.settings import RunSettings, SettingsError
from kvsim.engine.shell import Shell
from kvsim.engine.steps import StepCosts
from kvsim.profiles import Profile
from kvtraces import Log
from kvtraces.collector import without_collection

DISK_DUPLEX, NETWORK_DUPLEX = 0.5, 1.0
"""A disk's directions share one bandwidth; a network's do not."""
Progress = Callable[[int, int], None]
"""Called with requests finished and requests in all."""


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """What a log's requests are, whatever the setting: computed once, used by every run of the same chunk size."""

    log: Log
    chunk_tokens: int | None
    chains: list[tuple[int, ...]]
    output_chains: list[tuple[int, ...]]
    """Chunks that the outputs complete; empty where they are not recorded."""
    prefixes: Prefixes
    salts: list[str]


def prepare(log: Log, chunk_tokens: int | None, *, reuse: bool = True) -> Workload:
    """Make a log's chains and prefix tree.

    Args:
        log: The requests.
        chunk_tokens: Tokens of an L1 chunk; None: the log's own block.
        reuse: False leaves the chains out: nothing is cached beyond L0.

    Raises:
        UsageError: A chunk is no whole number of the log's blocks.
    """
    size = log.block_tokens if chunk_tokens is None else chunk_tokens
    chains: list[tuple[int, ...]] = [()] * len(log)
    outputs = chains
    if reuse and size is not None:
        chains, outputs = chunk_chains(log, size), output_chains(log, size)
    return Workload(log, size, chains, outputs, prefixes(log), salts(log))


@dataclass(frozen=True, slots=True, eq=False)
class Finished:
    """Everything a run leaves behind; times are SimPy's, in seconds."""

    jobs: list[Job | None]
    """By request; None for those refused."""
    engines: list[Engine]
    shell: Shell | None
    lower: Link | None
    warnings: list[str]
    now: float


def simulate(
    workload: Workload,
    settings: RunSettings,
    *,
    timeline: bool = False,
    progress: Progress | None = None,
) -> Finished:
    """Run a workload under one setting until every request has its last token.

    Args:
        workload: The requests.
        settings: What to run.
        timeline: Whether the engines keep their steps.
        progress: Told about a hundred times, and at the end.

    Raises:
        SettingsError: A combination that cannot be run.
    """
    import simpy  # noqa: PLC0415 - only a run needs it

    env = simpy.Environment()
    log, profile = workload.log, settings.profile
    costs = StepCosts(profile)
    engines = [_engine(env, number, workload, settings, costs) for number in range(settings.engines)]
    shell = lower = None
    if workload.chunk_tokens is not None:
        config = settings.core_config(workload.chunk_tokens)
        if config is not None:
            lower = _lower(env, profile, settings)
            shell = Shell(
                env,
                config,
                engines,
                lower=lower,
                chunk_tokens=workload.chunk_tokens,
                chunk_bytes=settings.chunk_bytes(workload.chunk_tokens),
                chunk_pages=settings.chunk_pages(workload.chunk_tokens),
            )
    elif settings.l1_gb != 0:
        raise SettingsError("the log has no hash_ids: nothing says what is reused; run it with no L1")
    for engine in engines:
        if shell is not None:
            engine.attach(shell)
        if timeline:
            engine.steps = []
    jobs = _jobs(workload, settings)
    choose = router(settings.routing, engines, log, settings.l0_block_tokens)
    order = sorted((job for job in jobs if job is not None), key=lambda job: (job.enqueued, job.index))
    if order:
        _Source(env, order, choose, None if progress is None else _Finishing(engines, progress, len(order))).start()
    with without_collection():
        env.run()
    stuck = sum(job is not None and job.finished < 0 for job in jobs)
    if stuck:
        raise AssertionError(f"{stuck} requests never ended")
    if progress is not None:
        progress(len(order), len(order))
    return Finished(jobs, engines, shell, lower, costs.warnings(), env.now)


class _Source:
    """Sends the requests to their engines, in order of arrival."""

    def __init__(self, env: Any, order: list[Job], choose: Any, finishing: "_Finishing | None") -> None:
        self._env = env
        self._order = order
        self._choose = choose
        self._finishing = finishing
        self._next = 0

    def start(self) -> None:
        self._wait()

    def _wait(self) -> None:
        event = self._env.timeout(max(0.0, self._order[self._next].enqueued - self._env.now))
        event.callbacks.append(self._send)

    def _send(self, _: Any) -> None:
        job = self._order[self._next]
        self._next += 1
        if self._next < len(self._order):
            self._wait()
        engine = self._choose(job)
        job.engine = engine.number
        engine.unfinished += 1
        engine.pending_tokens += job.prompt
        engine.enqueue(job)
        if self._finishing is not None:
            self._finishing.tell(self._next)


class _Finishing:
    """Tells how many requests have ended, as others arrive: no event of its own, so that a run is the same without."""

    def __init__(self, engines: list[Engine], progress: Progress, total: int) -> None:
        self._engines = engines
        self._progress = progress
        self._total = total
        self._every = max(1, total // 100)

    def tell(self, sent: int) -> None:
        if sent % self._every == 0:
            self._progress(sent - sum(engine.unfinished for engine in self._engines), self._total)


def _engine(env: Any, number: int, workload: Workload, settings: RunSettings, costs: StepCosts) -> Engine:
    native, block = workload.log.block_tokens, settings.l0_block_tokens
    if native is not None and native % block:
        raise SettingsError(f"engine blocks of {block} tokens: the log's block of {native} is not a multiple")
    per_block = 0 if native is None else native // block
    lengths = [per_block * length for length in workload.prefixes.lengths]
    cache = GpuCache(settings.l0_blocks, lengths, reuse=settings.l0_prefix_caching)
    profile = settings.profile
    # A load goes to all ranks over all their links; of what every rank holds, one stores a copy, over its own link.
    curves = (profile.transfers["h2d"], profile.transfers["d2h"])
    link = Link(env, curves, profile.duplex, (1, profile.kv_copies))
    return Engine(env, number, settings, costs, cache, link)


def _lower(env: Any, profile: Profile, settings: RunSettings) -> Link | None:
    if settings.l2_gb == 0:
        return None
    kind = settings.l2_kind
    duplex = DISK_DUPLEX if kind == "disk" else NETWORK_DUPLEX
    return Link(env, (profile.transfers[f"{kind}_read"], profile.transfers[f"{kind}_write"]), duplex)


def _jobs(workload: Workload, settings: RunSettings) -> list[Job | None]:
    log, block = workload.log, settings.l0_block_tokens
    arrived = arrival_times(log, settings)
    handling = settings.profile.handling_base_s + settings.profile.handling_token_s * log.input_tokens
    findable = np.diff(log.starts) * ((log.block_tokens or 0) // block)
    turned_away = refused(log, settings).tolist()
    jobs: list[Job | None] = []
    for index, row in enumerate(
        zip(
            log.input_tokens.tolist(),
            log.output_tokens.tolist(),
            workload.chains,
            workload.prefixes.paths,
            findable.tolist(),
            workload.salts,
            strict=True,
        )
    ):
        jobs.append(None if turned_away[index] else Job(index, *row))
    for job, arrival, enqueued in zip(jobs, arrived.tolist(), (arrived + handling).tolist(), strict=True):
        if job is not None:
            job.arrived, job.enqueued = arrival, enqueued
    if log.output_starts is not None:
        _append_outputs([job for job in jobs if job is not None], workload, settings)
    elif settings.store_output:
        raise SettingsError("store_output: the log has no output_hash_ids")
    return jobs


def _append_outputs(jobs: list[Job], workload: Workload, settings: RunSettings) -> None:
    """Tell the jobs which blocks and chunks their outputs complete; the last token's KV is never computed."""
    lengths, size = workload.prefixes.lengths, workload.chunk_tokens
    per_block = (workload.log.block_tokens or 0) // settings.l0_block_tokens
    for job in jobs:
        nodes = workload.prefixes.outputs[job.index]
        if nodes:
            job.whole_path = job.path + nodes
            job.whole_findable = job.findable + per_block * sum(lengths[node] for node in nodes)
        if settings.store_output and size is not None:
            full = (job.prompt + job.output - 1) // size
            job.output_chain = workload.output_chains[job.index][: max(0, full - len(job.chain))]
