"""A simulated run for a person at a terminal."""

from rich.panel import Panel
from rich.text import Text

from kvsim.cli.show import facts, meter, named_table, new_console
from kvsim.report.run_words import SPREAD_HEADINGS, hit_rows, run_notes, saved, setting_facts, times_rows, use_rows
from kvsim.report.units import sentence
from kvsim.runner import RunResult


def show(result: RunResult) -> None:
    """Print the setting, TTFT and its parts, hits by tier, what was busy, and what it comes to last."""
    console = new_console()
    facts("Setting", setting_facts(result.settings, result.chunk_tokens))
    if result.load.sustained and result.load.requests:
        console.print(Text("\nTime to first token", style="bold"))
        console.print(named_table(SPREAD_HEADINGS, times_rows(result)))
    meter("Prompt tokens found", [(name, share, f"{tokens:,}") for name, tokens, share in hit_rows(result)])
    meter("\nBusy until the last token", [(name, share, "") for name, share in use_rows(result)])
    console.print()
    words = Text(sentence(result.load.sentence()), style="bold green" if result.load.keeps_up else "bold yellow")
    gain = saved(result)
    if gain is not None:
        words.append(f"\n{sentence(gain)}", style="not bold default")
    console.print(Panel(words, title="Load", title_align="left", padding=(0, 1), width=min(console.width, 110)))
    for note in run_notes(result):
        console.print(Text(f"* {sentence(note)}", style="dim"))
