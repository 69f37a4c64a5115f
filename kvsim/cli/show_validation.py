"""A validation for a person at a terminal."""

from rich.panel import Panel
from rich.text import Text

from kvsim.cli.show import chart, facts, named_table, new_console
from kvsim.report.run_words import setting_facts
from kvsim.report.units import sentence
from kvsim.report.validation_words import (
    GROUP_HEADINGS,
    HIT_HEADINGS,
    PART_HEADINGS,
    TTFT_HEADINGS,
    cdf,
    group_rows,
    headline,
    hit_rows,
    notes,
    part_rows,
    sentences,
    ttft_rows,
)
from kvsim.validation import Validation


def show(found: Validation) -> None:
    """Print the setting, hits, TTFT with its error, where that is, a plot, and what it comes to last."""
    console = new_console()
    facts("Simulated", setting_facts(found.result.settings, found.result.chunk_tokens))
    tables = (
        ("Tokens hit", HIT_HEADINGS, hit_rows(found)),
        ("Time to first token", TTFT_HEADINGS, ttft_rows(found)),
        ("Where the error lies", PART_HEADINGS, part_rows(found)),
        ("By prompt length, the worst first", GROUP_HEADINGS, group_rows(found)),
    )
    for title, headings, rows in tables:
        if rows:
            console.print(Text(f"\n{title}", style="bold"))
            console.print(named_table(headings, rows))
    chart(console, cdf(found))
    console.print()
    words = Text(headline(found), style="bold green" if found.beats_baseline else "bold yellow")
    for line in sentences(found):
        words.append(f"\n{line}", style="not bold default")
    console.print(Panel(words, title="Validation", title_align="left", padding=(0, 1), width=min(console.width, 110)))
    for note in notes(found):
        console.print(Text(f"* {sentence(note)}", style="dim"))
