"""The sums that a step's sequences leave behind, and the sketches of those whose backward pass is under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import einops
import torch
from torch import Tensor

from gac.sequences.experts import Routed
from gac.sequences.layers import Kind, Layer, Layers, Slot
from gac.sequences.rows import Found, Places, Rows
from gac.sequences.shared import Projections
from gac.sequences.sources import SourceSums
from gac.sequences.stacked import Stacked
from gac.sequences.taps import Kept
from gac_kernels import kronecker_sketch, moments
from gac_kernels.arguments import accumulator_dtype
from gac_kernels.kronecker import sign_keys, signs_of


class Signs:
    """The signs and weights of a step's sketches.

    Args:
        slots: what is sketched.
        seed: of the step.
        weights: what each slot's sketch is multiplied with; 0 for those that the step does not look at.
        device: of the sketches.
    """

    def __init__(self, slots: Sequence[Slot], seed: int, weights: Sequence[float], device: torch.device) -> None:
        self.weights = list(weights)
        key = lambda number: sign_keys((seed << 20) + number)
        numbers = [(*key(slot.number)[:2], *key(slot.inputs)[2:]) for slot in slots]
        table = torch.tensor(numbers, dtype=torch.int64).reshape(len(slots), 4)
        if device.type == "cuda":
            table = table.pin_memory()
        self._keys = {device: table.to(device, non_blocking=True)}
        self._home = device

    def keys(self, slot: Slot, device: torch.device) -> Tensor:
        """``[4]`` int64."""
        if device not in self._keys:
            self._keys[device] = self._keys[self._home].to(device)
        return self._keys[device][slot.number]


class Sketches:
    """Sketches of the sequences of one batch: a row of numbers for each.

    Args:
        rows: the sequences. layers: what is seen. signs: of the step. device: of the sketches.
    """

    def __init__(self, rows: Rows, layers: Layers, signs: Signs, device: torch.device) -> None:
        self.rows, self.lost = rows, set[Slot]()
        self._signs, self._places, self._device = signs, Places(rows), device
        self._projections = Projections()
        self.table = torch.zeros(rows.count, layers.width, dtype=torch.float32, device=device)

    def take(self, layer: Layer, kept: Kept, gradient: Tensor) -> None:
        """Adds what one use of a layer gives to the sketch of each sequence."""
        if not any(self._signs.weights[slot.number] for slot in layer.slots):
            return
        inputs = kept.take()
        found = self._places.find(gradient.shape[:-1], kept.given, gradient.device)
        if inputs is None or found is None:
            self.lost.update(layer.slots)
            return
        if layer.experts is not None:
            self._experts(layer, Routed(*inputs), gradient, found)
            return
        (x,) = inputs
        lead = x.shape if layer.kind is Kind.EMBEDDING else x.shape[:-1]
        if lead.numel() != gradient.shape[:-1].numel():
            self.lost.update(layer.slots)
            return
        g = gradient.reshape(-1, gradient.shape[-1])
        flat = x.reshape(-1) if layer.kind is Kind.EMBEDDING else x.reshape(-1, x.shape[-1])
        if layer.kind is Kind.NORM:
            normalize = layer.normalize
            assert normalize is not None
            self._add(layer.weight, lambda: normalize(flat) * g, found)
        elif layer.weight is not None and self._signs.weights[layer.weight.number]:
            self._matrix(layer, flat, g, found)
        self._add(layer.bias, lambda: g, found)

    def _experts(self, layer: Layer, routed: Routed, gradient: Tensor, places: Found) -> None:
        """Both projections: pairs of token and expert are their tokens, and experts lie on one another."""
        experts, each = layer.experts, routed.chosen.shape[1]
        own = None if experts is None else experts.weights()
        if experts is None or own is None or gradient.shape[:-1] != routed.x.shape[:-1]:
            self.lost.update(layer.slots)
            return
        options: dict[str, Any] = {"experts": experts.count, "pairs": routed.chosen.numel(), "dtype": gradient.dtype}
        up, down = (
            None
            if part.weight is None or not self._signs.weights[part.weight.number]
            else Stacked(part.weight, self._signs.keys(part.weight, gradient.device), ones=part.ones, **options)
            for part in layer.parts
        )
        inputs = None if up is None else up.project(routed.x)
        for sent in experts.sent(routed, gradient, own):
            if up is not None and inputs is not None:
                up.put(sent.expert, sent.pairs, sent.up_gradient, inputs[sent.pairs // each])
            if down is not None:
                down.put(sent.expert, sent.pairs, sent.down_gradient, down.project(sent.inner))
        for part, stacked in zip(layer.parts, (up, down), strict=True):
            slot = part.weight
            if slot is not None and stacked is not None:
                out = self._stretch(slot, gradient.device).view(-1, *slot.shape)
                scale = self._signs.weights[slot.number]
                stacked.add_to(out, bounds=places.bounds * each, longest=places.longest * each, scale=scale)
                self._bring(slot, out)

    def _matrix(self, layer: Layer, x: Tensor, g: Tensor, places: Found) -> None:
        slot = layer.weight
        assert slot is not None
        options: dict[str, Any] = {
            "bounds": places.bounds,
            "longest": places.longest,
            "keys": self._signs.keys(slot, g.device),
        }
        options |= {"scale": self._signs.weights[slot.number], "ones": layer.ones}
        out = self._stretch(slot, g.device).view(-1, *slot.shape)
        if layer.kind is Kind.LINEAR:
            if slot.shares and x.device.type == "cpu":  # elsewhere the kernel keeps nothing of a token's own
                wide = torch.float64 if torch.float64 in (x.dtype, g.dtype) else torch.float32
                x = self._projections.of(x, slot, options["keys"], ones=layer.ones, wide=wide)
                options["ones"] = False
            kronecker_sketch(g, x, out, **options)
        else:
            ids = x.to(torch.int64)
            if layer.padding is not None:
                ids = torch.where(ids == layer.padding, -1, ids)
            kronecker_sketch(ids, g, out, size=slot.dims[0], **options)
        self._bring(slot, out)

    def _add(self, slot: Slot | None, values: Callable[[], Tensor], places: Found) -> None:
        """A vector's gradient: the sum of its tokens' values, folded to the slot's size under random signs."""
        if slot is None or not self._signs.weights[slot.number]:
            return
        found = _sum_by_row(values(), places)
        found = folded(found, slot, self._signs)
        out = self._stretch(slot, found.device)
        out.add_(found, alpha=self._signs.weights[slot.number])
        self._bring(slot, out)

    def _stretch(self, slot: Slot, device: torch.device) -> Tensor:
        if device == self._device:
            return self.table[:, slot.offset : slot.offset + slot.size]
        return torch.zeros(self.rows.count, slot.size, device=device)

    def _bring(self, slot: Slot, out: Tensor) -> None:
        if out.device != self._device:
            self.table[:, slot.offset : slot.offset + slot.size] += out.reshape(-1, slot.size).to(self._device)

    def drop_lost(self) -> None:
        """What was seen in part is not seen."""
        for slot in self.lost:
            self.table[:, slot.offset : slot.offset + slot.size] = 0.0


def folded(values: Tensor, slot: Slot, signs: Signs) -> Tensor:
    """``[B, m]``: vectors ``[B, d]`` under random signs, their pieces of ``m`` elements added up."""
    (size,), (d,) = slot.shape, slot.dims
    if size == d:
        return values
    keys = signs.keys(slot, values.device)
    own = signs_of(torch.arange(d, device=values.device), 1, keys[0], keys[1], values.dtype)[:, 0]
    padded = torch.nn.functional.pad(values * own, (0, -d % size))
    return einops.reduce(padded, "b (piece m) -> b m", "sum", m=size)


def _sum_by_row(values: Tensor, places: Found) -> Tensor:
    """``[B, d]`` float32: the sum over each sequence's tokens."""
    if places.even:
        return einops.reduce(values.float(), "(b t) d -> b d", "sum", t=places.longest)
    return torch.segment_reduce(values.float(), "sum", offsets=places.bounds, axis=0, initial=0.0, unsafe=True)


class StepSums:
    """Sums of a step's contributions on this rank. Pairs are SFT, RL.

    Args:
        layers: what is seen. device: of the sums.

    Attributes:
        totals: ``[2, K]`` float32, the sketches of both branches' gradients.
        power: ``[2]``, ``sum |x|^2 / t``. power_of_rows: ``[2]``, ``sum |x|^2``. tokens: ``[2]``.
        n: ``[2]``, contributions. nonfinite: 0-dim, sequences.
        module_power: ``[M, 2]``; None unless the step is taken apart.
        told: whether contributions were told their tokens; None before the first.
        sources: by source, where rows were told theirs.
        demonstrations: numbers and sketches ``[n, K]`` of those that were told theirs.
    """

    def __init__(self, layers: Layers, device: torch.device, *, by_module: bool) -> None:
        dtype = accumulator_dtype(device)
        self._layers = layers
        self.totals = torch.zeros(2, layers.width, dtype=torch.float32, device=device)
        self.power, self.tokens, self.n = torch.zeros(3, 2, dtype=dtype, device=device).unbind()
        self.power_of_rows = torch.zeros(2, dtype=dtype, device=device)
        self.nonfinite = torch.zeros((), dtype=dtype, device=device)
        self.module_power = torch.zeros(len(layers.labels), 2, dtype=dtype, device=device) if by_module else None
        self.told: bool | None = None
        self.sources = SourceSums()
        self.demonstrations: list[tuple[list[int], Tensor]] = []

    @property
    def nbytes(self) -> int:
        """Device memory of the sums."""
        return self.totals.nbytes + (0 if self.module_power is None else self.module_power.nbytes)

    def absorb(self, sketches: Sketches, scales: Tensor) -> None:
        """Takes in the sequences of a batch whose backward passes are over.

        Args:
            scales: ``[2]``, what takes weighted gradients of SFT and RL back.
        """
        rows, table = sketches.rows, sketches.table
        sketches.drop_lost()
        if not rows.count:
            return
        dtype = self.power.dtype
        squares, bad = moments(list(table.unbind()), per_tensor=True).unbind(1)
        self.nonfinite += (bad > 0).sum()
        mine = torch.stack([rows.is_expert, ~rows.is_expert]).to(dtype)  # [2, B]
        tokens = rows.tokens if rows.tokens is not None else torch.ones_like(squares)
        if rows.groups is not None:
            table, tokens, first = _grouped(table, tokens, rows)
            mine = mine * first
            squares = moments(list(table.unbind()), per_tensor=True)[:, 0]
            if rows.tokens is None:
                tokens = torch.ones_like(squares)
        counts = mine * (tokens > 0)
        scales = scales.to(dtype)
        inverse = torch.where(tokens > 0, 1.0 / tokens, 0.0)
        self.power += _dot(counts, squares * inverse) * scales.square()
        self.power_of_rows += _dot(counts, squares) * scales.square()
        self.tokens += _dot(counts, tokens)
        self.n += counts.sum(1)
        self.totals.addmm_(mine.to(table.dtype) * scales[:, None].to(table.dtype), table)
        if rows.sources is not None:
            self.sources.take(rows.sources, counts, table, squares, scales)
        if rows.index is not None and rows.on_host is not None:
            own = [k for k, expert in enumerate(rows.on_host) if expert]
            chosen = sketches.table[torch.tensor(own, dtype=torch.int64, device=table.device)]
            self.demonstrations.append(([rows.index[k] for k in own], chosen))
        if self.module_power is not None:
            parts = [table[:, a:b].square().sum(1, dtype=dtype) for a, b in self._layers.segments]
            self.module_power += (torch.stack(parts) * inverse) @ counts.T * scales.square()


def _dot(counts: Tensor, values: Tensor) -> Tensor:
    """``[2]``: sums of those that count. A row of another branch adds nothing, NaN included."""
    return torch.where(counts > 0, values * counts, 0.0).sum(1)


def _grouped(table: Tensor, tokens: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of one group and branch added up in the group's first; ``[B]``: which rows are first."""
    groups, expert = rows.groups, rows.is_expert
    assert groups is not None
    same = (groups[:, None] == groups) & (groups >= 0) & (expert[:, None] == expert)
    same = same | torch.eye(rows.count, dtype=torch.bool, device=same.device)
    first = ~same.tril(-1).any(1)
    together = (same & first[:, None]).to(table.dtype)
    return together @ table, together.to(tokens.dtype) @ tokens, first.to(tokens.dtype)
