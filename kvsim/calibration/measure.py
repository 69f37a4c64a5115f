"""A calibration: measure the plan's points, one after the other, and make a profile of them."""

import datetime as dt
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvsim.calibration.endpoint import Endpoint, EndpointError
from kvsim.calibration.fitting import decode_grid, fit_prefill, handling, prefill_grid, spread, undisturbed
from kvsim.calibration.plan import Plan
from kvsim.calibration.state import CalibrationError, Point, State
from kvsim.profiles import Part, Profile, TransferCurve

__all__ = ["CalibrationError", "Facts", "Progress", "calibrate"]

Progress = Callable[[int, int, str], None]
"""Called with the points done, all of them, and what comes next."""
FIRST_ID = 100
_MOST_REPEATS = 4
_SUSTAINED: Point = ("sustained", 0, 0)
_LEAST_SUSTAINED, _MOST_SUSTAINED = 5, 400
_HOT_S = 0.02
"""A prefill that takes less is launching and handling, mostly, which warms no GPU."""
_LARGEST_STEP = 8192
"""A token budget that servers commonly have; what is computed in more steps lacks rest already."""
_WARM_S = 1.0
"""An H100 that computes from a rest on slows down within that time, and has rested in as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What an endpoint cannot be asked, of the engine that is measured; as in `Profile`."""

    name: str
    model: str
    gpu: str
    layers: int
    kv_bytes_per_token: int
    weight_bytes: int
    gpu_memory_bytes: int
    max_model_len: int
    transfers: Mapping[str, TransferCurve]
    transfers_from: Part
    tensor_parallel: int = 1
    kv_copies: int = 1
    duplex: float = 1.0


def calibrate(
    endpoint: Endpoint,
    plan: Plan,
    facts: Facts,
    *,
    state: Path | None = None,
    progress: Progress | None = None,
) -> Profile:
    """Measure a profile. The engine must be idle and have prefix caching; its caches are filled with random prompts.

    Args:
        endpoint: The engine.
        plan: The points to measure.
        facts: What cannot be measured there.
        state: A file that keeps the measurements: run again with it, a calibration goes on where it stopped.
        progress: Told of every point.

    Raises:
        EndpointError: The endpoint is gone or refuses.
        CalibrationError: The state belongs to another calibration, or too few points could be measured.
    """
    about = {"model": endpoint.model, "where": endpoint.where, "seed": plan.seed, "vocabulary": plan.vocabulary}
    kept = State(state, about)
    prompts = _Prompts(plan, kept.resumed)
    tasks = _tasks(plan)
    warmed: int | None = None
    for number, (round_, point) in enumerate(tasks):
        if progress is not None:
            progress(number, len(tasks), _words(point))
        if kept.rounds[point] > round_:
            continue
        if warmed is None:
            endpoint.first_token_s(prompts.fresh("warm", 64))  # whatever is compiled or allocated on first use
            warmed = 0
        if point[0] == "prefill":
            warmed = _prefill(endpoint, plan, prompts, kept, point, warmed)
        elif point[0] == "sustained":
            _sustained(endpoint, plan, prompts, kept)
        else:
            _decode(endpoint, plan, prompts, kept, point)
    if progress is not None:
        progress(len(tasks), len(tasks), "done")
    return _profile(kept, plan, facts, endpoint)


def _tasks(plan: Plan) -> list[tuple[int, Point]]:
    """Return what to measure, in order: the prefills round by round, one of them without rest, and the decodes once."""
    tasks: list[tuple[int, Point]] = [
        (round_, ("prefill", *point)) for round_ in range(plan.repeats) for point in plan.prefill
    ]
    if plan.sustained_s:
        tasks.append((0, _SUSTAINED))
    return tasks + [(0, ("decode", *point)) for point in plan.decode]


def _words(point: Point) -> str:
    kind, a, b = point
    if kind == "sustained":
        return "prefills without rest"
    return f"prefill of {a:,} behind {b:,} tokens" if kind == "prefill" else f"decode of {a} x {b:,} tokens"


class _Prompts:
    """Random prompts; the same words for the same name, whatever was measured before, but others in each run."""

    def __init__(self, plan: Plan, resumed: int) -> None:
        self._seed = f"{plan.seed}/{resumed}" if resumed else f"{plan.seed}"
        self._high = plan.vocabulary

    def fresh(self, name: str, tokens: int) -> list[int]:
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        words: list[int] = rng.integers(FIRST_ID, self._high, tokens).tolist()
        return words


def _prefill(endpoint: Endpoint, plan: Plan, prompts: _Prompts, kept: State, point: Point, warmed: int) -> int:
    """Measure a prefill point once more; the prefix is computed first, unless the point before had the same one."""
    _, new, cached = point
    prefix = prompts.fresh(f"prefix {cached}", cached)
    if cached and warmed != cached:
        _rested(endpoint, plan, [*prefix, FIRST_ID])
    round_, seconds = kept.rounds[point], list[float]()
    most = 1 if plan.repeats == 1 else _MOST_REPEATS
    while not seconds or (sum(seconds) < plan.least_s / plan.repeats and len(seconds) < most):
        suffix = prompts.fresh(f"suffix {new} {cached} {round_} {len(seconds)}", new)
        seconds.append(_rested(endpoint, plan, [*prefix, *suffix]))
    kept.add(point, seconds)
    return cached


def _rested(endpoint: Endpoint, plan: Plan, prompt: list[int]) -> float:
    """Return the time to a prompt's first token, and have the engine rest behind it."""
    began = time.perf_counter()
    seconds = endpoint.first_token_s(prompt)
    time.sleep(min(_WARM_S, plan.rest * (time.perf_counter() - began)))
    return seconds


def _sustained(endpoint: Endpoint, plan: Plan, prompts: _Prompts, kept: State) -> None:
    """Measure a prefill again and again without rest; it counts from when the GPU had been computing for a while."""
    seconds, began = list[float](), time.perf_counter()
    new = _repeated(kept)
    for number in range(_MOST_SUSTAINED if new else 0):
        since = time.perf_counter() - began
        if since > plan.sustained_s and seconds:
            break
        took = endpoint.first_token_s(prompts.fresh(f"sustained {number}", new))
        if since >= _WARM_S:
            seconds.append(took)
    kept.add(_SUSTAINED, seconds if len(seconds) >= _LEAST_SUSTAINED else [])


def _repeated(kept: State) -> int:
    """Return the tokens of the prefill to repeat without rest: the longest that a GPU computes before it slows down.

    0 where all take longer, being slower for want of rest by themselves, or none takes long enough.
    """
    times = {
        new: np.median(seconds)
        for (kind, new, cached), seconds in kept.seconds.items()
        if kind == "prefill" and not cached
    }
    fitting = (new for new, seconds in times.items() if new <= _LARGEST_STEP and _HOT_S <= seconds <= _WARM_S / 2)
    return max(fitting, default=0)


def _decode(endpoint: Endpoint, plan: Plan, prompts: _Prompts, kept: State, point: Point) -> None:
    """Measure a decode point. One where requests ended before all had begun is left to the form."""
    _, batch, context = point
    asked = [prompts.fresh(f"decode {batch} {context} {number}", context) for number in range(batch)]
    for prompt in asked:  # so that the batch finds its prompts computed, and begins together
        endpoint.first_token_s(prompt)
    try:
        kept.add(point, [endpoint.decode_step_s(asked, plan.decode_steps) for _ in range(plan.repeats)])
    except EndpointError as error:
        if batch == 1:
            raise
        kept.fail(point, error)


def _profile(kept: State, plan: Plan, facts: Facts, endpoint: Endpoint) -> Profile:
    ttft = {point[1:]: float(np.median(values)) for point, values in kept.seconds.items() if point[0] == "prefill"}
    decode = {point[1:]: float(np.median(values)) for point, values in kept.seconds.items() if point[0] == "decode"}
    ttft = undisturbed({point: ttft[point] for point in plan.prefill if point in ttft})
    decode = undisturbed({point: decode[point] for point in plan.decode if point in decode})
    if any(len({point[axis] for point in points}) < 2 for points in (ttft, decode) for axis in (0, 1)):
        failed = "; ".join(kept.failed.values()) or "too few points"
        raise CalibrationError(f"{endpoint.where}: no grid can be made: {failed}")
    base, token = handling(ttft, decode)
    least = min(decode.values())
    steps = {(n, c): max(least, seconds - base - token * (n + c)) for (n, c), seconds in ttft.items()}
    prefill = undisturbed(steps)
    fit = fit_prefill(prefill)
    grid = prefill_grid(prefill, fit)
    misses = [abs(fit.at(n, c) / seconds - 1) for (n, c), seconds in prefill.items()]
    filled, repeated = len(grid.x) * len(grid.y) - len(prefill), _repeated(kept)
    slower = _slower(kept.seconds.get(_SUSTAINED, []), ttft.get((repeated, 0), 0.0), base + token * repeated)
    return Profile(
        name=facts.name,
        model=facts.model,
        gpu=facts.gpu,
        tensor_parallel=facts.tensor_parallel,
        layers=facts.layers,
        kv_bytes_per_token=facts.kv_bytes_per_token,
        kv_copies=facts.kv_copies,
        weight_bytes=facts.weight_bytes,
        gpu_memory_bytes=facts.gpu_memory_bytes,
        max_model_len=facts.max_model_len,
        prefill=grid,
        prefill_fit=fit,
        decode=decode_grid(decode),
        transfers=facts.transfers,
        duplex=facts.duplex,
        handling_base_s=base,
        handling_token_s=token,
        provenance=_provenance(kept, facts, endpoint, filled=filled, misses=misses, repeated=repeated),
        sustained=slower,
    )


def _provenance(
    kept: State, facts: Facts, endpoint: Endpoint, *, filled: int, misses: list[float], repeated: int
) -> dict[str, Part]:
    """Return where each part of a profile is from.

    Args:
        kept: The measurements.
        facts: As in `calibrate`.
        endpoint: As in `calibrate`.
        filled: Points of the prefill's grid that were not measured.
        misses: How far the fit is off each that was, as a fraction.
        repeated: Tokens of the prefill without rest.
    """
    share = spread({point: seconds for point, seconds in kept.seconds.items() if point != _SUSTAINED})
    told = "one measurement a point" if share is None else f"repeats of a point spread by {100 * share:.1f}% (median)"
    today = dt.datetime.now(tz=dt.UTC).date().isoformat()
    source = f"kvsim calibrate, {endpoint.where}, {facts.model}, {today}"
    without_rest = kept.seconds.get(_SUSTAINED, [])
    return {
        "prefill": Part(
            kind="measured",
            source=source,
            error=f"{told}; {filled} points follow the fit",
            spread=share,
        ),
        "prefill_fit": Part(
            kind="fitted",
            source=source,
            error=f"{100 * np.mean(misses):.1f}% mean, {100 * np.max(misses):.1f}% worst against the grid",
        ),
        "decode": Part(
            kind="measured",
            source=source,
            error=f"as above; {len(kept.failed)} points could not be measured and follow a linear form",
        ),
        "pcie": facts.transfers_from,
        "handling": Part(
            kind="fitted",
            source=source,
            error="what TTFT of one token behind a cached prefix takes beyond a decode step",
        ),
        "sustained": Part(
            kind="measured" if without_rest else "assumed",
            source=source,
            error=f"{len(without_rest)} prefills of {repeated:,} tokens without rest"
            if without_rest
            else "no prefill was measured without rest: they are too short for that, too long, or it was left out",
        ),
    }


def _slower(without_rest: list[float], rested: float, beside: float) -> float:
    """Return the time of a step without rest over that with; of the mean, as a GPU slows down in bouts of 0.2 s."""
    if not without_rest or rested <= beside:
        return 1.0
    return max(1.0, (float(np.mean(without_rest)) - beside) / (rested - beside))
