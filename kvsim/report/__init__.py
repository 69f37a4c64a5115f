"""Results as HTML files that need no network, and in words."""

from kvsim.report.page import check_available
from kvsim.report.tune_page import render, write_report

__all__ = ["check_available", "render", "write_report"]
