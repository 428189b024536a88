"""Estimates to words: what the gradients of a run say, by module, with standard errors."""

from gac.report.history import HISTORY, append_record, read_history
from gac.report.mix import Mix
from gac.report.report import Report
from gac.report.signals import BranchSignal, ModuleSummary

__all__ = ["HISTORY", "BranchSignal", "Mix", "ModuleSummary", "Report", "append_record", "read_history"]
