"""The connectors' counts in vLLM's own metrics: the periodic log line, and `vllm:kvcore_*` on its /metrics."""

from typing import Any

from prometheus_client import Counter

from kvcore.vllm.compat import KVConnectorPromMetrics, KVConnectorStats
from kvcore.vllm.stats import NUMBERS, add

_REFUSED = "refused_chunks_"
_MEANING = {
    "lookups": "Prompts looked up at the kvcore server.",
    "lookup_seconds": "Seconds that the scheduler waited for lookups.",
    "matched_tokens": "Leading prompt tokens that the server held at lookup, whatever the engine's own cache held.",
    "stored_tokens": "Tokens copied to L1.",
    "stored_bytes": "Bytes copied to L1.",
    "store_seconds": "Seconds that copies to L1 took, by the device's clock.",
    "loaded_tokens": "Tokens copied from L1 into the engine's KV cache.",
    "loaded_bytes": "Bytes copied from L1 into the engine's KV cache.",
    "load_seconds": "Seconds that copies from L1 took, by the device's clock.",
    "failed_tokens": "Tokens whose load failed, so that they were computed.",
    "aborted_tokens": "Tokens that were given room in L1 and not stored.",
}


class KVCoreStats(KVConnectorStats):  # type: ignore[misc]  # vLLM is untyped here
    """Counts by name; what workers and scheduler count is added up."""

    data: dict[str, int | float]

    def reset(self) -> None:
        """Forget everything."""
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> "KVCoreStats":
        """Add another's counts to these."""
        self.data = add(self.data, other.data)
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return the counts as they are logged."""
        return {name: round(value, 6) for name, value in sorted(self.data.items())}

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data


class KVCorePromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # vLLM is untyped here
    """The counts as Prometheus counters, one series an engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter]
        self._numbers = {
            name: counter(name=f"vllm:kvcore_{name}", documentation=_MEANING[name], labelnames=labelnames)
            for name in NUMBERS
        }
        self._refused = counter(
            name="vllm:kvcore_refused_chunks",
            documentation="Chunks that the server gave no room, by reason.",
            labelnames=[*labelnames, "reason"],
        )
        for values in per_engine_labelvalues.values():
            for metric in self._numbers.values():
                metric.labels(*values)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add counts to an engine's series."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            if name.startswith(_REFUSED):
                self._refused.labels(*labels, name.removeprefix(_REFUSED)).inc(value)
            elif name in self._numbers:
                self._numbers[name].labels(*labels).inc(value)
