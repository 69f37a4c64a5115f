"""The command's parts, and how its errors are shown."""

import os
import sys
from collections.abc import Sequence

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for what the user can mend, in one line; 130 after Ctrl-C.

    What is not known to be the user's keeps its traceback.
    """
    try:
        return int(app(args=arguments, prog_name="kvsim", standalone_mode=False) or 0)
    except _CommandLineError as error:
        return _failed(_sentence(error))
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, _known_errors()):
            from kvsim.cli.engine_options import in_flags  # noqa: PLC0415

            return _failed(in_flags(str(error)))
        raise


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
