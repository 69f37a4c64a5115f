"""The command line: `kvcore serve` and what goes with it."""

import inspect
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer

from kvcore.live.settings import (
    ENVIRONMENT,
    Settings,
    SettingsError,
    flag,
    load,
    meta,
    plain_type,
    strange_variables,
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="KV-cache reuse for LLM inference: the server, and what goes with it.",
)

_MOST_S = 86_400

_ENDPOINT = typer.Option(
    "--server", envvar=f"{ENVIRONMENT}SERVER", help="ipc://PATH or tcp://HOST:PORT; the default server of this host."
)
Endpoint = Annotated[str, _ENDPOINT]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _number(value: float) -> float:
    """Refuse what is in every range."""
    if math.isnan(value):
        raise typer.BadParameter("nan is no number")
    return value


TimeoutS = Annotated[
    float, typer.Option(min=0.01, max=_MOST_S, callback=_number, help="Seconds to wait for the server.")
]

_SERVE_HELP = """Run the server: L1 in shared memory, decided by the policy core.

Every flag is also a variable KVCORE_* and a key of the TOML file given with --config; flags win, then variables.

\b
Examples:
  kvcore serve --l1-size-gb 20 --eviction-policy lru --chunk-size 256
  kvcore serve --record prod.jsonl --journal /var/lib/kvcore/journal
  kvcore serve --config kvcore.toml --l2 files:/var/cache/kvcore --l2-size-gb 100
"""


def _default_endpoint() -> str:
    from kvcore.live.wire import ipc_endpoint  # noqa: PLC0415

    return ipc_endpoint()


def _serve_signature() -> inspect.Signature:
    """Return a signature with an option for every setting: the table in `settings` is the only one."""
    parameters = [
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None, typer.Option("--config", help="TOML file of settings.", show_default=False)
            ],
        )
    ]
    defaults = Settings()
    for field in Settings.__struct_fields__:
        kind, about, default = plain_type(field), meta(field), getattr(defaults, field)
        group = (about.extra or {})["group"]
        shown = "none" if default in ("", ()) else str(default).lower() if isinstance(default, bool) else str(default)
        many = get_origin(kind) is tuple
        names = [f"{flag(field)}/--no-{flag(field)[2:]}"] if kind is bool else [flag(field)]
        option = typer.Option(
            *names,
            help=about.description
            if "Default:" in (about.description or "")
            else f"{about.description} [default: {shown}]",
            rich_help_panel=group,
            show_default=False,
            metavar=None if kind is bool else _metavar(kind),
        )
        annotation = list[str] | None if many else bool | None if kind is bool else str | None
        parameters.append(
            inspect.Parameter(
                field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
            )
        )
    return inspect.Signature(parameters)


def _metavar(kind: Any) -> str:
    return {int: "INT", float: "NUMBER"}.get(kind, "TEXT")


def _serve(**flags: Any) -> None:
    from kvcore.live.run import serve  # noqa: PLC0415 - zmq is loaded when it is used

    for line in strange_variables(os.environ):
        typer.echo(f"kvcore: warning: {line}", err=True)
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    try:
        settings = load(given)
    except SettingsError as error:
        fail(str(error))
    raise typer.Exit(serve(settings))


_SERVE_SIGNATURE = _serve_signature()
_serve.__signature__ = _SERVE_SIGNATURE  # type: ignore[attr-defined]
_serve.__annotations__ = {p.name: p.annotation for p in _SERVE_SIGNATURE.parameters.values()}
app.command("serve", help=_SERVE_HELP)(_serve)


@app.command()
def ping(
    server: Endpoint = "",
    timeout: TimeoutS = 2.0,
    count: Annotated[int, typer.Option(min=1)] = 5,
    as_json: AsJson = False,
) -> None:
    """Ask the request loop whether it turns, and how long that takes.

    Example: kvcore ping --count 100
    """
    from kvcore.live.tools import ping_times  # noqa: PLC0415

    times = _ask(lambda: ping_times(server or _default_endpoint(), count, timeout))
    show(times, as_json, title="ping")


@app.command()
def status(server: Endpoint = "", timeout: TimeoutS = 2.0, as_json: AsJson = False) -> None:
    """Show arena, tiers, instances, recorder and journal.

    Example: kvcore status --json
    """
    from kvcore.live.tools import status as ask  # noqa: PLC0415
    from kvcore.live.tools import status_tables  # noqa: PLC0415

    report = _ask(lambda: ask(server or _default_endpoint(), timeout))
    if as_json:
        print_json(report)
    else:
        for table in status_tables(report):
            print_table(table)


@app.command()
def clear(
    chunks: Annotated[list[str] | None, typer.Argument(help="Hexadecimal digests; none for everything.")] = None,
    server: Endpoint = "",
    timeout: TimeoutS = 5.0,
    as_json: AsJson = False,
) -> None:
    """Drop chunks, or everything; what is being read leaves when it is let go of.

    Example: kvcore clear
    """
    from kvcore.live.tools import clear as ask  # noqa: PLC0415

    try:
        digests = tuple(map(bytes.fromhex, chunks)) if chunks else None
    except ValueError:
        fail("a chunk is named by its hexadecimal digest")
    show(_ask(lambda: ask(server or _default_endpoint(), digests, timeout)), as_json, title="clear")


bench_app = typer.Typer(
    invoke_without_command=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
app.add_typer(bench_app, name="bench")


@bench_app.callback()
def bench(
    context: typer.Context,
    server: Annotated[str, typer.Option("--server", help="A running server; none starts one for the benchmark.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Prompt length of the lookups.")] = 100_000,
    clients: Annotated[int, typer.Option(min=1, max=64, help="Client processes.")] = 2,
    seconds: Annotated[float, typer.Option(min=0.1, max=_MOST_S, callback=_number, help="How long to look up.")] = 5.0,
    copy_mb: Annotated[int, typer.Option(min=1, help="MiB to store and retrieve.")] = 512,
    chunk_size: Annotated[int, typer.Option(min=1, help="Chunk size of the server that is started.")] = 256,
    as_json: AsJson = False,
) -> None:
    """Measure lookups (pins taken and released) and copies through the arena, beside one memcpy of the same bytes.

    A server that is named with --server evicts chunks of its own for those of the benchmark, which are cleared in the
    end: what was cached is not all there afterwards.

    Examples:
      kvcore bench

      kvcore bench --server ipc:///dev/shm/kvcore-5555.ipc --tokens 32000 --json

      kvcore bench ttft --model Qwen/Qwen3-8B
    """
    if context.invoked_subcommand is not None:
        return
    from kvcore.live.bench import Load, run  # noqa: PLC0415

    load_ = Load(tokens=tokens, clients=clients, seconds=seconds, copy_bytes=copy_mb << 20, chunk_tokens=chunk_size)
    show(_ask(lambda: run(server or None, load_)), as_json, title="bench")


@bench_app.command(
    "ttft", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
def bench_ttft(context: typer.Context) -> None:
    """Measure TTFT with vLLM: cold and with hits, beside no connector, vLLM's offloading and LMCache; --help for more.

    Example: kvcore bench ttft --model Qwen/Qwen3-8B
    """
    # The server's half never imports the engine's: this process becomes the one that does, and gets its signals.
    os.execv(sys.executable, [sys.executable, "-m", "kvcore.vllm.ttft", *context.args])  # noqa: S606 - no shell needed


@app.command()
def doctor(
    server: Endpoint = "",
    vllm: Annotated[str, typer.Option(help="URL of a vLLM server, for the two-request hit test.")] = "",
    model: Annotated[str, typer.Option(help="Model to ask for; the first that vLLM serves by default.")] = "",
    prompt_tokens: Annotated[
        int, typer.Option(min=16, help="Length of the longest prompt, if the model takes it.")
    ] = 4096,
    write_load_cost: Annotated[
        Path | None, typer.Option(help="Write what loading and computing cost, for kvcore serve --load-cost.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Go through the checklist for production; exit code 1 where a check fails.

    With --vllm some fourteen prompts are asked of it, and stored as any are: whether a hit is found, and from which
    length on one is worth its copy, in L1 and in L2.

    Examples:
      kvcore doctor

      kvcore doctor --vllm http://127.0.0.1:8000

      kvcore doctor --vllm http://127.0.0.1:8000 --write-load-cost cost.json
    """
    from kvcore.live.doctor import examine, table  # noqa: PLC0415

    if write_load_cost is not None and not vllm:
        fail("--write-load-cost needs --vllm: what computing costs is measured there")
    checks = examine(
        server or _default_endpoint(),
        vllm_url=vllm,
        model=model,
        prompt_tokens=prompt_tokens,
        write_load_cost=write_load_cost,
    )
    if as_json:
        print_json([check.as_dict() for check in checks])
    else:
        print_table(table(checks))
    raise typer.Exit(1 if any(check.result == "fail" for check in checks) else 0)


@app.command()
def top(
    server: Endpoint = "",
    every: Annotated[
        float, typer.Option(min=0.1, max=_MOST_S, callback=_number, help="Seconds between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option(help="Look twice, print the rates, and end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch rates, hit ratios and tiers; ends with Ctrl-C.

    Example: kvcore top --every 5
    """
    from kvcore.live.top import watch  # noqa: PLC0415

    _ask(lambda: watch(server or _default_endpoint(), every, once=once, as_json=as_json))


# Output


def fail(message: str) -> Any:
    """Print one line to standard error and exit with code 2."""
    typer.echo(f"kvcore: {' '.join(message.split())}", err=True)
    raise typer.Exit(2)


def _ask(call: Callable[[], Any]) -> Any:
    """Call, with the errors that a user meets as one line and exit code 2."""
    from kvcore.live.connection import RemoteError, ServerAwayError  # noqa: PLC0415
    from kvcore.live.presence import RegistrationRefused  # noqa: PLC0415

    try:
        return call()
    except (ServerAwayError, RemoteError, RegistrationRefused, ValueError, OSError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def print_json(data: Any) -> None:
    """Print data as JSON."""
    typer.echo(json.dumps(data, indent=2, default=str))


def print_table(table: Any) -> None:
    """Print a rich table, without losing columns where the output is no terminal."""
    from rich.console import Console  # noqa: PLC0415

    Console(width=None if sys.stdout.isatty() else 160).print(table)


def show(data: dict[str, Any], as_json: bool, *, title: str) -> None:
    """Print a flat dict as a table of two columns, or as JSON."""
    if as_json:
        print_json(data)
        return
    from rich.table import Table  # noqa: PLC0415

    table = Table("what", "value", title=title, title_justify="left")
    for key, value in data.items():
        table.add_row(key, f"{value:,.4g}" if isinstance(value, float) else str(value))
    print_table(table)


def main() -> None:
    """Run the command line."""
    app()
