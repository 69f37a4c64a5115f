"""`kvsim tune`: a log in, a recommendation out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvsim.cli.options import (
    BlockSize,
    GpuName,
    Json,
    KvDtype,
    Model,
    ProfilePath,
    ShowProgress,
    SkipBad,
    TensorParallel,
    Traces,
    integers,
    names,
    sizes,
)

if TYPE_CHECKING:
    from kvsim.tuner import TuneResult

_SWEEP = "Sweep"
_CHOICE = "Choice"


def tune(  # noqa: PLR0913, PLR0917 - a command's options
    trace: Traces,
    model: Model = None,
    gpu: GpuName = None,
    profile: ProfilePath = None,
    tensor_parallel: TensorParallel = None,
    kv_dtype: KvDtype = "auto",
    block_size: BlockSize = None,
    skip_bad: SkipBad = False,
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
    json: Json = False,
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML report (extra 'report').", rich_help_panel="Output")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the plots to a folder as SVG.", rich_help_panel="Output")
    ] = None,
    progress: ShowProgress = None,
) -> None:
    """Recommend chunk size, L1 size and eviction policy for a log, by an exact sweep and a cost profile."""
    from kvsim.cli.console import print_json, read_log, stages  # noqa: PLC0415 - loaded when it runs, not for --help
    from kvsim.files import check_writable, make_folder  # noqa: PLC0415
    from kvsim.tuner import Rule, costs  # noqa: PLC0415
    from kvsim.tuner import tune as run  # noqa: PLC0415

    priced = costs(model=model, gpu=gpu, profile=profile, tensor_parallel=tensor_parallel, kv_dtype=kv_dtype)
    chosen_sizes, chosen_l1 = integers("--chunk-sizes", chunk_sizes), sizes("--l1-sizes-gb", l1_sizes_gb)
    chosen_policies = names("--policies", policies)
    if report is not None:
        from kvsim.report import check_available  # noqa: PLC0415

        check_available()
        check_writable(report)
    if plot is not None:
        make_folder(plot)
    with stages(progress) as shown:
        log = read_log(trace, block_size, skip_bad, shown)
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
        )
    _write(result, trace, report, plot)
    if json:
        print_json(result.to_dict())
        return
    from kvsim.cli.tuned import show  # noqa: PLC0415

    show(result)


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
