"""An engine under measurement, from the outside: the process, its commands, and its end."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

_END_S = 20.0
_PATIENCE_S = 400.0
"""An engine that takes longer to start, or to answer, is taken to hang."""


class EngineError(RuntimeError):
    """An engine that did not start, or ended; the message has its last words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request's tokens.

    Attributes:
        ttft_s: Seconds from the request to its first token.
        arrivals_s: Seconds from the request to each of its tokens.
        tokens: Their ids.
        looks_s: Seconds of a fixed loop on the engine's processor, right before and right behind the request.
    """

    ttft_s: float
    arrivals_s: tuple[float, ...]
    tokens: tuple[int, ...]
    looks_s: tuple[float, ...] = ()


class Engine:
    """A vLLM engine in a child process and a session of its own; a context manager, which ends it with all it started.

    It is starting when the constructor returns, and up when `facts` does: several can start at once.

    Args:
        arguments: vLLM's engine arguments.
        environment: Variables beside this process's.
        log: The file that takes what vLLM prints.
    """

    def __init__(self, arguments: Mapping[str, Any], environment: Mapping[str, str], log: Path) -> None:
        self._log_path = log
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvcore.vllm.ttft.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self._facts: dict[str, Any] | None = None
        self._tell(arguments)

    def __enter__(self) -> "Engine":
        """Return the engine."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.close()

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the engine says of itself, as soon as it is up. Raises EngineError where it does not start."""
        if self._facts is None:
            self._facts = self._hear()
        return self._facts

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int, *, fastest: bool = False) -> list[Answer]:
        """Have all prompts answered at once, greedily, by `tokens` tokens each.

        With `fastest` the engine's thread is on the processor that is the fastest right before.
        """
        prompts = [list(prompt) for prompt in prompts]
        reply = self._ask({"do": "run", "prompts": prompts, "tokens": tokens, "fastest": fastest})
        return [
            Answer(ttft_s=times[0], arrivals_s=tuple(times), tokens=tuple(ids), looks_s=tuple(reply["looks"]))
            for times, ids in zip(reply["arrivals"], reply["outputs"], strict=True)
        ]

    def reset(self) -> None:
        """Empty the engine's own prefix cache. Raises EngineError where it holds on to blocks."""
        if not self._ask({"do": "reset"})["reset"]:
            raise EngineError("the engine does not let go of its prefix cache: blocks are held for stores under way")

    def counters(self) -> dict[str, float]:
        """Return vLLM's counters by name."""
        return self._ask({"do": "counters"})

    def close(self) -> None:
        """End the engine: by the end of its input, then with its whole process group by force."""
        process = self._process
        with suppress(BrokenPipeError):
            if process.stdin is not None:
                process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def _kill(self) -> None:
        """Kill the child and all it started; where they are gone already it does nothing."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        _ = self.facts  # what it says first
        self._tell(message)
        return self._hear()

    def _tell(self, message: Mapping[str, Any]) -> None:
        stdin = self._process.stdin
        if stdin is None:
            raise EngineError("an engine without pipes")
        with suppress(BrokenPipeError):  # what is heard then says why
            stdin.write(json.dumps(dict(message)) + "\n")
            stdin.flush()

    def _hear(self) -> dict[str, Any]:
        stdout = self._process.stdout
        if stdout is None:
            raise EngineError("an engine without pipes")
        watch = threading.Timer(_PATIENCE_S, self._kill)
        watch.start()
        try:
            line = stdout.readline()
        finally:
            watch.cancel()
        if not line:
            raise EngineError(f"the engine ended: {last_words(self._log_path)} (all of it: {self._log_path})")
        reply: dict[str, Any] = json.loads(line)
        return reply


def last_words(log: Path) -> str:
    """Return the last line of a log that names an error, or else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line]
    return (named or lines or ["it said nothing"])[-1][:500]
