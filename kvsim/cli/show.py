"""What the commands print for a person."""

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvsim.plots import Chart, terminal

_UNSEEN = 160
"""Columns where stdout is no terminal: more than any table needs, so that no figure is cut."""


def new_console() -> Console:
    """Return what the commands print on: as wide as the terminal, if there is one."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _UNSEEN)


def facts(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print named facts, one a line."""
    console = new_console()
    console.print(Text(title, style="bold"))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, fact in rows:
        table.add_row(Text(name), Text(fact))
    console.print(table)


def chart(console: Console, plot: Chart) -> None:
    """Print a chart as wide as the terminal, up to 100 columns."""
    for pieces in terminal(plot, width=min(console.width, 100) - 1):
        console.print(Text.assemble(*pieces, no_wrap=True, overflow="crop"))


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], marked: int | None = None, width: int = _UNSEEN
) -> Table:
    """Return a table of right-aligned figures, one row marked; its columns closer together where `width` needs it."""
    needed = sum(max(map(len, column)) + 3 for column in zip(headings, *rows, strict=True))
    built = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1) if needed <= width else 0)
    for heading in headings:
        built.add_column(heading, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        built.add_row(*row, style="bold green" if i == marked else None)
    return built


def named_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table whose first column names the rows and whose others are figures."""
    built = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        built.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        built.add_row(*row)
    return built


def meter(title: str, rows: Sequence[tuple[str, float, str]]) -> None:
    """Print named shares, 0 to 1, with a bar each and a word beside."""
    console = new_console()
    console.print(Text(title, style="bold"))
    built = Table(box=None, show_header=False, padding=(0, 2, 0, 1))
    built.add_column(style="dim", no_wrap=True)
    built.add_column(no_wrap=True)
    built.add_column(justify="right", no_wrap=True)
    built.add_column(justify="right", no_wrap=True)
    for name, share, beside in rows:
        built.add_row(Text(name), bar(share), f"{100 * share:.1f}%", Text(beside))
    console.print(built)


_BAR_COLUMNS = 24
_EIGHTHS = " ▏▎▍▌▋▊▉"


def bar(share: float) -> Text:
    """Return a share, 0 to 1, as a bar, in eighths of a column."""
    eighths = round(8 * _BAR_COLUMNS * min(max(share, 0.0), 1.0))
    filled = "█" * (eighths // 8) + (_EIGHTHS[eighths % 8].strip() if eighths % 8 else "")
    return Text.assemble((filled, "blue"), ("·" * (_BAR_COLUMNS - len(filled)), "dim"))
