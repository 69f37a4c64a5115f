"""Progress on stderr, reading with progress, and JSON on stdout."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvsim.errors import UsageError
from kvtraces import Log, read
from kvtraces.schema import MAX_BLOCK_TOKENS
from kvtraces.words import counted

if TYPE_CHECKING:
    from rich.progress import Progress


class Stages:
    """Shows how far each stage of a command is; nothing where nobody looks."""

    def __init__(self, progress: "Progress | None") -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}

    def update(self, stage: str, done: int, total: int, what: str = "") -> None:
        """Show that `done` of `total` of a stage are done, and what comes next."""
        if self._progress is None:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, what="")
        self._progress.update(self._tasks[stage], completed=done, total=total, what=what)


@contextmanager
def stages(show: bool | None) -> Iterator[Stages]:
    """Show progress bars on stderr while the block runs; by default only if stderr is a terminal."""
    if not (sys.stderr.isatty() if show is None else show):
        yield Stages(None)
        return
    from rich.console import Console  # noqa: PLC0415 - loaded where it is shown
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (
        TextColumn("{task.description:9}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}", style="dim"),
    )
    with Progress(*columns, console=Console(stderr=True, force_terminal=True), transient=True) as progress:
        yield Stages(progress)


def read_log(
    paths: Sequence[str],
    block_size: int | None,
    skip_bad: bool,
    shown: Stages,
    model: str | None = None,
    *,
    sort: bool = False,
) -> Log:
    """Read a log with progress; bad rows left out, what is doubtful, and rows of other models, are told on stderr.

    `model` is the one that it is priced by. Raises as `kvtraces.read`, and UsageError.
    """
    if block_size is not None and not 1 <= block_size <= MAX_BLOCK_TOKENS:
        raise UsageError(f"--block-size {block_size}: from 1 to {MAX_BLOCK_TOKENS:,}")
    log = read(
        list(paths),
        block_tokens=block_size,
        skip_bad=skip_bad,
        sort=sort,
        progress=lambda done, total: shown.update("reading", done, total),
    )
    if log.skipped:
        sys.stderr.write(f"kvsim: {counted(log.skipped, 'bad row')} left out; the first: {log.skipped_messages[0]}\n")
    for doubt in log.doubts:
        sys.stderr.write(f"kvsim: warning: {doubt}\n")
    for doubt in _models(log, model):
        sys.stderr.write(f"kvsim: {doubt}\n")
    return log


def warnings(log: Log) -> dict[str, list[str]]:
    """Return what is doubtful of a log as a part of a JSON object: nothing for most."""
    return {"warnings": list(log.doubts)} if log.doubts else {}


def _models(log: Log, priced: str | None) -> list[str]:
    """Return what is doubtful of the models that a log names."""
    from kvsim.models.names import plain  # noqa: PLC0415 - most logs name none
    from kvsim.models.table import canonical  # noqa: PLC0415

    column = log.extra.get("model")
    names = sorted({name for name in column.tolist() if name}) if column is not None else []
    doubts = []
    if len(names) > 1:
        doubts.append(
            f"the log has rows of {', '.join(names)}: equal hash_ids are taken for the same KV, as of one model"
        )
    if priced is not None:
        ours = canonical(priced) or plain(priced)
        others = [name for name in names if (canonical(name) or plain(name)) != ours]
        if others:
            doubts.append(f"the log has rows of {', '.join(others)}, and is priced as {priced}'s")
    return doubts


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object."""
    sys.stdout.write(json.dumps(data, indent=1, allow_nan=False) + "\n")
