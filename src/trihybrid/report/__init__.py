"""The report of a run: one HTML file made from what the run folder holds."""

from trihybrid.report.page import build_report

__all__ = ["build_report"]
