"""What a finished run says, as columns and shares."""

import numpy as np
from numpy.typing import NDArray

from kvsim.engine.job import Job
from kvsim.engine.simulation import Finished
from kvtraces import Log

Columns = dict[str, NDArray[np.generic]]


def columns_of(log: Log, finished: Finished, chunk_tokens: int | None) -> Columns:
    """Lay the jobs out as columns; a request that was refused has NaN times and zero tokens."""
    jobs = finished.jobs
    served = np.array([job is not None for job in jobs], dtype=bool)
    rows = [_row(job, chunk_tokens or 0) for job in jobs if job is not None]
    table = np.full((len(jobs), 12), np.nan)
    table[served] = np.array(rows, dtype=np.float64).reshape(-1, 12)
    names = ("arrived_s", "handling_s", "queue_s", "load_s", "prefill_s", "ttft_s", "finished_s")
    columns: Columns = {"refused": ~served}
    columns.update({name: table[:, i].copy() for i, name in enumerate(names)})
    counts = np.where(np.isnan(table[:, len(names) :]), 0, table[:, len(names) :]).astype(np.int64)
    for i, name in enumerate(("l0_tokens", "matched_l1", "matched_l2", "loaded_tokens", "preemptions")):
        columns[name] = counts[:, i].copy()
    columns["engine"] = np.array([-1 if job is None else job.engine for job in jobs], dtype=np.int64)
    columns["prompt_tokens"] = log.input_tokens.astype(np.int64)
    columns["output_tokens"] = log.output_tokens.astype(np.int64)
    return columns


def _row(job: Job, chunk_tokens: int) -> tuple[float, ...]:
    ttft = job.first_token - job.arrived
    handling = job.enqueued - job.arrived
    load = job.exposed_load
    matched = job.matched or (0,)
    waited = job.first_scheduled - job.enqueued
    in_step = job.step_load
    return (
        job.arrived,
        handling,
        waited - (load - in_step),
        load,
        job.first_token - job.first_scheduled - in_step,
        ttft,
        job.finished,
        job.l0_tokens,
        matched[0] * chunk_tokens,
        sum(matched[1:]) * chunk_tokens,
        job.loaded,
        job.preemptions,
    )


def utilisation(finished: Finished) -> dict[str, float]:
    """Return the busy share of each resource until the run's end, 0 to 1, averaged over the engines."""
    engines, span = finished.engines, finished.now
    share = 1 / (span * len(engines)) if span > 0 else 0.0  # nothing happened where all requests were refused
    used = {
        "gpu": share * sum(engine.busy_s for engine in engines),
        "gpu_prefill": share * sum(engine.prefill_s for engine in engines),
        "pcie_h2d": share * sum(engine.link.busy_s[0] for engine in engines),
        "pcie_d2h": share * sum(engine.link.busy_s[1] for engine in engines),
    }
    if finished.lower is not None:
        used["l2_read"] = finished.lower.busy_s[0] * share * len(engines)
        used["l2_write"] = finished.lower.busy_s[1] * share * len(engines)
    return used


def copied_bytes(finished: Finished) -> dict[str, int]:
    """Return the bytes copied, by link and direction."""
    copied = {
        "pcie_h2d": sum(engine.link.bytes[0] for engine in finished.engines),
        "pcie_d2h": sum(engine.link.bytes[1] for engine in finished.engines),
    }
    if finished.lower is not None:
        copied["l2_read"], copied["l2_write"] = finished.lower.bytes
    return copied
