"""Measuring profiles: of a live endpoint, of vLLM in a child process, or composed from published operator tables."""
