"""The weight of each branch in a step, and what undoes it."""

from __future__ import annotations

import struct
from functools import cached_property

import torch
from torch import Tensor

from gac.statistics.branch import Branch
from gac_kernels.step_vector import WEIGHT_STRIDE, WEIGHTS_SIZE

_FOUR = struct.Struct("@4f")
_SLOTS = 16


class Weights:
    """``mu`` for the SFT branch and ``1 - mu`` for the RL branch. New tensors for each step: those handed out stay.

    Args:
        mu: 0-dim, any float dtype.

    Attributes:
        mu: 0-dim float32.
        present: ``[2]`` bool, whether SFT and RL have a weight above 0.
        of: the weight of a branch's loss. undone: what takes a weighted gradient back; 0 for a weight of 0.
    """

    def __init__(self, mu: Tensor) -> None:
        self.mu = mu.to(torch.float32, copy=True)
        pair = torch.stack([self.mu, 1.0 - self.mu])
        self.present = pair > 0
        self.of = dict(zip(Branch, pair.unbind(), strict=True))
        self.undone = dict(zip(Branch, torch.where(self.present, 1.0 / pair, 0.0).unbind(), strict=True))


class DeviceWeights(Weights):
    """The same as views of one vector on the device, which the program that ends steps has written.

    Args:
        numbers: ``[16]`` float32: ``mu``, ``1 - mu`` and what undoes them, at every fourth place.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers
        s, r, undone_s, undone_r = numbers.view(-1, WEIGHT_STRIDE).select(1, 0).unbind()
        self.mu = s
        self.of = {Branch.SFT: s, Branch.RL: r}
        self.undone = {Branch.SFT: undone_s, Branch.RL: undone_r}

    @classmethod
    def first(cls, mu: Tensor) -> DeviceWeights:
        """Of a ``mu`` that no program has made."""
        made = Weights(mu)
        numbers = torch.zeros(WEIGHTS_SIZE, dtype=torch.float32, device=mu.device)
        numbers[::WEIGHT_STRIDE] = torch.stack([*made.of.values(), *made.undone.values()])
        return cls(numbers)

    @cached_property
    def present(self) -> Tensor:  # type: ignore[override]
        return torch.stack(list(self.of.values())) > 0


class Slot:
    """Memory of one step's weights on the CPU, and the tensors over it. Each is used once.

    Attributes:
        address: of four float32 numbers.
        tensors: the four, 0-dim.
    """

    __slots__ = ("_at", "_memory", "address", "tensors")

    def __init__(self, memory: bytearray, at: int, address: int, tensors: tuple[Tensor, ...]) -> None:
        self._memory, self._at = memory, at
        self.address, self.tensors = address, tensors

    def write(self, *numbers: float) -> None:
        """Writes the four numbers."""
        _FOUR.pack_into(self._memory, self._at, *numbers)


def new_slots(count: int) -> list[Slot]:
    """Slots for so many steps. Not to be made in inference mode: backward passes save their tensors."""
    memory = bytearray(count * _FOUR.size)
    numbers = torch.frombuffer(memory, dtype=torch.float32)
    tensors, address = numbers.unbind(), numbers.data_ptr()
    places = [(4 * k, k * _FOUR.size) for k in range(count)]
    return [Slot(memory, at, address + at, tensors[first : first + 4]) for first, at in places]


class Slots:
    """The slots of a mixer's steps.

    Many are made at a time: between large matrix products no cache holds what makes a tensor, and the first costs what
    a dozen more do.
    """

    def __init__(self) -> None:
        self._made: list[Slot] = []

    def next(self) -> Slot:
        """A new one; see :func:`new_slots`."""
        if not self._made:
            self._made = new_slots(_SLOTS)
        return self._made.pop()


class HostWeights(Weights):
    """The same from a number, on the CPU.

    Args:
        mu: of the step to come.

    Attributes:
        present_on_host: ``present`` as numbers.
    """

    def __init__(self, mu: float) -> None:
        number = _float32(mu)
        # Differences and quotients of float32 numbers that double precision rounds first come out the same.
        pair = number, _float32(1.0 - number)
        undone = [_float32(1.0 / weight) if weight > 0 else 0.0 for weight in pair]
        (slot,) = new_slots(1)
        slot.write(*pair, *undone)
        self._take(slot, number)

    @classmethod
    def written(cls, slot: Slot, mu: float) -> HostWeights:
        """From what was written to a slot; ``mu`` is its first number."""
        found = object.__new__(cls)
        found._take(slot, mu)
        return found

    def _take(self, slot: Slot, mu: float) -> None:
        s, r, undone_s, undone_r = slot.tensors
        self.mu = s
        self.present_on_host = mu > 0, mu < 1
        self.of = {Branch.SFT: s, Branch.RL: r}
        self.undone = {Branch.SFT: undone_s, Branch.RL: undone_r}

    @staticmethod
    def rounded(mu: float) -> float:
        """A number as losses are weighted with it."""
        return _float32(mu)

    @cached_property
    def present(self) -> Tensor:  # type: ignore[override]
        return torch.tensor(self.present_on_host)


def _float32(x: float) -> float:
    """The nearest float32; beyond them an infinity."""
    return struct.unpack("f", struct.pack("f", x))[0] if abs(x) < 3.4028235e38 else x * float("inf")


_FACTOR_NODES = 32


def is_factor(weight: Tensor, loss: Tensor) -> bool:
    """Whether ``weight`` was multiplied into ``loss``, near the end of its graph: looked for in its last 32 nodes."""
    address, waiting = weight.data_ptr(), [loss.grad_fn]
    seen: set[object] = set()
    while waiting and len(seen) < _FACTOR_NODES:
        node = waiting.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "MulBackward0":
            factors = node._saved_self, node._saved_other  # type: ignore[attr-defined]
            if any(isinstance(f, Tensor) and f.numel() == 1 and f.data_ptr() == address for f in factors):
                return True
        waiting += [following for following, _ in node.next_functions]
    return False
