"""The report of a validation."""

from pathlib import Path

from kvsim.files import write_text
from kvsim.report.page import answer, bullets, named, page, plots, table
from kvsim.report.run_words import setting_facts
from kvsim.report.units import sentence
from kvsim.report.validation_words import (
    GROUP_HEADINGS,
    HIT_HEADINGS,
    PART_HEADINGS,
    TTFT_HEADINGS,
    WORST_HEADINGS,
    cdf,
    group_rows,
    headline,
    hit_rows,
    notes,
    part_rows,
    sentences,
    ttft_rows,
    worst_rows,
)
from kvsim.validation import Validation


def write_validation(found: Validation, path: Path, *, title: str) -> None:
    """Write the report of a validation to `path`, whole or not at all.

    Raises MissingExtraError without plotly, UsageError for a path that cannot be written.
    """
    write_text(path, render_validation(found, title=title))


def render_validation(found: Validation, *, title: str) -> str:
    """Return the report of a validation as the text of an HTML file. Raises MissingExtraError without plotly."""
    drawn = {"ttft_cdf": cdf(found)}
    result = found.result
    provenance = [
        f"Cost profile, {name}: {part.kind}; {part.source}; error {part.error}."
        for name, part in result.settings.profile.provenance.items()
    ]
    told = [sentence(note) for note in notes(found)]
    body = [
        answer(headline(found), sentences(found)),
        plots(drawn),
        f"<h2>Time to first token</h2>{table(TTFT_HEADINGS, ttft_rows(found))}",
    ]
    if found.hits:
        body.append(f"<h2>Tokens hit</h2>{table(HIT_HEADINGS, hit_rows(found))}")
    if found.parts:
        body.append(f"<h2>Where the error lies</h2>{table(PART_HEADINGS, part_rows(found))}")
    body += [
        f"<h2>By prompt length, the worst first</h2>{table(GROUP_HEADINGS, group_rows(found))}",
        f"<h2>The requests furthest off</h2>{table(WORST_HEADINGS, worst_rows(found))}",
        f"<h2>What was simulated</h2>{named(setting_facts(result.settings, result.chunk_tokens))}",
        f"<h2>Notes</h2>{bullets([*told, *provenance])}",
    ]
    return page(f"kvsim validate \u00b7 {title}", body=body, charts=drawn, data=found.as_dict())
