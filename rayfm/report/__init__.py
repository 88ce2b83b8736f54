"""Tables and plots of a run."""

from rayfm.report.html import write_report
from rayfm.report.run import Run
from rayfm.report.table import summary_table

__all__ = ["Run", "summary_table", "write_report"]
