"""The report of a run, and of a comparison: one JSON and one page."""

from phasequant.report.comparison import write_comparison
from phasequant.report.page import is_report, write_page
from phasequant.report.runs import what_runs

__all__ = ["is_report", "what_runs", "write_comparison", "write_page"]
