"""The server shell: it brings the core's decisions to a shared-memory arena (L1), to stores behind it, and to engines."""
