"""What the engine around a model (DeepSpeed, FSDP2) must not have done when a branch begins."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gac.observe import deepspeed
from gac.observe.structure import Structure
from gac.observe.topology import Topology, fsdp2_modules, has_unreduced_gradients
from gac.statistics.branch import Branch


class EngineChecks:
    """Refuses what would mix the branches' gradients up.

    Args:
        model: what was patched. parameters: its watched ones. topology: as it was then.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], topology: Topology) -> None:
        self._first = list(parameters[:1])
        self._managed = topology.managed
        self._fsdp2 = fsdp2_modules(model)
        self._structure = Structure(model, parameters, fixed=not (topology.managed or topology.sharded))
        self._last: Branch | None = None

    @property
    def reduces_late(self) -> bool:
        """Whether steps that are not measured can go wrong too."""
        return bool(self._fsdp2)

    def enter(self, branch: Branch, *, measuring: bool) -> None:
        """A branch begins, in a step that is measured or not.

        Raises RuntimeError where DeepSpeed took the parameters over after the patch, FSDP2 has not reduced the other
        branch's gradients yet, or trainable parameters are not watched.
        """
        if measuring and self._last is None:
            self._structure.check()
        if measuring and not self._managed and deepspeed.is_managed(self._first):
            raise RuntimeError(
                "DeepSpeed took the parameters over after gac.patch: call deepspeed.initialize first, then patch the "
                "engine that it returns"
            )
        if self._fsdp2 and branch is not self._last and has_unreduced_gradients(self._fsdp2):
            last = "other" if self._last is None else self._last.value
            raise RuntimeError(
                f"gradient sync was off in the last backward pass of the {last} branch, so FSDP2 "
                f"would reduce its gradient together with that of the {branch.value} branch: leave sync on in the last "
                "pass of each branch (module.set_requires_gradient_sync)"
            )
        self._last = branch

    def end_step(self) -> None:
        """The optimizer step has ended."""
        self._last = None
