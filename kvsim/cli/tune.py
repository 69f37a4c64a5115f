"""`kvsim tune`: a log in, a recommendation out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kvsim.cli.engine_options import (
    Journal,
    L0BlockTokens,
    L0Gb,
    L2Kind,
    LoadOrRecompute,
    MaxBatchedTokens,
    MaxModelLen,
    MaxSeqs,
    RoutingName,
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
    integers,
    names,
    said,
    sizes,
)
from kvsim.errors import UsageError

if TYPE_CHECKING:
    from kvsim.tuner import Costs, Trial, TuneResult
    from kvtraces import Log

_SWEEP = "Sweep"
_CHOICE = "Choice"
_TRIAL = "Simulation of the best settings (on when a flag of these is given)"
_PRICES = "Prices (in any currency; simulated too; they decide with --slo-ttft-p95, else they are only told)"


def tune(  # noqa: PLR0913, PLR0917 - a command's options
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
    chunk_sizes: Annotated[
        str | None,
        typer.Option(help="Tokens of a chunk: 256,512; default the block x 2^k.", rich_help_panel=_SWEEP),
    ] = None,
    l1_sizes_gb: Annotated[
        str | None, typer.Option(help="L1 in GiB, all ranks together: 64,128.", rich_help_panel=_SWEEP)
    ] = None,
    l1_points: Annotated[
        int, typer.Option(help="Or how many sizes to spread over the useful range.", rich_help_panel=_SWEEP)
    ] = 20,
    l1_max_gb: Annotated[
        float | None, typer.Option(help="The largest of those: what a host has.", rich_help_panel=_SWEEP)
    ] = None,
    policies: Annotated[
        str | None, typer.Option(help="Eviction policies: lru,fifo; default all.", rich_help_panel=_SWEEP)
    ] = None,
    threads: Annotated[int, typer.Option(help="Settings evaluated at once.", rich_help_panel=_SWEEP)] = 2,
    within: Annotated[
        float,
        typer.Option(help="L1 is the smallest that saves within this share of the best.", rich_help_panel=_CHOICE),
    ] = 0.05,
    simulate: Annotated[
        int | None,
        typer.Option(
            help="How many of the best settings to simulate; default 8, 0 none.",
            show_default=False,
            rich_help_panel=_TRIAL,
        ),
    ] = None,
    rate_scale: Annotated[
        float | None,
        typer.Option(help="Traffic this many times as fast.", show_default=False, rich_help_panel=_TRIAL),
    ] = None,
    arrivals: Annotated[
        Literal["recorded", "spread"],
        typer.Option(
            help="When requests arrive; spread: those of one recorded time evenly up to the log's next step.",
            rich_help_panel=_TRIAL,
        ),
    ] = "recorded",
    slo_ttft_p95: Annotated[
        float | None,
        typer.Option(help="Target: p95 of TTFT in seconds.", show_default=False, rich_help_panel=_TRIAL),
    ] = None,
    engines: Annotated[
        str | None,
        typer.Option(help="Engine instances; several to try: 2,3,4.", show_default=False, rich_help_panel=_TRIAL),
    ] = None,
    l2_sizes_gb: Annotated[
        str | None,
        typer.Option(help="L2 sizes to try, in GiB: 0,500,2000.", show_default=False, rich_help_panel=_TRIAL),
    ] = None,
    l2_kind: L2Kind = "disk",
    load_or_recompute: LoadOrRecompute = False,
    routing: RoutingName = "round-robin",
    max_model_len: MaxModelLen = None,
    max_num_batched_tokens: MaxBatchedTokens = 8192,
    max_num_seqs: MaxSeqs = 256,
    l0_gb: L0Gb = None,
    l0_block_tokens: L0BlockTokens = 16,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Simulate on a Ray cluster (extra 'ray'): auto, ray://host:10001, or local for one of this machine.",
            show_default=False,
            rich_help_panel=_TRIAL,
        ),
    ] = None,
    price_gpu_hour: Annotated[
        float | None, typer.Option(help="A GPU for an hour.", show_default=False, rich_help_panel=_PRICES)
    ] = None,
    price_ram_gb_hour: Annotated[
        float | None, typer.Option(help="A GiB of RAM for an hour.", show_default=False, rich_help_panel=_PRICES)
    ] = None,
    price_disk_gb_hour: Annotated[
        float | None, typer.Option(help="A GiB of disk for an hour.", show_default=False, rich_help_panel=_PRICES)
    ] = None,
    json: Json = False,
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML report (extra 'report').", rich_help_panel="Output")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the plots to a folder as SVG.", rich_help_panel="Output")
    ] = None,
    progress: ShowProgress = None,
) -> None:
    """Recommend chunk size, L1 size and eviction policy for a log, by an exact sweep and a cost profile.

    With a flag of the simulation the best settings are then run under load, and settled by their TTFT there. What if:
    --rate-scale for more traffic, --model and --gpu for others, --engines for one more; no cache is always among them.

    Example: kvsim tune --trace prod.jsonl --model qwen3-8b --gpu h100 --engines 3,4 --slo-ttft-p95 2
    """
    from dataclasses import replace  # noqa: PLC0415
    from functools import partial  # noqa: PLC0415 - loaded when it runs, not for --help

    from kvsim.cli.console import print_json, read_log, stages  # noqa: PLC0415
    from kvsim.cli.engine_options import with_journal  # noqa: PLC0415
    from kvsim.files import check_outputs, files_read, make_folder  # noqa: PLC0415
    from kvsim.tuner import Rule, costs  # noqa: PLC0415
    from kvsim.tuner import tune as run  # noqa: PLC0415
    from kvsim.tuner.run import engine_of  # noqa: PLC0415

    engine = {
        "l2_kind": l2_kind,
        "load_or_recompute": load_or_recompute,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_num_seqs": max_num_seqs,
        "l0_gb": l0_gb,
        "l0_block_tokens": l0_block_tokens,
    }
    unpacked = partial(costs, model=model, gpu=gpu, profile=profile, tensor_parallel=tensor_parallel, kv_dtype=kv_dtype)
    recorded, priced, told = with_journal(context, journal, engine, unpacked)
    chosen_sizes, chosen_l1 = integers("--chunk-sizes", chunk_sizes), sizes("--l1-sizes-gb", l1_sizes_gb)
    chosen_policies = names("--policies", policies)
    trial = _trial(
        priced,
        {
            "top": simulate,
            "rate_scale": rate_scale,
            "slo_ttft_p95_s": slo_ttft_p95,
            "engines": integers("--engines", engines),
            "l2_sizes_gb": sizes("--l2-sizes-gb", l2_sizes_gb),
            "cluster": ray,
            "gpu_hour": price_gpu_hour,
            "ram_gb_hour": price_ram_gb_hour,
            "disk_gb_hour": price_disk_gb_hour,
        },
        any(said(context, name) for name in (*engine, "routing", "arrivals")),
        routing=routing,
        arrivals=arrivals,
        **recorded,
    )
    if report is not None:
        from kvsim.report import check_available  # noqa: PLC0415

        check_available()
        check_outputs((report,), files_read(trace, journal, profile, model))
    if ray is not None:
        from kvsim import cluster  # noqa: PLC0415

        cluster.check_available()
    if plot is not None:
        make_folder(plot)
    with stages(progress) as shown:
        log = read_log(trace, block_size, skip_bad, shown, priced.profile.model, sort=sort)
        result = run(
            log,
            priced,
            chunk_sizes=chosen_sizes,
            l1_sizes_gb=chosen_l1,
            l1_points=l1_points,
            l1_max_gb=l1_max_gb,
            policies=chosen_policies,
            rule=Rule(within=within),
            threads=threads,
            progress=lambda done, total: shown.update("sweeping", done, total),
            trial=trial,
            trial_progress=lambda done, total: shown.update("simulating", done, total),
            engine=engine_of(priced, **{name: recorded[name] for name in _LIMITS}),
        )
    result = replace(result, notes=(*result.notes, *_of_log(log, trial, result.notes)))
    _write(result, trace, report, plot)
    if json:
        print_json({**result.to_dict(), **({"by_journal": told} if told else {})})
        return
    from kvsim.cli.show_tune import show  # noqa: PLC0415
    from kvsim.report.units import sentence  # noqa: PLC0415

    show(result)
    for note in told:
        typer.echo(f"* {sentence(note)}")


_LIMITS = ("max_model_len", "l0_gb", "l0_block_tokens")
"""The flags that say what an engine takes, simulated or not."""
_PRICE_NAMES = ("gpu_hour", "ram_gb_hour", "disk_gb_hour")


def _trial(costs: "Costs", asked: dict[str, Any], where: bool, **engine: Any) -> "Trial | None":
    """Return what to simulate: nothing unless a flag asks for it, or says on what. Raises UsageError, SettingsError."""
    given = {name: value for name, value in asked.items() if value is not None}
    if given.get("top") == 0:
        if len(given) > 1:
            raise UsageError("--simulate 0: the other flags of the simulation say nothing then")
        return None
    if not given and not where:
        return None
    from kvsim.cli.engine_options import build  # noqa: PLC0415
    from kvsim.tuner import Prices, Trial  # noqa: PLC0415

    prices = {name: given.pop(name) for name in _PRICE_NAMES if name in given}
    counts = tuple(given.pop("engines", (1,)))
    base = build(costs, engines=counts[0], rate_scale=given.pop("rate_scale", 1.0), **engine)
    lower = tuple(given.pop("l2_sizes_gb", (0.0,)))
    trial = Trial(base=base, engines=counts, l2_sizes_gb=lower, prices=Prices(**prices) if prices else None, **given)
    for count in counts:
        trial.settings(None, 0.0, count)  # what cannot be run is refused before the sweep
    return trial


def _of_log(log: "Log", trial: "Trial | None", said: tuple[str, ...]) -> list[str]:
    """Return what the log makes doubtful, but for what is said already."""
    from kvsim.engine.arrivals import coarse_times  # noqa: PLC0415

    coarse = None if trial is None else coarse_times(log, trial.base)
    return [doubt for doubt in (*log.doubts, *filter(None, [coarse])) if doubt not in said]


def _write(result: "TuneResult", trace: list[str], report: Path | None, plot: Path | None) -> None:
    """Write what was asked for in files."""
    if plot is not None:
        from kvsim.files import write_text  # noqa: PLC0415
        from kvsim.plots import svg  # noqa: PLC0415
        from kvsim.report.charts import charts  # noqa: PLC0415

        for name, chart in charts(result).items():
            write_text(plot / f"{name}.svg", svg(chart))
    if report is not None:
        from kvsim.report import write_report  # noqa: PLC0415

        write_report(result, report, title=", ".join(trace))
