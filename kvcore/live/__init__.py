"""The server shell: it brings the core's decisions to a shared-memory arena and to real engines."""
