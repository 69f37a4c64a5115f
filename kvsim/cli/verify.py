"""`kvsim verify`: a server's journal, decided again."""

from pathlib import Path
from typing import Annotated

import typer

from kvsim.cli.options import Json
from kvsim.errors import UsageError


def verify(
    journal: Annotated[Path, typer.Option(help="The folder that `kvcore serve --journal` writes.")],
    json: Json = False,
) -> None:
    """Replay a server's journal and say whether every decision comes out equal; exit code 1 where one does not.

    Example: kvsim verify --journal journal/
    """
    from dataclasses import asdict  # noqa: PLC0415 - loaded when it runs, not for --help

    from kvsim.cli.console import print_json  # noqa: PLC0415
    from kvtraces.journal import Equal, JournalError  # noqa: PLC0415
    from kvtraces.journal import verify as replayed  # noqa: PLC0415

    try:
        found = replayed(journal)
    except JournalError as error:
        raise UsageError(f"{error}; --journal takes the folder that kvcore serve wrote") from error
    equal = isinstance(found, Equal)
    if json:
        plain = (
            asdict(found)
            if isinstance(found, Equal)
            else {
                **{name: getattr(found, name) for name in ("segment", "offset", "step", "reason")},
                "event": repr(found.event) if found.event is not None else None,
                "recorded": [repr(decision) for decision in found.recorded],
                "replayed": [repr(decision) for decision in found.replayed],
            }
        )
        print_json({"equal": equal, **plain})
    else:
        typer.echo(str(found))
    if not equal:
        raise typer.Exit(1)
