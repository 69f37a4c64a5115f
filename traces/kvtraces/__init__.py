"""Request logs: one schema, readers and writers of it and of other formats, and a generator."""

from kvtraces.describe import Lengths, Summary, describe
from kvtraces.errors import LogError
from kvtraces.log import Log
from kvtraces.reader import read
from kvtraces.schema import Row
from kvtraces.segments import Request, Segment, Workload, segment_tokens
from kvtraces.workloads import Agent, Bursty, Chat, Mixed, Poisson, Rag, Spread, generate, workload
from kvtraces.writer import Writer, next_seq, read_rows, rows_of, write

__all__ = [
    "Agent",
    "Bursty",
    "Chat",
    "Lengths",
    "Log",
    "LogError",
    "Mixed",
    "Poisson",
    "Rag",
    "Request",
    "Row",
    "Segment",
    "Spread",
    "Summary",
    "Workload",
    "Writer",
    "describe",
    "generate",
    "next_seq",
    "read",
    "read_rows",
    "rows_of",
    "segment_tokens",
    "workload",
    "write",
]
