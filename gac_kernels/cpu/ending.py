"""The end of a step on a CPU by two calls of the library: its sums, and what follows from them.

What each number is and where it lies: :mod:`gac_kernels.step_vector`. There is no form in plain torch here; the
reference is the law itself, which the package above has in torch and in plain numbers.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from gac_kernels import backends
from gac_kernels.cpu.library import check, require
from gac_kernels.cpu.quick import QUICK
from gac_kernels.step_vector import SUMS_SIZE

_STEP = struct.Struct("@PPPPqqqqqii")
_ENDING = struct.Struct("@PPPPPdddqiiiiii")
_NO_SUMS = array("d", bytes(8 * SUMS_SIZE))


def serves() -> bool:
    """Whether the library serves the CPU: it is there, and no other backend is asked for."""
    return backends.select("cpu")[1] == "cpu"


class StepSums:
    """The sums of steps whose contributions are left in the same memory. The tensors must outlive it.

    Args:
        totals: of SFT and RL, contiguous float32 CPU tensors of equal length.
        rows: ``[r, 2 + cells]`` float64 or wider, contiguous: of each contribution squares and non-finite elements as
            read, then parts of its square.
        cells: how many of these; None where the first number is the square, in units of the squared scale.
    """

    def __init__(self, totals: tuple[Tensor, Tensor], rows: Tensor, cells: int | None) -> None:
        self._tensors = (*totals, rows)
        self._addresses = totals[0].data_ptr(), totals[1].data_ptr(), rows.data_ptr()
        self._numel, self._stride, self._rows = totals[0].numel(), rows.stride(0), rows.shape[0]
        self._cells, self._lossless = cells or 0, cells is None
        library = require()
        self._small = 2 * self._numel <= QUICK
        self._call = (library.quick if self._small else library.call).gac_step_sums

    def __call__(self, told: Sequence[float], *, clear: bool) -> array[float]:
        """``[13]``: :data:`gac_kernels.step_vector.SUMS`, of which ``silent`` and ``time_noise`` stay 0.

        Args:
            told: three numbers for each contribution: 0 for SFT and 1 for RL, its tokens (1 where untold), and the
                square of its scale. At most as many contributions as there are rows.
            clear: whether the rows of contributions, and of one that was given up after the last, become 0.
        """
        numbers = array("d", told)
        count = len(numbers) // 3
        if count > self._rows:
            raise ValueError(f"told is of {count} contributions, there are {self._rows} rows")
        sums = _NO_SUMS[:]
        sft, rl, rows = self._addresses
        step = _STEP.pack(
            sft, rl, rows, numbers.buffer_info()[0], self._numel, self._stride, count,
            min(count + 1, self._rows), self._cells, self._lossless, clear,
        )  # fmt: skip
        check(self._call(step, sums.buffer_info()[0], 1 if self._small else torch.get_num_threads()))
        return sums


class StepEnd:
    """From what steps have measured to the state after them.

    Args:
        table: ``[1025, 3]``, weights of averages and factor of a standard error by the number of measurements.
        averages: that the law keeps, 1 or 2.
    """

    def __init__(self, table: Tensor, averages: int) -> None:
        self._table = array("d", table.to("cpu", torch.float64).flatten().tolist())
        self._averages = averages
        self._call = require().quick.gac_step_end

    def __call__(
        self,
        source: array[float] | None,
        state: array[float],
        weights: int,
        *,
        options: array[float],
        alpha: float = 0.5,
        prior: float = float("nan"),
        kl: float = float("nan"),
        prior_is_tensor: bool = False,
        follows_kl: bool = False,
        from_statistics: bool = False,
        passed: int = 0,
        present: Sequence[bool] = (True, True),
        lone: Sequence[bool] = (False, False),
    ) -> None:
        """Takes a step in.

        Args:
            source: the step's sums, ``[13]``, or at least ten statistics where ``from_statistics`` says so; None:
                nothing was measured.
            state: ``[SIZE]``, of the step before; it becomes that of this one.
            weights: address of four float32 numbers: they become ``mu`` and ``1 - mu`` of the next step and what undoes
                them.
            options: of the law, :data:`gac_kernels.step_vector.OPTIONS`.
            alpha, prior, kl: numbers. A prior of NaN is none; one that is told by a tensor is clipped to [0, 1], and
                counts as ``mu`` where it is not finite.
            follows_kl: whether alpha follows ``kl``.
            passed: steps before this one in which nothing was measured or told.
            present: of SFT and RL, whether the weight was above 0. lone: whether noise is that from time.
        """
        ending = _ENDING.pack(
            0 if source is None else source.buffer_info()[0],
            state.buffer_info()[0],
            self._table.buffer_info()[0],
            options.buffer_info()[0],
            weights,
            alpha,
            prior,
            kl,
            passed,
            self._averages,
            from_statistics,
            follows_kl,
            prior_is_tensor,
            present[0] | present[1] << 1,
            lone[0] | lone[1] << 1,
        )
        check(self._call(ending))
