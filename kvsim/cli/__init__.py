"""The `kvsim` command. Each command is one module, which loads what it runs when it runs."""

from kvsim.cli.app import app, main

__all__ = ["app", "main"]
