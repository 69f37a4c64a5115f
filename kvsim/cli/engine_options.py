"""Options of a simulated server, shared by `run`, `validate` and `tune`, and the settings that they make."""

import re
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from kvsim.cli.options import said

if TYPE_CHECKING:
    from kvsim.engine.settings import RunSettings
    from kvsim.tuner import Costs
    from kvtraces import Log

_ENGINES, _CACHE, _TRAFFIC = "Engines", "Cache", "Traffic"

Engines: TypeAlias = Annotated[int, typer.Option(help="Engine instances that share one L1.", rich_help_panel=_ENGINES)]
RoutingName: TypeAlias = Annotated[
    Literal["round-robin", "least-loaded", "prefix-aware", "recorded"],
    typer.Option(help="Which engine a request goes to; recorded: the log's instance.", rich_help_panel=_ENGINES),
]
MaxModelLen: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="Longest prompt and output; default the profile's.", show_default=False, rich_help_panel=_ENGINES
    ),
]
MaxBatchedTokens: TypeAlias = Annotated[
    int, typer.Option("--max-num-batched-tokens", help="Token budget of a step.", rich_help_panel=_ENGINES)
]
MaxSeqs: TypeAlias = Annotated[
    int, typer.Option("--max-num-seqs", help="Most requests running at once.", rich_help_panel=_ENGINES)
]
ChunkedPrefill: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--chunked-prefill/--no-chunked-prefill",
        help="Compute a prompt over several steps where it does not fit.",
        rich_help_panel=_ENGINES,
    ),
]
AsyncScheduling: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--async-scheduling/--no-async-scheduling",
        help="Put a step together when the one before it begins, as vLLM does on GPUs by default.",
        rich_help_panel=_ENGINES,
    ),
]
L0Gb: TypeAlias = Annotated[
    float | None,
    typer.Option(
        help="GPU memory for KV in GiB, an engine; default 90% less the weights and 2 GiB.",
        show_default=False,
        rich_help_panel=_CACHE,
    ),
]
L0BlockTokens: TypeAlias = Annotated[int, typer.Option(help="Tokens of an engine block.", rich_help_panel=_CACHE)]
L0PrefixCaching: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--l0-prefix-caching/--no-l0-prefix-caching",
        help="Whether the engine reuses its own blocks.",
        rich_help_panel=_CACHE,
    ),
]
ChunkTokens: TypeAlias = Annotated[
    int | None,
    typer.Option(
        help="Tokens of an L1 chunk, a multiple of the log's block; default that block.",
        show_default=False,
        rich_help_panel=_CACHE,
    ),
]
L1SizeGb: TypeAlias = Annotated[
    float,
    typer.Option(help="L1 in GiB, all ranks together; 0: no cache but the engine's; inf.", rich_help_panel=_CACHE),
]
Policy: TypeAlias = Annotated[
    str,
    typer.Option(help="L1's eviction: lru, fifo, lfu, sieve, s3fifo, arc, gdsf, w-tinylfu.", rich_help_panel=_CACHE),
]
L2SizeGb: TypeAlias = Annotated[
    float, typer.Option(help="The tier below L1 in GiB; 0: there is none; inf.", rich_help_panel=_CACHE)
]
L2Kind: TypeAlias = Annotated[Literal["disk", "network"], typer.Option(help="What L2 is.", rich_help_panel=_CACHE)]
L2Policy: TypeAlias = Annotated[str, typer.Option(help="L2's eviction.", rich_help_panel=_CACHE)]
PlacementName: TypeAlias = Annotated[
    Literal["write-through", "write-back"],
    typer.Option(help="How chunks reach L2: when stored, or when evicted from L1.", rich_help_panel=_CACHE),
]
PromoteOnHit: TypeAlias = Annotated[
    bool,
    typer.Option("--promote-on-hit/--no-promote-on-hit", help="Whether L2's hits stay in L1.", rich_help_panel=_CACHE),
]
AdmissionName: TypeAlias = Annotated[
    Literal["always", "second-use"],
    typer.Option(help="Store a chunk at once, or when it is missed again.", rich_help_panel=_CACHE),
]
TtlS: TypeAlias = Annotated[
    float | None,
    typer.Option(help="Drop chunks unused for so many seconds.", show_default=False, rich_help_panel=_CACHE),
]
LoadOrRecompute: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--load-or-recompute", help="Leave hits that are faster computed than loaded.", rich_help_panel=_CACHE
    ),
]
StoreOutput: TypeAlias = Annotated[
    bool,
    typer.Option("--store-output", help="Store outputs' KV too; the log needs its hashes.", rich_help_panel=_CACHE),
]
LoadName: TypeAlias = Annotated[
    Literal["auto", "layerwise", "sync", "async"],
    typer.Option(
        "--load",
        help="How an engine loads: overlapped, before compute, beside; auto: beside while another prompt is computed, "
        "else overlapped.",
        rich_help_panel=_CACHE,
    ),
]
LookupS: TypeAlias = Annotated[
    float, typer.Option(help="Seconds that a lookup holds up the scheduler.", rich_help_panel=_CACHE)
]
Journal: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="Journal of the server that recorded the log: its settings and its engines', where they are not given.",
        show_default=False,
        rich_help_panel="Log",
    ),
]
RateScale: TypeAlias = Annotated[
    float, typer.Option(help="Traffic this many times as fast as recorded.", rich_help_panel=_TRAFFIC)
]
ArrivalsName: TypeAlias = Annotated[
    Literal["recorded", "spread", "poisson", "uniform"],
    typer.Option(
        help="When requests arrive; spread: those of one recorded time evenly up to the log's next step.",
        rich_help_panel=_TRAFFIC,
    ),
]
RatePerS: TypeAlias = Annotated[
    float | None,
    typer.Option(help="Requests a second of poisson and uniform.", show_default=False, rich_help_panel=_TRAFFIC),
]
Seed: TypeAlias = Annotated[int, typer.Option(help="Of everything drawn by chance.", rich_help_panel=_TRAFFIC)]

_FLAGS = {"l1_gb": "--l1-size-gb", "l2_gb": "--l2-size-gb"}


def build(costs: "Costs", *, l1_size_gb: float = 0.0, l2_size_gb: float = 0.0, **given: Any) -> "RunSettings":
    """Return the settings of a simulated server; sizes may be infinite. Raises SettingsError."""
    from kvsim.engine.settings import RunSettings  # noqa: PLC0415 - loaded when a command runs

    lowered = {name: value.lower() if name in {"policy", "l2_policy"} else value for name, value in given.items()}
    return RunSettings(
        profile=costs.run_profile,
        packed_share=costs.kv.packed_share,
        l1_gb=_size(l1_size_gb),
        l2_gb=_size(l2_size_gb),
        **lowered,
    )


_OF_JOURNAL = (
    "engines",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "chunked_prefill",
    "async_scheduling",
    "l0_gb",
    "l0_block_tokens",
    "l0_prefix_caching",
    "chunk_tokens",
    "l1_size_gb",
    "policy",
    "l2_size_gb",
    "l2_kind",
    "l2_policy",
    "placement",
    "promote_on_hit",
    "admission",
    "ttl_s",
    "load_or_recompute",
)
"""Options of `run` and `validate` that a journal may tell of."""


def options(context: typer.Context) -> dict[str, Any]:
    """Return those options' values by name, and what is none of them: the page, and a server's own costs."""
    from kvsim.tuner.pricing import PAGE_BYTES  # noqa: PLC0415

    return {**{name: context.params[name] for name in _OF_JOURNAL}, "page_bytes": PAGE_BYTES, "load_cost": None}


def with_journal(
    context: typer.Context, journal: Path | None, given: dict[str, Any], priced: "Callable[..., Costs]"
) -> "tuple[dict[str, Any], Costs, list[str]]":
    """Take from a journal what the command line does not say.

    Args:
        context: The command's.
        journal: Of the server that recorded the log; None changes nothing.
        given: Options that a journal may tell of, and their values.
        priced: `costs` but for the packing.

    Returns:
        The options, the costs with the packing of the server's engines, and what must be said of it.

    Raises UsageError as `served` and `Served.packing`.
    """
    packing = context.params["packing"]
    if journal is None:
        return given, priced(packing=packing), []
    from kvsim.recorded_settings import served  # noqa: PLC0415

    found, kv = served(journal), priced().kv
    told = {name: value for name, value in found.flags(kv).items() if name in given and not said(context, name)}
    return {**given, **told}, priced(packing=packing if said(context, "packing") else found.packing(kv)), found.notes()


def routed(
    context: typer.Context, settings: "RunSettings", log: "Log", journal: Path | None
) -> "tuple[RunSettings, Log, list[str]]":
    """Let requests go to the engines that served them, where a journal tells how many there were.

    Returns the settings, the log, and what must be said of it: an engine that restarts has another name.
    """
    from kvsim.recorded_settings import in_places, instances  # noqa: PLC0415

    names = instances(log)
    if journal is None or said(context, "routing") or said(context, "engines") or names <= 1:
        return settings, log, []
    if names <= settings.engines:
        return replace(settings, routing="recorded"), log, []
    most = f"the log names {names} engine instances, and {settings.engines} at once are simulated"
    placed = in_places(log, journal, settings.engines)
    if placed is None:
        way = "the journal does not tell which took another's place, so requests go to engines by --routing"
        other = f"--engines {names} --routing recorded makes each an engine of its own"
        return settings, log, [f"{most}: {way} {settings.routing}, not to those that served them; {other}"]
    told = f"{most}: one that registered after another had left takes its place, with what its GPU cache held"
    return replace(settings, routing="recorded"), placed, [told]


def _size(value: float) -> float | None:
    return None if value == float("inf") else value


def plain(settings: "RunSettings") -> dict[str, Any]:
    """Return settings as JSON values: the profile by its names, an unbounded size as null."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name != "profile"}
    values["load_cost"] = None if settings.load_cost is None else asdict(settings.load_cost)
    profile = settings.profile
    named = {"profile": profile.name, "model": profile.model, "gpu": profile.gpu}
    return {**named, "tensor_parallel": profile.tensor_parallel, **values}


def in_flags(message: str) -> str:
    """Return a settings error with the names of the flags in the place of the fields'."""
    message = re.sub(r"^[a-z]+(?=(?: is \S+;|: no eviction))", _flag, message)
    return re.sub(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b", _flag, message)


def _flag(found: "re.Match[str]") -> str:
    from kvsim.engine.settings import RunSettings  # noqa: PLC0415

    name = found.group()
    if name not in RunSettings.__dataclass_fields__:
        return name
    return _FLAGS.get(name, "--" + name.replace("_", "-"))
