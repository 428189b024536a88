"""What ``p.grad`` held when it was last read: running sums tell contributions apart while nobody else writes them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import is_, is_not, ne, or_

from torch import Tensor, nn

CHANGED = (
    "gradients were changed between two backward passes of a step ({}), and contributions are what passes add to them: "
    "change them once, after the step's last pass, use mixer.backward(loss), which looks again, or patch with "
    'estimator="exact"'
)


class Accumulated:
    """Notices gradients that were replaced, cleared, clipped or scaled, without reading the device.

    A gradient is the one that was noted if it is the same tensor at the same version: every write in place counts its
    version up. Tensors are kept until the step ends, so that no other can take their place.

    Args:
        parameters: whose gradients accumulate.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._gradients: list[Tensor | None] = []
        self._versions: list[int] = []
        self.forget()

    def forget(self) -> None:
        """A step begins: nothing should be there."""
        self._gradients = [None] * len(self._parameters)
        self._versions = [-1] * len(self._parameters)

    def note(self) -> None:
        """What is there now is known."""
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._versions = _versions(self._gradients)

    def changed(self) -> bool:
        """Whether any gradient is not what was noted last."""
        present = [parameter.grad for parameter in self._parameters]
        return not all(map(is_, present, self._gradients)) or _versions(present) != self._versions

    def written(self) -> list[int]:
        """The parameters whose gradients are not what was noted last, and are there. What is there now is known."""
        gradients, versions = self._gradients, self._versions
        self.note()
        other = map(or_, map(is_not, self._gradients, gradients), map(ne, self._versions, versions))
        found = compress(range(len(versions)), other)  # without a line of Python per parameter
        return [k for k in found if self._gradients[k] is not None]

    def changed_besides(self, index: int) -> list[int]:
        """The gradients that are not what was noted, when a pass has just accumulated the one of ``index``.

        Those on other devices are passed over: their thread may be ahead.
        """
        device, found = self._parameters[index].device, []
        for k, (parameter, noted, version) in enumerate(
            zip(self._parameters, self._gradients, self._versions, strict=True)
        ):
            if parameter.device != device:
                continue
            present = parameter.grad
            if k == index and noted is not None:
                version += 1
            if k == index and (noted is None or (present is not None and present.requires_grad)):
                continue  # its first gradient, or (create_graph) a new tensor for the sum
            if present is not noted or (present is not None and present._version != version):
                found.append(k)
        return found


def _versions(gradients: Sequence[Tensor | None]) -> list[int]:
    return [-1 if gradient is None else gradient._version for gradient in gradients]
