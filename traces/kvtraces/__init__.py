"""Request logs: one schema, readers and writers of it and of other formats, and a generator."""

from kvtraces.describe import Lengths, Summary, describe
from kvtraces.errors import LogError
from kvtraces.log import Log
from kvtraces.reader import read
from kvtraces.schema import Row
from kvtraces.writer import Writer, next_seq, read_rows, rows_of, write

__all__ = [
    "Lengths",
    "Log",
    "LogError",
    "Row",
    "Summary",
    "Writer",
    "describe",
    "next_seq",
    "read",
    "read_rows",
    "rows_of",
    "write",
]
