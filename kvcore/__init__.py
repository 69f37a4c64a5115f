"""KV-cache reuse for LLM inference: the policy core, the server and the vLLM connectors."""

__version__ = "0.1.0"
