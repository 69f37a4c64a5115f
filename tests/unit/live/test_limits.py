from pathlib import Path

import pytest

from kvcore.live.limits import GIB, ArenaError, MemoryLimits, check_size, read_limits


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    write(tmp_path / "proc/meminfo", "MemTotal: 99 kB\nMemAvailable:   41943040 kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/pods/engine\n")
    return tmp_path / "proc"


def limits_with(proc: Path, tmp_path: Path) -> MemoryLimits:
    return read_limits(tmp_path, proc=proc, cgroups=tmp_path / "cgroup")


def test_mem_available_and_folder_are_read(proc: Path, tmp_path: Path) -> None:
    limits = limits_with(proc, tmp_path)
    assert limits.available_bytes == 40 * GIB
    assert limits.cgroup_bytes is None
    assert 0 < limits.folder_bytes < 1 << 60


def test_the_tightest_ancestor_of_a_v2_cgroup_counts_less_reclaimable_cache(proc: Path, tmp_path: Path) -> None:
    group = tmp_path / "cgroup/pods/engine"
    write(group / "memory.max", "max\n")
    write(group / "memory.current", f"{GIB}\n")
    write(group.parent / "memory.max", f"{10 * GIB}\n")
    write(group.parent / "memory.current", f"{8 * GIB}\n")
    write(group.parent / "memory.stat", f"anon 5\ninactive_file {3 * GIB}\nactive_file 7\n")
    assert limits_with(proc, tmp_path).cgroup_bytes == 5 * GIB


def test_a_container_sees_its_own_limit_at_the_root(proc: Path, tmp_path: Path) -> None:
    write(tmp_path / "cgroup/memory.max", f"{4 * GIB}\n")
    write(tmp_path / "cgroup/memory.current", f"{GIB}\n")
    assert limits_with(proc, tmp_path).cgroup_bytes == 3 * GIB


def test_a_v1_memory_cgroup_counts_and_its_unlimited_does_not(proc: Path, tmp_path: Path) -> None:
    write(proc / "self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n")
    group = tmp_path / "cgroup/memory/docker/abc"
    write(group / "memory.limit_in_bytes", f"{6 * GIB}\n")
    write(group / "memory.usage_in_bytes", f"{2 * GIB}\n")
    assert limits_with(proc, tmp_path).cgroup_bytes == 4 * GIB
    write(group / "memory.limit_in_bytes", "9223372036854771712\n")
    assert limits_with(proc, tmp_path).cgroup_bytes is None


def test_a_size_beyond_the_least_is_refused_with_every_figure() -> None:
    limits = MemoryLimits(folder_bytes=30 * GIB, cgroup_bytes=8 * GIB, available_bytes=16 * GIB)
    check_size(8 * GIB, Path("/somewhere"), limits)
    with pytest.raises(ArenaError) as caught:
        check_size(8 * GIB + 1, Path("/somewhere"), limits)
    message = str(caught.value)
    assert "\n" not in message
    for figure in ("/somewhere", "at most 8.00 GiB", "30.00 GiB", "16.00 GiB"):
        assert figure in message


def test_an_overdrawn_cgroup_leaves_nothing() -> None:
    limits = MemoryLimits(folder_bytes=GIB, cgroup_bytes=-5, available_bytes=None)
    assert limits.least_bytes == 0


def test_a_missing_folder_is_an_arena_error(tmp_path: Path) -> None:
    with pytest.raises(ArenaError, match="nowhere"):
        read_limits(tmp_path / "nowhere")
