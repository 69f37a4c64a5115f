"""Line charts without a plotting library: braille in a terminal, SVG in a file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#525252")
"""One a series, told apart by colour-blind readers and on white."""
TERMINAL_COLORS = ("blue", "yellow", "green", "red", "magenta", "cyan", "bright_red", "bright_green", "white")


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name and its points [n], by ascending x."""

    name: str
    x: FloatArray
    y: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """Lines on common axes.

    Attributes:
        title: Above the chart.
        x_name: Below it, with the unit.
        y_name: Beside it, with the unit.
        series: The lines.
        log_x: Whether the x axis is logarithmic; then every x is above zero.
        mark: A point to mark, with its label.
        percent: Whether y is a fraction to be written in percent.
    """

    title: str
    x_name: str
    y_name: str
    series: Sequence[Series]
    log_x: bool = False
    mark: tuple[float, float, str] | None = None
    percent: bool = False

    def place_x(self, x: FloatArray) -> FloatArray:
        """Return x as it lies along the axis."""
        return np.log10(x) if self.log_x else x

    def x_range(self) -> tuple[float, float]:
        """Return the ends of the x axis, as they lie along it."""
        values = np.concatenate([self.place_x(one.x) for one in self.series])
        low, high = float(values.min()), float(values.max())
        return (low, high) if high > low else (low - 0.5, high + 0.5)

    def y_top(self) -> float:
        """Return the upper end of the y axis; the lower one is zero."""
        top = max(float(one.y.max()) for one in self.series)
        return top * 1.05 if top > 0 else 1.0

    def y_text(self, value: float) -> str:
        """Return a y value as the axis writes it."""
        return f"{100 * value:.3g}%" if self.percent else f"{value:.3g}"


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` + 1 round values from `low` to `high`."""
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` round values from 10^low to 10^high, as their logarithms."""
    for digits in ((1, 2, 5), (1, 3), (1,)):
        values = [
            exponent + math.log10(digit)
            for exponent in range(math.floor(low), math.ceil(high) + 1)
            for digit in digits
            if low - 1e-9 <= exponent + math.log10(digit) <= high + 1e-9
        ]
        if len(values) <= most:
            break
    return values if len(values) > 1 else [low, high]


def number(value: float) -> str:
    """Return a number as an axis writes it: three digits, thousands with a comma."""
    return f"{round(value, -math.floor(math.log10(value)) + 2):,.0f}" if value >= 1000 else f"{value:.3g}"


def _x_ticks(chart: Chart, most: int) -> list[tuple[float, str]]:
    low, high = chart.x_range()
    if chart.log_x:
        return [(place, number(10**place)) for place in log_ticks(low, high, most)]
    return [(place, number(place) if place else "0") for place in ticks(low, high, most)]


# Braille: each character holds 2 x 4 dots; these are the bits by row and column.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def terminal(chart: Chart, width: int = 72, height: int = 14) -> list[list[tuple[str, str]]]:
    """Return a chart as lines of (text, style) pieces, `width` columns and about `height` lines."""
    margin = max(len(chart.y_text(value)) for value in ticks(0, chart.y_top(), 4)) + 1
    columns = max(width - margin - 1, 16)
    bits = np.zeros((height, columns), np.int64)
    owner = np.full((height, columns), -1, np.int64)
    for i, one in reversed(list(enumerate(chart.series))):  # the first series lies on top
        for row, column in _dots(chart, one, 2 * columns, 4 * height):
            bits[row // 4, column // 2] |= _DOTS[row % 4][column % 2]
            owner[row // 4, column // 2] = i
    lines = [[(f"{'':{margin}} {chart.title}", "bold")]]
    labels = {_row(value, chart, 4 * height) // 4: chart.y_text(value) for value in ticks(0, chart.y_top(), 4)}
    marked = _cell_of_mark(chart, columns, height)
    for row in range(height):
        pieces = [(f"{labels.get(row, ''):>{margin}}{'┤' if row in labels else '│'}", "dim")]
        for column in range(columns):
            style = TERMINAL_COLORS[owner[row, column] % len(TERMINAL_COLORS)] if owner[row, column] >= 0 else ""
            cell = ("●", "bold") if (row, column) == marked else (chr(0x2800 + bits[row, column]), style)
            pieces.append(cell if cell[0] != "\u2800" else (" ", ""))
        lines.append(pieces)
    lines += _terminal_x_axis(chart, margin, columns)
    return lines + _terminal_legend(chart, margin, width)


def _row(value: float, chart: Chart, rows: int) -> int:
    return min(max(round((1 - value / chart.y_top()) * (rows - 1)), 0), rows - 1)


def _dots(chart: Chart, one: Series, columns: int, rows: int) -> set[tuple[int, int]]:
    """Return the dots of a line: one or a run for each column that it crosses."""
    low, high = chart.x_range()
    places = (chart.place_x(one.x) - low) / (high - low) * (columns - 1)
    across = np.arange(round(float(places[0])), round(float(places[-1])) + 1)
    heights = [_row(float(y), chart, rows) for y in np.interp(across, places, one.y)]
    dots: set[tuple[int, int]] = set()
    previous = heights[0]
    for column, row in zip(across.tolist(), heights, strict=True):
        step = 1 if row >= previous else -1
        dots.update(
            (between, column) for between in range(previous + step if row != previous else row, row + step, step)
        )
        previous = row
    return dots


def _cell_of_mark(chart: Chart, columns: int, height: int) -> tuple[int, int] | None:
    if chart.mark is None:
        return None
    low, high = chart.x_range()
    x = float(chart.place_x(np.array([chart.mark[0]]))[0])
    return _row(chart.mark[1], chart, 4 * height) // 4, round((x - low) / (high - low) * (2 * columns - 1)) // 2


def _terminal_x_axis(chart: Chart, margin: int, columns: int) -> list[list[tuple[str, str]]]:
    low, high = chart.x_range()
    line, text = ["─"] * columns, [" "] * (columns + 8)
    free_from = 0
    for place, label in _x_ticks(chart, columns // 9):
        column = round((place - low) / (high - low) * (columns - 1))
        start = max(column - len(label) // 2, 0)
        if start >= free_from:
            line[column] = "┬"
            text[start : start + len(label)] = label
            free_from = start + len(label) + 1
    return [
        [(f"{'':{margin}}└{''.join(line)}", "dim")],
        [(f"{'':{margin}} {''.join(text).rstrip()}", "dim")],
        [(f"{'':{margin}} {chart.x_name:^{columns}}".rstrip(), "dim")],
    ]


def _terminal_legend(chart: Chart, margin: int, width: int) -> list[list[tuple[str, str]]]:
    entries = [("━━", TERMINAL_COLORS[i % len(TERMINAL_COLORS)], one.name) for i, one in enumerate(chart.series)]
    if chart.mark is not None:
        entries.append(("●", "bold", chart.mark[2]))
    lines: list[list[tuple[str, str]]] = []
    free = 0
    for sign, style, name in entries:
        length = len(sign) + len(name) + 3
        if length > free:
            lines.append([(" " * (margin + 1), "")])
            free = width - margin - 1
        lines[-1] += [(f"{sign} ", style), (f"{name}  ", "")]
        free -= length
    return lines


_WIDTH, _HEIGHT = 860, 480
_SVG_STYLE = f'width="{_WIDTH}" height="{_HEIGHT}" font-family="system-ui, sans-serif" font-size="12" fill="#334155"'
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 170, 50, 60


def svg(chart: Chart) -> str:
    """Return a chart as a standalone SVG file's text."""
    low, high = chart.x_range()
    top = chart.y_top()
    across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def at(place: float, value: float) -> tuple[float, float]:
        return _LEFT + (place - low) / (high - low) * across, _TOP + (1 - value / top) * down

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" {_SVG_STYLE}>',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>',
        f'<text x="{_LEFT}" y="28" font-size="16" font-weight="600">{escape(chart.title)}</text>',
    ]
    for place, label in _x_ticks(chart, 8):
        x, _ = at(place, 0)
        parts.append(f'<path d="M{x:.1f} {_TOP}v{down}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{x:.1f}" y="{_TOP + down + 18}" text-anchor="middle">{label}</text>')
    for value in ticks(0, top, 6):
        _, y = at(low, value)
        parts.append(f'<path d="M{_LEFT} {y:.1f}h{across}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{chart.y_text(value)}</text>')
    middle = _LEFT + across / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 16}" text-anchor="middle">{escape(chart.x_name)}</text>')
    y_name = f'<text transform="translate(18 {_TOP + down / 2}) rotate(-90)" text-anchor="middle">'
    parts.append(f"{y_name}{escape(chart.y_name)}</text>")
    for i, one in enumerate(chart.series):
        color = COLORS[i % len(COLORS)]
        points = [at(float(x), float(y)) for x, y in zip(chart.place_x(one.x), one.y, strict=True)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        y = _TOP + 10 + 20 * i
        parts.append(f'<path d="M{_WIDTH - _RIGHT + 16} {y}h22" stroke="{color}" stroke-width="3"/>')
        parts.append(f'<text x="{_WIDTH - _RIGHT + 44}" y="{y + 4}">{escape(one.name)}</text>')
    if chart.mark is not None:
        x, y = at(float(chart.place_x(np.array([chart.mark[0]]))[0]), chart.mark[1])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="none" stroke="#0f172a" stroke-width="2"/>')
        right = x > _LEFT + 0.7 * across
        anchor = "end" if right else "start"
        where = f'x="{x - 10 if right else x + 10:.1f}" y="{y + 18:.1f}" text-anchor="{anchor}"'
        parts.append(f'<text {where} font-weight="600">{escape(chart.mark[2])}</text>')
    return "\n".join([*parts, "</svg>", ""])
