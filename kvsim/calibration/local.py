"""vLLM on this machine, in a child process of its own: this one never imports it."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from kvsim.calibration import child
from kvsim.calibration.endpoint import EndpointError, step_s


class LocalEndpoint:
    """A vLLM engine that a child process steps; a context manager, for the child has to be ended.

    Args:
        model: Name or path.
        arguments: vLLM's engine arguments, such as `max_model_len` or `enforce_eager`.
        python: An interpreter that has vLLM; None: this one.

    Raises:
        EndpointError: vLLM does not start; the message has the last line it wrote.
    """

    def __init__(
        self,
        model: str,
        *,
        arguments: Mapping[str, Any] | None = None,
        python: str | None = None,
    ) -> None:
        self.model = model
        self.where = "vLLM in process"
        self._last = ""
        command = [python or sys.executable, "-P", str(Path(child.__file__))]
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own file and the caller's interpreter
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        except OSError as error:
            raise EndpointError(f"{command[0]}: {error}") from None
        given = {"enable_prefix_caching": True, **(arguments or {}), "model": model}
        try:
            self._ask(given)
        except EndpointError:
            self.close()
            raise

    def __enter__(self) -> "LocalEndpoint":
        """Return the endpoint."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the child."""
        self.close()

    def close(self) -> None:
        """End the child, by its input's end, or by force where it does not see that."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            with suppress(BrokenPipeError):  # it is gone already
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def first_token_s(self, prompt: Sequence[int]) -> float:
        """Compute one prompt of token ids and return the time to its first token, in seconds."""
        return float(self._run([prompt], 1)[0][0])

    def decode_step_s(self, prompts: Sequence[Sequence[int]], steps: int) -> float:
        """Have all prompts continued by `steps` tokens at once; return the time of a step with all of them in it."""
        return step_s(self._run(prompts, steps))

    def _run(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[float]]:
        answer = self._ask({"prompts": [list(prompt) for prompt in prompts], "tokens": tokens})
        arrivals: list[list[float]] = answer["arrivals"]
        if not all(arrivals):
            raise EndpointError(f"{self.where}: a prompt of {max(map(len, prompts))} tokens brought no token")
        return arrivals

    def _ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("a child without pipes")
        with suppress(BrokenPipeError):  # then its last words are still to be read
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
        for line in stdout:
            if line.startswith(child.MARK):
                answer: dict[str, Any] = json.loads(line[len(child.MARK) :])
                return answer
            self._last = line.strip() or self._last
        raise EndpointError(f"{self.where}: the process ended: {self._last}")
