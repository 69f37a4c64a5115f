"""Charts in a terminal and as SVG."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from kvsim.plots import Chart, Series, log_ticks, svg, terminal, ticks


def chart(**settings):
    x = np.array([1.0, 10.0, 100.0])
    given = {
        "title": "a <title> & more",
        "x_name": "x",
        "y_name": "y",
        "series": [Series("up", x, np.array([0.0, 0.5, 1.0])), Series("flat", x, np.array([0.25, 0.25, 0.25]))],
        "log_x": True,
        "percent": True,
    }
    return Chart(**{**given, **settings})


def lines(drawn):
    return ["".join(text for text, _ in pieces) for pieces in terminal(drawn, width=60, height=10)]


def test_terminal_chart_fits_and_rises():
    text = lines(chart(mark=(100.0, 1.0, "here")))
    assert all(len(line) <= 62 for line in text)
    assert text[0].strip() == "a <title> & more"
    body = text[1:11]
    assert "●" in body[0][-2:]
    first = [line for line in body if any(0x2800 < ord(c) <= 0x28FF for c in line[7:12])]
    last = [line for line in body if any(0x2800 < ord(c) <= 0x28FF or c == "●" for c in line[-4:])]
    assert body.index(first[-1]) > body.index(last[0])  # low on the left, high on the right
    assert "here" in text[-1]


def test_terminal_chart_of_one_point_and_of_zeros():
    point = Series("one", np.array([5.0]), np.array([0.3]))
    assert any(0x2800 < ord(c) <= 0x28FF for line in lines(chart(series=[point])) for c in line)
    zeros = Series("none", np.array([1.0, 2.0]), np.array([0.0, 0.0]))
    assert lines(chart(series=[zeros]))


def test_svg_is_well_formed_and_places_points():
    root = ET.fromstring(svg(chart(mark=(10.0, 0.5, "knee <here>"))))
    name = "{http://www.w3.org/2000/svg}"
    polylines = root.findall(f"{name}polyline")
    assert len(polylines) == 2
    points = [tuple(map(float, pair.split(","))) for pair in polylines[0].get("points").split()]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=0.2)  # even on a log axis
    assert points[0][1] > points[1][1] > points[2][1]
    circle = root.find(f"{name}circle")
    assert (float(circle.get("cx")), float(circle.get("cy"))) == points[1]
    assert any(text.text == "knee <here>" for text in root.findall(f"{name}text"))


def test_ticks_are_round_and_inside():
    assert ticks(0, 1, 4) == [0, 0.5, 1.0]
    assert ticks(0, 0.37, 4) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [round(10**t) for t in log_ticks(0, 3, 12)] == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]
    assert [round(10**t) for t in log_ticks(0, 3, 4)] == [1, 10, 100, 1000]
    assert log_ticks(0.31, 0.4, 5) == [0.31, 0.4]
