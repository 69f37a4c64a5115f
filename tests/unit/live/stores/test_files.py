import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvcore.live.stores.base import FRAME_BYTES, StoreError, StoreFull
from kvcore.live.stores.files import FileStore

DATA = b"0123456789" * 10
SIZE = FRAME_BYTES + len(DATA)


def name(number: int) -> bytes:
    """Names whose first bytes differ: each lies in a folder of its own."""
    return bytes([number]) + b"x" * 31


def put(store: FileStore, chunk: bytes, data: bytes = DATA) -> None:
    store.put(chunk, [memoryview(data)])


def get(store: FileStore, chunk: bytes) -> bytes | None:
    into = bytearray(len(DATA))
    return bytes(into) if store.get(chunk, [memoryview(into)]) else None


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    store = FileStore(tmp_path, 5 * SIZE)
    yield store
    store.close()
    assert os.listdir(tmp_path / "parts") == []


def test_the_limit_is_kept_and_room_comes_back(store: FileStore) -> None:
    for number in range(5):
        put(store, name(number))
    with pytest.raises(StoreFull, match=f"{6 * SIZE} of {5 * SIZE}"):
        put(store, name(5))
    assert get(store, name(5)) is None
    put(store, name(4), b"9876543210" * 10)  # over one that is there: no room needed
    assert store.used_bytes == 5 * SIZE
    store.delete([name(0), name(77)])
    assert store.used_bytes == 4 * SIZE
    put(store, name(5))
    assert get(store, name(5)) == DATA


def test_a_restart_finds_what_is_there_folder_by_folder(tmp_path: Path) -> None:
    store = FileStore(tmp_path, 5 * SIZE)
    for number in range(5):
        put(store, name(number * 50))
    store.close()

    store = FileStore(tmp_path, 5 * SIZE)
    assert store.used_bytes == 0
    assert get(store, name(200)) == DATA
    store.delete([name(200)])
    assert store.used_bytes == 0
    assert dict(store.scan()) == {name(number * 50): SIZE for number in range(4)}
    assert store.used_bytes == 4 * SIZE
    put(store, name(1))
    with pytest.raises(StoreFull):
        put(store, name(2))
    store.close()


def test_the_limit_holds_after_a_restart_without_a_scan(tmp_path: Path) -> None:
    store = FileStore(tmp_path, 5 * SIZE)
    for number in range(5):
        put(store, name(number))
    store.close()
    store = FileStore(tmp_path, 5 * SIZE)
    with pytest.raises(StoreFull):
        put(store, name(100))
    store.delete([name(3)])
    put(store, name(100))
    assert store.used_bytes == 5 * SIZE
    store.close()


@pytest.mark.parametrize("limit", [None, 10_000])
def test_names_that_are_not_ours_are_left_alone(tmp_path: Path, limit: int | None) -> None:
    store = FileStore(tmp_path, limit)
    store.put(b"\0\1", [memoryview(b"x" * 100)])
    store.close()
    strange = [tmp_path / "00" / name for name in (".nfs0001", "0", "ab", "00AB", "0002.tmp")]
    for path in strange:
        path.write_bytes(b"theirs")
    store = FileStore(tmp_path, limit)
    assert [chunk for chunk, _ in store.scan()] == [b"\0\1"]
    store.put(b"\0\2", [memoryview(b"y" * 100)])
    store.delete([b"\0\1"])
    assert all(path.exists() for path in strange)
    store.close()


def test_a_scan_is_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(tmp_path)
    put(store, name(0))
    put(store, name(255))
    store.close()
    looked_into: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: looked_into.append(Path(path).name) or scandir(path))
    store = FileStore(tmp_path)
    first, _ = next(store.scan())
    assert first == name(0)
    assert looked_into == ["00"]
    store.close()


def test_half_written_files_of_a_killed_server_are_removed(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/0").write_bytes(b"half")
    store = FileStore(tmp_path, 5 * SIZE)
    assert os.listdir(tmp_path / "parts") == []
    put(store, name(0))
    store.close()


def test_a_folder_has_one_server(store: FileStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="another server"):
        FileStore(tmp_path)


def test_a_full_disk_is_told_and_leaves_what_was_there(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(store, name(1))

    def full(fd: int, parts: list[memoryview]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", full)
        for chunk in (name(1), name(2)):
            with pytest.raises(StoreFull, match="No space left"):
                put(store, chunk, b"9876543210" * 10)
    assert get(store, name(1)) == DATA
    assert get(store, name(2)) is None
    assert store.used_bytes == SIZE


def test_short_writes_and_reads_are_continued(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    writev, readv = os.writev, os.readv
    monkeypatch.setattr(os, "writev", lambda fd, parts: writev(fd, [parts[0][:7]]))
    monkeypatch.setattr(os, "readv", lambda fd, parts: readv(fd, [parts[0][:5]]))
    store.put(name(1), [memoryview(DATA)[:33], memoryview(DATA)[33:33], memoryview(DATA)[33:]])
    assert get(store, name(1)) == DATA


def test_a_broken_file_is_removed(store: FileStore, tmp_path: Path) -> None:
    put(store, name(1))
    place = tmp_path / "01" / name(1).hex()
    place.write_bytes(place.read_bytes()[:-1] + b"!")
    assert get(store, name(1)) is None
    assert store.corrupt == 1
    assert not place.exists()
    assert store.used_bytes == 0
    assert get(store, name(1)) is None
    assert store.corrupt == 1, "not there is not broken"


def test_an_unusable_folder_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        FileStore(tmp_path / "file" / "store")


@pytest.mark.parametrize("call", ["readv", "open"])
def test_a_file_that_cannot_be_read_is_a_broken_one(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    put(store, name(1))
    put(store, name(2))
    monkeypatch.setattr(os, call, failing(getattr(os, call), errno.EIO))
    assert get(store, name(1)) is None
    monkeypatch.undo()
    assert store.corrupt == 1
    assert not (tmp_path / "01" / name(1).hex()).exists()
    assert store.used_bytes == SIZE
    assert get(store, name(2)) == DATA


def failing(call: Callable[..., int], number: int) -> Callable[..., int]:
    """Fail for the first chunk's file; a call that knows only a descriptor fails whatever it is."""
    any_file = call is os.readv

    def fail(first: object, *more: object) -> int:
        if any_file or name(1).hex() in str(first):
            raise OSError(number, os.strerror(number))
        return call(first, *more)

    return fail


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_where_the_process_or_the_folder_is_at_fault_nothing_is_deleted(
    store: FileStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    put(store, name(1))
    monkeypatch.setattr(os, "open", failing(os.open, number))
    monkeypatch.setattr(Path, "unlink", lambda path, **_: failing(os.stat, errno.EROFS)(path))
    with pytest.raises(StoreError, match=os.strerror(errno.EROFS if number == errno.EIO else number)):
        get(store, name(1))
    monkeypatch.undo()
    assert get(store, name(1)) == DATA


def test_a_file_that_cannot_be_removed_does_not_keep_the_others(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        put(store, name(number))
    unlink = Path.unlink

    def stuck(path: Path) -> None:
        if path.name == name(1).hex():
            raise OSError(errno.EPERM, "Operation not permitted")
        unlink(path)

    monkeypatch.setattr(Path, "unlink", stuck)
    with pytest.raises(StoreError, match="not permitted"):
        store.delete([name(0), name(1), name(2)])
    assert store.used_bytes == SIZE
    assert dict(store.scan()) == {name(1): SIZE}


def test_what_is_deleted_while_the_disk_is_away_is_not_taken_for_gone(store: FileStore, tmp_path: Path) -> None:
    put(store, name(1))
    away = tmp_path.with_name("away")
    tmp_path.rename(away)
    with pytest.raises(StoreError, match="No such file"):
        store.delete([name(1)])
    away.rename(tmp_path)
    store.delete([name(1)])
    assert store.used_bytes == 0


def test_a_scan_goes_over_every_file_once(store: FileStore) -> None:
    list(store.scan())
    for number in range(300_000):
        store._set_size(number.to_bytes(3, "big"), 0)
    start = time.process_time()
    assert sum(1 for _ in store.scan()) == 300_000
    assert time.process_time() - start < 1.5, "not 256 times"
