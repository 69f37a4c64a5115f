"""Writing a run down: a row a request, or a trace that Perfetto and Chrome open."""

import gzip
import importlib
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from kvsim.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from kvsim.runner import RunResult

PHASES = ("handling_s", "queue_s", "load_s", "prefill_s")


class TimelineError(UsageError):
    """A timeline that cannot be written; the message is one line."""


def check_kind(path: Path) -> None:
    """Raise what `write_requests` raises for this kind of file: before the work, not after it."""
    if path.suffix == ".parquet":
        if importlib.util.find_spec("pyarrow") is None:
            raise MissingExtraError(f"{path}: parquet (.jsonl needs nothing)", "report")
    elif not path.name.removesuffix(".gz").endswith(".jsonl"):
        raise TimelineError(f"{path}: a timeline is a .parquet, .jsonl or .jsonl.gz file")


def write_requests(result: "RunResult", path: str | Path) -> None:
    """Write a row a request, with the columns of `RunResult.columns`, to a .parquet, .jsonl or .jsonl.gz file.

    Raises:
        TimelineError: Another kind of file.
        MissingExtraError: Parquet without pyarrow.
        OSError: The file cannot be written.
    """
    path = Path(path)
    check_kind(path)
    if path.suffix == ".parquet":
        arrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
        parquet.write_table(arrow.table({"request": range(len(result.columns["refused"])), **result.columns}), path)
        return
    with _opened(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in _rows(result))


def write_trace(result: "RunResult", path: str | Path) -> None:
    """Write a run in the Trace Event Format, plain or .gz, for Perfetto or chrome://tracing.

    A process an engine: its steps, and each request as an asynchronous track of its phases. The steps need a run with
    `timeline`.

    Raises:
        OSError: The file cannot be written.
    """
    with _opened(Path(path)) as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        for number, event in enumerate(_events(result)):
            file.write(("" if number == 0 else ",\n") + json.dumps(event))
        file.write("\n]}\n")


def _opened(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return cast("IO[str]", gzip.open(path, "wt", encoding="utf-8"))
    return path.open("w", encoding="utf-8")


def _rows(result: "RunResult") -> Iterator[dict[str, Any]]:
    names = list(result.columns)
    for index, values in enumerate(zip(*(result.columns[name].tolist() for name in names), strict=True)):
        row = {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in zip(names, values, strict=True)
        }
        yield {"request": index, **row}


def _events(result: "RunResult") -> Iterator[dict[str, Any]]:
    for engine in range(result.settings.engines):
        yield {"name": "process_name", "ph": "M", "pid": engine, "args": {"name": f"engine {engine}"}}
        yield {"name": "thread_name", "ph": "M", "pid": engine, "tid": 0, "args": {"name": "steps"}}
    for engine, steps in enumerate(result.steps):
        for start, end, prompt_tokens, decodes, count in steps:
            name = f"prefill {prompt_tokens}" if prompt_tokens else "decode"
            sizes = {"prompt_tokens": prompt_tokens, "decodes": decodes, "steps": count}
            yield {
                "name": name,
                "ph": "X",
                "pid": engine,
                "tid": 0,
                "ts": 1e6 * start,
                "dur": 1e6 * (end - start),
                "args": sizes,
            }
    for row in _rows(result):
        if not row["refused"]:
            yield from _spans(row)


def _spans(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A request as nested asynchronous spans: itself, and what it waited for in turn."""
    common = {"cat": "request", "id": row["request"], "pid": row["engine"], "tid": 1}
    name = f"request {row['request']}"
    at = row["arrived_s"]
    sizes = {
        key: row[key]
        for key in ("prompt_tokens", "output_tokens", "l0_tokens", "matched_l1", "matched_l2", "loaded_tokens")
    }
    yield {"name": name, "ph": "b", "ts": 1e6 * at, "args": sizes, **common}
    for phase in PHASES:
        if row[phase] > 0:
            yield {"name": phase.removesuffix("_s"), "ph": "b", "ts": 1e6 * at, **common}
            at += row[phase]
            yield {"name": phase.removesuffix("_s"), "ph": "e", "ts": 1e6 * at, **common}
    if row["finished_s"] > at:
        yield {"name": "decode", "ph": "b", "ts": 1e6 * at, **common}
        yield {"name": "decode", "ph": "e", "ts": 1e6 * row["finished_s"], **common}
    yield {"name": name, "ph": "e", "ts": 1e6 * row["finished_s"], **common}
