"""Predict KV-cache reuse from a request log: hit ratios exactly, time to first token by simulation."""
