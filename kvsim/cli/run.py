"""`kvsim run`: one setting under load, in full detail."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvsim.cli.engine_options import (
    AdmissionName,
    ArrivalsName,
    AsyncScheduling,
    ChunkedPrefill,
    ChunkTokens,
    Engines,
    Journal,
    L0BlockTokens,
    L0Gb,
    L0PrefixCaching,
    L1SizeGb,
    L2Kind,
    L2Policy,
    L2SizeGb,
    LoadName,
    LoadOrRecompute,
    LookupS,
    MaxBatchedTokens,
    MaxModelLen,
    MaxSeqs,
    PlacementName,
    Policy,
    PromoteOnHit,
    RatePerS,
    RateScale,
    RoutingName,
    Seed,
    StoreOutput,
    TtlS,
)
from kvsim.cli.options import (
    BlockSize,
    GpuName,
    Json,
    KvDtype,
    Model,
    PackingName,
    ProfilePath,
    ShowProgress,
    SkipBad,
    Sort,
    TensorParallel,
    Traces,
)

if TYPE_CHECKING:
    from kvsim.runner import RunResult


def run(  # noqa: PLR0913, PLR0917 - a command's options
    context: typer.Context,
    trace: Traces,
    model: Model = None,
    gpu: GpuName = None,
    profile: ProfilePath = None,
    tensor_parallel: TensorParallel = None,
    kv_dtype: KvDtype = "auto",
    packing: PackingName = "none",
    block_size: BlockSize = None,
    skip_bad: SkipBad = False,
    sort: Sort = False,
    journal: Journal = None,
    rate_scale: RateScale = 1.0,
    arrivals: ArrivalsName = "recorded",
    rate_per_s: RatePerS = None,
    seed: Seed = 0,
    engines: Engines = 1,
    routing: RoutingName = "round-robin",
    max_model_len: MaxModelLen = None,
    max_num_batched_tokens: MaxBatchedTokens = 8192,
    max_num_seqs: MaxSeqs = 256,
    chunked_prefill: ChunkedPrefill = True,
    async_scheduling: AsyncScheduling = True,
    l0_gb: L0Gb = None,
    l0_block_tokens: L0BlockTokens = 16,
    l0_prefix_caching: L0PrefixCaching = True,
    chunk_tokens: ChunkTokens = None,
    l1_size_gb: L1SizeGb = 0.0,
    policy: Policy = "lru",
    l2_size_gb: L2SizeGb = 0.0,
    l2_kind: L2Kind = "disk",
    l2_policy: L2Policy = "lru",
    placement: PlacementName = "write-through",
    promote_on_hit: PromoteOnHit = True,
    admission: AdmissionName = "always",
    ttl_s: TtlS = None,
    load_or_recompute: LoadOrRecompute = False,
    store_output: StoreOutput = False,
    load: LoadName = "auto",
    lookup_s: LookupS = 0.0,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline/--no-baseline", help="Run it without L1 and L2 too, on another core.", rich_help_panel="Output"
        ),
    ] = True,
    json: Json = False,
    timeline: Annotated[
        Path | None,
        typer.Option(help="Write a row a request: .parquet, .jsonl or .jsonl.gz.", rich_help_panel="Output"),
    ] = None,
    chrome_trace: Annotated[
        Path | None,
        typer.Option(
            help="Write a trace for Perfetto or chrome://tracing: .json or .json.gz.", rich_help_panel="Output"
        ),
    ] = None,
    progress: ShowProgress = None,
) -> None:
    """Simulate one setting under the log's load: TTFT and its parts, hits by tier, what was busy.

    Example: kvsim run --trace prod.jsonl --model qwen3-8b --gpu h100 --engines 4 --l1-size-gb 200
    """
    from functools import partial  # noqa: PLC0415 - loaded when it runs, not for --help

    from kvsim.cli.console import print_json, read_log, stages  # noqa: PLC0415
    from kvsim.cli.engine_options import build, options, plain, routed, with_journal  # noqa: PLC0415
    from kvsim.engine.arrivals import coarse_times  # noqa: PLC0415
    from kvsim.files import files_read  # noqa: PLC0415
    from kvsim.runner import run as simulated  # noqa: PLC0415
    from kvsim.tuner.grid import check_log_chunk  # noqa: PLC0415
    from kvsim.tuner.pricing import costs  # noqa: PLC0415

    priced = partial(costs, model=model, gpu=gpu, profile=profile, tensor_parallel=tensor_parallel, kv_dtype=kv_dtype)
    recorded, chosen, told = with_journal(context, journal, options(context), priced)
    settings = build(
        chosen,
        rate_scale=rate_scale,
        arrivals=arrivals,
        rate_per_s=rate_per_s,
        seed=seed,
        routing=routing,
        store_output=store_output,
        load=load,
        lookup_s=lookup_s,
        **recorded,
    )
    _check(timeline, chrome_trace, files_read(trace, journal, profile, model))
    with stages(progress) as shown:
        log = read_log(trace, block_size, skip_bad, shown, settings.profile.model, sort=sort)
        check_log_chunk(settings.chunk_tokens, log.block_tokens)
        told += filter(None, [coarse_times(log, settings)])
        settings, log, by_routing = routed(context, settings, log, journal)
        told += by_routing
        result = simulated(
            log,
            settings,
            baseline=baseline,
            timeline=chrome_trace is not None,
            workers=2,
            progress=lambda done, total: shown.update("running", done, total),
        )
    _write(result, timeline, chrome_trace)
    if json:
        print_json({"settings": plain(settings), **({"notes": told} if told else {}), **result.summary()})
        return
    from kvsim.cli.show_run import show  # noqa: PLC0415
    from kvsim.report.units import sentence  # noqa: PLC0415

    show(result)
    for note in told:
        typer.echo(f"* {sentence(note)}")


def _check(timeline: Path | None, chrome_trace: Path | None, read: list[Path]) -> None:
    """Raise UsageError or TimelineError for what cannot be written: before the run."""
    from kvsim.engine.timeline import check_kind  # noqa: PLC0415
    from kvsim.files import check_outputs  # noqa: PLC0415

    if timeline is not None:
        check_kind(timeline)
    check_outputs((timeline, chrome_trace), read)


def _write(result: "RunResult", timeline: Path | None, chrome_trace: Path | None) -> None:
    from kvsim.engine.timeline import write_requests, write_trace  # noqa: PLC0415
    from kvsim.files import whole  # noqa: PLC0415

    if timeline is not None:
        with whole(timeline) as path:
            write_requests(result, path)
    if chrome_trace is not None:
        with whole(chrome_trace) as path:
            write_trace(result, path)
