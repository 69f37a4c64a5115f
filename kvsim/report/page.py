"""A report's page: one HTML file with its plots, its data and plotly's script inside."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from kvsim.errors import MissingExtraError
from kvsim.plots import COLORS, Chart

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
    """Raise MissingExtraError unless plotly, whose script a report carries, is installed."""
    plotly_script()


def page(heading: str, *, body: Sequence[str], charts: Mapping[str, Chart], data: Any) -> str:
    """Return the text of an HTML file that needs no network.

    Args:
        heading: Its title, as text.
        body: Its parts, as HTML; `plots` makes the one that the charts are drawn into.
        charts: By name.
        data: What the report rests on, as plain JSON values.

    Raises:
        MissingExtraError: Without plotly.
    """
    figures = {name: figure(chart) for name, chart in charts.items()}
    return "".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(heading)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{escape(heading)}</h1>",
            *body,
            f'<script type="application/json" id="data">{_json(data)}</script>',
            f"<script>{plotly_script()}</script>",
            f"<script>const figures = {_json(figures)};{_DRAW}</script></body></html>\n",
        )
    )


def plots(charts: Mapping[str, Chart]) -> str:
    """Return the part of a page that its charts are drawn into."""
    places = "".join(f'<div class="plot" id="{name}"></div>' for name in charts)
    return f'<h2>Plots</h2><div class="plots">{places}</div>'


def answer(headline: str, sentences: Sequence[str]) -> str:
    """Return what the report says first."""
    words = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f'<section class="answer"><p class="headline">{escape(headline)}</p>{words}</section>'


def bullets(sentences: Sequence[str]) -> str:
    """Return sentences as a list."""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f"<ul>{items}</ul>"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], marked: int | None = None) -> str:
    """Return a table of text, one row marked."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    tags = ['<tr class="marked">' if i == marked else "<tr>" for i in range(len(rows))]
    body = "".join(f"{tag}{line}</tr>" for tag, line in zip(tags, lines, strict=True))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def named(facts: Sequence[tuple[str, str]]) -> str:
    """Return named facts, one a line."""
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(fact)}</td></tr>" for name, fact in facts)
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


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


def plotly_script() -> str:
    """Return plotly's script. Raises MissingExtraError without plotly."""
    try:
        from plotly.offline import get_plotlyjs  # noqa: PLC0415 - an extra, and large
    except ImportError as error:
        raise MissingExtraError("the HTML report", "report") from error
    script: str = get_plotlyjs()
    return script


def _json(value: Any) -> str:
    """Return JSON that cannot end the script element that it stands in."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
