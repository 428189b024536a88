"""Estimates to words: what the gradients of a run say, by module, with standard errors."""

from gac.report.report import HISTORY, BranchSignal, ModuleSummary, Report, append_record, read_history

__all__ = ["HISTORY", "BranchSignal", "ModuleSummary", "Report", "append_record", "read_history"]
