"""What gac found against the truth, within bounds that follow from the arithmetic.

With ``u = 2**-24``: buffers are float32, so a total of ``n`` contributions errs by at most ``(n + 4) u sum |x_k|`` in
its norm (a rounding for each addition, the scale's and the product's). A contribution read as a difference of running
sums ``R`` adds ``u (|R_k| + |R_k-1|)``, the rounding of their float32 copies; against the contribution that autograd
computed, also the rounding of ``R_k`` to the model's dtype. Squares are summed in float64, but 16 products of 16-bit
numbers at a time in float32: ``32 u`` of the sum. In Adam's space a weighted element errs by at most ``8 u``, and by a
rounding of the model's dtype where second moments are rescaled in it. Everything else is propagated: ``|x|^2`` errs by
``2 |x| e + e^2``. ``mu`` must be what the law makes of the statistics that were found, to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import gac
from gac import Statistics
from gac_kernels import reference
from tests.fuzz.draw import TOLD, Draw
from tests.fuzz.run import Found, Outcome
from tests.fuzz.tokens import coefficients
from tests.fuzz.truth import Contribution, Expected, Past, Replay

U = 2.0**-24
SQUARES = 32 * U
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
TINY = 1e-40
TOKENS = 1e-9
"""Of sums over tokens, in float64: variances are differences of them."""
BRANCHES = ("sft", "rl")


@dataclass(frozen=True)
class Difference:
    """One number of one step that is not what it has to be."""

    step: int
    what: str
    got: object
    want: object

    def __str__(self) -> str:
        return f"step {self.step}: {self.what} is {self.got}, has to be {self.want}"


@dataclass
class Sums:
    """Of a branch: its total and the weighted sum of squares, with bounds of their errors."""

    n: int
    total: Tensor
    total_error: float
    power: float
    power_error: float


def compare(draw: Draw, outcome: Outcome) -> list[Difference]:
    """All differences of a run's steps."""
    replay = Replay(draw, outcome)
    return Comparison(draw, replay).differences(outcome, replay.steps())


class Comparison:
    """Carries what statistics and laws remember from step to step."""

    def __init__(self, draw: Draw, replay: Replay) -> None:
        self.draw, self.replay = draw, replay
        self.found: list[Difference] = []
        self._start()

    def _start(self) -> None:
        self.law = self._controller()
        self.number = 0
        self._compare_anew()

    def _compare_anew(self) -> None:
        """Lone contributions have no earlier steps to be compared with."""
        self.past = {kind: {b: Past() for b in BRANCHES} for kind in (True, False)}

    def _controller(self) -> gac.Controller:
        controller = gac.Controller(self.draw.law, **self.draw.options)
        if self.draw.named != "found":
            controller.law.follow(self.replay.optimizer)
        return controller

    def differences(self, outcome: Outcome, expected: list[Expected]) -> list[Difference]:
        for index, (found, want) in enumerate(zip(outcome.steps, expected, strict=True)):
            step = self.draw.steps[index]
            for event in step.before:
                if event == "repatch":
                    self._start()
                elif event in ("watch", "unfreeze"):
                    self._compare_anew()
                elif event == "save":
                    state, self.law = self.law.state_dict(), self._controller()
                    self.law.load_state_dict(state)
            self.step = index
            self._gradients(found, want)
            self._statistics(found, want)
            if step.update:
                self.law.law.follow(self.replay.optimizer)
            self._mu(found)
            self.number += 1
        return self.found

    def _differ(self, what: str, got: object, want: object) -> None:
        self.found.append(Difference(self.step, what, got, want))

    # -- gradients ------------------------------------------------------------------------------------------------

    def _gradients(self, found: Found, want: Expected) -> None:
        for k, (got, right) in enumerate(zip(found.gradients, want.gradients, strict=True)):
            if (got is None) != (right is None):
                self._differ(f"gradient {k}", "none" if got is None else "some", "none" if right is None else "some")
            elif got is not None and not self._same(got, right, want.exact):
                self._differ(f"gradient {k}", got.tolist(), right.tolist())

    @staticmethod
    def _same(got: Tensor, right: Tensor, exact: bool) -> bool:
        if exact:
            return got.dtype == right.dtype and bool(((got == right) | (got.isnan() & right.isnan())).all())
        slack = 64 * torch.finfo(got.dtype).eps
        largest = float(right.double().nan_to_num().abs().max()) if right.numel() else 0.0
        return torch.allclose(got.double(), right.double(), rtol=slack, atol=slack * largest, equal_nan=True)

    # -- statistics -----------------------------------------------------------------------------------------------

    def _statistics(self, found: Found, want: Expected) -> None:
        due = self.number % self.draw.interval == 0
        always = self.draw.estimator == "coefficient" and self.draw.engine != "one"
        right, sick = coefficients(want.told, always=always) if due else (None, False)
        self._coefficients("coefficient", found.coefficient, right, sick)
        if self.draw.from_tokens(self.draw.steps[self.step]):
            self._coefficients("statistics", found.statistics, right, sick)
            if found.modules is not None and found.modules.step == self.number + 1:
                self._differ("taken apart", True, "tokens say nothing of modules")
            if want.measured and self.draw.estimator != "coefficient" and not (want.broken or want.nonfinite):
                self._remember(found, want)
            return
        statistics = found.statistics
        if (statistics is not None) != want.measured:
            self._differ("measured", statistics is not None, want.measured)
        if statistics is None or not want.measured:
            return
        sick = want.broken or want.nonfinite
        if sick or float(statistics.nonfinite) != 0:
            if sick != (float(statistics.nonfinite) > 0):
                self._differ("nonfinite", float(statistics.nonfinite), "above 0" if sick else 0)
            return
        views = (True, False) if self.draw.running else (False,)
        for differences in views:
            self._numbers(found, want, differences)
        self._modules(found)

    def _remember(self, found: Found, want: Expected) -> None:
        """Lone contributions are compared with those of later steps, whatever gave the statistics of theirs."""
        for differences in (True, False):
            for b in BRANCHES:
                own = [c for c in want.contributions if c.branch == b]
                part = self._sums(own, found, differences)
                if len(own) == 1 and part.n:
                    self.past[differences][b].totals.append((part.total, part.total_error))

    def _coefficients(self, of: str, got: Statistics | None, right: dict[str, float] | None, sick: bool) -> None:
        """What the coefficient estimator has made of the sequences that a step told; None: of none."""
        if (got is None) != (right is None):
            self._differ(of, "none" if got is None else "some", "none" if right is None else "some")
        elif got is not None and sick != (float(got.nonfinite) > 0):
            self._differ(f"nonfinite of {of}", float(got.nonfinite), "above 0" if sick else 0)
        elif got is not None and not sick:
            for name, value in right.items():
                here = float(getattr(got, name))
                if math.isnan(here) != math.isnan(value) or abs(here - value) > TOKENS * (1 + abs(value)):
                    self._differ(f"{name} of {of}", here, value)

    def _numbers(self, found: Found, want: Expected, differences: bool) -> None:
        """Every number; ``differences`` of running sums stand for contributions, or the contributions themselves."""
        own = {b: [c for c in want.contributions if c.branch == b] for b in BRANCHES}
        sums = {b: self._sums(own[b], found, differences) for b in BRANCHES}
        numbers: dict[str, tuple[float, float]] = {}
        noise = {}
        for b, name in zip(BRANCHES, ("s", "r"), strict=True):
            part = sums[b]
            size, error = float(part.total.norm()), part.total_error
            norm = (size**2, 2 * size * error + error**2 + SQUARES * size**2)
            numbers[f"norm_{name}2"] = norm if part.n else (math.nan, 0.0)
            noise[b] = (math.nan, 0.0)
            if len(own[b]) == 1:
                past = self.past[differences][b]
                if part.n:
                    noise[b] = past.noise(part.total, error, U)
                    past.totals.append((part.total, error))
            elif part.n >= 2:
                value = max(part.power - norm[0], 0.0) / (part.n - 1)
                noise[b] = value, (part.power_error + norm[1]) / (part.n - 1)
            numbers[f"sigma_{name}2"] = noise[b]
            numbers[f"n_{name}"] = (float(part.n), 0.0)
        s, r = sums["sft"], sums["rl"]
        both = s.n and r.n
        e = float(s.total.norm()) * r.total_error + float(r.total.norm()) * s.total_error
        e += s.total_error * r.total_error + SQUARES * float(s.total.norm()) * float(r.total.norm())
        numbers["dot"] = (float(s.total @ r.total), e) if both else (math.nan, 0.0)
        e = numbers["norm_s2"][1] + numbers["norm_r2"][1] + 2 * e
        apart = float((s.total - r.total).square().sum())
        numbers["distance2"] = (apart, e) if both else (math.nan, 0.0)
        rest = noise["sft"][0] + noise["rl"][0]
        numbers["delta_g2"] = numbers["distance2"][0] - rest, e + noise["sft"][1] + noise["rl"][1]
        for name, (right, error) in numbers.items():
            got = float(getattr(found.statistics, name))
            if math.isnan(got) != math.isnan(right) or abs(got - right) > error + TINY:
                how = " of differences" if differences else ""
                self._differ(name + how, got, f"{right} within {error:.2g}")

    def _sums(self, own: list[Contribution], found: Found, differences: bool) -> Sums:
        present = [c for c in own if c.weight > 0 or self.draw.running]
        n = sum(c.weight > 0 and (c.tokens is None or c.tokens > 0) for c in own)
        size = len(own[0].x) if own else 1
        total, slack, sizes = torch.zeros(size, dtype=torch.float64), 0.0, 0.0
        power = power_error = 0.0
        tokens = sum(1.0 if c.tokens is None else c.tokens for c in own)
        for c in present:
            x, error = self._contribution(c, differences)
            length = float(x.norm())
            total, slack, sizes = total + x, slack + error, sizes + length
            share = tokens / (1.0 if c.tokens is None else c.tokens)
            power += share * length**2
            power_error += share * (2 * length * error + error**2 + (SQUARES + 8 * U) * length**2)
        if found.layouts and not found.layouts[0].lossless:
            return self._sketched(present, found, differences, Sums(n, total, slack, power, power_error), sizes)
        return Sums(n, total, slack + (len(own) + 4) * U * sizes, power, power_error)

    def _contribution(self, c: Contribution, differences: bool) -> tuple[Tensor, float]:
        """A contribution and the bound of its error before it is added."""
        coarse = self.draw.dtype in ("bfloat16", "float16") or self.draw.model == "mixed"
        unit = U if self.draw.metric == "gradient" else 8 * U + (ROUNDOFF["bfloat16"] if coarse else 0.0)
        x = c.after - c.before if differences else c.x
        error = unit * float(x.norm())
        if self.draw.running:
            error += (unit + U) * (float(c.before.norm()) + float(c.after.norm()))
            if not differences:
                own = ROUNDOFF["bfloat16" if self.draw.model == "mixed" else self.draw.dtype]
                error += own * float(c.after.norm())
                if self.draw.engine == "fsdp2":  # the average over ranks is rounded before it is added
                    error += own * float(c.x.norm())
        return x, error

    def _sketched(self, own: list[Contribution], found: Found, differences: bool, sums: Sums, sizes: float) -> Sums:
        """The same of a lossy sketch: contributions as the reference projects them, in float64.

        At most as many rows as a slab has share a bucket: the norm grows by at most the root of their number.
        """
        layout = found.layouts[0]
        grown = math.sqrt(layout.rows_per_slab)
        total = torch.zeros(layout.size, dtype=torch.float64)
        power = error = 0.0
        tokens = sum(1.0 if c.tokens is None else c.tokens for c in own)
        for c in own:
            x, slack = self._contribution(c, differences)
            slack = grown * slack + layout.rows_per_slab * U * grown * float(c.after.norm() + c.before.norm())
            projected = torch.zeros_like(total)
            reference.sketch(x.split([p.numel() for p in self.replay.parameters]), projected, layout=layout)
            total += projected
            length, share = float(projected.norm()), tokens / (1.0 if c.tokens is None else c.tokens)
            power += share * length**2
            error += share * (2 * length * slack + slack**2 + SQUARES * length**2)
        slack = grown * (sums.total_error + (len(own) + 4 + layout.rows_per_slab) * U * sizes)
        slack += sum(layout.rows_per_slab * U * grown * float(c.after.norm() + c.before.norm()) for c in own)
        return Sums(sums.n, total, slack, power, error)

    def _modules(self, found: Found) -> None:
        """Modules are there when they are due, and add up to the whole."""
        every, measured = self.draw.report_interval, self.number // self.draw.interval
        due = every is not None and (measured + 1) % every == 0
        modules = found.modules
        if due != (modules is not None and modules.step == self.number + 1):
            self._differ("taken apart", not due, due)
        elif due:
            for name in ("norm_s2", "norm_r2", "dot", "distance2"):
                whole = float(getattr(found.statistics, name))
                parts = float(modules.column(name).double().sum())
                size = float(found.statistics.norm_s2.nan_to_num() + found.statistics.norm_r2.nan_to_num())
                if math.isnan(whole) != math.isnan(parts) or abs(whole - parts) > SQUARES * size + TINY:
                    self._differ(f"{name} of all modules", parts, whole)

    # -- mu -------------------------------------------------------------------------------------------------------

    def _mu(self, found: Found) -> None:
        right = self.law.update(found.statistics, **TOLD.get(self.draw.law, {}))
        if found.mu != float(right.float()):
            self._differ("mu", found.mu, float(right.float()))
        if found.metrics.get("mu") != found.mu:
            self._differ("mu in metrics", found.metrics.get("mu"), found.mu)
