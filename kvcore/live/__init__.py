"""The server shell: arena, stores, wire, journal, HTTP, metrics, client. It decides nothing; `kvcore.policy` does."""
