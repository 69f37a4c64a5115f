"""The server shell: brings the core's decisions to an arena in shared memory (L1), to stores behind it, to engines."""
