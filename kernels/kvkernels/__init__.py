"""Transfers between an engine's paged KV cache and chunk slots in host memory."""
