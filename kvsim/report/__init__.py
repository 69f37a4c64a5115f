"""A tuning run as one HTML file that needs no network."""

from kvsim.report.html import check_available, render, write_report

__all__ = ["check_available", "render", "write_report"]
