import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kvcore.live.allocator import PageAllocator
from kvcore.live.arena import Arena, ArenaError, ArenaPaths, Reader, StaleChunk, Writer, pieces, views
from kvcore.live.mapping import Mapping
from kvcore.live.writers import MEMBER, WriterTable, process_start

PAGE = 4096
SIZE = 64 * PAGE

Spawn = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[ArenaPaths]:
    """An arena's paths in a folder that must be empty in the end: whatever a test does, nothing is left."""
    yield ArenaPaths(tmp_path, "test")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start `code` in another Python process and wait for its first line."""
    with contextlib.ExitStack() as stack:

        def start(code: str, *args: object) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            return process

        yield start


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


# --- open, attach, close ---


def test_a_worker_sees_what_the_server_made(paths: ArenaPaths) -> None:
    with Arena.open(paths, size_bytes=SIZE + 100, page_bytes=PAGE) as server:
        worker = Arena.attach(paths.arena)
        assert (worker.pages, worker.page_bytes, worker.epoch) == (64, PAGE, server.epoch)
        assert worker.address % (2 << 20) == 0
        server.data[5 * PAGE] = 77
        server.generations[63] = 9
        assert worker.data[5 * PAGE] == 77
        assert worker.buffer[5 * PAGE] == 77
        assert worker.generations[63] == 9
        assert worker.is_current
    assert not worker.is_current
    worker.close()


def test_a_closed_arena_says_so(paths: ArenaPaths) -> None:
    arena = Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE)
    arena.close()
    arena.close()
    with pytest.raises(ArenaError, match="closed"):
        _ = arena.data


def test_views_outlive_close_and_keep_the_workers_lock(paths: ArenaPaths) -> None:
    server = Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE)
    worker = Arena.attach(paths.arena)
    view = worker.data[:8]
    view[:] = 3
    worker.close()
    assert view.tolist() == [3] * 8
    with open(paths.arena) as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        del view
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    server.close()


def test_one_server_only(paths: ArenaPaths) -> None:
    with Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE):
        with pytest.raises(ArenaError, match=f"held by the server with process id {os.getpid()}"):
            Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE)
        assert paths.arena.exists()
        assert paths.lock.exists()
    with Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE):
        pass


@pytest.mark.parametrize(
    ("size_bytes", "page_bytes", "message"),
    [
        (1 << 50, 2 << 20, r"does not fit.*at most .* GiB"),
        (SIZE, 1000, "no multiple"),
        (SIZE, 0, "no multiple"),
        (PAGE - 1, PAGE, "0 pages"),
    ],
)
def test_bad_sizes_are_refused_in_one_line(paths: ArenaPaths, size_bytes: int, page_bytes: int, message: str) -> None:
    with pytest.raises(ArenaError, match=message) as caught:
        Arena.open(paths, size_bytes=size_bytes, page_bytes=page_bytes)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_a_bad_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArenaError, match="No such file"):
        Arena.open(ArenaPaths(tmp_path / "nowhere", "x"), size_bytes=SIZE, page_bytes=PAGE)
    with pytest.raises(ArenaError, match="name"):
        ArenaPaths(tmp_path, "../x")
    with pytest.raises(ArenaError, match="no arena"):
        Arena.attach(tmp_path / "kvcore-x.arena")
    assert os.listdir(tmp_path) == []


def test_memory_that_cannot_be_reserved_leaves_nothing(paths: ArenaPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    descriptors = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ArenaError, match=r"cannot reserve .*No space left.*MemAvailable"):
        Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE)
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_an_interrupted_start_leaves_nothing(paths: ArenaPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Mapping) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Mapping, "advise_huge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE)


def test_descriptors_are_closed(paths: ArenaPaths) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE):
            Arena.attach(paths.arena).close()
    assert len(os.listdir("/proc/self/fd")) == before


# --- another format ---


def test_another_format_is_replaced_when_nobody_maps_it(paths: ArenaPaths) -> None:
    paths.arena.write_bytes(b"KVCARENA" + b"\xff" * 5000)
    with Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE) as arena:
        assert not arena.taken_over
        assert not arena.data.any()


def test_half_made_and_resized_arenas_are_replaced(paths: ArenaPaths) -> None:
    paths.arena.write_bytes(b"\0" * 100_000)  # a server died before its header was whole
    Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE).close(unlink=False)
    with Arena.open(paths, size_bytes=2 * SIZE, page_bytes=PAGE) as arena:
        assert (arena.taken_over, arena.pages) == (False, 128)
    Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE).close(unlink=False)
    os.truncate(paths.arena, 10_000)
    with pytest.raises(ArenaError, match="not an arena"):
        Arena.attach(paths.arena)
    with Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE) as arena:
        assert not arena.taken_over


def test_another_size_is_refused_while_somebody_maps_it(paths: ArenaPaths) -> None:
    Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE).close(unlink=False)
    worker = Arena.attach(paths.arena)
    with pytest.raises(ArenaError, match=r"64 pages of 4096 bytes, not 128 pages .* mapped"):
        Arena.open(paths, size_bytes=2 * SIZE, page_bytes=PAGE)
    assert worker.is_current
    worker.close()
    Arena.open(paths, size_bytes=2 * SIZE, page_bytes=PAGE).close()


# --- pretouch ---


def resident_bytes(address: int) -> int:
    """Rss of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(part, 16) for part in first.split("-"))
            inside = start <= address < stop
        elif inside and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("not mapped")


@pytest.mark.parametrize("populate", ["new kernel", "old kernel"])
def test_pretouch_makes_every_page_resident_and_keeps_contents(
    paths: ArenaPaths, monkeypatch: pytest.MonkeyPatch, populate: str
) -> None:
    if populate == "old kernel":
        monkeypatch.setattr(Mapping, "populate", lambda *_: errno.EINVAL)
        monkeypatch.setattr(Mapping, "collapse", lambda *_: errno.EINVAL)
    size_bytes = 80 << 20
    seen: list[tuple[int, int]] = []
    with Arena.open(paths, size_bytes=size_bytes) as arena:
        arena.data[40 << 20] = 5
        assert resident_bytes(arena.address) < size_bytes
        pretouch = arena.pretouch(progress=lambda done, total: seen.append((done, total)))
        assert pretouch.join(60)
        assert not pretouch.running
        assert pretouch.error is None
        assert resident_bytes(arena.address) >= size_bytes
        assert arena.data[40 << 20] == 5
        assert np.count_nonzero(arena.data) == 1
    assert seen == [(32 << 20, size_bytes), (64 << 20, size_bytes), (size_bytes, size_bytes)]


def test_pretouch_tells_when_memory_is_not_there(paths: ArenaPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mapping, "populate", lambda *_: errno.EFAULT)
    with Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE) as arena:
        pretouch = arena.pretouch()
        assert pretouch.join(60)
        assert pretouch.error is not None
        assert pretouch.error.errno == errno.EFAULT
        assert pretouch.done_bytes == 0


@pytest.mark.parametrize(("code", "asked"), [(0, 5), (errno.EINVAL, 3), (errno.ENOMEM, 3)])
def test_huge_pages_are_made_after_all_is_touched_and_given_up_when_refused(
    paths: ArenaPaths, monkeypatch: pytest.MonkeyPatch, code: int, asked: int
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(Mapping, "populate", lambda *_: calls.append("touch") or 0)
    monkeypatch.setattr(Mapping, "collapse", lambda *_: calls.append("collapse") or code)
    with Arena.open(paths, size_bytes=160 << 20) as arena:
        pretouch = arena.pretouch()
        assert pretouch.join(60)
        assert calls == ["touch"] * 5 + ["collapse"] * asked
        assert pretouch.huge_bytes == (arena.size_bytes if code == 0 else 0)
        assert pretouch.error is None
        calls.clear()
        assert arena.pretouch(huge_pages=False).join(60)
        assert calls == ["touch"] * 5


def test_huge_pages_keep_what_is_written_meanwhile() -> None:
    """On a memory file system the kernel moves the data; a writer must not notice."""
    if os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize < 256 << 20:
        pytest.skip("/dev/shm is too small")
    paths = ArenaPaths(Path("/dev/shm"), f"test-{os.getpid()}")
    with Arena.open(paths, size_bytes=128 << 20) as arena:
        pretouch = arena.pretouch()
        words = arena.data.view(np.uint64)
        rounds = 0
        while pretouch.running or rounds < 2:
            rounds += 1
            words[::512] = rounds  # one word of every small page
            assert (words[::512] == rounds).all()
        assert pretouch.error is None
    assert not paths.arena.exists()
    assert not paths.lock.exists()


def test_close_stops_a_pretouch_under_way(paths: ArenaPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    entered = threading.Event()

    def slow(self: Mapping, offset: int, length: int) -> int:
        entered.set()
        time.sleep(0.05)
        return 0

    monkeypatch.setattr(Mapping, "populate", slow)
    monkeypatch.setattr(Mapping, "collapse", lambda *_: errno.EINVAL)
    arena = Arena.open(paths, size_bytes=256 << 20)
    pretouch = arena.pretouch()
    assert entered.wait(30)
    arena.close()
    assert not pretouch.running
    assert pretouch.done_bytes < pretouch.total_bytes


# --- copies ---


def test_pieces_merge_adjacent_pages_and_cut_out_a_shard() -> None:
    assert pieces([4, 5, 9], 100) == [(400, 200), (900, 100)]
    assert pieces([4, 5, 9], 100, 50, 200) == [(450, 150), (900, 50)]
    assert pieces([9, 4], 100, 99, 2) == [(999, 1), (400, 1)]
    assert pieces([4], 100, 30, 0) == []
    with pytest.raises(ValueError, match="chunk of 1 pages"):
        pieces([4], 100, 50, 51)


def test_shards_are_written_and_read_across_scattered_pages(paths: ArenaPaths) -> None:
    with Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE) as arena:
        pages = np.array([7, 3, 4, 60, 1], np.uint32)
        told = arena.generations[pages]
        chunk = np.random.default_rng(0).integers(0, 256, 2 * 10_000, np.uint8)
        for rank in range(2):
            Writer(arena).scatter(pages, told, chunk[rank * 10_000 : (rank + 1) * 10_000], rank * 10_000)
        expected = np.concatenate([arena.data[p * PAGE : (p + 1) * PAGE] for p in pages.tolist()])[: chunk.size]
        assert np.array_equal(expected, chunk)
        shard = np.zeros(10_000, np.uint8)
        Reader(arena).gather(pages, told, shard, 10_000)
        assert np.array_equal(shard, chunk[10_000:])
        parts = views(arena, pages, 0, chunk.size)
        assert b"".join(parts) == chunk.tobytes()
        assert len(parts) == 4


def test_pages_handed_out_anew_are_stale_before_and_after_a_copy(
    paths: ArenaPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE) as arena:
        allocator = PageAllocator(arena.generations, arena.page_writers)
        pages = allocator.take(2)
        told = arena.generations[pages]
        flat = np.zeros(2 * PAGE, np.uint8)
        Reader(arena).gather(pages, told, flat)

        copy = np.copyto

        def reused_meanwhile(into: np.ndarray, data: np.ndarray) -> None:
            copy(into, data)
            allocator.give(pages[1:])
            allocator.take(1)

        with monkeypatch.context() as patch:
            patch.setattr(np, "copyto", reused_meanwhile)
            allocator.give(allocator.take(allocator.free))  # the page given back is the first to be taken again
            with pytest.raises(StaleChunk, match="1 of 2"):
                Reader(arena).gather(pages, told, flat)
        arena.generations[pages[0]] += np.uint64(1)
        with pytest.raises(StaleChunk):
            Writer(arena).scatter(pages, told, flat)


REWRITER = """
    import sys
    from pathlib import Path
    import numpy as np
    from kvcore.live.allocator import PageAllocator
    from kvcore.live.arena import Arena, ArenaPaths, Writer

    arena = Arena.open(ArenaPaths(Path(sys.argv[1]), "test"), size_bytes=18 * 4096, page_bytes=4096)
    allocator = PageAllocator(arena.generations, arena.page_writers)
    board = arena.data[:8].view(np.uint64)
    own = allocator.take(1)
    assert own[0] == 0
    pages = allocator.take(17)
    print("ready", flush=True)
    while True:
        told = arena.generations[pages].copy()
        Writer(arena).scatter(pages, told, np.full(17 * 512, told[0], np.uint64).view(np.uint8))
        board[0] = told[0]  # committed: from here on readers are told of it
        for _ in range(int(told[0]) % 7):
            board[0] = told[0]
        allocator.give(pages)
        pages = allocator.take(17)
"""


def test_a_reader_racing_a_rewriter_never_accepts_torn_data(paths: ArenaPaths, spawn: Spawn) -> None:
    process = spawn(REWRITER, paths.folder)
    arena = Arena.attach(paths.arena)
    board = arena.data[:8].view(np.uint64)
    reader = Reader(arena)
    pages = np.arange(1, 18, dtype=np.uint32)
    flat = np.zeros(17 * PAGE, np.uint8)
    accepted = stale = 0
    until = time.monotonic() + 30
    while time.monotonic() < until and (accepted < 300 or stale < 300):
        generation = board[0]
        try:
            reader.gather(pages, np.full(17, generation), flat)
        except StaleChunk:
            stale += 1
        else:
            accepted += 1
            assert (flat.view(np.uint64) == generation).all()
    kill(process)
    arena.close()
    Arena.open(paths, size_bytes=18 * PAGE, page_bytes=PAGE).close()
    assert accepted >= 50
    assert stale >= 50


# --- takeover ---

WORKER = """
    import sys
    from pathlib import Path
    from kvcore.live.arena import Arena
    arena = Arena.attach(Path(sys.argv[1]))
    print("ready", flush=True)
    sys.stdin.readline()
    arena.data[0] = 99
    print("written", flush=True)
    sys.stdin.readline()
"""

SERVER = """
    import sys
    from pathlib import Path
    from kvcore.live.allocator import PageAllocator
    from kvcore.live.arena import Arena, ArenaPaths
    arena = Arena.open(ArenaPaths(Path(sys.argv[1]), "test"), size_bytes=64 * 4096, page_bytes=4096)
    allocator = PageAllocator(arena.generations, arena.page_writers)
    print("ready", flush=True)
    pids = [int(pid) for pid in sys.stdin.readline().split()]
    one = arena.writers.join("one/0", pids[0])
    arena.writers.join("one/1", pids[1], one)
    two = arena.writers.join("two/0", pids[2])
    committed = allocator.take(10, one)
    allocator.settle(committed)
    arena.data[committed[0] * 4096] = 42
    allocator.take(5, one)
    allocator.take(7, two)
    print("taken", flush=True)
    sys.stdin.readline()
"""


def tell(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_a_killed_server_is_taken_over_and_live_writers_pages_stay_quarantined(paths: ArenaPaths, spawn: Spawn) -> None:
    server = spawn(SERVER, paths.folder)
    workers = [spawn(WORKER, paths.arena) for _ in range(3)]
    assert tell(server, " ".join(str(worker.pid) for worker in workers)) == "taken"
    epoch = Arena.attach(paths.arena).epoch
    kill(server)
    kill(workers[0])

    with Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE) as arena:
        assert arena.taken_over
        assert arena.epoch > epoch
        allocator = PageAllocator(arena.generations, arena.page_writers, in_use=range(10))
        assert arena.data[0] == 42
        assert (allocator.used, allocator.quarantined, allocator.free) == (10, 12, 42)

        # Of engine one a rank lives on, as does engine two: nothing may be handed out.
        assert allocator.reap(arena.writers.alive) == 0
        assert tell(workers[1], "go") == "written"  # it still writes here: the mapping is the same
        assert arena.data[0] == 99

        kill(workers[1])
        assert allocator.reap(arena.writers.alive) == 5

        # Engine two's worker has drained and registers anew.
        arena.writers.leave("two/0", workers[2].pid)
        assert allocator.reap(arena.writers.alive) == 7
        assert arena.writers.join("two/0", workers[2].pid) == 3
        assert (allocator.quarantined, allocator.free) == (0, 54)
        kill(workers[2])


def test_without_anyone_mapping_it_all_marks_lapse(paths: ArenaPaths, spawn: Spawn) -> None:
    server = spawn(SERVER, paths.folder)
    assert tell(server, f"{os.getpid()} {os.getpid()} 0") == "taken"  # alive, or out of sight, but without a mapping
    kill(server)
    with Arena.open(paths, size_bytes=SIZE, page_bytes=PAGE) as arena:
        allocator = PageAllocator(arena.generations, arena.page_writers)
        assert allocator.quarantined == 12
        assert allocator.reap(arena.writers.alive) == 12


# --- the table of writers ---


def table(slots: int = 4) -> WriterTable:
    return WriterTable(np.zeros(slots, MEMBER), np.zeros(1, np.uint32))


def test_a_writer_lives_while_any_member_does(spawn: Spawn) -> None:
    writers = table()
    process = spawn("import sys; print('ready', flush=True); sys.stdin.read()")
    first = writers.join("a/0", os.getpid())
    writers.join("a/1", process.pid, first)
    assert first == 1
    assert not writers.alive(2)
    writers.leave("a/0", os.getpid())
    assert writers.alive(first)
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while writers.alive(first) and time.monotonic() < deadline:  # not waited for: it stays a zombie
        time.sleep(0.01)
    assert Path(f"/proc/{process.pid}/stat").exists()
    assert not writers.alive(first)


def test_a_reused_process_id_is_not_the_old_process() -> None:
    slots = np.zeros(4, MEMBER)
    writers = WriterTable(slots, np.zeros(1, np.uint32))
    writer = writers.join("a/0", os.getpid())
    slots["start"][0] -= 1
    assert not writers.alive(writer)


def test_what_is_out_of_sight_lives_until_it_leaves() -> None:
    slots = np.zeros(4, MEMBER)
    writers = WriterTable(slots, np.zeros(1, np.uint32))
    unseen, foreign = writers.join("a/0", 0), writers.join("b/0", os.getpid())
    slots["pid_namespace"][1] += 1
    slots["start"][1] = 1
    assert writers.alive(unseen)
    assert writers.alive(foreign)
    writers.leave("a/0", 4711)
    writers.leave("nobody/0", os.getpid())
    assert not writers.alive(unseen)
    assert writers.alive(foreign)
    writers.clear()
    assert not writers.alive(foreign)


def test_a_full_table_is_refused() -> None:
    writers = table(slots=1)
    writers.join("a/0", os.getpid())
    with pytest.raises(ArenaError, match="full: 1 process"):
        writers.join("b/0", os.getpid())


def test_process_start_tells_processes_apart() -> None:
    ours = process_start(os.getpid())
    assert ours is not None
    assert ours != process_start(1)
    assert process_start(0) is None
    assert process_start(2**22 + 5) is None
