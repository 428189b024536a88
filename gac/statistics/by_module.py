"""What was measured in each module of a model in one step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gac.statistics.step import NAN, Statistics, noise_from_weighted
from gac.statistics.sums import StepSums

COLUMNS = ("sigma_s2", "sigma_r2", "delta_g2", "distance2", "norm_s2", "norm_r2", "dot")
"""The columns of :attr:`ModuleStatistics.values`, fields of :class:`gac.Statistics` that are sums over elements."""


@dataclass
class ModuleStatistics:
    """Gradient statistics of one optimizer step by module.

    Each number is a sum over the elements of a module, so that the modules add up to the whole model.

    Attributes:
        step: the optimizer step, counted from 1.
        labels: the ``M`` modules, in model order (:func:`group_parameters`).
        values: ``[M, 7]``, floating point, on any device; columns as in :data:`COLUMNS`. NaN where a number was not
            measured: noise of a branch with one contribution, anything of a branch that was absent.
        whole: the statistics of the whole model in that step, which add the numbers of contributions and the standard
            errors; without them noise scales are in units of the step's batch.
        informative_groups: share of the step's groups of rollouts whose rewards differ, so that not all of their
            advantages are 0: a trainer that knows it sets it; None: not told.
    """

    step: int
    labels: tuple[str, ...]
    values: Tensor
    whole: Statistics | None = None
    informative_groups: float | None = None

    def __post_init__(self) -> None:
        self.labels = tuple(self.labels)
        self.step = int(self.step)
        expected = (len(self.labels), len(COLUMNS))
        if not isinstance(self.values, Tensor) or tuple(self.values.shape) != expected:
            got = tuple(self.values.shape) if isinstance(self.values, Tensor) else type(self.values).__name__
            raise ValueError(f"values must be a tensor of shape {expected}, a row for each label; got {got}")
        if not self.values.is_floating_point():
            raise TypeError(f"values must be floating point, got {self.values.dtype}")
        self.values = self.values.detach()

    def column(self, name: str) -> Tensor:
        """``[M]``: the numbers of all modules, by a name of :data:`COLUMNS`."""
        if name not in COLUMNS:
            raise KeyError(f"no column {name!r}; known: {', '.join(COLUMNS)}")
        return self.values[:, COLUMNS.index(name)]

    def module(self, label: str) -> dict[str, float]:
        """The numbers of one module; waits for the device."""
        if label not in self.labels:
            raise KeyError(f"no module {label!r}; known: {', '.join(self.labels)}")
        return dict(zip(COLUMNS, self.values[self.labels.index(label)].tolist(), strict=True))

    def total(self) -> Tensor:
        """``[7]``: the sums over modules, which are the whole model's numbers."""
        return self.values.sum(0)

    def to_record(self) -> dict[str, Any]:
        """A dictionary for JSON, NaN and infinities as None; waits for the device."""
        record = {
            "step": self.step,
            "columns": list(COLUMNS),
            "modules": {k: _to_json(row) for k, row in zip(self.labels, self.values.tolist(), strict=True)},
        }
        if self.whole is not None:
            numbers = self.whole.stacked().tolist()
            record["whole"] = dict(zip(self.whole.names(), _to_json(numbers), strict=True))
        if self.informative_groups is not None:
            record["informative_groups"] = self.informative_groups
        return record

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ModuleStatistics:
        """Reads what :meth:`to_record` returned, into float64 on the CPU.

        Raises ValueError where something is missing. Columns of other versions are left out, or NaN.
        """
        missing = [key for key in ("step", "columns", "modules") if key not in record]
        if missing:
            raise ValueError(f"not a record of module statistics: it lacks {', '.join(missing)}")
        rows = [dict(zip(record["columns"], row, strict=True)) for row in record["modules"].values()]
        values = [[_from_json(row.get(name)) for name in COLUMNS] for row in rows]
        known = Statistics.names()
        whole = {k: _from_json(v) for k, v in (record.get("whole") or {}).items() if k in known}
        return cls(
            step=record["step"],
            labels=tuple(record["modules"]),
            values=torch.tensor(values, dtype=torch.float64).reshape(len(rows), len(COLUMNS)),
            whole=Statistics(**whole) if whole else None,
            informative_groups=record.get("informative_groups"),
        )


def _to_json(numbers: Sequence[float]) -> list[float | None]:
    # nine digits hold every float32
    return [float(f"{x:.9g}") if math.isfinite(x) else None for x in numbers]


def _from_json(number: float | None) -> float:
    return math.nan if number is None else float(number)


def take_apart(sums: StepSums, whole: Statistics, labels: Sequence[str], step: int) -> ModuleStatistics:
    """A step's statistics by module.

    Args:
        sums: with ``module_power`` and ``module_norms``. whole: the step's statistics. labels: of the modules.
        step: the step's number, from 1.
    """
    n_s, n_r = whole.n_s, whole.n_r
    norm_s2, norm_r2, dot = sums.module_norms.unbind(1)
    power_s, power_r = (sums.module_power * sums.tokens).unbind(1)
    sigma_s2 = noise_from_weighted(power_s, norm_s2, n_s)
    sigma_r2 = noise_from_weighted(power_r, norm_r2, n_r)
    distance2 = (norm_s2 + norm_r2 - 2 * dot).clamp(min=0.0)
    columns = [sigma_s2, sigma_r2, distance2 - sigma_s2 - sigma_r2, distance2, norm_s2, norm_r2, dot]
    has_s, has_r = n_s >= 1, n_r >= 1
    known = torch.stack([has_s, has_r, has_s & has_r, has_s & has_r, has_s, has_r, has_s & has_r])
    values = torch.where(known & (whole.nonfinite == 0), torch.stack(columns, dim=1), NAN)
    return ModuleStatistics(step, tuple(labels), values, whole)
