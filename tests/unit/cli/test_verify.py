"""`kvsim verify` says equal, or where a journal and its replay part."""

import json

import pytest

from kvcore.policy import Core, CoreConfig, InstanceRegistered, LookedUp, RequestEnded, RoomAsked, TierConfig
from kvsim.cli import main
from kvtraces.journal import Head, JournalWriter


@pytest.fixture
def journal(tmp_path):
    config = CoreConfig(tiers=(TierConfig(name="l1", pages=3),))
    core, writer = Core(config), JournalWriter(tmp_path / "journal", Head(config=config, meta={}))
    chunks = tuple(bytes([i]) * 32 for i in range(4))
    for event in (
        InstanceRegistered(now_ns=0, instance="i", chunk_pages=1),
        LookedUp(now_ns=1, request="r", instance="i", chunks=chunks),
        RoomAsked(now_ns=2, request="r", chunks=chunks),
        RequestEnded(now_ns=3, request="r"),
    ):
        writer.step(event, core.handle(event))
    writer.close()
    return tmp_path / "journal"


def test_equal(journal, capsys):
    assert main(["verify", "--journal", str(journal), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"equal": True, "segments": 1, "steps": 4, "torn": []}
    assert main(["verify", "--journal", str(journal)]) == 0
    assert "4 steps in 1 segment decided again as recorded" in capsys.readouterr().out


def test_any_byte_changed_is_found(journal, capsys):
    (segment,) = journal.iterdir()
    data = segment.read_bytes()
    for at in range(0, len(data), 7):
        segment.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert main(["verify", "--journal", str(journal), "--json"]) in {1, 2}, f"byte {at}"
        said = capsys.readouterr()
        assert said.err or not json.loads(said.out)["equal"]


def test_a_torn_end_is_told_and_nothing_at_all_is_an_error(journal, capsys):
    (segment,) = journal.iterdir()
    data = segment.read_bytes()
    segment.write_bytes(data[:-3])
    assert main(["verify", "--journal", str(journal)]) == 0
    said = capsys.readouterr().out
    assert "equal: 3 steps in 1 segment" in said
    assert "the last record of 00000001.kvj is cut short" in said
    segment.write_bytes(data[:10])
    assert main(["verify", "--journal", str(journal), "--json"]) == 2
    assert "nothing to decide again: no whole step in 1 segment" in capsys.readouterr().err


def test_no_journal(tmp_path, capsys):
    assert main(["verify", "--journal", str(tmp_path)]) == 2
    assert "no journal in" in capsys.readouterr().err
