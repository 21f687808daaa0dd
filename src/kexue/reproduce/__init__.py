"""Re-measure the claim of each method: one module per row of the catalogue."""

from kexue.reproduce.report import write_report
from kexue.reproduce.runner import VERDICTS, Measurement, Reproduction, available, run

__all__ = ["VERDICTS", "Measurement", "Reproduction", "available", "run", "write_report"]
