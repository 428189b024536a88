"""What a mixer measures in a step: from the observer's sums, over ranks, to :class:`gac.Statistics`."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gac.observe.observer import Observer
from gac.observe.optimizer_space import SecondMoments
from gac.observe.reduction import Reduction, StepSums, gather_rows
from gac.observe.temporal import MovingMeans
from gac.observe.topology import Topology, local_numel
from gac.statistics import NAN, Branch, ModuleStatistics, Statistics, noise_from_weighted, pair_statistics
from gac.statistics.coefficient import CoefficientOptions, sequence_rows, statistics_from_rows
from gac.statistics.uncertainty import SuccessiveDifferences
from gac_kernels.arguments import accumulator_dtype

ESTIMATORS = ("auto", "sketch", "exact", "coefficient")

EXACT_BYTES = 32 * 2**20
"""``auto`` is exact where its fp32 buffers take at most this much ..."""

EXACT_SHARE = 0.05
"""... or this share of the model's own parameters (LoRA)."""

EXACT_BYTES_REDUCED = 2**20
"""Where ranks hold replicas the buffers also travel between them: ``auto`` is exact there up to this size."""

MODULE_HISTORY = 512
"""Steps kept of those that were taken apart by module."""

NOTHING_OBSERVED = (
    "mixer.step() with nothing observed: no backward pass reached a patched parameter since the last step. Run the "
    "losses inside `with mixer.sft():` and `with mixer.rl():`. If you did, the hooks are gone: copy.deepcopy, "
    "load_state_dict(assign=True) and fully_shard drop them, so patch the model after any of these."
)

_WITH_ERRORS = ("sigma_s2", "sigma_r2", "distance2", "delta_g2")


class Measurement:
    """Observer, estimators and the state that they carry from step to step.

    A step goes ``plan``, backward passes, ``post``, ``finish``; between the last two a collective may be under way.

    Args:
        model, parameters: what is watched.
        topology: of the ranks. group: of the replicas.
        estimator: one of :data:`ESTIMATORS`.
        interval, report_interval: measure in every so many steps; take every so many of those apart by module.
        second_moments: of the optimizer, to measure in its space.
        coefficient: options of the coefficient estimator.
        hooks: False where gradients are handed over.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        topology: Topology,
        group: dist.ProcessGroup | None,
        estimator: str,
        interval: int,
        report_interval: int | None,
        second_moments: SecondMoments | None,
        coefficient: CoefficientOptions,
        hooks: bool,
    ) -> None:
        self.estimator = _choose(estimator, model, parameters, topology, in_place=hooks)
        self.used = self.estimator
        """What the last step was measured with, for the metrics."""
        self.device = parameters[0][1].device
        self.topology = topology
        self.modules: deque[ModuleStatistics] = deque(maxlen=MODULE_HISTORY)
        self.coefficient: Statistics | None = None
        self.skipped = torch.zeros((), dtype=accumulator_dtype(self.device), device=self.device)
        self._dtype = self.skipped.dtype
        self._auto = estimator == "auto"
        self._group = group
        self._interval, self._report_interval = interval, report_interval
        self._second_moments = second_moments
        self._options = coefficient
        exact = self.estimator == "exact"
        watched = self.estimator != "coefficient"
        self.observer = Observer(
            parameters if watched else [],
            lossless=exact,
            running=_reads_running_sums(exact, topology, in_place=hooks),
            seed=0,
            second_moments=second_moments,
            copies=topology.copies if watched else None,
            hooks=hooks,
        )
        self._means = [MovingMeans(ledger.device) for ledger in self.observer.ledgers]
        self._uncertainty = SuccessiveDifferences(len(_WITH_ERRORS), self.device, self._dtype)
        self._rows: list[Tensor] = []  # of the coefficient estimator
        self._reduction: Reduction | None = None  # on its way
        self.confirmed = topology.ranks == 1
        """Whether a first measured step has shown that hooks work on every rank."""

    # -- a step ---------------------------------------------------------------------------------------------------

    def plan(self, step: int) -> None:
        """Decides what the step to come (from 0) measures, and forgets the last one."""
        self.observer.clear()
        self._rows.clear()
        ready = self.estimator != "coefficient"
        if self._second_moments is not None and ready:
            ready = self._second_moments.ready
            if ready:  # of the moments that this step's gradients are divided by
                self._root = self._second_moments.correction(self.device, self._dtype).sqrt().float()
        measured, rest = divmod(step, self._interval)
        self.due = rest == 0
        by_module = self._report_interval is not None and (measured + 1) % self._report_interval == 0
        self.observer.measure(ready and self.due, by_module=ready and self.due and by_module)

    def scaled(self, scale: Tensor) -> Tensor:
        """The scale that takes a branch's gradients to its contributions, from the one that undoes its weight."""
        return scale * self._root if self._second_moments is not None and self.observer.measuring else scale

    def observe_tokens(self, logprobs: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor) -> None:
        """Rows for the coefficient estimator."""
        self.observer.fired = True
        if self.due:
            rows = sequence_rows(logprobs, advantages, mask, is_expert)
            self._rows.append(rows.to(self.device, non_blocking=True))

    def check_observed(self) -> None:
        """Raises RuntimeError where a lone process has nothing to end a step with."""
        if self.topology.ranks > 1:
            return  # this rank may lack data; what all of them lack is found in the sums
        if not self.observer.fired and not self.observer.broken:
            raise RuntimeError(NOTHING_OBSERVED)
        if self.estimator == "coefficient" and self.due and not self._rows:
            raise RuntimeError(
                'mixer.step() without token coefficients: estimator="coefficient" is fed by mixer.observe_tokens(...), '
                "once for each micro-batch"
            )

    def post(self) -> None:
        """The step has ended: adds up what this rank has and starts the collective."""
        observer = self.observer
        self.coefficient = self._from_tokens()
        if observer.measuring:
            silent = observer.entered and not observer.alive
            self._reduction = Reduction(
                observer, self.device, self.topology, time_noise=self._noise_from_time(), silent=silent
            )

    def finish(self, present: Tensor, step: int) -> Statistics | None:
        """Statistics of the step, of the estimator that applies to it; None when it was not measured.

        Args:
            present: ``[2]``, whether SFT and RL had a weight above 0: contributions of weight 0 leave no trace.
            step: its number, from 0.
        """
        statistics = None
        if self._reduction is not None:
            sums, self._reduction = self._reduction.finish(), None
            self._confirm(sums)
            statistics = self._from_sums(sums, present)
        self.used = self.estimator + ("+time" if self._uses_time() else "")
        if self.estimator == "coefficient" or (self._auto and self.observer.outside):
            statistics, self.used = self.coefficient, "coefficient"
        if statistics is None:
            return None
        healthy = statistics.nonfinite == 0
        self.skipped = self.skipped + (~healthy).to(self._dtype)
        estimates = torch.stack([getattr(statistics, name) for name in _WITH_ERRORS])
        errors = self._uncertainty.update(estimates, healthy).unbind()
        named = {f"{name}_se": error for name, error in zip(_WITH_ERRORS, errors, strict=True)}
        statistics = dataclasses.replace(statistics, **named)
        if self.observer.by_module and self.estimator != "coefficient":
            self.modules.append(self._take_apart(sums, statistics, step))
        return statistics

    # -- estimators -----------------------------------------------------------------------------------------------

    def _confirm(self, sums: StepSums) -> None:
        """In the first measured step, on every rank: did hooks run on all of them? The only wait for the device."""
        if self.confirmed:
            return
        if float(sums.silent) > 0 or float(sums.n.sum()) == 0:
            raise RuntimeError(f"{NOTHING_OBSERVED} ({float(sums.silent):.0f} of {self.topology.ranks} ranks)")
        self.confirmed = True

    def _uses_time(self, branch: Branch | None = None) -> bool:
        """Whether a lone contribution (of a branch, or of either) is compared with earlier steps."""
        counts = self.observer.counts
        alone = 1 in counts.values() if branch is None else counts[branch] == 1
        return alone and (self.topology.ranks == 1 or self.topology.sharded)

    def _noise_from_time(self) -> Tensor:
        """``[2]``: noise of lone contributions, of the elements that this rank holds; 0 where there are several."""
        found = torch.zeros(2, dtype=self._dtype, device=self.device)
        for k, branch in enumerate(Branch):
            if self._uses_time(branch):
                for ledger, means in zip(self.observer.ledgers, self._means, strict=True):
                    part = means.noise(branch, ledger.totals[branch]) / ledger.copies
                    found[k] += part.to(self.device, non_blocking=True)
        return found

    def _from_sums(self, sums: StepSums, present: Tensor) -> Statistics:
        n = sums.n * present
        noise = noise_from_weighted(sums.power * sums.tokens, sums.norms[:2], n)
        lone = [branch for branch in Branch if self._uses_time(branch)]
        if lone:
            known = n > 0
            by_time = torch.where(known, sums.time_noise, NAN)
            noise = torch.stack([(by_time if b in lone else noise)[k] for k, b in enumerate(Branch)])
            healthy = known & (sums.nonfinite == 0)
            for k, branch in enumerate(Branch):
                for ledger, means in zip(self.observer.ledgers, self._means, strict=True):
                    if branch in lone:
                        means.update(branch, ledger.totals[branch], healthy[k].to(ledger.device, non_blocking=True))
        return pair_statistics(noise=noise, norms=sums.norms, n=n, nonfinite=sums.nonfinite)

    def _take_apart(self, sums: StepSums, whole: Statistics, step: int) -> ModuleStatistics:
        """The step's statistics by module."""
        n_s, n_r = whole.n_s, whole.n_r
        norm_s2, norm_r2, dot = sums.module_norms.unbind(1)
        power_s, power_r = (sums.module_power * sums.tokens).unbind(1)
        sigma_s2 = noise_from_weighted(power_s, norm_s2, n_s)
        sigma_r2 = noise_from_weighted(power_r, norm_r2, n_r)
        distance2 = (norm_s2 + norm_r2 - 2 * dot).clamp(min=0.0)
        columns = [sigma_s2, sigma_r2, distance2 - sigma_s2 - sigma_r2, distance2, norm_s2, norm_r2, dot]
        has_s, has_r = n_s >= 1, n_r >= 1
        known = torch.stack([has_s, has_r, has_s & has_r, has_s & has_r, has_s, has_r, has_s & has_r])
        values = torch.where(known & (whole.nonfinite == 0), torch.stack(columns, dim=1), NAN)
        return ModuleStatistics(step + 1, tuple(self.observer.module_labels), values, whole)

    def _from_tokens(self) -> Statistics | None:
        """The coefficient estimator's statistics of the step; None where it was not fed."""
        if not self._rows and not (self.estimator == "coefficient" and self.due):
            return None
        rows = torch.cat(self._rows) if self._rows else torch.zeros(0, 8, dtype=self._dtype, device=self.device)
        if self.topology.ranks > 1:
            rows = gather_rows(rows, self._group)
        return statistics_from_rows(rows, self._options)

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """What the next step needs: tensors alone, on the CPU."""
        # moving means belong to one process: with several ranks they would be one rank's own
        means = self._means if self.topology.ranks == 1 else []
        return {
            "skipped": self.skipped.to("cpu", copy=True),
            "means": [_on_cpu(m.state) for m in means],
            "uncertainty": _on_cpu(self._uncertainty.state),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues where :meth:`state_dict` left off, on any number of ranks."""
        self.skipped = state["skipped"].to(self.device, copy=True)
        self._uncertainty.state = {
            k: v.to(self.device, self._dtype, copy=True) for k, v in state["uncertainty"].items()
        }
        if self.topology.ranks == 1 and len(state["means"]) == len(self._means):
            for means, saved in zip(self._means, state["means"], strict=True):
                means.state = {k: v.to(means.device, copy=True) for k, v in saved.items()}


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to("cpu", copy=True) for name, value in state.items()}


def _reads_running_sums(exact: bool, topology: Topology, *, in_place: bool) -> bool:
    """Whether contributions are differences of what was accumulated.

    Not where the engine reduces the gradient in place before the next pass (replicas on several ranks) or takes it
    away, and not for the exact estimator where the gradient itself is at hand: that saves two of its buffers.
    """
    return topology.sharded or not in_place or (topology.ranks == 1 and not exact and not topology.managed)


def _choose(estimator: str, model: nn.Module, parameters, topology: Topology, *, in_place: bool) -> str:
    """What ``auto`` stands for."""
    if estimator != "auto":
        return estimator
    vectors = 4 if _reads_running_sums(True, topology, in_place=in_place) else 2
    buffers = 4 * vectors * sum(local_numel(p) for _, p in parameters)
    if topology.ranks > 1 and not topology.sharded:
        return "exact" if buffers <= EXACT_BYTES_REDUCED else "sketch"
    whole = sum(local_numel(p) * p.element_size() for p in model.parameters())
    return "exact" if buffers <= max(EXACT_BYTES, EXACT_SHARE * whole) else "sketch"
