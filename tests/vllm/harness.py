"""Real vLLM engines in this process, one at a time; what they answer, and how it is compared.

On the CPU in CI. Where there is a CUDA device they run there, and `test_ahead.py`, `test_faults.py`, `test_random.py`,
`test_reuse.py` and, with two of them, `test_ranks.py` are of use.
"""

# ruff: noqa: PLC0415 - vLLM reads the environment when it is imported
import gc
import json
import logging
import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from servers import status, wait_for

KV_BYTES = 1 << 30
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE=str(KV_BYTES >> 30),
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    TRITON_F32_DEFAULT="ieee",  # else attention rounds to TF32 on a GPU, and a hit differs from a prefill by 2.5e-3
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a second thread spins while it waits, at the server's expense
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.pop("CUDA_VISIBLE_DEVICES", None)

BLOCK = 32
CHUNK = 128
LOGPROB_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Answer:
    tokens: list[int]
    logprobs: list[float]


def connector_config(connector, **extra):
    """The JSON of `--kv-transfer-config`; patient, so that a busy machine does not change what is stored."""
    extra.setdefault("grant_wait_ms", 1000)
    return {
        "kv_connector": connector,
        "kv_connector_module_path": "kvcore.vllm",
        "kv_role": "kv_both",
        "kv_connector_extra_config": extra,
    }


@contextmanager
def planning_ahead():
    """Let engines plan a step while another is under way, as they do on a GPU; vLLM turns that off on the CPU.

    vLLM's own scheduler, engine core and model runner do it. The CPU's runner has no streams to copy tokens out by:
    those of torch's CUDA stand for nothing meanwhile. Of kvcore's copies, too, it is not taken for granted then that
    they are over with the step.
    """
    import pytest
    import torch
    from vllm.platforms import current_platform

    from kvcore.vllm import compat

    if torch.cuda.is_available():
        yield
        return
    configure = current_platform.check_and_update_config

    def ahead(vllm_config):
        configure(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current_platform), "check_and_update_config", staticmethod(ahead))
        for owner, name in ((torch, "Event"), (torch.cuda, "Event"), (torch.cuda, "Stream")):
            patch.setattr(owner, name, _Nothing)
        patch.setattr(torch.cuda, "current_stream", _Nothing)
        patch.setattr(torch.cuda, "stream", nullcontext)
        patch.setattr(compat, "copies_in_step", lambda config: False)
        yield


class _Nothing:
    """An event or a stream where every operation is over when it returns."""

    device = "cpu"

    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        pass

    synchronize = wait_stream = wait_event = wait = record


@contextmanager
def engine(model: Path, kv_transfer_config=None, **options):
    """An engine with float32 weights and KV; gone, with everything that vLLM keeps in globals, on exit."""
    import torch
    import vllm
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

    settings = {
        "model": str(model),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 3072,
        "block_size": BLOCK,
        "seed": 0,
        "disable_log_stats": False,
        "enable_prefix_caching": True,
        **({"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": KV_BYTES} if torch.cuda.is_available() else {}),
    }
    llm = None
    try:
        llm = LLM(**{**settings, **options}, kv_transfer_config=kv_transfer_config)
        if vllm.__version__.startswith("0.26."):
            _count_every_step(llm.llm_engine)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        ensure_kv_transfer_shutdown()  # a start that failed leaves the worker's connector behind
        cleanup_dist_env_and_memory()
        logging.getLogger("kvcore").handlers.clear()  # vLLM's, which our lines went to as well


def _count_every_step(engine):
    """vLLM 0.26 loses the counts of steps without output, but only in an engine inside the caller's thread."""
    step = engine.engine_core.get_output

    def get_output():
        outputs = step()
        if outputs.scheduler_stats is not None and not outputs.outputs:
            engine.logger_manager.record(scheduler_stats=outputs.scheduler_stats, iteration_stats=None)
        return outputs

    engine.engine_core.get_output = get_output


def generate(llm, prompts, max_tokens=8, salts=None):
    """Greedy answers to prompts of token ids, all submitted at once."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=0, ignore_eos=True)
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    for item, salt in zip(inputs, salts or (), strict=False):
        item["cache_salt"] = salt
    return [answer(output) for output in llm.generate(inputs, params, use_tqdm=False)]


def answer(output):
    """What vLLM put out for a request, asked for with `logprobs=0`."""
    result = output.outputs[0]
    logprobs = [row[token].logprob for token, row in zip(result.token_ids, result.logprobs, strict=True)]
    return Answer(list(result.token_ids), logprobs)


def assert_same(got, expected):
    """Tokens equal, log-probabilities but for rounding."""
    for i, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one.tokens == other.tokens, f"request {i}"
        worst = max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True))
        assert worst < LOGPROB_TOLERANCE, f"request {i}: logprobs differ by {worst}"


def metrics(llm):
    """vLLM's own counters and gauges, summed over labels."""
    found = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value"):
            found[metric.name] = found.get(metric.name, 0) + metric.value
    return found


def scheduler(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def step_idle(llm):
    """Step an engine until no request is left: what an engine in a process of its own does by itself."""
    core = llm.llm_engine.engine_core.engine_core
    until = time.monotonic() + 10
    while core.scheduler.has_requests() or core.batch_queue:
        assert time.monotonic() < until, scheduler(llm).requests
        core.step_fn()
        time.sleep(0.002)


def settle(llm, endpoint):
    """Return the server's status once it has no request of this engine.

    Answers that come after their request is gone are taken in the next step: here, those of other requests.
    """

    def gone():
        generate(llm, [[5, 6, 7]], 1)
        return status(endpoint)["requests"] == 0

    step_idle(llm)
    wait_for(gone)
    return status(endpoint)


def to_json(answers):
    return json.dumps([[answer.tokens, answer.logprobs] for answer in answers])
