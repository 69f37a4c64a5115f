"""Load or recompute: whether a prefix hit is worth its copy."""

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCost:
    """What loading a chunk and computing one cost.

    Prefill of n new tokens behind c cached ones takes `max(floor, base + linear n + quadratic n (n + 2 c))` ns: the
    linear term is the weights' work, the quadratic one attention's. A load of b bytes from tier t takes
    `latency_ns[t] + b / bytes_per_s[t]`, behind the bytes that wait on the link already.
    """

    chunk_tokens: int
    prefill_floor_ns: float
    prefill_base_ns: float
    prefill_linear_ns: float
    prefill_quadratic_ns: float
    latency_ns: tuple[float, ...]
    bytes_per_s: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse a link without bandwidth."""
        if len(self.latency_ns) != len(self.bytes_per_s) or any(rate <= 0 for rate in self.bytes_per_s):
            raise ValueError(f"bandwidths {self.bytes_per_s}, latencies {self.latency_ns}: one each a tier, above zero")

    def prefill_ns(self, new_tokens: int, cached_tokens: int) -> float:
        """Return the time to compute `new_tokens` behind `cached_tokens`, in ns.

        None at all takes a step as well: an engine computes the last token of a prompt that it holds whole.
        """
        attention = self.prefill_quadratic_ns * new_tokens * (new_tokens + 2 * cached_tokens)
        return max(self.prefill_floor_ns, self.prefill_base_ns + self.prefill_linear_ns * new_tokens + attention)

    def load_ns(self, tier_bytes: tuple[int, ...], queued_bytes: int) -> float:
        """Return the time until `tier_bytes[t]` bytes of every tier t have arrived in the engine, in ns.

        Bytes of a lower tier travel through tier 0, so they pay for both.
        """
        total = sum(tier_bytes)
        if not total:
            return 0.0
        below = sum(
            self.latency_ns[tier] + 1e9 * size / self.bytes_per_s[tier]
            for tier, size in enumerate(tier_bytes)
            if tier and size
        )
        return below + self.latency_ns[0] + 1e9 * (queued_bytes + total) / self.bytes_per_s[0]


def chunks_worth_loading(
    cost: LoadCost, *, tiers: tuple[int, ...], computed: int, total: int, chunk_bytes: int, queued_bytes: int
) -> int:
    """Return how many leading chunks to have in the engine: `computed` (load nothing) up to `len(tiers)` (load all).

    Args:
        cost: The costs.
        tiers: The tier of each leading hit, head first.
        computed: Leading chunks that the engine holds already.
        total: Chunks of the whole prompt, hits and misses: what is not loaded is computed in one go.
        chunk_bytes: Bytes of a chunk.
        queued_bytes: Bytes waiting on the link to the engine.

    Within a run of one tier, loading another chunk takes the same time each, and spares the more computing the deeper
    the prefix (attention's share), so the best cut is at an end of the run, unless computing the rest meets the floor
    of a step inside it: more chunks spare nothing from there on. So the ends of all runs are compared, and the first
    cut at which the rest takes no more than the floor and the one before it.
    """
    end = len(tiers)
    at_floor = _first_at_floor(cost, computed, end, total)
    cuts = {cut for cut in range(computed + 1, end) if tiers[cut] != tiers[cut - 1]} | {at_floor - 1, at_floor, end}
    best, best_ns = computed, cost.prefill_ns((total - computed) * cost.chunk_tokens, computed * cost.chunk_tokens)
    sizes, at = [0] * len(cost.latency_ns), computed
    for cut in sorted(cut for cut in cuts if cut > computed):
        sizes[tiers[at]] += (cut - at) * chunk_bytes  # no border lies between two cuts
        at = cut
        tokens = (total - cut) * cost.chunk_tokens
        took = cost.load_ns(tuple(sizes), queued_bytes) + cost.prefill_ns(tokens, cut * cost.chunk_tokens)
        if took < best_ns:
            best, best_ns = cut, took
    return best


def _first_at_floor(cost: LoadCost, computed: int, end: int, total: int) -> int:
    """Return the first cut at which computing the rest takes no more than the floor; `end` where none does before."""

    def at_floor(cut: int) -> bool:
        tokens = cost.chunk_tokens
        return cost.prefill_ns((total - cut) * tokens, cut * tokens) <= cost.prefill_floor_ns

    return bisect_left(range(end), True, lo=computed, key=at_floor)
