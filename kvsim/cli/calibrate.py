"""`kvsim calibrate`: measure a cost profile of an engine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvsim.cli.options import GpuName, Json, KvDtype, Model, ShowProgress, TensorParallel
from kvsim.errors import UsageError

if TYPE_CHECKING:
    from kvsim.calibration import Endpoint, Facts, Plan
    from kvsim.cli.console import Stages
    from kvsim.profiles import Profile

_ENDPOINT, _LIMITS, _FACTS = "Engine", "What the engine can do", "What cannot be measured there"
API_KEY = "KVSIM_API_KEY"
_SERVED_SEQS = 256
"""The least that `vllm serve` allows by itself, on any GPU; an engine that is made in a program allows half of it."""


def calibrate(  # noqa: PLR0913, PLR0917 - a command's options
    out: Annotated[Path, typer.Option(help="The profile to write; --profile of the other commands takes it.")],
    url: Annotated[
        str | None,
        typer.Option(
            help="A live OpenAI-compatible server, idle, with prefix caching; its own times count where its /metrics "
            f"has them, as vLLM's does. A key: ${API_KEY}.",
            rich_help_panel=_ENDPOINT,
        ),
    ] = None,
    local: Annotated[
        str | None,
        typer.Option(
            help="Or a model, by name or folder, that vLLM runs in a child process.", rich_help_panel=_ENDPOINT
        ),
    ] = None,
    served_model: Annotated[
        str | None, typer.Option(help="The model's name at the URL; default its first.", rich_help_panel=_ENDPOINT)
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="With --local: an interpreter that has vLLM.", rich_help_panel=_ENDPOINT)
    ] = None,
    engine_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="With --local: an argument of vLLM's engine, enforce_eager=true; again for more.",
            rich_help_panel=_ENDPOINT,
        ),
    ] = None,
    model: Model = None,
    gpu: GpuName = None,
    tensor_parallel: TensorParallel = None,
    kv_dtype: KvDtype = "auto",
    weight_gb: Annotated[
        float | None, typer.Option(help="Weights in GiB, where nothing says it.", rich_help_panel=_FACTS)
    ] = None,
    gpu_memory_gb: Annotated[
        float | None, typer.Option(help="Memory of a GPU that has no name here; of --gpu cpu.", rich_help_panel=_FACTS)
    ] = None,
    link_gb_s: Annotated[
        float | None,
        typer.Option(
            help="Rate of its link to host memory, 1e9 bytes/s; by default that of kvcore's copies there so far, or "
            "of another machine.",
            rich_help_panel=_FACTS,
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The profile's name.", rich_help_panel=_FACTS)] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt and output; default as the server says.", rich_help_panel=_LIMITS)
    ] = None,
    max_num_batched_tokens: Annotated[int, typer.Option(help="Its token budget.", rich_help_panel=_LIMITS)] = 8192,
    max_num_seqs: Annotated[int, typer.Option(help="Largest batch to measure.", rich_help_panel=_LIMITS)] = 64,
    kv_tokens: Annotated[
        int, typer.Option(help="Tokens that fit into its KV cache, as vLLM logs them.", rich_help_panel=_LIMITS)
    ] = 200_000,
    vocabulary: Annotated[
        int, typer.Option(help="Prompts are drawn from token ids below this.", rich_help_panel=_LIMITS)
    ] = 30_000,
    repeats: Annotated[int, typer.Option(help="Measurements of each point.", rich_help_panel=_LIMITS)] = 3,
    timeout_s: Annotated[float, typer.Option(help="Of a request.", rich_help_panel=_ENDPOINT)] = 600.0,
    json: Json = False,
    progress: ShowProgress = None,
) -> None:
    """Measure what prefill and decode cost on an engine, in minutes, and write it as a profile.

    What was measured is kept beside OUT until the profile is written: run again, an interrupted one goes on from there.

    Example: kvsim calibrate --url http://localhost:8000 --model qwen3-8b --gpu h100 --out mine.json
    """
    from kvsim.cli.console import stages  # noqa: PLC0415 - loaded when it runs, not for --help
    from kvsim.files import check_outputs, write_text  # noqa: PLC0415
    from kvsim.profiles.load import to_json  # noqa: PLC0415

    if (url is None) == (local is None):
        raise UsageError("--url or --local: give one")
    if gpu is None or (model is None and local is None):
        raise UsageError("--model and --gpu are needed: a profile says what it is of, and how large its KV is")
    if local is None and (python is not None or engine_arg):
        raise UsageError("--python and --engine-arg go with --local")
    state = out.with_name(f"{out.name}.partial")
    check_outputs((out, state))
    arguments = _arguments(engine_arg or [])
    limits = {"max_num_batched_tokens": max_num_batched_tokens, "max_num_seqs": max_num_seqs}
    opened = (
        _local(local, arguments, {**limits, "max_model_len": max_model_len}, tensor_parallel or 1, python)
        if local is not None
        else _live(url or "", served_model, max_model_len, timeout_s)
    )
    with opened as (endpoint, length), stages(progress) as shown:
        facts = _facts(
            model or local or "",
            gpu,
            max_model_len=length,
            tensor_parallel=tensor_parallel or 1,
            kv_dtype=kv_dtype,
            weight_gb=weight_gb,
            gpu_memory_gb=gpu_memory_gb,
            link_gb_per_s=link_gb_s,
            name=name,
        )
        plan = _plan(max_model_len=length, kv_tokens=kv_tokens, vocabulary=vocabulary, repeats=repeats, **limits)
        profile = _measure(endpoint, plan, facts, state, shown)
        if link_gb_s is None:
            profile = _linked(profile, endpoint)
    write_text(out, to_json(profile))
    state.unlink(missing_ok=True)
    _tell(profile, out, json)


def _measure(endpoint: "Endpoint", plan: "Plan", facts: "Facts", state: Path, shown: "Stages") -> "Profile":
    from kvsim.calibration import EndpointError  # noqa: PLC0415
    from kvsim.calibration import calibrate as measured  # noqa: PLC0415

    try:
        return measured(
            endpoint,
            plan,
            facts,
            state=state,
            progress=lambda done, total, what: shown.update("measuring", done, total, what),
        )
    except EndpointError as error:
        raise UsageError(f"{error}; what was measured is kept in {state}: run the same again to go on") from error


def _linked(profile: "Profile", endpoint: "Endpoint") -> "Profile":
    """Take the link as a connector at a server has measured it, where there is one."""
    from kvsim.calibration import EndpointError, HttpEndpoint, linked  # noqa: PLC0415

    try:
        return linked(profile, endpoint.copied()) if isinstance(endpoint, HttpEndpoint) else profile
    except EndpointError:  # all that was asked for is measured
        return profile


def _facts(model: str, gpu: str, **given: Any) -> "Facts":
    from kvsim.calibration.facts import gather  # noqa: PLC0415

    return gather(model, gpu, **given)


def _plan(**limits: int) -> "Plan":
    from kvsim.calibration import make_plan  # noqa: PLC0415

    try:
        return make_plan(**limits)
    except ValueError as error:
        raise UsageError(f"{error}: raise --max-model-len, --max-num-seqs or --kv-tokens") from error


@contextmanager
def _live(url: str, served_model: str | None, length: int | None, timeout_s: float) -> "Iterator[tuple[Endpoint, int]]":
    """Give a server and its longest prompt and output."""
    from kvsim.calibration import HttpEndpoint  # noqa: PLC0415

    try:
        endpoint = HttpEndpoint(url, model=served_model, api_key=os.environ.get(API_KEY), timeout_s=timeout_s)
    except ValueError as error:
        raise UsageError(str(error)) from error
    longest = length or endpoint.max_model_len()
    if longest is None:
        raise UsageError(f"--max-model-len is needed: {url} does not say how long a prompt may be")
    yield endpoint, longest


@contextmanager
def _local(
    local: str, given: dict[str, Any], limits: dict[str, int | None], ranks: int, python: str | None
) -> "Iterator[tuple[Endpoint, int]]":
    """Give an engine in a child process, ended at the end."""
    from kvsim.calibration import LocalEndpoint  # noqa: PLC0415

    length = given.get("max_model_len", limits["max_model_len"])
    if not isinstance(length, int):
        raise UsageError("--local needs --max-model-len")
    arguments = {**limits, "max_model_len": length, "tensor_parallel_size": ranks, **given}
    if "max_num_seqs" not in given:  # vLLM captures CUDA graphs for twice as many tokens, as a server's would be
        arguments["max_num_seqs"] = max(_SERVED_SEQS, limits["max_num_seqs"] or 0)
    with LocalEndpoint(local, arguments=arguments, python=python) as endpoint:
        yield endpoint, length


def _arguments(texts: list[str]) -> dict[str, Any]:
    """Return "key=value" as vLLM takes them: JSON where it is, text otherwise. Raises UsageError."""
    import json  # noqa: PLC0415

    found: dict[str, Any] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key.isidentifier():
            raise UsageError(f"--engine-arg {text}: key=value is expected, such as enforce_eager=true")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _tell(profile: "Profile", out: Path, json: bool) -> None:
    from dataclasses import asdict  # noqa: PLC0415

    if json:
        from kvsim.cli.console import print_json  # noqa: PLC0415

        print_json(
            {
                "profile": str(out),
                "name": profile.name,
                "handling_base_s": profile.handling_base_s,
                "handling_token_s": profile.handling_token_s,
                "sustained": profile.sustained,
                "warnings": [*filter(None, [profile.doubt()])],
                "provenance": {name: asdict(part) for name, part in profile.provenance.items()},
            }
        )
        return
    from kvsim.cli.show import facts  # noqa: PLC0415
    from kvsim.report.units import seconds  # noqa: PLC0415

    longest = profile.prefill.x[-1] if profile.prefill is not None else 1
    facts(
        f"Profile {profile.name}: {out}",
        [
            (f"prefill of {longest:,} tokens", seconds(profile.prefill_s(longest))),
            ("a token for one request", seconds(profile.decode_step_s(1, profile.decode.y[0]))),
            ("the server's handling", seconds(profile.handling_s(longest))),
            ("prefills without rest", f"{100 * (profile.sustained - 1):.1f}% longer"),
            *((name, f"{part.kind}; error {part.error}") for name, part in profile.provenance.items()),
            *(("beware", doubt) for doubt in filter(None, [profile.doubt()])),
        ],
    )
