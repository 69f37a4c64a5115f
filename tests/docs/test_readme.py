"""What README and the commands' help tell the reader to type is what the command takes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kvsim.cli import main

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ("tune", "run", "validate", "calibrate", "simulate", "describe", "generate", "verify")


def kvsim_commands(text):
    """Return the arguments of each whole `kvsim` command in an indented block of a text."""
    found = []
    for line in re.findall(r"^ {4}(.*)$", text.replace("\\\n", " "), flags=re.MULTILINE):
        found += [words.strip() for words in re.findall(r"(?:^|[\s/])kvsim ((?:[a-z]+ )[^&|;#]*)", line)]
    return [shlex.split(words) for words in found]


def test_readmes_commands_run_as_they_stand():
    commands = kvsim_commands((ROOT / "README.md").read_text())
    assert any(command[0] == "tune" for command in commands)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for command in commands:
        run = [sys.executable, "-m", "kvsim", *command]
        done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, (command, done.stderr)
        assert "Recommendation" in done.stdout or command[0] != "tune"


def test_readmes_row_is_a_log(tmp_path, capsys):
    (row,) = re.findall(r'^ {4}(\{"timestamp".*\})$', (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    (tmp_path / "log.jsonl").write_text(row + "\n")
    assert main(["describe", "--trace", str(tmp_path / "log.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["input_tokens"] == json.loads(row)["input_length"]


def test_the_sample_log_can_be_run_too(capsys):
    sample = ROOT / "traces" / "data" / "chat.jsonl.gz"
    costs = ("--model", "qwen3-8b", "--gpu", "h100")
    assert main(["run", "--trace", str(sample), *costs, "--l1-size-gb", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["hit_tokens"]["l1"] > 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option_and_its_example_is_one(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    options = set(re.findall(r"--[a-z0-9-]+", shown))
    for example in re.findall(rf"Example: kvsim {command} (.*?)\s*$", shown, flags=re.MULTILINE):
        assert set(re.findall(r"--[a-z0-9-]+", example)) <= options
    assert f"Example: kvsim {command}" in shown
