"""Two vLLM engines, one after the other, share a kvcore server: the second starts with what the first computed.

    python examples/vllm_shared_server.py MODEL

Starts `kvcore serve` on an endpoint of its own and stops it at the end. Needs vLLM, on a GPU or on the CPU.
"""

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, SamplingParams

from kvcore.live.client import Client, ServerAwayError


def start_server(folder: Path) -> tuple[str, subprocess.Popen[bytes]]:
    """Start a small server and wait until it answers; return its endpoint and its process."""
    endpoint = f"ipc://{folder}/kvcore.ipc"
    command = [sys.executable, "-m", "kvcore", "serve", "--l1-size-gb", "0.5", "--http", "off"]
    server = subprocess.Popen([*command, "--bind", endpoint, "--arena-dir", str(folder)])
    for _ in range(100):
        with Client(endpoint) as client:
            try:
                client.ping(0.2)
            except ServerAwayError:
                time.sleep(0.1)
                continue
            return endpoint, server
    raise SystemExit("the server does not answer")


def ask(model: str, endpoint: str, prompt: list[int]) -> tuple[tuple[int, ...], float]:
    """Start an engine, answer one prompt, end the engine; return the answer and the tokens loaded from the server."""
    connector = {
        "kv_connector": "KVCoreMPConnector",
        "kv_connector_module_path": "kvcore.vllm",
        "kv_role": "kv_both",
        # The line to the server shares this interpreter with an engine that starts, and may be late.
        "kv_connector_extra_config": {"endpoint": endpoint, "deadline_ms": 5000},
    }
    llm = LLM(model, enforce_eager=True, max_model_len=1024, disable_log_stats=False, kv_transfer_config=connector)
    (answer,) = llm.generate(
        [{"prompt_token_ids": prompt}], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False
    )
    loaded = sum(m.value for m in llm.get_metrics() if m.name == "vllm:kvcore_loaded_tokens")
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    from vllm.distributed import cleanup_dist_env_and_memory  # noqa: PLC0415

    cleanup_dist_env_and_memory()
    return tuple(answer.outputs[0].token_ids), loaded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    options = parser.parse_args()
    prompt = [4 + (7 * i + i // 13) % 250 for i in range(800)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        endpoint, server = start_server(Path(folder))
        try:
            first, loaded = ask(options.model, endpoint, prompt)
            print(f"first engine:  {loaded:.0f} of {len(prompt)} tokens from the server, answer {first}")
            second, loaded = ask(options.model, endpoint, prompt)
            print(f"second engine: {loaded:.0f} of {len(prompt)} tokens from the server, answer {second}")
            print("the same answer" if first == second else "ANOTHER ANSWER")
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
