"""`kvsim verify`: a server's journal, decided again."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.options import Json
from kvsim.errors import UsageError

if TYPE_CHECKING:
    from kvtraces.journal import Difference, Equal


def verify(
    journal: Annotated[Path, typer.Option(help="The folder that `kvcore serve --journal` writes.")],
    json: Json = False,
) -> None:
    """Replay a server's journal and say whether every decision comes out equal; exit code 1 where one does not.

    A last record that a crash has cut short is told, and is no error; a journal without a step is one.

    Example: kvsim verify --journal journal/
    """
    from kvsim.cli.console import print_json  # noqa: PLC0415 - loaded when it runs, not for --help

    found = replay(journal)
    told = as_json(found)
    if not told.get("steps", 1):
        raise UsageError(f"{journal}: {found}")
    if json:
        print_json(told)
    else:
        typer.echo(str(found))
    if not told["equal"]:
        raise typer.Exit(1)


def replay(journal: Path) -> "Equal | Difference":
    """Decide a journal again. Raises UsageError for a folder that holds none."""
    from kvtraces.journal import JournalError, verify  # noqa: PLC0415

    try:
        return verify(journal)
    except JournalError as error:
        raise UsageError(f"{error}; --journal takes the folder that kvcore serve wrote") from error


def as_json(found: "Equal | Difference") -> dict[str, Any]:
    """Return what a replay found as plain JSON values."""
    from dataclasses import asdict  # noqa: PLC0415

    from kvtraces.journal import Equal  # noqa: PLC0415

    if isinstance(found, Equal):
        return {"equal": True, **asdict(found)}
    return {
        "equal": False,
        **{name: getattr(found, name) for name in ("segment", "offset", "step", "reason")},
        "event": repr(found.event) if found.event is not None else None,
        "recorded": [repr(decision) for decision in found.recorded],
        "replayed": [repr(decision) for decision in found.replayed],
    }
