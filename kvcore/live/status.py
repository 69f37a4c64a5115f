"""A service's state as plain data, for status pages and for /metrics."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from kvcore.live.members import Instance

if TYPE_CHECKING:
    from kvcore.live.service import Service


def status(service: "Service") -> dict[str, Any]:
    """Return the server's state, to be shown."""
    arena, allocator, core = service.parts.arena, service.parts.allocator, service.parts.state.core
    tiers = [
        {
            "name": tier.name,
            "chunks": len(tier.resident),
            "pages": tier.used,
            "capacity_pages": tier.capacity,
            "idle_pages": tier.idle,
            "bytes": tier.used * arena.page_bytes,
        }
        for tier in core.tiers
    ]
    recorder, journal = service.parts.recorder, service.parts.journal
    return {
        "epoch": arena.epoch,
        "pid": os.getpid(),
        "uptime_s": (service.clock.now_ns() - service.started_ns) / 1e9,
        "arena": {
            "path": str(arena.path),
            "page_bytes": arena.page_bytes,
            "pages": arena.pages,
            "free_pages": allocator.free,
            "quarantined_pages": allocator.quarantined,
            "taken_over": arena.taken_over,
            "touched_bytes": None if service.pretouch is None else service.pretouch.done_bytes,
            "huge_bytes": None if service.pretouch is None else service.pretouch.huge_bytes,
        },
        "chunk_tokens": service.settings.chunk_size,
        "tiers": tiers,
        "quotas": {
            salt: {"pages": pages, "used_pages": core.tiers[0].salt_pages.get(salt, 0)}
            for salt, pages in core.tiers[0].quotas.items()
        },
        "l2_failing": None if service.parts.pool is None else service.parts.pool.failing,
        "l2_corrupt_chunks": None if service.parts.pool is None else service.parts.pool.corrupt,
        "l2_threads": service.settings.copying_threads if service.settings.l2 else None,
        "requests": len(service.works),
        "instances": [_shown(instance) for instance in service.members.instances.values()],
        "recorder": None
        if recorder is None
        else {"path": str(recorder.path), "rows": recorder.rows, "dropped": recorder.dropped},
        "journal": None
        if not service.settings.journal
        else {
            "path": service.settings.journal,
            "bytes": None if journal is None else journal.written_bytes,
            "failed": service.journal_failure or None,
        },
    }


def kept_elsewhere(service: "Service") -> Iterable[tuple[tuple[str, ...], float]]:
    """Yield the gauges and the counters that other parts keep."""
    allocator, core, page_bytes = service.parts.allocator, service.parts.state.core, service.parts.arena.page_bytes
    yield ("kvcore_pages", "free"), allocator.free
    yield ("kvcore_pages", "used"), allocator.used
    yield ("kvcore_pages", "quarantined"), allocator.quarantined
    for index, tier in enumerate(core.tiers, 1):
        yield ("kvcore_bytes_in_use", f"l{index}"), tier.used * page_bytes
        yield ("kvcore_chunks", f"l{index}"), len(tier.resident)
    yield ("kvcore_requests_at_work",), len(service.works)
    yield ("kvcore_uptime_seconds",), (service.clock.now_ns() - service.started_ns) / 1e9
    yield ("kvcore_l2_dropped_chunks",), service.transport.dropped_l2_chunks
    if service.parts.pool is not None:
        yield ("kvcore_l2_corrupt_chunks",), service.parts.pool.corrupt
    if service.parts.recorder is not None:
        yield ("kvcore_recorder_rows",), service.parts.recorder.rows
        yield ("kvcore_recorder_dropped",), service.parts.recorder.dropped
    if service.parts.journal is not None:
        yield ("kvcore_journal_bytes",), service.parts.journal.written_bytes
    if service.settings.journal:
        yield ("kvcore_journal_failed",), bool(service.journal_failure)


def _shown(instance: Instance) -> dict[str, Any]:
    register = instance.register
    return {
        "name": instance.name,
        "ready": instance.ready,
        "requests": len(instance.works),
        "world": register.world,
        "shards": register.shards,
        "block_tokens": register.block_tokens,
        "chunk_bytes": instance.chunk_bytes,
        "chunk_pages": instance.chunk_pages,
        "namespace": register.namespace,
        "members": [
            {"role": member.role, "rank": member.rank, "pid": member.pid, "here": member.here}
            for member in instance.members.values()
        ],
    }
