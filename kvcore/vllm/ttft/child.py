"""One vLLM engine in a process of its own, driven by lines of JSON; `kvcore.vllm.ttft.engine` is the other end.

The first line holds vLLM's arguments; each further line is a command, and gets one line in reply. What vLLM prints goes
to standard error.
"""

import importlib
import json
import os
import sys
import time
from typing import Any, TextIO

from kvcore.vllm.ttft.look import LEAVE, LOOK, SETTLE, Look, settle

_RESET_S = 20.0


class Worker:
    """A vLLM engine and what can be asked of it."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        started = time.perf_counter()
        self._vllm = vllm = importlib.import_module("vllm")
        self._llm = vllm.LLM(**arguments, worker_extension_cls=f"{Look.__module__}.{Look.__qualname__}")
        self._engine = self._llm.llm_engine
        if vllm.__version__.startswith("0.26."):
            _count_every_step(self._engine)
        self._requests = 0
        self.start_s = time.perf_counter() - started

    def facts(self) -> dict[str, Any]:
        """Return what the parent has to know of the engine."""
        config = self._engine.vllm_config
        model, parallel = config.model_config, config.parallel_config
        torch = importlib.import_module("torch")
        dtype = str(config.cache_config.cache_dtype)
        element = torch.empty(0, dtype=model.dtype if dtype in ("auto", "bfloat16") else torch.uint8).element_size()
        heads, head = model.get_num_kv_heads(parallel), model.get_head_size()
        cuda = torch.cuda.is_available()
        return {
            "start_s": self.start_s,
            "device": torch.cuda.get_device_name(0) if cuda else "cpu",
            "cuda": cuda,
            "block_tokens": config.cache_config.block_size,
            "gpu_blocks": config.cache_config.num_gpu_blocks,
            "vocabulary": model.get_vocab_size(),
            "max_model_len": model.max_model_len,
            "dtype": str(model.dtype).removeprefix("torch."),
            "kv_bytes_per_token": 2 * model.get_num_layers(parallel) * heads * head * element,
            "versions": {"vllm": self._vllm.__version__, "torch": torch.__version__},
        }

    def run(self, prompts: list[list[int]], tokens: int, *, fastest: bool) -> dict[str, Any]:
        """Return each prompt's tokens and their arrival times, in seconds from the start of all.

        Right before and right behind, the engine's processor is looked at. With `fastest` the engine's thread stays on
        the fastest processor meanwhile, and this one on the next.
        """
        sampling = self._vllm.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        names = [str(self._requests + number) for number in range(len(prompts))]
        self._requests += len(prompts)
        places = {name: place for place, name in enumerate(names)}
        arrivals: list[list[float]] = [[] for _ in prompts]
        outputs: list[list[int]] = [[] for _ in prompts]
        mine = self._settle() if fastest else None
        before = self._look()
        started = time.perf_counter()
        for name, prompt in zip(names, prompts, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
        while self._engine.has_unfinished_requests():
            stepped = self._engine.step()
            now = time.perf_counter() - started
            for output in stepped:
                place = places[output.request_id]
                outputs[place] = list(output.outputs[0].token_ids)
                arrivals[place].extend([now] * (len(outputs[place]) - len(arrivals[place])))
        behind = self._look()
        if mine:
            os.sched_setaffinity(0, mine)
            self._llm.collective_rpc(LEAVE)
        return {"arrivals": arrivals, "outputs": outputs, "looks": [before, behind]}

    def _settle(self) -> set[int]:
        """Put the engine on the fastest processor and this thread on the next; returns where this one could run."""
        mine = os.sched_getaffinity(0)
        taken = self._llm.collective_rpc(SETTLE)[0][0]
        settle([processor for processor in sorted(mine) if processor != taken] or [taken])
        return mine

    def _look(self) -> float:
        looks: list[float] = self._llm.collective_rpc(LOOK)
        return max(looks)

    def reset(self) -> dict[str, Any]:
        """Empty the engine's own prefix cache; blocks still held for stores under way are waited for."""
        until = time.monotonic() + _RESET_S
        while not self._llm.reset_prefix_cache():
            if time.monotonic() > until:
                return {"reset": False}
            time.sleep(0.05)
        return {"reset": True}

    def counters(self) -> dict[str, float]:
        """Return vLLM's counters and gauges, summed over labels."""
        found: dict[str, float] = {}
        for metric in self._llm.get_metrics():
            if hasattr(metric, "value"):
                found[metric.name] = found.get(metric.name, 0.0) + metric.value
        return found

    def close(self) -> None:
        """End the engine."""
        self._engine.engine_core.shutdown()


def _count_every_step(engine: Any) -> None:
    """Mend vLLM 0.26, whose `LLM` loses the counts of steps without output, such as those that begin a load."""
    step = engine.engine_core.get_output

    def get_output() -> Any:
        outputs = step()
        if outputs.scheduler_stats is not None and not outputs.outputs:
            engine.logger_manager.record(scheduler_stats=outputs.scheduler_stats, iteration_stats=None)
        return outputs

    engine.engine_core.get_output = get_output


def main() -> None:
    """Serve until the input ends."""
    replies = _private_output()
    worker = Worker(json.loads(sys.stdin.readline()))
    _reply(replies, worker.facts())
    for line in sys.stdin:
        command = json.loads(line)
        match command["do"]:
            case "run":
                _reply(replies, worker.run(command["prompts"], command["tokens"], fastest=command["fastest"]))
            case "reset":
                _reply(replies, worker.reset())
            case "counters":
                _reply(replies, worker.counters())
    worker.close()


def _private_output() -> TextIO:
    """Return the standard output for replies alone: whatever else is printed goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _reply(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
