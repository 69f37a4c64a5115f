"""A validation in words and rows, for the terminal and the report."""

import numpy as np

from kvsim.plots import Chart, Series
from kvsim.report.units import percent, seconds
from kvsim.validation import HITS, PARTS, Group, Validation, block_requests
from kvtraces.words import counted

TTFT_HEADINGS = ("TTFT", "recorded", "predicted", "error", "95% interval", "by length", "its error")
HIT_HEADINGS = ("tier", "recorded", "predicted", "error", "equal requests")
PART_HEADINGS = ("part", "recorded", "predicted", "mean absolute error", "share of it")
GROUP_HEADINGS = ("prompt tokens", "requests", "recorded", "predicted", "error", "mostly")
WORST_HEADINGS = ("request", "prompt tokens", "recorded", "predicted", "mostly")
RIGHT = 5e-4
"""A smaller relative error is written as none."""
TIERS = {"l0": "L0, the engine's own", "l1": "L1", "l2": "L2, not in L1", "loaded": "loaded beyond L0"}


def headline(found: Validation) -> str:
    """Return the error in one line."""
    p50, p95 = found.ttft["p50"], found.ttft["p95"]
    return f"TTFT p50 is predicted {_off(p50.error)}, p95 {_off(p95.error)}."


def _off(error: float) -> str:
    if abs(error) < RIGHT:
        return "as recorded"
    return f"{percent(abs(error))} {'above' if error > 0 else 'below'} what was recorded"


def sentences(found: Validation) -> list[str]:
    """Return what the comparison says and rests on, one sentence each."""
    better = "beats" if found.beats_baseline else "does NOT beat"
    words = [
        (
            f"Request by request the mean absolute error is {seconds(found.mean_absolute_error_s)}, half "
            f"of the requests are within {percent(found.median_relative_error)}."
        ),
        (
            f"It {better} the baseline, the mean TTFT of others by prompt length, whose mean absolute error is "
            f"{seconds(found.baseline_mean_absolute_error_s)}."
        ),
        where(found),
        (
            f"The 95% intervals are for these arrivals, by drawing blocks of {block_requests(found.compared)} requests "
            "in a row again; near saturation they are still too narrow."
        ),
        ""
        if found.compared == found.requests
        else f"{counted(found.compared, 'request')} with a recorded TTFT to compare with.",
    ]
    return [sentence for sentence in words if sentence]


def where(found: Validation) -> str:
    """Return where the error is largest, and in what."""
    worst = found.groups[0]
    if abs(worst.error) < RIGHT:
        return "No prompt length is off."
    words = f"It is worst for prompts of {_lengths(worst)} tokens: the mean is {percent(abs(worst.error))} "
    words += "too long" if worst.error > 0 else "too short"
    if worst.why is None:
        return f"{words}; the log does not say in what."
    own = found.parts[worst.why]
    return f"{words}, mostly in {worst.why} ({percent(own.share)} of the error of all requests lies there)."


def _lengths(group: Group) -> str:
    return f"{group.from_tokens:,} to {group.to_tokens:,}"


def missing(found: Validation) -> list[str]:
    """Return which recorded columns the log lacks, and what cannot be compared without them."""
    columns = [column for name, column in HITS.items() if name not in found.hits]
    parts = [f"{name}_ms" for name in PARTS if name not in found.parts]
    notes = []
    if columns:
        notes.append(f"the log does not record {', '.join(columns)}: those hits are not compared")
    if parts:
        notes.append(f"the log does not record {', '.join(parts)}: the error cannot be split into those parts")
    return notes


def notes(found: Validation) -> list[str]:
    """Return what must be said beside the figures."""
    told = missing(found)
    load, l1 = found.result.load, found.hits.get("l1")
    if l1 is not None and l1.recorded and found.result.settings.l1_gb == 0:
        told.append(
            "the log records hits in L1, and no L1 is simulated: give the server's --journal, or its --l1-size-gb and "
            "--chunk-tokens"
        )
    if not load.sustained:
        told.append(f"the simulation says that this load cannot be sustained: {load.sentence()}")
    refused = int(found.result.columns["refused"].sum())
    if refused:
        told.append(f"{counted(refused, 'request')} refused by the simulation, and not compared")
    return [*told, *found.result.warnings]


def ttft_rows(found: Validation) -> list[list[str]]:
    """Return the percentiles as text under `TTFT_HEADINGS`."""
    return [
        [
            name,
            seconds(one.recorded_s),
            seconds(one.predicted_s),
            _signed(one.error),
            f"{_signed(one.low)[:-1]} to {_signed(one.high)}",
            seconds(one.baseline_s),
            _signed(one.baseline_error),
        ]
        for name, one in found.ttft.items()
    ]


def hit_rows(found: Validation) -> list[list[str]]:
    """Return the tiers as text under `HIT_HEADINGS`."""
    return [
        [
            TIERS[name],
            f"{one.recorded:,}",
            f"{one.predicted:,}",
            "-" if one.error is None else _signed(one.error),
            percent(one.equal_requests),
        ]
        for name, one in found.hits.items()
    ]


def part_rows(found: Validation) -> list[list[str]]:
    """Return the parts of TTFT as text under `PART_HEADINGS`."""
    return [
        [name, _time(one.recorded_s), _time(one.predicted_s), _time(one.mean_absolute_error_s), percent(one.share)]
        for name, one in found.parts.items()
    ]


def group_rows(found: Validation) -> list[list[str]]:
    """Return the groups by prompt length, the worst first, as text under `GROUP_HEADINGS`."""
    return [
        [
            _lengths(one),
            f"{one.requests:,}",
            seconds(one.recorded_s),
            seconds(one.predicted_s),
            _signed(one.error),
            one.why if one.why and abs(one.error) >= RIGHT else "-",
        ]
        for one in found.groups
    ]


def worst_rows(found: Validation) -> list[list[str]]:
    """Return the requests that are furthest off as text under `WORST_HEADINGS`."""
    return [
        [
            f"{one.request:,}",
            f"{one.prompt_tokens:,}",
            seconds(one.recorded_s),
            seconds(one.predicted_s),
            one.why or "-",
        ]
        for one in found.worst
    ]


def _signed(error: float) -> str:
    return f"{100 * error:+.1f}%"


def _time(value: float) -> str:
    return seconds(value) if abs(value) >= 1e-6 else "0"


def cdf(found: Validation) -> Chart:
    """Return the share of requests with their first token by a time: recorded, predicted, by the baseline."""
    names = {"recorded_s": "recorded", "predicted_s": "predicted", "baseline_s": "mean by prompt length"}
    share = found.cdf["share"]
    lines = [Series(name, np.maximum(found.cdf[column], 1e-9), share) for column, name in names.items()]
    return Chart(
        title="Requests with their first token by then",
        x_name="TTFT, s",
        y_name="share of requests",
        series=lines,
        log_x=True,
        percent=True,
    )
