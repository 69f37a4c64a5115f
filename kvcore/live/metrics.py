"""Counters and histograms of a server, fed by what the core was told and decided, and by the engines' reports.

The request loop only adds to plain numbers; the web thread asks for them over the wire and renders them.
"""

from bisect import bisect_left
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any, Final, cast

import numpy as np

from kvcore.live.members import Work
from kvcore.policy import Chunk, Decision, Demote, Event, Evict, Refuse, StoreCommitted

SECONDS: Final = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
AGES: Final = (1.0, 3.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0, 3600.0, 4 * 3600.0, 24 * 3600.0)
SAMPLED_BELOW: Final = 4
"""Chunks whose digest's last byte is below this, one in 64, are followed for reuse gap and lifetime."""
_EVICTED_REMEMBERED = 262_144
_PROBES_REMEMBERED = 65_536
_MOST = 2**63 - 1
"""A counter that engines have brought further is shown as this, which can travel."""
_TENANTS = 1000
"""Salts with counters of their own; later ones share the label `other`. A salt is shown as a digest (`veiled`) unless
the operator has named it."""

HELP: Final[dict[str, tuple[str, str, tuple[str, ...]]]] = {
    "kvcore_requests": ("counter", "Requests looked up, each once.", ("model", "salt", "resumed")),
    "kvcore_requested_tokens": ("counter", "Prompt tokens of the requests looked up.", ("model", "salt")),
    "kvcore_aligned_tokens": ("counter", "Of them, those in full chunks: the most that can hit.", ("model", "salt")),
    "kvcore_matched_tokens": (
        "counter",
        "Leading chunks found x chunk tokens, whatever the engine's own cache holds.",
        ("tier", "model", "salt"),
    ),
    "kvcore_loaded_tokens": (
        "counter",
        "Tokens copied into the engine, beyond its own cache; equals vLLM's external_prefix_cache_hits.",
        ("tier", "model", "salt"),
    ),
    "kvcore_missed_tokens": (
        "counter",
        "Requested - matched: cold (never seen), evicted, namespace (cached for another model, dtype, ...), tail.",
        ("reason", "model", "salt"),
    ),
    "kvcore_stored_tokens": ("counter", "Tokens that every rank has written.", ("model", "salt")),
    "kvcore_loaded_bytes": ("counter", "Bytes copied into engines, all ranks.", ("model",)),
    "kvcore_stored_bytes": ("counter", "Bytes written by engines, all ranks.", ("model",)),
    "kvcore_evicted_chunks": ("counter", "Chunks that left a tier; demoted: for the one below.", ("tier", "reason")),
    "kvcore_refused_chunks": ("counter", "Chunks not stored, or not loaded, by reason.", ("reason",)),
    "kvcore_l2_chunks": ("counter", "Chunks copied to and from L2.", ("operation", "result")),
    "kvcore_errors": ("counter", "Error replies, by kind.", ("kind",)),
    "kvcore_lookup_seconds": ("histogram", "Handling of a lookup in the request loop.", ()),
    "kvcore_turn_seconds": ("histogram", "A turn of the request loop, journal included.", ()),
    "kvcore_load_seconds": ("histogram", "Copy of a request's chunks into the engine, by the device's clock.", ()),
    "kvcore_store_seconds": ("histogram", "Copy of chunks into the arena, by the device's clock.", ()),
    "kvcore_l2_seconds": ("histogram", "Copy of a chunk to or from L2.", ("operation",)),
    "kvcore_reuse_gap_seconds": ("histogram", "Time between two uses of a chunk; one chunk in 64.", ()),
    "kvcore_chunk_lifetime_seconds": ("histogram", "Time from store to eviction from L1; one chunk in 64.", ()),
    "kvcore_pages": ("gauge", "Pages of the arena.", ("state",)),
    "kvcore_bytes_in_use": ("gauge", "Bytes of the pages that chunks occupy.", ("tier",)),
    "kvcore_chunks": ("gauge", "Chunks that can be matched.", ("tier",)),
    "kvcore_requests_at_work": ("gauge", "Requests that hold anything.", ()),
    "kvcore_recorder_rows": ("counter", "Trace rows written.", ()),
    "kvcore_recorder_dropped": ("counter", "Trace rows lost.", ()),
    "kvcore_journal_bytes": ("counter", "Bytes written to the journal.", ()),
    "kvcore_journal_failed": ("gauge", "1 where the journal could not be written and was given up.", ()),
    "kvcore_l2_corrupt_chunks": (
        "counter",
        "Chunks that were broken in L2 when they were asked for; among its misses.",
        (),
    ),
    "kvcore_l2_dropped_chunks": ("counter", "Chunks not written to L2 for want of room in its queue.", ()),
    "kvcore_uptime_seconds": ("gauge", "Since the server started.", ()),
}
"""By name: kind, help and labels. A counter is exported with the suffix `_total`."""


class Histogram:
    """Counts by upper bound, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Metrics:
    """All of a server's numbers. One thread adds to them: the request loop's."""

    def __init__(self) -> None:
        self.counts: defaultdict[tuple[str, ...], int] = defaultdict(int)
        """By name and label values, in the order of `HELP`."""
        self.histograms: dict[tuple[str, ...], Histogram] = {
            (name,): Histogram(AGES if "gap" in name or "lifetime" in name else SECONDS)
            for name, (kind, _, labels) in HELP.items()
            if kind == "histogram" and not labels
        }
        self._labels_of: dict[str, str] = {}
        """By salt, of the tenants with counters of their own."""
        self._named: set[str] = set()
        self._evicted: OrderedDict[Chunk, None] = OrderedDict()
        self._probes: OrderedDict[bytes, Chunk] = OrderedDict()
        self._stored_ns: dict[Chunk, int] = {}
        self._used_ns: OrderedDict[Chunk, int] = OrderedDict()

    def observe(self, event: Event, decisions: tuple[Decision, ...]) -> None:
        """Take in an event and its decisions."""
        if type(event) is StoreCommitted and event.tier == 0:
            refused = {chunk for decision in decisions if type(decision) is Refuse for chunk in decision.chunks}
            for chunk in sampled(event.chunks):
                if chunk in refused:
                    continue
                self._stored_ns[chunk] = event.now_ns
                self._use(chunk, event.now_ns)
        for decision in decisions:
            if type(decision) is Evict:
                self._leave(decision.tier, decision.chunks, decision.reason, event.now_ns)
            elif type(decision) is Demote:
                self._leave(decision.tier, decision.chunks, "demoted", event.now_ns)
            elif type(decision) is Refuse:
                self.counts["kvcore_refused_chunks", decision.reason] += len(decision.chunks)

    def looked_up(self, work: Work, *, tokens: int, salt: str, resumed: bool, probe: bytes, now_ns: int) -> None:
        """Count a request's first lookup."""
        model, salt = self._labels(work, salt)
        counts, chunk_tokens = self.counts, work.instance.chunk_tokens
        aligned = len(work.chunks) * chunk_tokens
        tokens = max(tokens, aligned)
        counts["kvcore_requests", model, salt, "yes" if resumed else "no"] += 1
        if resumed:
            return
        counts["kvcore_requested_tokens", model, salt] += tokens
        counts["kvcore_aligned_tokens", model, salt] += aligned
        for tier, hits in enumerate(work.hits):
            counts["kvcore_matched_tokens", f"l{tier + 1}", model, salt] += hits * chunk_tokens
        if tokens > aligned:
            counts["kvcore_missed_tokens", "tail", model, salt] += tokens - aligned
        hits = sum(work.hits)
        if hits < len(work.chunks):
            self._miss(
                work.chunks[hits:], first=hits == 0, probe=probe, labels=(model, salt), chunk_tokens=chunk_tokens
            )
        if probe and work.chunks:
            self._probes[probe] = work.chunks[0]
            if len(self._probes) > _PROBES_REMEMBERED:
                self._probes.popitem(last=False)
        for chunk in sampled(work.chunks[:hits]):
            self._use(chunk, now_ns)

    def loaded(
        self, work: Work | None, instance_model: str, *, tokens: int, nbytes: int, seconds: float, salt: str
    ) -> None:
        """Count what a rank has loaded; `tokens` and `seconds` of rank 0 only."""
        self.counts["kvcore_loaded_bytes", instance_model] += nbytes
        if tokens:
            below = 0 if work is None else min(tokens, sum(work.hits[1:]) * work.instance.chunk_tokens)
            model, salt = instance_model, self._salt(salt)
            self.counts["kvcore_loaded_tokens", "l1", model, salt] += tokens - below
            if below:
                self.counts["kvcore_loaded_tokens", "l2", model, salt] += below
            self.histograms["kvcore_load_seconds",].add(seconds)

    def stored(self, model: str, *, tokens: int, nbytes: int, seconds: float, salt: str) -> None:
        """Count what a rank has written; `tokens` and `seconds` of rank 0 only."""
        self.counts["kvcore_stored_bytes", model] += nbytes
        if tokens:
            self.counts["kvcore_stored_tokens", model, self._salt(salt)] += tokens
            self.histograms["kvcore_store_seconds",].add(seconds)

    def time(self, name: str, seconds: float, *labels: str) -> None:
        """Count a duration."""
        key = (name, *labels)
        if key not in self.histograms:
            self.histograms[key] = Histogram(SECONDS)
        self.histograms[key].add(seconds)

    def report(self, extra: Iterable[tuple[tuple[str, ...], float]]) -> dict[str, Any]:
        """Return every number as plain data; `extra` are gauges and counters that others keep."""
        return {
            "values": [[*key, min(value, _MOST)] for key, value in (*self.counts.items(), *extra)],
            "histograms": [[list(key), list(h.bounds), h.counts, h.sum] for key, h in self.histograms.items()],
        }

    def _labels(self, work: Work, salt: str) -> tuple[str, str]:
        return model_of(work), self._salt(salt)

    def name(self, salt: str) -> None:
        """Show a tenant by name from now on, for the operator has named it; any other's salt is its secret."""
        self._named.add(salt)
        if salt in self._labels_of:
            self._labels_of[salt] = salt

    def _salt(self, salt: str) -> str:
        label = self._labels_of.get(salt)
        if label is None:
            if len(self._labels_of) >= _TENANTS:
                return "other"
            label = self._labels_of[salt] = salt if not salt or salt in self._named else veiled(salt)
        return label

    def _miss(
        self, chunks: tuple[Chunk, ...], *, first: bool, probe: bytes, labels: tuple[str, str], chunk_tokens: int
    ) -> None:
        evicted = sum(chunk in self._evicted for chunk in chunks)
        others = (len(chunks) - evicted) * chunk_tokens
        if evicted:
            self.counts["kvcore_missed_tokens", "evicted", *labels] += evicted * chunk_tokens
        elsewhere = self._probes.get(probe) if first and probe else None
        reason = "cold" if elsewhere is None or elsewhere == chunks[0] else "namespace"
        if others:
            self.counts["kvcore_missed_tokens", reason, *labels] += others

    def _use(self, chunk: Chunk, now_ns: int) -> None:
        used_ns = self._used_ns.pop(chunk, None)
        if used_ns is not None:
            self.histograms["kvcore_reuse_gap_seconds",].add((now_ns - used_ns) / 1e9)
        self._used_ns[chunk] = now_ns
        if len(self._used_ns) > _EVICTED_REMEMBERED:
            self._used_ns.popitem(last=False)

    def _leave(self, tier: int, chunks: tuple[Chunk, ...], reason: str, now_ns: int) -> None:
        """Chunks leave a tier; what is demoted and then lost on its way was evicted, too."""
        self.counts["kvcore_evicted_chunks", f"l{tier + 1}", reason] += len(chunks)
        self._evicted.update(dict.fromkeys(chunks[-_EVICTED_REMEMBERED:]))
        while len(self._evicted) > _EVICTED_REMEMBERED:
            self._evicted.popitem(last=False)
        if tier == 0:
            for chunk in sampled(chunks):
                stored_ns = self._stored_ns.pop(chunk, None)
                if stored_ns is not None:
                    self.histograms["kvcore_chunk_lifetime_seconds",].add((now_ns - stored_ns) / 1e9)


def model_of(work: Work) -> str:
    """Return the model's name, as a label."""
    return work.instance.register.namespace.get("model", "")


def veiled(salt: str) -> str:
    """Return what a salt is shown as where who reads it may not learn it: whoever has a salt could match its KV."""
    return "#" + blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()


def sampled(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Return the chunks, digests of any length, that are followed one by one."""
    return [chunk for chunk in cast("Sequence[bytes]", chunks) if chunk[-1] < SAMPLED_BELOW]


def render(report: dict[str, Any]) -> bytes:
    """Return a report in the Prometheus text format."""
    from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415 - loaded by the web thread
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily  # noqa: PLC0415

    kinds = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily}
    families = {name: kinds[kind](name, text, labels=labels) for name, (kind, text, labels) in HELP.items()}
    for name, *labels, value in report["values"]:
        families[name].add_metric([str(label) for label in labels], value)
    for (name, *labels), bounds, counts, total in report["histograms"]:
        uppers = [*(f"{bound:g}" for bound in bounds), "+Inf"]
        cumulated = np.cumsum(counts).tolist()
        families[name].add_metric(labels, list(zip(uppers, cumulated, strict=True)), total)

    class Collector:
        def collect(self) -> Iterable[Any]:
            return families.values()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    return bytes(generate_latest(registry))
