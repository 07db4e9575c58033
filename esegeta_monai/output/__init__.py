"""Results of a run on disk: maps with records and pictures, tables of metrics, and HTML reports."""

from __future__ import annotations

from esegeta_monai.output.report.page import write_report
from esegeta_monai.output.writer import ResultWriter

__all__ = ["ResultWriter", "write_report"]
