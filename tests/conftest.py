"""Fixtures that every folder of tests shares."""

import os
import signal
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real traces and golden numbers that lies beside the repository; it is not part of it."""
    folder = Path(os.environ.get("KVCORE_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip("the shared traces are not here (../shared or $KVCORE_SHARED)")
    return folder


def pytest_configure(config: pytest.Config) -> None:
    """Let the tests of Ctrl-C send it: a shell's background job, and all that it starts, ignores it otherwise."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
