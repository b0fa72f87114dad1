"""The report: the audit of all splits and datasets as one self-contained HTML page."""

from spctrl.report.page import render_report

__all__ = ["render_report"]
