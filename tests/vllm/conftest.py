"""What the vLLM tests share."""

# ruff: noqa: PLC0415 - vLLM and the models are not there where only the halves are tested
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if find_spec("vllm") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, not ours to mend
        import harness  # noqa: F401 - sets what vLLM reads when it is imported
        import vllm.distributed.kv_transfer  # noqa: F401
        from vllm import LLM  # noqa: F401


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The folder of the seeded model of 14 MB."""
    from tiny_model import build_model

    return build_model(tmp_path_factory.getbasetemp() / "tiny")


def pytest_collection_modifyitems(items):
    """Warnings of vLLM and torch are not ours to mend."""
    for item in items:
        if item.get_closest_marker("vllm"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
