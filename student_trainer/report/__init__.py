"""`outputs/report.html`: one file that shows a run, without network, scripts or a plotting library."""

from .run_report import RunReport

__all__ = ["RunReport"]
