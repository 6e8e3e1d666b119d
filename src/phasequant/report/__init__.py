"""The report of a run: one JSON and one page."""

from phasequant.report.page import write_page

__all__ = ["write_page"]
