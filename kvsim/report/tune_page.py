"""The report of a tuning run."""

from pathlib import Path

from kvsim.files import write_text
from kvsim.report.charts import charts
from kvsim.report.page import answer, bullets, named, page, plots, table
from kvsim.report.trial_words import trial_headings, trial_marked, trial_rows
from kvsim.report.tune_words import (
    FRONTIER_HEADINGS,
    frontier_rows,
    further_notes,
    headline,
    log_facts,
    marked_row,
    sentences,
)
from kvsim.tuner.result import TuneResult


def write_report(result: TuneResult, path: Path, *, title: str) -> None:
    """Write the report of a run to `path`, whole or not at all.

    Raises MissingExtraError without plotly, UsageError for a path that cannot be written.
    """
    write_text(path, render(result, title=title))


def render(result: TuneResult, *, title: str) -> str:
    """Return the report of a run as the text of an HTML file. Raises MissingExtraError without plotly."""
    drawn = charts(result)
    body = (
        answer(headline(result), sentences(result)),
        plots(drawn),
        "<h2>The best setting at each L1 size</h2>",
        table(FRONTIER_HEADINGS, frontier_rows(result), marked_row(result)),
        *_simulated(result),
        f"<h2>The log and the costs</h2>{named(log_facts(result))}",
        f"<h2>Notes</h2>{_notes(result)}",
        f"<details><summary>All {len(result.points):,} settings swept</summary>{_all_settings(result)}</details>",
    )
    return page(f"kvsim tune \u00b7 {title}", body=body, charts=drawn, data=result.to_dict())


def _simulated(result: TuneResult) -> tuple[str, ...]:
    """Return the settings that were simulated, where any were."""
    if result.settled is None:
        return ()
    rows, marked = trial_rows(result.settled), trial_marked(result.settled)
    return ("<h2>Settled by simulation</h2>", table(trial_headings(result.settled), rows, marked))


def _notes(result: TuneResult) -> str:
    share, near = 100 * result.rule.within, 100 * result.rule.near
    rule = (
        f"The rule: the smallest L1 that saves within {share:g}% of the most mean TTFT that any setting saves; there "
        f"the simplest policy within {near:g}% of the best, and its largest chunk within {near:g}% of its best."
    )
    provenance = [
        f"Cost profile, {name}: {part.kind}; {part.source}; error {part.error}."
        for name, part in result.costs.profile.provenance.items()
    ]
    return bullets([*further_notes(result), rule, *provenance])


def _all_settings(result: TuneResult) -> str:
    headings = ("chunk", "policy", "L1 GiB", "chunks", "hits", "warm hits", "TTFT p50 s", "p95 s", "mean saved s")
    rows = [
        (
            f"{point.chunk_tokens:,}",
            point.policy,
            f"{point.l1_size_gb:,.6g}",
            f"{point.capacity_chunks:,}",
            f"{100 * point.cold.token_hit_ratio:.2f}%",
            f"{100 * point.warm.token_hit_ratio:.2f}%",
            f"{point.cold.ttft.p50_s:.4f}",
            f"{point.cold.ttft.p95_s:.4f}",
            f"{point.cold.saved_mean_s:.4f}",
        )
        for point in result.points
    ]
    return table(headings, rows)
