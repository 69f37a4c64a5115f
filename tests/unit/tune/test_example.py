"""The example runs, on a log of its own and on a given one."""

import runpy
import sys
from pathlib import Path

from kvtraces import Chat, generate, write

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tune_a_log.py"


def test_example(capsys, monkeypatch, tmp_path):
    log = tmp_path / "log.jsonl.gz"
    write(generate(Chat(requests=300, seed=4)), log)
    for arguments, requests in (([], "2,000 requests"), ([str(log)], "300 requests")):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        printed = capsys.readouterr().out
        assert requests in printed
        assert "recommended: chunks of" in printed
        assert "GiB" in printed
