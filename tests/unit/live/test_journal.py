import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.policy import (
    Cleared,
    Core,
    CoreConfig,
    InstanceRegistered,
    LoadDone,
    LoadFailed,
    LookedUp,
    Place,
    RequestEnded,
    RoomAsked,
    StoreCommitted,
    TierCleared,
    TierConfig,
)
from kvcore.policy.snapshot import reconfigured
from kvtraces.journal import (
    Difference,
    Engine,
    Equal,
    Head,
    JournalError,
    JournalWriter,
    Located,
    Pages,
    Snapshot,
    Step,
    read_segment,
    segments,
    take_snapshot,
    verify,
)

CONFIG = CoreConfig(tiers=(TierConfig(name="l1", pages=6, eviction="sieve"),), quotas=(("bob", 4),))
HEAD = Head(config=CONFIG, meta={"epoch": 7, "page_bytes": 4096})


def names(at, count=3):
    return tuple(bytes([at % 5]) * 31 + bytes([i]) for i in range(count))


def write(folder, requests, *, segment_bytes=1 << 30, keep=100, snapshot_at=None):
    """Write the journal of a core that serves some requests; return the core."""
    core = Core(CONFIG)
    writer = JournalWriter(folder, HEAD, segment_bytes=segment_bytes, keep=keep)
    now = 0

    def step(event):
        nonlocal now
        now += 1
        event = replace(event, now_ns=now)
        decisions = core.handle(event)
        writer.step(event, decisions)
        for decision in decisions:
            if isinstance(decision, Place):
                writer.pages(b"\1" * 4 * len(decision.chunks), b"\2" * 8 * len(decision.chunks), 4096)
        writer.flush()
        if writer.due:
            writer.rotate(take_snapshot(core, b"book"))
        return decisions

    step(InstanceRegistered(now_ns=0, instance="e", chunk_pages=1))
    for at in range(requests):
        request, chunks = f"r{at}", names(at)
        found = step(LookedUp(now_ns=0, request=request, instance="e", chunks=chunks))
        if len(found) > 1:
            step(LoadDone(now_ns=0, request=request, tier=0, chunks=found[1].chunks))
        for decision in step(RoomAsked(now_ns=0, request=request, chunks=chunks)):
            if isinstance(decision, Place):
                step(StoreCommitted(now_ns=0, request=request, tier=0, chunks=decision.chunks))
        step(RequestEnded(now_ns=0, request=request))
        if at == snapshot_at:
            writer.rotate(take_snapshot(core, b"book"))
    writer.close()
    return core


def test_what_is_written_is_read_again(tmp_path):
    write(tmp_path, 4)
    (path,) = segments(tmp_path)
    located = list(read_segment(path))
    assert located[0] == Located(path.name, 8, HEAD)
    steps = [one.record for one in located if isinstance(one.record, Step)]
    core = Core(CONFIG)
    assert [core.handle(step.event) for step in steps] == [step.decisions for step in steps]
    assert next(one.record for one in located if isinstance(one.record, Pages)) == Pages(
        ids=b"\1" * 12, generations=b"\2" * 24, chunk_bytes=4096
    )
    assert verify(tmp_path) == Equal(segments=1, steps=len(steps))


@pytest.mark.parametrize("keep", [100, 2])
def test_segments_begin_with_snapshots_and_the_oldest_go(tmp_path, keep):
    write(tmp_path, 40, segment_bytes=3000, keep=keep)
    paths = segments(tmp_path)
    assert len(paths) == (keep if keep == 2 else int(paths[-1].stem))
    head, snapshot, *_ = (located.record for located in read_segment(paths[-1]))
    assert head.has_snapshot
    assert isinstance(snapshot, Snapshot)
    found = verify(tmp_path)
    assert isinstance(found, Equal), str(found)
    assert found.segments == len(paths)
    assert len(list(tmp_path.iterdir())) == len(paths)


def test_a_new_run_goes_on_in_a_new_segment(tmp_path):
    write(tmp_path, 3)
    write(tmp_path, 3)
    assert [path.name for path in segments(tmp_path)] == ["00000001.kvj", "00000002.kvj"]
    assert isinstance(verify(tmp_path), Equal)


def test_every_changed_byte_is_a_difference(tmp_path):
    write(tmp_path, 3, snapshot_at=1)
    for path in segments(tmp_path):
        whole = path.read_bytes()
        for at in range(len(whole)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
            found = verify(tmp_path)
            assert isinstance(found, Difference), f"byte {at} of {path.name}"
            assert found.segment == path.name
            assert found.offset <= at
        path.write_bytes(whole)
    assert isinstance(verify(tmp_path), Equal)


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(8, 2000))
def test_a_torn_end_is_no_damage(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("journal")
    write(folder, 3)
    (path,) = segments(folder)
    os.truncate(path, min(cut, path.stat().st_size))
    found = verify(folder)
    assert isinstance(found, Equal), str(found)


def test_another_decision_is_shown_with_its_event(tmp_path):
    write(tmp_path, 2)
    (path,) = segments(tmp_path)
    steps = [one.record for one in read_segment(path) if isinstance(one.record, Step)]
    path.unlink()
    writer = JournalWriter(tmp_path, HEAD)
    for at, step in enumerate(steps):
        decisions = step.decisions
        if at == 2:
            decisions = (replace(decisions[0], chunks=decisions[0].chunks[:2]),)
        writer.step(step.event, decisions)
    writer.close()
    found = verify(tmp_path)
    assert isinstance(found, Difference)
    assert found.step == 2
    assert found.event == steps[2].event
    assert found.replayed == steps[2].decisions
    assert "recorded Place" in str(found)
    assert "[2 from" in str(found)
    assert "[3 from" in str(found)


def test_a_snapshot_of_another_state_is_a_difference(tmp_path):
    core = write(tmp_path, 5)
    core.handle(Cleared(now_ns=1000))
    JournalWriter(tmp_path, HEAD, take_snapshot(core)).close()
    found = verify(tmp_path)
    assert isinstance(found, Difference)
    assert "snapshot" in found.reason


@pytest.mark.parametrize(
    ("tier", "quotas", "emptied", "reason"),
    [
        (TierConfig(name="l1", pages=9, eviction="arc"), (("bob", 4),), True, None),
        (TierConfig(name="l1", pages=9, eviction="arc"), (("bob", 4),), False, "empty"),
        (TierConfig(name="l1", pages=9, eviction="arc"), (("bob", 5),), True, "the state that the steps"),
    ],
)
def test_an_empty_l1_may_go_on_with_another_size(tmp_path, tier, quotas, emptied, reason):
    core = write(tmp_path, 5)
    config = replace(CONFIG, tiers=(tier,), quotas=quotas)
    if emptied:
        with_event = JournalWriter(tmp_path, HEAD, take_snapshot(core))
        event = TierCleared(now_ns=1000, tier=0)
        with_event.step(event, core.handle(event))
        with_event.close()
    moved = Core(config) if reason else reconfigured(core, config)
    JournalWriter(tmp_path, Head(config=config, meta={}), take_snapshot(moved)).close()
    found = verify(tmp_path)
    assert isinstance(found, Equal if reason is None else Difference), str(found)
    assert reason is None or reason in found.reason


def test_every_segment_tells_of_the_engines_that_registered_last(tmp_path):
    writer = JournalWriter(tmp_path, HEAD)
    for number in range(70):
        writer.engine(f"e{number}", {"l0_blocks": number})
    writer.engine("e40", {"l0_blocks": 400})
    writer.rotate(take_snapshot(Core(CONFIG), b"book"))
    writer.close()
    first, second = ([located.record for located in read_segment(path)] for path in segments(tmp_path))
    assert [one.facts["l0_blocks"] for one in first[1:]] == [*range(70), 400]
    assert [one.instance for one in second[2:]] == [f"e{n}" for n in range(6, 70) if n != 40] + ["e40"]
    assert second[-1] == Engine(instance="e40", facts={"l0_blocks": 400})
    assert isinstance(verify(tmp_path), Equal)


def test_a_missing_segment_is_told(tmp_path):
    write(tmp_path, 40, segment_bytes=3000)
    segments(tmp_path)[1].unlink()
    found = verify(tmp_path)
    assert isinstance(found, Difference)
    assert "00000002 is missing" in found.reason


def test_no_journal_is_an_error(tmp_path):
    with pytest.raises(JournalError, match="no journal"):
        verify(tmp_path)


def test_what_came_to_an_event_since_is_taken_for_what_it_was(tmp_path):
    writer = JournalWriter(tmp_path, HEAD, segment_bytes=1 << 30, keep=2)
    writer._collect(("step", "LoadFailed", (1, "r", 1, (b"a",)), ()))
    writer._collect(("step", "LoadFailed", (1, "r", 1, (b"a",), False, "and more"), ()))
    writer.close()
    records = read_segment(*segments(tmp_path))
    assert isinstance(next(records).record, Head)
    assert next(records).record == Step(event=LoadFailed(now_ns=1, request="r", tier=1, chunks=(b"a",)), decisions=())
    with pytest.raises(JournalError, match="LoadFailed has 6 values, 5 are known"):
        next(records)


def test_a_snapshot_larger_than_a_segment_does_not_end_it(tmp_path):
    core = write(tmp_path, 5)
    writer = JournalWriter(tmp_path, HEAD, take_snapshot(core, b"b" * 5000), segment_bytes=3000)
    assert not writer.due
    writer.rotate(take_snapshot(core, b"b" * 5000))
    assert not writer.due
    writer._collect(("engine", "e" * 3000, {}))
    writer.flush()
    assert writer.due
    writer.close()


def test_a_segment_removed_while_the_journal_is_read_is_told(tmp_path, monkeypatch):
    write(tmp_path, 40, segment_bytes=3000)
    listed = segments(tmp_path)
    listed[2].unlink()
    monkeypatch.setattr("kvtraces.journal.segments", lambda folder: listed)
    with pytest.raises(
        JournalError, match=r"00000003\.kvj at byte 0: the server that writes .* has removed it meanwhile: try again"
    ):
        verify(tmp_path)
