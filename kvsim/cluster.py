"""Simulations on a Ray cluster (extra 'ray'): for sweeps that one machine takes too long for."""

import importlib.util
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kvsim.engine.settings import RunSettings
from kvsim.errors import MissingExtraError, UsageError
from kvtraces import Log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvsim.runner import RunResult

LOCAL = "local"
"""Names a cluster of this machine alone, which is started for the run and ended with it."""


def check_available() -> None:
    """Raise MissingExtraError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise MissingExtraError("a cluster", "ray")


def run_on_cluster(
    log: Log, settings: Sequence[RunSettings], *, address: str, baseline: bool, report: Callable[[int, int], None]
) -> "list[RunResult]":
    """Simulate each setting as a Ray task of one processor; see `kvsim.run_many`.

    Args:
        log: The requests; sent to every node once.
        settings: What to run.
        address: As for `ray.init`: `auto` for the cluster that this machine belongs to, `ray://host:10001` for another,
            `local` for one of this machine alone. Where the process has joined a cluster already, that one is used.
            Its nodes need this version of kvcore installed.
        baseline: As in `run`.
        report: Called with the settings done and all of them.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
        SettingsError: As `run`, for the first setting that fails.
    """
    check_available()
    import ray  # noqa: PLC0415 - an extra

    from kvsim.runner import run  # noqa: PLC0415 - it offers this

    with _joined(ray, address):
        task = ray.remote(num_cpus=1, max_retries=2)(run)
        shared = ray.put(log)
        tasks = [task.remote(shared, one, baseline=baseline) for one in settings]
        waiting, done = tasks, 0
        try:
            while waiting:
                (ended,), waiting = ray.wait(waiting, num_returns=1)
                ray.get(ended)
                done += 1
                report(done, len(tasks))
            return ray.get(tasks)  # type: ignore[no-any-return]  # Ray is untyped here
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        finally:
            for one in waiting:  # where one has failed, or Ctrl-C was pressed
                # Not by force: a worker that is killed while its task ends can take this process with it (Ray 2.60's
                # TaskManager::CompletePendingTask checks that the task has not failed before).
                ray.cancel(one)


@contextmanager
def _joined(ray: Any, address: str) -> "Iterator[None]":
    """Belong to the cluster, unless this process belongs to one already."""
    if ray.is_initialized():
        yield
        return
    beside = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **beside)
    except (ConnectionError, ValueError, RuntimeError) as error:
        words = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"no Ray cluster at {address!r}: {words}") from error
    try:
        yield
    finally:
        ray.shutdown()
