"""Results as HTML files that need no network, and in words."""

from kvsim.report.html import render, write_report
from kvsim.report.page import check_available

__all__ = ["check_available", "render", "write_report"]
