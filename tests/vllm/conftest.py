"""What the vLLM tests share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of the seeded model of 14 MB."""
    from tiny_model import build_model

    return build_model(tmp_path_factory.getbasetemp() / "tiny")


@pytest.fixture(scope="session")
def big_model(tmp_path_factory):
    """The folder of the seeded model of 105 M parameters."""
    from tiny_model import build_big_model

    return build_big_model(tmp_path_factory.getbasetemp() / "big")
