"""The report: one HTML file with its plots, its data and plotly's script inside."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from kvsim.errors import MissingExtraError
from kvsim.files import write_text
from kvsim.plots import COLORS, Chart
from kvsim.report.charts import charts
from kvsim.report.words import (
    FRONTIER_HEADINGS,
    frontier_rows,
    further_notes,
    headline,
    log_facts,
    marked_row,
    sentences,
)
from kvsim.tuner.result import TuneResult

_STYLE = """
:root { color-scheme: light; --ink: #0f172a; --soft: #475569; --line: #e2e8f0; --accent: #2563eb; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink);
  margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 1080px; }
h1 { font-size: 1.1rem; font-weight: 600; color: var(--soft); margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .5rem; }
.answer { border-left: 4px solid var(--accent); background: #f8fafc; padding: 1rem 1.25rem; }
.answer p { margin: .4rem 0; } .answer .headline { font-size: 1.35rem; font-weight: 650; margin-top: 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 1rem; }
.plot { height: 400px; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } tr.marked td { background: #dbeafe; font-weight: 650; }
.facts td { text-align: left; white-space: normal; } .facts td:first-child { color: var(--soft); }
.wide { overflow-x: auto; } ul { padding-left: 1.2rem; color: var(--soft); }
summary { cursor: pointer; color: var(--accent); }
"""


def check_available() -> None:
    """Raise MissingExtraError unless plotly, whose script the report carries, is installed."""
    _plotly_script()


def write_report(result: TuneResult, path: Path, *, title: str) -> None:
    """Write the report of a run to `path`, whole or not at all.

    Raises MissingExtraError without plotly, UsageError for a path that cannot be written.
    """
    write_text(path, render(result, title=title))


def render(result: TuneResult, *, title: str) -> str:
    """Return the report of a run as the text of an HTML file. Raises MissingExtraError without plotly."""
    drawn = charts(result)
    plots = "".join(f'<div class="plot" id="{name}"></div>' for name in drawn)
    figures = {name: figure(chart) for name, chart in drawn.items()}
    data = result.to_dict()
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>kvsim tune: {escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>kvsim tune &middot; {escape(title)}</h1>",
            _answer(result),
            f'<h2>Plots</h2><div class="plots">{plots}</div>',
            "<h2>The best setting at each L1 size</h2>",
            _table(FRONTIER_HEADINGS, frontier_rows(result), marked_row(result)),
            f"<h2>The log and the costs</h2>{_facts(log_facts(result))}",
            f"<h2>Notes</h2>{_notes(result)}",
            f"<details><summary>All {len(result.points):,} settings swept</summary>{_all_settings(result)}</details>",
            f'<script type="application/json" id="data">{_json(data)}</script>',
            f"<script>{_plotly_script()}</script>",
            f"<script>const figures = {_json(figures)};{_DRAW}</script></body></html>\n",
        )
    )


_DRAW = """
for (const [name, figure] of Object.entries(figures)) {
  Plotly.newPlot(name, figure.data, figure.layout, {responsive: true, displayModeBar: false});
}
"""


def figure(chart: Chart) -> dict[str, Any]:
    """Return a chart as a plotly figure of plain JSON values."""
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(one.x) <= 40 else "lines",
            "name": one.name,
            "x": one.x.tolist(),
            "y": one.y.tolist(),
            "line": {"color": COLORS[i % len(COLORS)], "width": 2},
            "marker": {"size": 5},
        }
        for i, one in enumerate(chart.series)
    ]
    axis = {"gridcolor": "#e2e8f0", "zeroline": False, "linecolor": "#94a3b8", "automargin": True}
    layout: dict[str, Any] = {
        "title": {"text": chart.title, "font": {"size": 15}, "x": 0.02, "xanchor": "left"},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#334155"},
        "margin": {"l": 60, "r": 20, "t": 50, "b": 90},
        "legend": {"orientation": "h", "y": -0.25},
        "hovermode": "closest",
        "plot_bgcolor": "#fff",
        "xaxis": axis | {"title": {"text": chart.x_name}, "type": "log" if chart.log_x else "linear"},
        "yaxis": axis
        | {"title": {"text": chart.y_name}, "range": [0, chart.y_top()], "tickformat": ".0%" if chart.percent else ""},
    }
    if chart.mark is not None:
        x, y, label = chart.mark
        ring = {"size": 14, "color": "rgba(0,0,0,0)", "line": {"color": "#0f172a", "width": 2}}
        name = f"recommended: {label}"
        data.append({"type": "scatter", "mode": "markers", "name": name, "x": [x], "y": [y], "marker": ring})
    return {"data": data, "layout": layout}


def _plotly_script() -> str:
    try:
        from plotly.offline import get_plotlyjs  # noqa: PLC0415 - an extra, and large
    except ImportError as error:
        raise MissingExtraError("the HTML report", "report") from error
    script: str = get_plotlyjs()
    return script


def _json(value: Any) -> str:
    """Return JSON that cannot end the script element that it stands in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _answer(result: TuneResult) -> str:
    words = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences(result))
    return f'<section class="answer"><p class="headline">{escape(headline(result))}</p>{words}</section>'


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], marked: int | None = None) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    tags = ['<tr class="marked">' if i == marked else "<tr>" for i in range(len(rows))]
    body = "".join(f"{tag}{line}</tr>" for tag, line in zip(tags, lines, strict=True))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _facts(facts: list[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(fact)}</td></tr>" for name, fact in facts)
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


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
    items = "".join(f"<li>{escape(note)}</li>" for note in [*further_notes(result), rule, *provenance])
    return f"<ul>{items}</ul>"


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
    return _table(headings, rows)
