"""What the small commands ask of a server."""

import statistics
import time
from typing import Any

from rich.table import Table

from kvcore.live import wire
from kvcore.live.connection import Client, RemoteError


def ping_times(endpoint: str, count: int, timeout_s: float) -> dict[str, Any]:
    """Return the round trips of `count` pings, in ms. Raises ServerAwayError, RemoteError."""
    took = []
    with Client(endpoint) as client:
        for _ in range(count):
            start = time.perf_counter()
            pong = client.ping(timeout_s)
            took.append((time.perf_counter() - start) * 1000)
    return {
        "server": endpoint,
        "pid": pong.pid,
        "epoch": pong.epoch,
        "pings": count,
        "min_ms": min(took),
        "median_ms": statistics.median(took),
        "max_ms": max(took),
    }


def report(endpoint: str, request: wire.Message, timeout_s: float) -> dict[str, Any]:
    """Return a report's data. Raises ServerAwayError, RemoteError."""
    with Client(endpoint) as client:
        reply = client.call(request, timeout_s)
    if not isinstance(reply, wire.Report):
        raise RemoteError("internal", f"an unexpected reply: {type(reply).__name__}")
    return reply.data


def status(endpoint: str, timeout_s: float) -> dict[str, Any]:
    """Return the server's state. Raises ServerAwayError, RemoteError."""
    return report(endpoint, wire.Status(), timeout_s)


def clear(endpoint: str, chunks: tuple[bytes, ...] | None, timeout_s: float) -> dict[str, Any]:
    """Drop chunks, or everything. Raises ServerAwayError, RemoteError."""
    with Client(endpoint) as client:
        client.call(wire.Clear(chunks), timeout_s)
    return {"cleared": "everything" if chunks is None else f"{len(chunks)} chunks"}


def status_tables(report: dict[str, Any]) -> list[Table]:
    """Return a status as tables."""
    arena = report["arena"]
    general = Table("what", "value", title="server", title_justify="left")
    for name, value in (
        ("pid", report["pid"]),
        ("up", f"{report['uptime_s']:.0f} s"),
        ("epoch", report["epoch"]),
        ("chunk", f"{report['chunk_tokens']} tokens"),
        ("arena", f"{arena['path']}, {arena['pages']} pages of {arena['page_bytes']} bytes"),
        ("pages", f"{arena['free_pages']} free, {arena['quarantined_pages']} quarantined"),
        ("requests at work", report["requests"]),
        ("quotas", _quotas(report["quotas"])),
        ("L2", _l2(report["l2_failing"], report["l2_corrupt_chunks"])),
        ("recorder", _recorder(report["recorder"])),
        ("journal", _journal(report["journal"])),
    ):
        general.add_row(name, str(value))
    tiers = Table("tier", "chunks", "GiB", "pages", "of", title="tiers", title_justify="left")
    for tier in report["tiers"]:
        capacity = "unbounded" if tier["capacity_pages"] is None else str(tier["capacity_pages"])
        tiers.add_row(tier["name"], str(tier["chunks"]), f"{tier['bytes'] / 2**30:.2f}", str(tier["pages"]), capacity)
    instances = Table("instance", "model", "ready", "members", "requests", title="instances", title_justify="left")
    for one in report["instances"]:
        members = ", ".join(f"{m['role']} {m['rank']} (pid {m['pid']})" for m in one["members"])
        ready = "yes" if one["ready"] else "no"
        instances.add_row(one["name"], one["namespace"].get("model", ""), ready, members, str(one["requests"]))
    return [general, tiers, instances]


def _quotas(quotas: dict[str, dict[str, int]]) -> str:
    return ", ".join(f"{salt}: {one['used_pages']} of {one['pages']} pages" for salt, one in quotas.items()) or "none"


def _l2(failing: dict[str, str] | None, corrupt: int | None) -> str:
    if failing is None:
        return "off"
    state = [f"{operation} fails: {error}" for operation, error in failing.items()] or ["works"]
    return "; ".join([*state, f"chunks found broken: {corrupt}"] if corrupt else state)


def _journal(journal: dict[str, Any] | None) -> str:
    if journal is None:
        return "off"
    return f"{journal['path']}: given up, {journal['failed']}" if journal["failed"] else str(journal["path"])


def _recorder(recorder: dict[str, Any] | None) -> str:
    if recorder is None:
        return "off"
    return f"{recorder['path']}: {recorder['rows']} rows, {recorder['dropped']} dropped"
