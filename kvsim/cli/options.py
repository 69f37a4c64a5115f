"""Options that several commands share, and how lists are read."""

import math
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from kvsim.errors import UsageError

Traces: TypeAlias = Annotated[
    list[str],
    typer.Option("--trace", help="A request log: file, glob or folder; again for more.", rich_help_panel="Log"),
]
BlockSize: TypeAlias = Annotated[
    int | None,
    typer.Option(help="Tokens of a block, where the log does not say and no one size fits.", rich_help_panel="Log"),
]
SkipBad: TypeAlias = Annotated[
    bool, typer.Option("--skip-bad", help="Leave bad rows out and count them.", rich_help_panel="Log")
]
Sort: TypeAlias = Annotated[
    bool,
    typer.Option("--sort", help="Sort a log by timestamp that is in another order.", rich_help_panel="Log"),
]
Model: TypeAlias = Annotated[
    str | None,
    typer.Option(help="A model's name (qwen3-8b), or the path of its config.json.", rich_help_panel="Costs"),
]
GpuName: TypeAlias = Annotated[str | None, typer.Option("--gpu", help="A GPU's name (h100).", rich_help_panel="Costs")]
ProfilePath: TypeAlias = Annotated[
    Path | None,
    typer.Option("--profile", help="A cost profile of your own, as kvsim calibrate writes.", rich_help_panel="Costs"),
]
TensorParallel: TypeAlias = Annotated[
    int | None,
    typer.Option(help="GPUs of one engine; default 1, or the profile's.", show_default=False, rich_help_panel="Costs"),
]
KvDtype: TypeAlias = Annotated[
    str, typer.Option(help="The KV cache's dtype: auto, bf16, fp8, fp32, ...", rich_help_panel="Costs")
]
PackingName: TypeAlias = Annotated[
    Literal["none", "lossless"],
    typer.Option(
        "--packing",
        help="lossless: bf16 KV beyond the GPU as kvcore's connectors pack it there, a fifth smaller.",
        rich_help_panel="Costs",
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel="Output")]
ShowProgress: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress",
        help="Show progress on stderr; by default on a terminal.",
        show_default=False,
        rich_help_panel="Output",
    ),
]


def integers(option: str, text: str | None) -> list[int] | None:
    """Return "256,512" as numbers, None for None. Raises UsageError for what is not a list of whole numbers."""
    if text is None:
        return None
    parts = _parts(option, text)
    try:
        return [int(part) for part in parts]
    except ValueError as error:
        raise UsageError(f"{option} {text}: a list of whole numbers is expected, such as 256,512") from error


def sizes(option: str, text: str | None) -> list[float] | None:
    """Return "1,2.5" as numbers, None for None. Raises UsageError for what is not a list of numbers."""
    if text is None:
        return None
    parts = _parts(option, text)
    try:
        values = [float(part) for part in parts]
    except ValueError as error:
        raise UsageError(f"{option} {text}: a list of sizes in GiB is expected, such as 64,128.5") from error
    if not all(map(math.isfinite, values)):
        raise UsageError(f"{option} {text}: sizes are finite")
    return values


def names(option: str, text: str | None) -> list[str] | None:
    """Return "lru,fifo" as names in lower case, None for None. Raises UsageError for an empty list."""
    return None if text is None else [part.lower() for part in _parts(option, text)]


def _parts(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError(f"{option}: the list is empty")
    return parts


def said(context: typer.Context, name: str) -> bool:
    """Whether a parameter's value was given, not its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"
