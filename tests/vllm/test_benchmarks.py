"""Benchmarks run where few can run them: that they still find what they import is checked here."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
for file in sys.argv[2:]:
    runpy.run_path(file, run_name="benchmark")
"""


def test_every_benchmark_can_be_imported():
    files = sorted(map(str, FOLDER.glob("*.py")))
    assert len(files) > 15
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(FOLDER), *files], capture_output=True, text=True, check=False, timeout=200
    )
    assert run.returncode == 0, run.stderr[-2000:]
