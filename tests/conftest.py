"""Fixtures that every folder of tests shares."""

import os
import signal
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real traces and golden numbers that lies beside the repository; it is not part of it."""
    folder = Path(os.environ.get("KVCORE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip("the shared traces are not here (../shared or $KVCORE_SHARED)")
    return folder


@pytest.fixture
def operate() -> Callable[[Any, int, Mapping[Callable[[Any], object], float], int], None]:
    """What drives a machine: operations drawn by its `rng`, by weight, a check behind each, and its end."""

    def drive(machine: Any, seed: int, operations: Mapping[Callable[[Any], object], float], count: int) -> None:
        done: list[str] = []
        try:
            for _ in range(count):
                (operation,) = machine.rng.choices([*operations], [*operations.values()])
                done.append(operation.__name__)
                operation(machine)
                machine.check()
            machine.close()
        except Exception as error:
            error.add_note(f"seed {seed}, after {len(done)} operations, the last: {done[-12:]}")
            raise

    return drive


def pytest_configure(config: pytest.Config) -> None:
    """Let the tests of Ctrl-C and SIGHUP send them: a shell's background job, or all under nohup, ignores them else."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where everything that tests talk to was installed ($KVCORE_REQUIRE_SERVICES), a skipped test has failed."""
    report = yield
    if report.skipped and os.environ.get("KVCORE_REQUIRE_SERVICES"):
        report.outcome = "failed"
    return report
