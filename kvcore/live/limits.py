"""How much memory an arena may reserve on this machine, and the refusal that shows the figures."""

import os
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30
_UNLIMITED = 1 << 60  # cgroup v1 says "no limit" as the largest multiple of a page below 2^63


class ArenaError(Exception):
    """An arena cannot be had as asked. The message is one line, with the figures, fit to end a program's start with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimits:
    """What is left for an arena, in bytes; None where the system sets no such limit."""

    folder_bytes: int
    cgroup_bytes: int | None
    available_bytes: int | None

    @property
    def least_bytes(self) -> int:
        """The size of the largest arena that fits."""
        known = (self.folder_bytes, self.cgroup_bytes, self.available_bytes)
        return max(0, min(limit for limit in known if limit is not None))

    def __str__(self) -> str:
        parts = [f"free in the folder {gib(self.folder_bytes)}"]
        if self.cgroup_bytes is not None:
            parts.append(f"left under the cgroup's limit {gib(self.cgroup_bytes)}")
        if self.available_bytes is not None:
            parts.append(f"MemAvailable {gib(self.available_bytes)}")
        return ", ".join(parts)


def gib(size_bytes: int) -> str:
    """Show bytes as GiB: what a flag that ends in `-gb` counts in."""
    return f"{size_bytes / GIB:.2f} GiB"


def read_limits(folder: Path, *, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> MemoryLimits:
    """Read what is left for an arena in `folder`.

    A hugetlbfs folder hands out a pool set aside beforehand, so only its own free space counts there.

    Raises:
        ArenaError: the folder is missing or cannot be asked.
    """
    try:
        stat = os.statvfs(folder)
    except OSError as error:
        raise ArenaError(f"arena folder {folder}: {error.strerror}") from error
    free_bytes = stat.f_bavail * stat.f_frsize
    if stat.f_bsize >= 2 << 20:  # only hugetlbfs has blocks of a huge page
        return MemoryLimits(folder_bytes=free_bytes, cgroup_bytes=None, available_bytes=None)
    return MemoryLimits(
        folder_bytes=free_bytes,
        cgroup_bytes=_cgroup_left(proc, cgroups),
        available_bytes=_mem_available(proc),
    )


def check_size(size_bytes: int, folder: Path, limits: MemoryLimits) -> None:
    """Refuse an arena that would not fit.

    Raises:
        ArenaError: `size_bytes` is beyond the least of the limits; the message shows each of them.
    """
    if size_bytes > limits.least_bytes:
        raise ArenaError(
            f"an arena of {gib(size_bytes)} does not fit in {folder}: at most {gib(limits.least_bytes)} ({limits})"
        )


def _mem_available(proc: Path) -> int | None:
    text = _read(proc / "meminfo")
    for line in (text or "").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_left(proc: Path, cgroups: Path) -> int | None:
    """Return the least of limit - usage over this process's memory cgroup and its ancestors."""
    least: int | None = None
    for line in (_read(proc / "self" / "cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, read_left = cgroups, _left_v2
        elif "memory" in controllers.split(","):
            root, read_left = cgroups / "memory", _left_v1
        else:
            continue
        for group in _ancestry(root, path):
            left = read_left(group)
            if left is not None:
                least = left if least is None else min(least, left)
    return least


def _ancestry(root: Path, path: str) -> list[Path]:
    """List a cgroup's folders up to the root. In a container only the root may be there, holding its own limit."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [root.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _left_v2(group: Path) -> int | None:
    limit, usage = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is None or usage is None:
        return None
    return limit - usage + _inactive_file(group, "inactive_file")


def _left_v1(group: Path) -> int | None:
    limit, usage = _number(group / "memory.limit_in_bytes"), _number(group / "memory.usage_in_bytes")
    if limit is None or usage is None or limit >= _UNLIMITED:
        return None
    return limit - usage + _inactive_file(group, "total_inactive_file")


def _inactive_file(group: Path, name: str) -> int:
    """Page cache that the kernel drops first. Without it a container that has just read a model would look full."""
    for line in (_read(group / "memory.stat") or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    text = (_read(path) or "").strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
