"""Naming a branch that takes part in steps and trains nothing."""

from __future__ import annotations

import warnings

from gac.statistics.branch import Branch

SILENT_STEPS = 5
"""Measured steps in a row after which a branch is named."""

ZERO = (
    "the gradient of the {branch} branch was exactly 0 in {steps} measured steps: all advantages or labels are 0, its "
    "loss does not reach what is trained (frozen inputs under re-entrant checkpointing: "
    "model.enable_input_require_grads()), or it underflows (float16 without a scaler). mu has nothing to go by there"
)
ABSENT = (
    "no backward pass inside the {branch} branch reached a watched parameter in {steps} measured steps: its loss is "
    "logged, but backward() is not called on it, or it does not depend on what is trained"
)


class Silence:
    """Counts the steps in a row in which each branch was silent, and warns once for each branch.

    Args:
        text: of the warning, with ``{branch}`` and ``{steps}``.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._said: set[Branch] = set()
        self.counts = dict.fromkeys(Branch, 0)

    def take(self, branch: Branch, *, silent: bool) -> None:
        """One more measured step in which the branch took part."""
        self.counts[branch] = self.counts[branch] + 1 if silent else 0
        if self.counts[branch] == SILENT_STEPS and branch not in self._said:
            self._said.add(branch)
            warnings.warn(self._text.format(branch=branch.value.upper(), steps=SILENT_STEPS), stacklevel=2)
