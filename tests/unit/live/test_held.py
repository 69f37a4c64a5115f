"""The table of what a server holds: what it says, whom it says it to, and what it does not miss."""

import errno
import os

import pytest

from kvcore.live.held import HeldTable, HeldView
from kvcore.policy import Core, CoreConfig, TierConfig

ONE, TWO, SAME = b"\1\0\0\0one.", b"\2\0\0\0two.", b"\1\0\0\0same"


@pytest.fixture
def table(tmp_path):
    made = HeldTable(tmp_path / "kvcore-x.held")
    yield made
    made.close()


def test_a_reader_sees_what_comes_and_goes(table):
    view = HeldView.attach(table.path, table.token)
    assert not view.may_hold(ONE)
    for chunk in (ONE, SAME):
        table.came(chunk)
    assert view.may_hold(ONE)
    assert not view.may_hold(TWO)
    table.went(ONE)
    assert view.may_hold(ONE), "another chunk gives the same cell"
    table.went(SAME)
    assert not view.may_hold(ONE)
    view.close()


def test_a_cell_that_was_full_is_never_empty_again(table):
    for _ in range(300):
        table.came(ONE)
    for _ in range(300):
        table.went(ONE)
    view = HeldView.attach(table.path, table.token)
    assert view.may_hold(ONE)
    assert not view.may_hold(TWO)
    view.close()


def test_many_that_go_at_once_are_counted_as_one_by_one(table, tmp_path):
    other = HeldTable(tmp_path / "kvcore-y.held")
    many = [bytes([at % 7, at % 3, 0, 0, at % 256, at // 256]) for at in range(600)]
    full = [b"\3\3\3\3" + bytes([at % 256, at // 256]) for at in range(300)]
    for one in (table, other):
        for chunk in [*many, *full]:
            one.came(chunk)
    table.all_went([*many[100:], *full])
    for chunk in [*many[100:], *full]:
        other.went(chunk)
    assert table._cells[4096:] == other._cells[4096:]
    other.close()


def test_only_the_servers_own_table_is_read(table, tmp_path):
    assert HeldView.attach(table.path, table.token + 1) is None
    assert HeldView.attach(table.path, 0) is None
    assert HeldView.attach(tmp_path / "none.held", 1) is None
    (tmp_path / "short.held").write_bytes(b"short")
    assert HeldView.attach(tmp_path / "short.held", 1) is None
    os.symlink(table.path, tmp_path / "link.held")
    assert HeldView.attach(tmp_path / "link.held", table.token) is None
    assert table.path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(TypeError):
        HeldView.attach(table.path, table.token)._cells[5000] = 1


def test_without_room_for_it_nothing_is_left(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space"):
        HeldTable(tmp_path / "kvcore-x.held")
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_the_next_server_replaces_the_table_and_a_reader_of_the_old_one_goes_on(table):
    table.came(ONE)
    old = HeldView.attach(table.path, table.token)
    following = HeldTable(table.path)
    assert old.may_hold(ONE)
    assert HeldView.attach(table.path, table.token) is None
    assert not HeldView.attach(table.path, following.token).may_hold(ONE)
    following.close()
    assert not table.path.exists()


def test_chunks_that_are_there_already_are_counted_and_what_no_tier_does_is_refused(table):
    core = Core(CoreConfig(tiers=(TierConfig(name="l1", pages=4),)))
    core.tiers[0].resident[ONE] = entry = object()
    table.follow(core)
    view, resident = HeldView.attach(table.path, table.token), core.tiers[0].resident
    assert view.may_hold(ONE)
    resident[ONE] = entry  # again: the same chunk
    resident.update([(TWO, entry)])
    with pytest.raises(KeyError):
        resident.pop(SAME)
    del resident[ONE]
    assert not view.may_hold(ONE)
    assert view.may_hold(TWO)
    for refused in (resident.clear, resident.popitem, lambda: resident.setdefault(ONE, entry)):
        with pytest.raises(TypeError):
            refused()
    view.close()
