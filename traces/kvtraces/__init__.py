"""Request logs: one schema, readers and writers of it and of other formats, and a generator."""

from kvtraces.errors import LogError
from kvtraces.log import Log
from kvtraces.reader import read
from kvtraces.schema import Row

__all__ = ["Log", "LogError", "Row", "read"]
