"""Runs vLLM in this process for `LocalEndpoint`, which starts it by its path: it imports nothing of ours.

Commands come as JSON lines on standard input; replies go to standard output behind a marker, for vLLM writes there too.
"""

import importlib
import json
import os
import sys
import time
from typing import Any

MARK = "@kvsim "


class Worker:
    """A vLLM engine, stepped by hand."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        self._vllm = vllm = importlib.import_module("vllm")
        self._engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments))
        self._requests = 0

    def run(self, prompts: list[list[int]], tokens: int) -> list[list[float]]:
        """Return the arrival time of each token of each prompt, in seconds from their start."""
        started = time.perf_counter()
        names = [self._add(prompt, tokens) for prompt in prompts]
        arrivals: dict[str, list[float]] = {name: [] for name in names}
        while self._engine.has_unfinished_requests():
            self._step(arrivals, started)
        return [arrivals[name] for name in names]

    def join(self, beside: list[int], prompt: list[int], tokens: int, delay_s: float) -> float:
        """Return the seconds to the first token of a prompt that comes `delay_s` behind the first one of `beside`.

        It is taken up between two steps, as requests are in vLLM's own loop, but its time runs from when it came.
        """
        first = self._add(beside, tokens)
        arrivals: dict[str, list[float]] = {first: []}
        while not arrivals[first]:
            self._step(arrivals, 0.0)
        came = arrivals[first][0] + delay_s
        while self._engine.has_unfinished_requests() and time.perf_counter() < came:
            self._step(arrivals, 0.0)
        second = self._add(prompt, 1)
        arrivals[second] = []
        while self._engine.has_unfinished_requests():
            self._step(arrivals, 0.0)
        return arrivals[second][0] - came

    def _add(self, prompt: list[int], tokens: int) -> str:
        sampling = self._vllm.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        self._requests += 1
        self._engine.add_request(str(self._requests), {"prompt_token_ids": prompt}, sampling)
        return str(self._requests)

    def _step(self, arrivals: dict[str, list[float]], started: float) -> None:
        """Have the engine take a step, and note the tokens that came of it."""
        outputs = self._engine.step()
        now = time.perf_counter() - started
        for output in outputs:
            times = arrivals[output.request_id]
            times.extend([now] * (len(output.outputs[0].token_ids) - len(times)))


def reply(message: dict[str, Any]) -> None:
    """Answer the parent."""
    sys.stdout.write("\n" + MARK + json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serve until the input ends."""
    worker = Worker(json.loads(sys.stdin.readline()))
    reply({"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        if "delay_s" in command:
            beside, prompt = command["prompts"]
            reply({"joined_s": worker.join(beside, prompt, command["tokens"], command["delay_s"])})
        else:
            reply({"arrivals": worker.run(command["prompts"], command["tokens"])})


if __name__ == "__main__":
    main()
