"""Request logs: one schema, readers and writers of it and of other formats, and a generator."""

from kvtraces.log import Log

__all__ = ["Log"]
