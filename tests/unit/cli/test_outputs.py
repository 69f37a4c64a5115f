"""What the commands write: never over what they read, never to a device, whole or not at all."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kvcore.policy import Core, CoreConfig, InstanceRegistered, TierConfig
from kvsim.errors import UsageError
from kvsim.files import check_outputs, files_read, write_text
from kvtraces import read
from kvtraces.journal import Head, JournalWriter

COSTS = ("--model", "qwen3-8b", "--gpu", "h100")


@pytest.fixture
def log(tmp_path, chat_trace):
    path = tmp_path / "log.jsonl"
    path.write_bytes(Path(chat_trace).read_bytes())
    return path


def journal_at(folder):
    config = CoreConfig(tiers=(TierConfig(name="l1", pages=3),))
    core, writer = Core(config), JournalWriter(folder, Head(config=config, meta={}))
    event = InstanceRegistered(now_ns=0, instance="i", chunk_pages=1)
    writer.step(event, core.handle(event))
    writer.close()
    (segment,) = folder.iterdir()
    return segment


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        (("run", *COSTS), "--timeline"),
        (("run", *COSTS), "--chrome-trace"),
        (("validate", *COSTS), "--report"),
        (("tune", *COSTS), "--report"),
    ],
)
def test_no_output_is_written_over_what_is_read(kvsim_command, log, tmp_path, command, flag):
    pytest.importorskip("plotly")
    before = log.read_bytes()
    (tmp_path / "linked.jsonl").symlink_to(log)
    os.link(log, tmp_path / "other.jsonl")
    for name in ("log.jsonl", "linked.jsonl", "other.jsonl"):
        assert "is read by this command" in kvsim_command.refused(*command, "--trace", log, flag, tmp_path / name)
    assert log.read_bytes() == before


def test_a_journal_and_a_profile_are_read_too(log, tmp_path):
    segment, profile = journal_at(tmp_path / "journal"), tmp_path / "own.json"
    profile.write_text("{}")
    for path in (segment, profile):
        with pytest.raises(UsageError, match="is read by this command"):
            check_outputs((path,), files_read([str(log)], tmp_path / "journal", profile, "qwen3-8b"))


def test_no_two_outputs_are_one(kvsim_command, log, tmp_path):
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    for other in ("a.jsonl", "b.jsonl"):
        given = ("--timeline", tmp_path / "a.jsonl", "--chrome-trace", tmp_path / other)
        assert "twice" in kvsim_command.refused("run", "--trace", log, *COSTS, *given)


def test_what_is_no_file_is_left_as_it_is(kvsim_command, log, tmp_path):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    (tmp_path / "to_pipe.jsonl").symlink_to(pipe)
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    for name, word in (("pipe.jsonl", "a device"), ("to_pipe.jsonl", "a device"), ("loop.jsonl", "leads to itself")):
        assert word in kvsim_command.refused("run", "--trace", log, *COSTS, "--timeline", tmp_path / name)
        with pytest.raises(UsageError, match=word):
            write_text(tmp_path / name, "")
    assert pipe.is_fifo()


def test_a_link_stays_one_and_leads_to_what_was_written(tmp_path):
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link.txt", tmp_path / "folder" / "target.txt"
    link.symlink_to(target)
    for text in ("one", "two"):
        check_outputs((link,))
        write_text(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["target.txt"]


def test_a_folder_that_takes_no_files_is_told_before_the_work(kvsim_command, log):
    assert "cannot be written to" in kvsim_command.refused("run", "--trace", log, *COSTS, "--timeline", "/proc/t.jsonl")
    assert "cannot be" in kvsim_command.refused("tune", "--trace", log, *COSTS, "--plot", "/proc")


def limited(*arguments, size):
    """Run the command with no file larger than `size`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "NUMBA_CACHE_DIR": ""}
    return subprocess.run(
        [sys.executable, "-m", "kvsim", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    done = limited("generate", tmp_path / "g.jsonl", "--requests", 500, size=20_000)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"kvsim: error: {tmp_path}/g.jsonl: cannot be written: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_generate_refuses_other_names_and_parts_of_a_set(kvsim_command, tmp_path):
    assert ".jsonl.gz" in kvsim_command.refused("generate", tmp_path / "x.csv", "--requests", 5)
    (tmp_path / "a.1.jsonl").write_text("")
    assert "is there already" in kvsim_command.refused("generate", tmp_path / "a.jsonl", "--requests", 5)
    for name in ("b.jsonl", "c.jsonl.gz", "d.jsonl.zst"):
        kvsim_command.shown("generate", tmp_path / name, "--requests", 5)
        assert len(read(tmp_path / name)) == 5
    assert {path.name for path in tmp_path.iterdir()} == {"a.1.jsonl", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst"}


def shell(line):
    """Run a line of bash in which $kvsim is the command; return its exit code and stderr."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment["kvsim"] = f"{sys.executable} -m kvsim"
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 100}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], check=False, **options)
    return done.returncode, done.stderr


@pytest.mark.parametrize("json", ["", "--json"])
def test_what_stdout_does_not_take_is_one_line_and_a_reader_that_has_gone_is_none(chat_trace, json):
    command = f"$kvsim describe --trace {chat_trace} {json}"
    assert shell(f"{command} > /dev/full") == (
        2,
        "kvsim: error: the output cannot be written: No space left on device\n",
    )
    assert shell(f"{command} | true") == (0, "")


def test_a_terminal_without_our_characters_is_no_error(chat_trace):
    for name, encoding in (("run", "ascii"), ("tune --l1-points 2 --policies lru", "latin-1")):
        given = f"--trace {chat_trace} {' '.join(COSTS)}"
        assert shell(f"PYTHONIOENCODING={encoding} $kvsim {name} {given} | tail -1") == (0, "")
