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
        sampling = self._vllm.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        places: dict[str, int] = {}
        started = time.perf_counter()
        for place, prompt in enumerate(prompts):
            self._requests += 1
            places[str(self._requests)] = place
            self._engine.add_request(str(self._requests), {"prompt_token_ids": prompt}, sampling)
        arrivals: list[list[float]] = [[] for _ in prompts]
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter() - started
            for output in outputs:
                times = arrivals[places[output.request_id]]
                times.extend([now] * (len(output.outputs[0].token_ids) - len(times)))
        return arrivals


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
        reply({"arrivals": worker.run(command["prompts"], command["tokens"])})


if __name__ == "__main__":
    main()
