"""Sums to estimates: formulas that turn what a step's contributions add up to into unbiased statistics."""

from gac.statistics.branch import Branch
from gac.statistics.by_module import COLUMNS, ModuleStatistics
from gac.statistics.coefficient import coefficient_statistics
from gac.statistics.step import (
    NAN,
    Statistics,
    noise_from_weighted,
    pair_statistics,
)
from gac.statistics.uncertainty import SuccessiveDifferences

__all__ = [
    "COLUMNS",
    "NAN",
    "Branch",
    "ModuleStatistics",
    "Statistics",
    "SuccessiveDifferences",
    "coefficient_statistics",
    "noise_from_weighted",
    "pair_statistics",
]
