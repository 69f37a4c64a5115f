"""`kvcore bench ttft`: TTFT with and without reuse, beside vLLM alone, vLLM's own offloading, and LMCache.

    python -m kvcore.vllm.ttft --model Qwen/Qwen3-8B

Every system runs in an engine of its own, one at a time. A figure counts only if the system's own counters say that the
request was what it is called: a hit that was none is an error.
"""
