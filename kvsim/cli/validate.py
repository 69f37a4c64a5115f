"""`kvsim validate`: predicted against recorded."""

from pathlib import Path
from typing import Annotated

import typer

from kvsim.cli.engine_options import (
    AdmissionName,
    AsyncScheduling,
    ChunkedPrefill,
    ChunkTokens,
    Engines,
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


def validate(  # noqa: PLR0913, PLR0917 - a command's options
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
    seed: Seed = 0,
    engines: Engines = 1,
    routing: RoutingName = "round-robin",
    max_model_len: MaxModelLen = None,
    max_num_batched_tokens: MaxBatchedTokens = 8192,
    max_num_seqs: MaxSeqs = 256,
    chunked_prefill: ChunkedPrefill = True,
    async_scheduling: AsyncScheduling = True,
    l0_gb: L0Gb = None,
    l0_block_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of an engine block; default the log's block.", rich_help_panel="Cache"),
    ] = None,
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
    handling: Annotated[
        bool,
        typer.Option(
            "--handling/--no-handling",
            help="The recorded TTFT begins at the arrival, as kvcore serve --record writes it, not inside the engine.",
            rich_help_panel="Output",
        ),
    ] = True,
    journal: Annotated[
        Path | None,
        typer.Option(
            help="The server's journal: settings of the server and its engines that are not given are taken from it, "
            "and it is decided again, as kvsim verify does.",
            rich_help_panel="Log",
        ),
    ] = None,
    json: Json = False,
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML report (extra 'report').", rich_help_panel="Output")
    ] = None,
    progress: ShowProgress = None,
) -> None:
    """Simulate a recorded log and compare: hits by tier, TTFT with the error's interval, where it is worst and why.

    The log needs ttft_ms, as `kvcore serve --record` writes it; hits and parts of TTFT are compared where recorded.
    The profile must not be calibrated on this log. An error, however large, is reported: the exit code is 0.

    Without a journal, give what the server and its engines ran with: --chunk-tokens 256 --l1-size-gb 20 --l0-gb 40.

    Example: kvsim validate --trace prod.jsonl --journal journal/ --profile mine.json --report out.html
    """
    from dataclasses import replace  # noqa: PLC0415 - loaded when it runs, not for --help
    from functools import partial  # noqa: PLC0415

    from kvsim.cli.console import print_json, read_log, stages  # noqa: PLC0415
    from kvsim.cli.engine_options import build, options, plain, routed, with_journal  # noqa: PLC0415
    from kvsim.cli.verify import as_json, replay  # noqa: PLC0415
    from kvsim.files import check_outputs, files_read  # noqa: PLC0415
    from kvsim.tuner.grid import check_log_chunk  # noqa: PLC0415
    from kvsim.tuner.pricing import costs  # noqa: PLC0415
    from kvsim.validation import validate as compared  # noqa: PLC0415

    priced = partial(costs, model=model, gpu=gpu, profile=profile, tensor_parallel=tensor_parallel, kv_dtype=kv_dtype)
    recorded, chosen, told = with_journal(context, journal, options(context), priced)
    block_known = recorded["l0_block_tokens"] is not None
    settings = build(
        chosen,
        seed=seed,
        routing=routing,
        store_output=store_output,
        load=load,
        lookup_s=lookup_s,
        **{**recorded, "l0_block_tokens": recorded["l0_block_tokens"] if block_known else 16},
    )
    if report is not None:
        from kvsim.report import check_available  # noqa: PLC0415

        check_available()
        check_outputs((report,), files_read(trace, journal, profile, model))
    replayed = None if journal is None else replay(journal)
    with stages(progress) as shown:
        log = read_log(trace, block_size, skip_bad, shown, settings.profile.model, sort=sort)
        check_log_chunk(settings.chunk_tokens, log.block_tokens)
        if not block_known and log.block_tokens is not None:
            settings = replace(settings, l0_block_tokens=log.block_tokens)
        settings, log, by_routing = routed(context, settings, log, journal)
        told += by_routing
        found = compared(
            log,
            settings,
            handling=handling,
            progress=lambda done, total: shown.update("running", done, total),
        )
    if report is not None:
        from kvsim.report.validation_page import write_validation  # noqa: PLC0415

        write_validation(found, report, title=", ".join(trace))
    if json:
        from kvsim.report.validation_words import notes  # noqa: PLC0415

        by_replay = {} if replayed is None else {"journal": as_json(replayed)}
        print_json({"settings": plain(settings), "notes": [*notes(found), *told], **by_replay, **found.as_dict()})
        return
    from kvsim.cli.show_validation import show  # noqa: PLC0415
    from kvsim.report.units import sentence  # noqa: PLC0415

    show(found)
    for note in told:
        typer.echo(f"* {sentence(note)}")
    if replayed is not None:
        typer.echo(f"* By the journal: {replayed}")
