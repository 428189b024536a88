"""The end of a step on a GPU: two launches for its sums and one for what follows, or one where nothing was measured.

What each number is and where it lies: :mod:`gac_kernels.step_vector`. There is no form in plain torch here; the
reference is the law itself, which the package above has in torch and in plain numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gac_kernels.step_vector import SIZE, SUMS_SIZE, WEIGHTS_SIZE
from gac_kernels.triton import gather_kernel, launch, step_kernels
from gac_kernels.triton.grouping import indexed
from gac_kernels.triton.launch import Slot, kind, scalar_arguments
from gac_kernels.triton.operations import pair_partials
from gac_kernels.triton.tables import device_tables, to_device

NOTHING = step_kernels.NOTHING.value
SUMS = step_kernels.SUMS.value
STATISTICS = step_kernels.STATISTICS.value

_BLOCK = 2048
_slots: defaultdict[Any, Slot] = defaultdict(Slot)


def upload(numbers: Sequence[float] | Tensor, device: torch.device) -> Tensor:
    """Numbers of the host as float64 on ``device``, without a wait."""
    return to_device(torch.as_tensor(numbers, dtype=torch.float64), device)


def gather(
    totals: tuple[Tensor, Tensor],
    rows: Tensor,
    cells: int | None,
    branches: Sequence[int],
    *,
    tokens: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    time_noise: Tensor | None = None,
    broken: float = 0.0,
    counts: bool = True,
) -> Tensor:
    """The sums of a step on one device: ``[13]`` float64, :data:`gac_kernels.step_vector.SUMS`. Two launches.

    Args:
        totals: of SFT and RL, contiguous float32 of equal length above 0.
        rows: ``[r, 2 + cells]`` float64 or wider, contiguous: of each contribution squares and non-finite elements as
            read, then parts of its square.
        cells: how many of these; None where the first number is the square, in units of a branch's squared scale.
        branches: of each contribution, 0 for SFT and 1 for RL; at most ``r``.
        tokens: ``[K]`` float64, what each counts for; None: 1.
        scales: of both branches, 0-dim; needed without ``cells``.
        time_noise: ``[2]`` float64, taken as it is; None for zeros.
        broken: added to the non-finite elements.
        counts: False where another device counts tokens and contributions.
    """
    device = indexed(rows.device)
    partials = pair_partials(*totals)
    out = torch.empty(SUMS_SIZE, dtype=torch.float64, device=device)
    order = tuple(branches)
    table = device_tables.get(("branches", order), device, lambda: torch.tensor(order, dtype=torch.int64))
    scale_s, scale_r = scales if cells is None and scales is not None else (None, None)
    like = (device, "gather", cells is None, *map(kind, (tokens, scale_s, scale_r, time_noise)))
    launch.launch(
        gather_kernel.gather_kernel,
        (1,),
        device,
        partials,
        partials.shape[1],
        rows,
        rows.stride(0),
        rows.shape[0],
        len(order),
        cells or 0,
        table,
        tokens,
        scale_s,
        scale_r,
        time_noise,
        broken,
        float(counts),
        out,
        slot=_slots[like],
        LOSSLESS=cells is None,
        BLOCK=_BLOCK,
    )
    return out


def finish(
    source: Tensor | None,
    old: Tensor,
    weights: Tensor,
    *,
    table: Tensor,
    options: Tensor,
    averages: int,
    from_statistics: bool = False,
    follows_kl: bool = False,
    alpha: Tensor | float = 0.5,
    prior: Tensor | float = float("nan"),
    kl: Tensor | float = float("nan"),
    lone: tuple[bool, bool] = (False, False),
) -> tuple[Tensor, Tensor]:
    """The state after a step and the weights of the next. One launch; nothing is changed in place.

    Args:
        source: the step's sums, ``[13]``, or statistics where ``from_statistics`` says so; None: nothing was measured.
        old: ``[SIZE]``, the state before.
        weights: ``[WEIGHTS_SIZE]`` float32, of the step that ends.
        table: ``[1025, 3]``, weights of averages and factor of a standard error by the number of measurements.
        options: of the law, :data:`gac_kernels.step_vector.OPTIONS`.
        averages: that the law keeps, 1 or 2.
        follows_kl: whether alpha follows ``kl``.
        alpha, prior, kl: numbers, or 0-dim floating tensors on the device. A prior of NaN is none.
        lone: of SFT and RL, whether noise is that from time.

    Returns:
        ``[SIZE]`` float64 and ``[WEIGHTS_SIZE]`` float32, both new.
    """
    device = indexed(old.device)
    new = torch.empty(SIZE, dtype=torch.float64, device=device)
    after = torch.empty(WEIGHTS_SIZE, dtype=torch.float32, device=device)
    mode = NOTHING if source is None else STATISTICS if from_statistics else SUMS
    tensors = (source, old, weights, *(x for x in (alpha, prior, kl)))
    like = (device, mode, averages, follows_kl, *map(kind, tensors))
    launch.launch(
        step_kernels.finish_kernel,
        (1,),
        device,
        source,
        old,
        new,
        weights,
        after,
        table,
        options,
        *scalar_arguments(alpha),
        *scalar_arguments(prior),
        *scalar_arguments(kl),
        float(lone[0]),
        float(lone[1]),
        slot=_slots[like],
        SOURCE=mode,
        AVERAGES=averages,
        FOLLOWS_KL=follows_kl,
    )
    return new, after
