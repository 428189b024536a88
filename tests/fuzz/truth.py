"""The same schedule in plain autograd on a copy of the model, and what each step's statistics then are in float64.

The copy has the model's dtype and compiler, so that both take the same gradients, to the bit; the rest is float64. A
contribution is what ``torch.autograd.grad`` returns for the weighted loss, over its weight. Where gradients are read as
running sums, it is the difference of two of the copy's accumulated gradients, which are rounded to the model's dtype.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from tests.fuzz.draw import Draw, Pass, Step
from tests.fuzz.models import (
    Net,
    Planted,
    build,
    compile_stages,
    losses_of,
    make_optimizer,
    mixed_losses,
    run_backward,
    warm_up,
)
from tests.fuzz.run import Outcome, before_pass, clear, clear_gradients, finish_gradients, shifted, unfreeze, whole

WARM_UP = 10  # steps of Adam before its space is measured in, as documented


@dataclass
class Contribution:
    """One contribution as vectors over all trainable elements, in float64.

    Attributes:
        x: without its weight. before, after: the gradient accumulated before and after it, times ``1/weight``.
    """

    branch: str
    x: Tensor
    before: Tensor
    after: Tensor
    tokens: float | None
    weight: float


@dataclass
class Expected:
    """What a step has to show.

    Attributes:
        measured: whether this step has statistics. broken: whether a pass left a part of its gradient and failed.
        nonfinite: whether some gradient was not finite. gradients: accumulated, before clipping.
        exact: whether they are the same to the bit (a checkpoint may add up a shared weight in another order).
        told: the passes, of all ranks, whose sequences the mixer was told of.
    """

    measured: bool = True
    broken: bool = False
    nonfinite: bool = False
    contributions: list[Contribution] = field(default_factory=list)
    gradients: list[Tensor | None] = field(default_factory=list)
    exact: bool = True
    told: list[Pass] = field(default_factory=list)


class Replay:
    """The copy in the middle of its run.

    Args:
        draw: what was drawn. outcome: of gac's run; its weights are used, and steps after an error are left out.
        rank: whose data.
    """

    def __init__(self, draw: Draw, outcome: Outcome, rank: int = 0) -> None:
        self.draw, self.outcome, self.rank = draw, outcome, rank
        self.net: Net = build(draw.model, draw.dtype, draw.seed)
        self.optimizer = make_optimizer(draw.optimizer, self.net)
        warm_up(self.net, self.optimizer, draw.warm)
        compile_stages(self.net, draw.compiled)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.known = draw.named != "found"  # whether the mixer knows the optimizer
        self.number = 0  # of the step, for the interval
        self.ready = self._ready()

    def steps(self) -> list[Expected]:
        """What every step of the outcome has to show."""
        return [self._take(step, number) for number, step in enumerate(self.draw.steps[: len(self.outcome.steps)])]

    def _take(self, step: Step, number: int) -> Expected:
        for event in step.before:
            if event == "aside":
                clear_gradients(self.parameters)
            elif event in ("unfreeze", "thaw"):
                self.parameters = unfreeze(self.net, self.optimizer)
            elif event in ("repatch", "save"):
                self.number *= event == "save"
                self.known = self.draw.named != "found"
                self.ready = self._ready()
        expected = Expected(measured=self.ready and self.number % self.draw.interval == 0)
        found = self.outcome.steps[number]
        space = self._space() if self.draw.metric == "optimizer" and expected.measured else None
        if step.threads == "together" and not (expected.measured and self.draw.estimator != "coefficient"):
            expected.exact = False  # without hooks, plain passes at once add up in any order
        for k in found.order:
            self._pass(shifted(step.passes[k], self.rank), found.weights[k], found.failed[k], space, expected)
        expected.told = self._of_all_ranks(
            [p for p, failed in zip(step.passes, found.failed, strict=True) if not failed]
        )
        expected.gradients = [None if p.grad is None else whole(p.grad).clone() for p in self.parameters]
        finish_gradients(step, self.parameters, self.draw.scale)
        if step.update:
            self.optimizer.step()
            self.known = True
        clear(step, self.parameters)
        with torch.no_grad():
            for parameter, value in zip(self.parameters, found.parameters, strict=False):
                parameter.copy_(value)
        self.number += 1
        self.ready = self._ready()
        return expected

    def _pass(self, one: Pass, weight: Tensor, failed: bool, space: Tensor | None, expected: Expected) -> None:
        before_pass(one, self.net, self.parameters)
        if one.how == "mixed":
            self._mixed_pass(one, weight, expected)
            return
        factor = torch.ones(()) if one.how == "unweighted" else weight
        losses = lambda plain: [factor * self._scaled(part) for part in losses_of(self.net, one, plain=plain)]
        if failed:
            arrived: list[nn.Parameter] = []
            hooks = [p.register_post_accumulate_grad_hook(arrived.append) for p in self.parameters]
            with contextlib.suppress(Planted):
                run_backward(losses(False), one, self.parameters)
            for hook in hooks:
                hook.remove()
            expected.broken |= bool(arrived)
            return
        gradients = torch.autograd.grad(losses(True), self.parameters, allow_unused=True)
        if one.style == "inputs":
            gradients = tuple(g if k % 2 == 0 else None for k, g in enumerate(gradients))
        own = self._contributions(flat(gradients, self.parameters))
        value = float(factor) * (self.draw.scale or 1.0)
        undone = 1.0 / value if value else 0.0
        scale = undone if space is None else undone * space
        for _ in range(2 if one.style == "twice" else 1):
            before = self._accumulated()
            self._add(one, gradients, lambda: losses(False), expected)
            after = self._accumulated()
            for x in own:
                expected.nonfinite |= not bool(torch.isfinite(after if self.draw.running else x).all())
                expected.contributions.append(
                    Contribution(one.branch, x * scale, before * scale, after * scale, one.tokens, float(weight))
                )

    def _mixed_pass(self, one: Pass, weights: Tensor, expected: Expected) -> None:
        """A pass over a mixed batch: its gradient counts, and is no contribution."""
        losses = lambda plain: mixed_losses(self.net, one, plain=plain).values()
        mixed = lambda plain: self._scaled(sum(w * loss for w, loss in zip(weights, losses(plain), strict=True)))
        gradients = torch.autograd.grad(mixed(True), self.parameters, allow_unused=True)
        self._add(one, gradients, lambda: [mixed(False)], expected)

    def _add(self, one: Pass, gradients: tuple, losses: Callable[[], list[Tensor]], expected: Expected) -> None:
        """Accumulates a pass as autograd does; within a checkpoint it has an order of its own."""
        if one.checkpoint is None:
            self._accumulate(gradients)
        else:
            style = one.style if one.style == "inputs" else None
            run_backward(losses(), replace(one, style=style), self.parameters)
            expected.exact &= one.checkpoint == "plain" or self.draw.model not in ("tied", "reused")

    def _of_all_ranks(self, passes: list[Pass]) -> list[Pass]:
        return passes

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.draw.scale is None else loss * torch.full((), self.draw.scale)

    def _contributions(self, own: Tensor) -> list[Tensor]:
        """The contributions that a pass makes, from the gradient of this rank."""
        return [own]

    def _accumulate(self, gradients: tuple[Tensor | None, ...]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            self._accumulate_one(parameter, gradient)

    def _accumulate_one(self, parameter: nn.Parameter, gradient: Tensor | None) -> None:
        if gradient is not None:
            parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad + gradient

    def _accumulated(self) -> Tensor:
        return flat([p.grad for p in self.parameters], self.parameters)

    # -- the optimizer's space ------------------------------------------------------------------------------------

    def _ready(self) -> bool:
        if self.draw.metric != "optimizer":
            return True
        counts = [float(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        return self.known and bool(counts) and max(counts) >= WARM_UP

    def _space(self) -> Tensor:
        """``1 / (sqrt(v / (1 - beta2^t)) + eps)`` of every element; 0 where ``v`` is 0 or young."""
        group = self.optimizer.param_groups[0]
        parts = []
        for parameter in self.parameters:
            state = self.optimizer.state.get(parameter)
            part = torch.zeros(parameter.numel(), dtype=torch.float64)
            if state and float(state["step"]) >= WARM_UP:
                v = state["exp_avg_sq"].double().reshape(-1)
                corrected = v / (1.0 - group["betas"][1] ** float(state["step"]))
                part = torch.where(v == 0, 0.0, 1.0 / (corrected.sqrt() + group["eps"]))
            parts.append(part)
        return torch.cat(parts)


def flat(gradients, parameters: list[nn.Parameter]) -> Tensor:
    parts = [
        torch.zeros(p.numel(), dtype=torch.float64) if g is None else whole(g).detach().double().reshape(-1)
        for g, p in zip(gradients, parameters, strict=True)
    ]
    return torch.cat(parts)


@dataclass
class Past:
    """Gradients of a branch in its lone steps so far, for the noise that is told from time; errors beside them."""

    totals: list[tuple[Tensor, float]] = field(default_factory=list)

    def noise(self, total: Tensor, error: float, u: float) -> tuple[float, float]:
        """``|G - M|^2 / (1 + v)`` with the average ``M`` of weights that shrink by .9 a step, and its error bound."""
        if not self.totals:
            return math.nan, 0.0
        n = len(self.totals)
        shares = [0.1 * 0.9 ** (n - 1 - k) for k in range(n)]
        whole_weight = sum(shares)
        mean = sum(s * g for s, (g, _) in zip(shares, self.totals, strict=True)) / whole_weight
        v = 0.1 * (2 - whole_weight) / (1.9 * whole_weight)
        away = total - mean
        size = max([float(total.norm())] + [float(g.norm()) for g, _ in self.totals])
        slack = error + max(e for _, e in self.totals) + 4 * (n + 2) * u * size
        distance = float(away.norm())
        return distance**2 / (1 + v), (2 * distance * slack + slack**2) / (1 + v)
