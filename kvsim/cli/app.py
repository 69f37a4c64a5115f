"""The command's parts, and how its errors are shown."""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer

from kvsim.cli import calibrate, describe, generate, run, simulate, tune, validate, verify

app = typer.Typer(
    name="kvsim",
    help="Predict KV-cache reuse and time to first token from a request log, and check the prediction.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("tune")(tune.tune)
app.command("run")(run.run)
app.command("validate")(validate.validate)
app.command("calibrate")(calibrate.calibrate)
app.command("simulate")(simulate.simulate)
app.command("describe")(describe.describe)
app.command("generate")(generate.generate)
app.command("verify")(verify.verify)

# Typer brings its own copy of click from some version on, and click's exceptions with it.
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What a full disk says of stdout; a file that we write says it in words of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for what the user can mend, in one line; 130 after Ctrl-C.

    143 after SIGTERM and 129 after SIGHUP, as a terminal that is closed sends it: they end it as Ctrl-C does, with
    everything cleaned up. What is not known to be the user's keeps its traceback.
    """
    _encodable()
    ended_by: list[int] = []
    try:
        with _as_ctrl_c(ended_by):
            code = _printed(arguments)
    except (KeyboardInterrupt, typer.Abort):
        code = 128 + signal.SIGINT
    return 128 + ended_by[0] if ended_by else code


@contextmanager
def _as_ctrl_c(ended_by: list[int]) -> Iterator[None]:
    """Let the first SIGTERM or SIGHUP in the block do what Ctrl-C does, and pass over others while all is cleaned up.

    SIGHUP stays ignored where it is, as under nohup. `ended_by` gets the signal's number.
    """

    def end(number: int, _: Any) -> NoReturn:
        for one in before:
            signal.signal(one, signal.SIG_IGN)
        ended_by.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return
    taken = (signal.SIGTERM, signal.SIGHUP)
    before = {one: signal.getsignal(one) for one in taken}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    for one in before:
        signal.signal(one, end)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _encodable() -> None:
    """Let what a terminal's encoding lacks be shown as a question mark, not end the command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _printed(arguments: Sequence[str] | None) -> int:
    """Run the command until all that it prints is written; return its exit code."""
    try:
        code = int(app(args=arguments, prog_name="kvsim", standalone_mode=False) or 0)
        sys.stdout.flush()
    except _CommandLineError as error:
        return _failed(_sentence(error))
    except SystemExit as left:  # what click and rich make of a reader that has gone
        if not isinstance(left.__context__, BrokenPipeError):
            raise
        return _unread()
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        return _unread()
    except Exception as error:
        if isinstance(error, OSError) and error.filename is None and error.errno in _NO_ROOM:
            _unread()
            return _failed(f"the output cannot be written: {error.strerror}")
        if isinstance(error, _known_errors()):
            from kvsim.cli.engine_options import in_flags  # noqa: PLC0415

            return _failed(in_flags(str(error)))
        raise
    return code


def _unread() -> int:
    """Let go of what stdout does not take, so that the interpreter does not try again; return the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _known_errors() -> tuple[type[Exception], ...]:
    """Return the errors that are the user's, looked up only once one is there."""
    from kvsim.errors import UsageError  # noqa: PLC0415
    from kvtraces import LogError  # noqa: PLC0415

    return (UsageError, LogError)


def _sentence(error: Exception) -> str:
    """Return a command-line error as one line, with the command that it was given to."""
    shown = getattr(error, "format_message", lambda: str(error))()
    context = getattr(error, "ctx", None)
    where = f" (see {context.command_path} --help)" if context is not None else ""
    return " ".join(str(shown).split()) + where


def _failed(message: str) -> int:
    sys.stderr.write(f"kvsim: error: {' '.join(message.splitlines())}\n")
    return 2
