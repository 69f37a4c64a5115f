"""A tuning run for a person at a terminal."""

from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kvsim.cli.show import chart, facts, new_console, table
from kvsim.report.charts import hit_ratio
from kvsim.report.trial_words import LEAST, trial_headings, trial_marked, trial_rows
from kvsim.report.tune_words import (
    FRONTIER_HEADINGS,
    frontier_rows,
    further_notes,
    headline,
    log_facts,
    marked_row,
    recommends,
    sentences,
)
from kvsim.tuner.result import TuneResult
from kvsim.tuner.trial import Settled

_MOST_ROWS = 24
_WIDE = 104
_ONLY_WIDE = ("saved p50", "saved p95")
"""Columns left out where the terminal is narrower than `_WIDE`."""


def show(result: TuneResult) -> None:
    """Print the log's summary, the best setting of each size, a plot, and the recommendation last."""
    console = new_console()
    facts("Log and costs", log_facts(result))
    if result.unbounded.cold.hit_tokens:
        console.print(Text("\nThe best setting at each L1 size", style="bold"))
        columns = [i for i, name in enumerate(FRONTIER_HEADINGS) if console.width >= _WIDE or name not in _ONLY_WIDE]
        rows, marked = _thinned([[row[i] for i in columns] for row in frontier_rows(result)], marked_row(result))
        console.print(table([FRONTIER_HEADINGS[i] for i in columns], rows, marked, console.width))
        chart(console, hit_ratio(result))
        console.print()
    if result.settled is not None:
        console.print(Text("Simulated under load", style="bold"))
        console.print(_trials(result.settled, console.width))
    words = Text(headline(result), style="bold green" if recommends(result) else "bold yellow")
    for sentence in sentences(result):
        words.append(f"\n{sentence}", style="not bold default")
    console.print(
        Panel(words, title="Recommendation", title_align="left", padding=(0, 1), width=min(console.width, 110))
    )
    for note in further_notes(result):
        console.print(Text(f"* {note}", style="dim"))


def _trials(settled: Settled, width: int) -> Table:
    """Return the simulated settings, without the least of the columns where the terminal is narrow."""
    headings = trial_headings(settled)
    kept = [i for i, heading in enumerate(headings) if width >= _WIDE or heading not in LEAST]
    rows = [[row[i] for i in kept] for row in trial_rows(settled)]
    return table([headings[i] for i in kept], rows, trial_marked(settled), width)


def _thinned(rows: list[list[str]], marked: int | None) -> tuple[list[list[str]], int | None]:
    """Return at most about `_MOST_ROWS` rows, evenly chosen, with the marked one among them."""
    step = -(-len(rows) // _MOST_ROWS)
    kept = sorted({*range(len(rows) - 1, -1, -step), *([] if marked is None else [marked])})
    return [rows[i] for i in kept], None if marked is None else kept.index(marked)
