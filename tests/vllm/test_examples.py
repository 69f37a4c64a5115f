"""The examples that need vLLM run, and say what they should."""

import subprocess
import sys

import pytest
from servers import ROOT, environment

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        ("vllm_inprocess.py", ["--tokens", "1024"], "the same token"),
        ("vllm_shared_server.py", [], "second engine: 768 of 800 tokens from the server"),
    ],
)
def test_example(tiny_model, script, flags, said):
    command = [sys.executable, str(ROOT / "examples" / script), str(tiny_model), *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert said in done.stdout
