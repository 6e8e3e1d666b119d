"""The report of a run: one JSON and one page."""

from phasequant.report.page import is_report, write_page

__all__ = ["is_report", "write_page"]
