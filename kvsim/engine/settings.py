"""What a simulation is told: the engines, the tiers, the arrivals."""

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from kvcore.policy import POLICIES, CoreConfig, LoadCost, TierConfig
from kvcore.policy.config import Admission, Placement
from kvsim.errors import UsageError
from kvsim.profiles import Profile

Routing: TypeAlias = Literal["round-robin", "least-loaded", "prefix-aware", "recorded"]
Arrivals: TypeAlias = Literal["recorded", "spread", "poisson", "uniform"]
LoadMode: TypeAlias = Literal["auto", "layerwise", "sync", "async"]
LowerKind: TypeAlias = Literal["disk", "network"]

GIB = 2**30
MOST = 1e9
"""The most of what is given in GiB, seconds, requests a second or currency: more is a slip, and overflows somewhere."""
_MOST_ENGINES = 10_000


class SettingsError(UsageError):
    """Settings that cannot be simulated; the message is one line and names the setting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """One setting of the simulator. GB are 2**30 bytes over all ranks; None is named with each.

    Attributes:
        profile: What steps and copies cost.
        chunk_tokens: Tokens of an L1 chunk; None: the log's own block.
        engines: Engine instances, all on one server's L1.
        routing: Which engine a request goes to; `recorded` follows the log's `instance` column.
        rate_scale: Recorded arrivals this many times as fast.
        arrivals: Recorded times; these with those of one time spread evenly over the step in which the log counts; or a
            Poisson or evenly spaced stream of `rate_per_s` in the log's order.
        rate_per_s: Requests a second of the latter two.
        seed: Of everything drawn at random.
        max_model_len: Longest prompt and output together, longer requests are refused; None: the profile's.
        max_num_batched_tokens: Token budget of a step.
        max_num_seqs: Most requests running at once.
        chunked_prefill: Whether a prompt may be computed over several steps.
        async_scheduling: Whether a step is put together when the one before it begins, as vLLM does on GPUs, or when
            that one has ended.
        l0_gb: GPU memory for KV; None: 90% of the device less the weights and 2 GiB.
        l0_block_tokens: Tokens of an engine block.
        l0_prefix_caching: Whether the engine reuses its own blocks.
        l1_gb: L1's size; 0: no cache beyond L0; None: unbounded.
        policy: L1's eviction policy.
        l2_gb: The lower tier's size; 0: there is none; None: unbounded.
        l2_kind: What the lower tier is: a disk of this host, or a store across the network.
        l2_policy: Its eviction policy.
        placement: How chunks reach L2.
        promote_on_hit: Whether chunks loaded from L2 stay in L1.
        admission: Whether a chunk is stored at once or when it is missed a second time.
        ttl_s: Chunks unused for longer are dropped; None keeps them.
        load_or_recompute: Whether the core leaves hits that are faster to compute than to load.
        load_cost: By which costs; None takes the profile's.
        store_output: Whether the chunks that an output completes are stored too; the log has to have their hashes. (L0
            has them either way, as vLLM does, where the log has.)
        packed_share: What KV takes beyond the GPU, of its size there: 1, or less where it is packed.
        page_bytes: Page of the L1 arena; a chunk takes whole ones.
        load: How the engine loads: `layerwise` (in the step, layers overlapped with compute), `sync` (in the step,
            before compute), `async` (the request waits beside the batch), or `auto`, as kvcore's connectors do on
            GPUs: async while another prompt is being computed, else layerwise.
        lookup_s: What a lookup holds up the scheduler.
    """

    profile: Profile
    chunk_tokens: int | None = None
    engines: int = 1
    routing: Routing = "round-robin"
    rate_scale: float = 1.0
    arrivals: Arrivals = "recorded"
    rate_per_s: float | None = None
    seed: int = 0
    max_model_len: int | None = None
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    chunked_prefill: bool = True
    async_scheduling: bool = True
    l0_gb: float | None = None
    l0_block_tokens: int = 16
    l0_prefix_caching: bool = True
    l1_gb: float | None = 0.0
    policy: str = "lru"
    l2_gb: float | None = 0.0
    l2_kind: LowerKind = "disk"
    l2_policy: str = "lru"
    placement: Placement = "write-through"
    promote_on_hit: bool = True
    admission: Admission = "always"
    ttl_s: float | None = None
    load_or_recompute: bool = False
    load_cost: LoadCost | None = None
    store_output: bool = False
    packed_share: float = 1.0
    page_bytes: int = 2 * 2**20
    load: LoadMode = "auto"
    lookup_s: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated."""
        self._check_numbers()
        for name in ("policy", "l2_policy"):
            if getattr(self, name) not in POLICIES:
                raise SettingsError(
                    f"{name}: no eviction policy {getattr(self, name)!r}; there are {', '.join(POLICIES)}"
                )
        if (self.arrivals in ("recorded", "spread")) != (self.rate_per_s is None):
            raise SettingsError("rate_per_s goes with arrivals poisson or uniform, and they with it")
        if self.l2_gb != 0 and f"{self.l2_kind}_read" not in self.profile.transfers:
            raise SettingsError(f"profile {self.profile.name} has no speed of a {self.l2_kind}")
        if self.l1_gb == 0 and self.l2_gb != 0:
            raise SettingsError("an L2 needs an L1 in front of it")
        if self.l0_blocks < 1:
            what = (
                "90% of it less weights and 2 GiB is none: give l0_gb"
                if self.l0_gb is None
                else f"l0_gb is {self.l0_gb}"
            )
            raise SettingsError(f"no GPU memory is left for KV by profile {self.profile.name}: {what}")

    def _check_numbers(self) -> None:
        """Refuse a number that is out of its range."""
        counts = ("engines", "max_num_batched_tokens", "max_num_seqs", "l0_block_tokens", "page_bytes")
        for name in counts:
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        for name in ("l0_gb", "l1_gb", "l2_gb", "lookup_s", "ttl_s"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MOST:
                raise SettingsError(f"{name} is {value:g}; not negative, and at most {MOST:g}")
        if self.seed < 0:
            raise SettingsError(f"seed is {self.seed}; not negative")
        for name, least, most in (("rate_scale", 1e-6, MOST), ("rate_per_s", 1e-6, MOST), ("packed_share", 1e-6, 1.0)):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise SettingsError(f"{name} is {value:g}; from {least:g} to {most:g} is needed")
        if self.engines > _MOST_ENGINES:
            raise SettingsError(f"engines is {self.engines}; at most {_MOST_ENGINES:,}")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise SettingsError(f"max_model_len is {self.max_model_len}; at least 1 is needed")

    @property
    def l0_blocks(self) -> int:
        """Engine blocks of one instance's GPU cache."""
        profile = self.profile
        size = (
            0.9 * profile.gpu_memory_bytes - profile.weight_bytes - 2 * GIB if self.l0_gb is None else self.l0_gb * GIB
        )
        return max(0, int(size // (profile.gpu_bytes_per_token * self.l0_block_tokens)))

    @property
    def l0_tokens(self) -> int:
        """Tokens that one instance's GPU cache holds."""
        return self.l0_blocks * self.l0_block_tokens

    @property
    def l0_gib(self) -> float:
        """GiB of KV that one instance's GPU cache holds."""
        return self.profile.kv_bytes(self.l0_tokens) / GIB

    @property
    def model_len(self) -> int:
        """Longest prompt and output together."""
        return self.profile.max_model_len if self.max_model_len is None else self.max_model_len

    def chunk_bytes(self, chunk_tokens: int) -> int:
        """Return the size of a chunk beyond the GPU, over all ranks."""
        return math.ceil(self.profile.kv_bytes(chunk_tokens) * self.packed_share)

    def loaded_bytes(self, tokens: int) -> int:
        """Return what a load of so many tokens brings over all ranks' links: to each its part, or all of it (MLA)."""
        return self.chunk_bytes(tokens) * self.profile.kv_copies

    def chunk_pages(self, chunk_tokens: int) -> int:
        """Return the pages that a chunk takes."""
        return -(-self.chunk_bytes(chunk_tokens) // self.page_bytes)

    def core_config(self, chunk_tokens: int) -> CoreConfig | None:
        """Return the core's configuration, None where there is no cache beyond L0.

        Raises:
            SettingsError: A policy that does not exist, or a combination the core refuses.
        """
        if self.l1_gb == 0:
            return None
        try:
            tiers = [TierConfig(name="l1", pages=self._pages(self.l1_gb), eviction=self.policy)]
            if self.l2_gb != 0:
                tiers.append(TierConfig(name="l2", pages=self._pages(self.l2_gb), eviction=self.l2_policy))
            return CoreConfig(
                tiers=tuple(tiers),
                placement=self.placement,
                promote_on_hit=self.promote_on_hit,
                admission=self.admission,
                ttl_ns=None if self.ttl_s is None else round(1e9 * self.ttl_s),
                load_cost=self._load_cost(chunk_tokens, len(tiers)) if self.load_or_recompute else None,
            )
        except ValueError as error:
            raise SettingsError(str(error)) from None

    def _load_cost(self, chunk_tokens: int, tiers: int) -> LoadCost:
        """Return the given costs where they are of as many tiers, the profile's otherwise."""
        if self.load_cost is not None and len(self.load_cost.bytes_per_s) == tiers:
            return replace(self.load_cost, chunk_tokens=chunk_tokens)
        return self.profile.load_cost(chunk_tokens, (self.l2_kind,) if tiers > 1 else ())

    def _pages(self, size_gb: float | None) -> int | None:
        return None if size_gb is None else int(size_gb * GIB // self.page_bytes)
