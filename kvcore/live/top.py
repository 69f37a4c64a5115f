"""`kvcore top`: rates and levels of a running server, from two looks at its counters."""

import json
import sys
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from kvcore.live import wire
from kvcore.live.connection import Client
from kvcore.live.tools import status_tables


def watch(endpoint: str, every_s: float, *, once: bool, as_json: bool) -> None:
    """Show the rates between looks until interrupted. Raises ServerAwayError, RemoteError."""
    with Client(endpoint) as client:
        before = _look(client)
        if once or as_json:
            while True:
                time.sleep(every_s)
                now = _look(client)
                _print(rates(before, now), now, as_json=as_json)
                if once:
                    return
                before = now
        with Live(console=Console(), auto_refresh=False) as live:
            while True:
                time.sleep(every_s)
                now = _look(client)
                live.update(_screen(rates(before, now), now), refresh=True)
                before = now


def rates(before: dict[str, Any], now: dict[str, Any]) -> dict[str, float]:
    """Return what happened a second between two looks, and ratios of the tokens looked up in between."""
    seconds = max(1e-9, now["at_s"] - before["at_s"])

    def since(name: str) -> float:
        return float(now["sums"].get(name, 0) - before["sums"].get(name, 0))

    requested = since("kvcore_requested_tokens")
    return {
        "requests_per_s": since("kvcore_requests") / seconds,
        "requested_tokens_per_s": requested / seconds,
        "matched_of_requested": since("kvcore_matched_tokens") / requested if requested else 0.0,
        "loaded_of_requested": since("kvcore_loaded_tokens") / requested if requested else 0.0,
        "stored_tokens_per_s": since("kvcore_stored_tokens") / seconds,
        "loaded_gb_per_s": since("kvcore_loaded_bytes") / seconds / 1e9,
        "stored_gb_per_s": since("kvcore_stored_bytes") / seconds / 1e9,
        "evicted_chunks_per_s": since("kvcore_evicted_chunks") / seconds,
        "refused_chunks_per_s": since("kvcore_refused_chunks") / seconds,
        "errors_per_s": since("kvcore_errors") / seconds,
    }


def _look(client: Client) -> dict[str, Any]:
    metrics, status = client.call(wire.GetMetrics(), 5.0), client.call(wire.Status(), 5.0)
    if not (isinstance(metrics, wire.Report) and isinstance(status, wire.Report)):
        raise TypeError("reports were asked for")
    sums: dict[str, float] = {}
    for name, *_, value in metrics.data["values"]:
        sums[name] = sums.get(name, 0) + value
    return {"at_s": time.monotonic(), "sums": sums, "status": status.data}


def _table(found: dict[str, float]) -> Table:
    table = Table("rate", "value", title="since the last look", title_justify="left")
    for name, value in found.items():
        table.add_row(name, f"{value:,.3f}")
    return table


def _screen(found: dict[str, float], now: dict[str, Any]) -> Group:
    return Group(_table(found), *status_tables(now["status"])[1:])


def _print(found: dict[str, float], now: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"rates": found, "tiers": now["status"]["tiers"]}) + "\n")
        sys.stdout.flush()
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(_screen(found, now))
