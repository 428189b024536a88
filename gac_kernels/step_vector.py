"""The vectors that the end of a step reads and writes: what lies where, for the program and for whoever reads them.

All are contiguous float64. Pairs are of SFT and RL; fours are of ``sigma_s2``, ``sigma_r2``, ``distance2`` and
``delta_g2``; threes, of the law, of ``sigma_s2``, ``sigma_r2`` and ``delta_g2``.
"""

from __future__ import annotations

import itertools
import math

ROW = (
    *("mu", "raw", "mu_se", "prior", "skipped"),
    *("sigma_s2", "sigma_r2", "delta_g2", "distance2", "norm_s2", "norm_r2", "dot", "n_s", "n_r", "nonfinite"),
    *("sigma_s2_se", "sigma_r2_se", "distance2_se", "delta_g2_se"),
    "cosine",
)
"""The numbers that a step tells, with which a state vector begins; ``mu`` as losses are weighted with it."""

STATISTICS = slice(ROW.index("sigma_s2"), ROW.index("cosine"))
"""Those of the row that are statistics."""

AVERAGES = 2
"""Averages of different length that the law keeps at most; of one the second place is not used."""

SHAPES: dict[str, tuple[int, ...]] = {
    "row": (len(ROW),),
    "mu": (),  # as the law has it
    "moved": (),  # above 0 where statistics differ from those before by more than their errors explain
    "alpha": (),
    "kl": (),
    "last": (4,),  # the standard errors' state
    "level": (4,),
    "average": (4,),
    "count": (4,),
    "waiting": (3,),  # the law's
    "unsettled": (3,),
    "mus": (2,),
    "evidence": (2,),
    "sums": (AVERAGES, 2, 3),
    "squares": (AVERAGES, 3, 3),
}
"""The parts of a state vector in their order."""

_ends = list(itertools.accumulate(map(math.prod, SHAPES.values())))

OFFSETS = dict(zip(SHAPES, (0, *_ends), strict=False))
"""Where each part begins."""

SIZE = _ends[-1]
"""Numbers of a state vector."""

SUMS = ("power", "tokens", "n", "nonfinite", "silent", "norms", "time_noise")
"""What a step's contributions add up to: 2, 2, 2, 1, 1, 3 and 2 numbers; see :class:`gac.statistics.sums.StepSums`."""

SUMS_SIZE = 13
"""Numbers of them."""

OPTIONS = (
    *("cap", "mu_min", "mu_max", "noise", "forget", "prior_weight", "prior_sd", "unknown_weight"),
    *("kl_target", "kl_decay", "hysteresis", "eta_up", "eta_down", "alpha_min", "alpha_max", "surprise"),
    *("rate_0", "share_0", "rate_1", "share_1"),
)
"""The vector of the law's options.

``noise`` is the share that momentum leaves; ``forget`` what evidence decays by in a step, as a rate; ``prior_weight``
is NaN for the one of least expected error; ``surprise`` is how many standard errors are a movement; ``rate_k`` and
``share_k`` are the decay of an average in a step and the weight of its newest value, the long average last.
"""

WEIGHT_STRIDE = 4
"""Distance of the weights ``mu``, ``1 - mu`` and their inverses in their float32 vector: each has an address of its own
that is a multiple of 16, so that kernels which read one of them need no form for other addresses."""

WEIGHTS_SIZE = 4 * WEIGHT_STRIDE
"""Numbers of that vector."""
