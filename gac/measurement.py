"""What a mixer measures in a step: from the observer's sums, over ranks, to :class:`gac.Statistics`."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gac.cadence import Cadence
from gac.finishing import FinishOnDevice, FinishOnHost
from gac.laws.base import kind_of
from gac.observe.choice import choose_estimator, reads_running_sums
from gac.observe.observer import Observer
from gac.observe.optimizer_space import SecondMoments
from gac.observe.reduction import Reduction, gather_rows, reduce_step
from gac.observe.temporal import MovingMeans, noise_from_time, take_in
from gac.observe.topology import Topology, local_numel
from gac.options import Options
from gac.sequences.observer import SequenceObserver
from gac.sequences.reduction import SequenceReduction
from gac.silence import ABSENT, Silence
from gac.spending import Spending
from gac.statistics.branch import Branch
from gac.statistics.by_module import ModuleStatistics, take_apart
from gac.statistics.coefficient import sequence_rows, statistics_from_rows
from gac.statistics.step import NAN, Statistics, noise_from_sums, pair_statistics
from gac.statistics.sums import StepSums
from gac.statistics.uncertainty import StandardErrors, has_moved
from gac.worth import WorthOfSteps
from gac_kernels.arguments import accumulator_dtype

MODULE_HISTORY = 512
"""Steps kept of those that were taken apart by module."""

NOTHING_OBSERVED = (
    "mixer.step() with nothing observed: no backward pass reached a patched parameter since the last step. Run the "
    "losses inside `with mixer.sft():` and `with mixer.rl():`. If you did, the hooks are gone: copy.deepcopy, "
    "load_state_dict(assign=True) and fully_shard drop them, so patch the model after any of these."
)


class Measurement(FinishOnDevice, FinishOnHost):
    """Observer, estimators and the state that they carry from step to step.

    A step goes ``plan``, backward passes, ``post``, ``finish``; between the last two a collective may be under way.

    Args:
        model, parameters: what is watched.
        topology: of the ranks.
        options: of the mixer.
        cadence: which steps are measured.

    Attributes:
        spending: what steps cost, and which ones are measured.
        worth: what steps were worth; None unless the law asks for it.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        topology: Topology,
        options: Options,
        cadence: Cadence,
    ) -> None:
        self.estimator = _estimator(options, model, parameters, topology)
        self.used = self.estimator
        """What the last step was measured with, for the metrics."""
        self.device = parameters[0][1].device
        self.topology = topology
        self.modules: deque[ModuleStatistics] = deque(maxlen=MODULE_HISTORY)
        self.coefficient: Statistics | None = None
        self._dtype = accumulator_dtype(self.device)
        self._skipped: Tensor | float = torch.zeros((), dtype=self._dtype, device=self.device)
        self._options = options
        exact = self.estimator == "exact"
        watched = self.estimator != "coefficient"
        if self.estimator == "sequence":
            self.observer: Observer = SequenceObserver(model, parameters, options.sequences, topology)
        else:
            self.observer = Observer(
                parameters if watched else [],
                lossless=exact,
                running=_running(exact, topology, options),
                seed=0,
                copies=topology.copies if watched else None,
                hooks=options.hooks,
            )
        self._no_noise = torch.zeros(2, dtype=self._dtype, device=self.device)
        self._means = [MovingMeans(ledger.device) for ledger in self.observer.ledgers]
        timed = [self.observer] if isinstance(self.observer, SequenceObserver) else self.observer.ledgers
        self.spending = Spending(cadence, timed, self.device, topology.ranks)
        self._errors = StandardErrors(self.device, self._dtype)
        self.worth: WorthOfSteps | None = None
        if kind_of(options.law).measures_worth:
            kept = self.observer.ledgers if self.estimator in ("exact", "sketch") else []
            self.worth = WorthOfSteps([ledger.device for ledger in kept], self.device, self._dtype)
        self._absent = Silence(ABSENT)
        self._rows: list[Tensor] = []  # of the coefficient estimator
        self._reduction: Reduction | SequenceReduction | None = None  # on its way
        self.confirmed = topology.ranks == 1
        """Whether a first measured step has shown that hooks work on every rank."""

    @property
    def skipped(self) -> Tensor:
        """Steps dropped for non-finite gradients so far, 0-dim."""
        if not isinstance(self._skipped, Tensor):
            self._skipped = torch.tensor(self._skipped, dtype=self._dtype)
        return self._skipped

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes second moments from ``optimizer`` where gradients are measured in its space.

        Raises TypeError, ValueError for one that keeps none; see :class:`SecondMoments`.
        """
        if self._options.in_optimizer_space:
            self.observer.second_moments = SecondMoments(optimizer)

    # -- a step ---------------------------------------------------------------------------------------------------

    def plan(self, step: int) -> None:
        """Decides what the step to come (from 0) measures, and forgets the last one."""
        self.observer.clear()
        self._rows.clear()
        ready = self.estimator != "coefficient"
        if self._options.in_optimizer_space and ready:
            moments = self.observer.second_moments
            ready = moments is not None and moments.ready
            if moments is not None and ready:  # of the moments that this step's gradients are divided by
                self._root = moments.correction(self.device, self._dtype).sqrt().float()
        self.due = self.spending.cadence.is_due(step)
        every = self._options.report_interval
        by_module = every is not None and (self.spending.cadence.measurements + 1) % every == 0
        if isinstance(self.observer, SequenceObserver):
            self.observer.step = step
        self.observer.measure(ready and self.due, by_module=ready and self.due and by_module)

    def scaled(self, scale: Tensor) -> Tensor:
        """The scale that takes a branch's gradients to its contributions, from the one that undoes its weight."""
        return scale * self._root if self._options.in_optimizer_space and self.observer.measuring else scale

    def observe_tokens(self, logprobs: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor) -> None:
        """Rows for the coefficient estimator."""
        self.observer.seen.fired = True
        if self.due:
            rows = sequence_rows(logprobs, advantages, mask, is_expert)
            self._rows.append(rows.to(self.device, non_blocking=True))

    def check_observed(self) -> None:
        """Raises RuntimeError where a lone process has nothing to end a step with."""
        if self.topology.ranks > 1:
            return  # this rank may lack data; what all of them lack is found in the sums
        if not self.observer.seen.fired and not self.observer.seen.broken:
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
            if self.topology.ranks == 1:  # a rank of several may lack data
                counts = observer.seen.counts
                for branch in observer.seen.entered:
                    self._absent.take(branch, silent=counts[branch] == 0)
            silent = bool(observer.seen.entered) and not observer.alive
            reduce = SequenceReduction if isinstance(observer, SequenceObserver) else reduce_step
            told = {"time_noise": self._noise_from_time(), "silent": silent, "costs": self.spending.report()}
            if self.worth is not None and self.worth.crossing is not None:
                told["crossing"] = self.worth.crossing
            self._reduction = reduce(observer, self.device, self.topology, **told)
            observer.let_go()

    def finish(self, present: Tensor, step: int) -> Statistics | None:
        """Statistics of the step, of the estimator that applies to it; None when it was not measured.

        Args:
            present: ``[2]``, whether SFT and RL had a weight above 0: contributions of weight 0 leave no trace.
            step: its number, from 0.
        """
        statistics = None
        if self.worth is not None:
            self.worth.latest = None
        if self._reduction is not None:
            reduction, self._reduction = self._reduction, None
            sums = reduction.finish()
            self.spending.decide(reduction.costs)
            if not self.confirmed:
                self._confirm(float(sums.silent), float(sums.n.sum()))
            statistics = self._from_sums(sums, present, step)
            if self.worth is not None and sums.worth is not None:
                self.worth.take(sums.worth, reduction.totals, (sums.n * present > 0) & (sums.nonfinite == 0), step)
        elif self.is_measured:
            self.spending.decide(self.spending.report())
        self.used = self.estimator + ("+time" if any(self._lone()) else "")
        if self.from_tokens:
            statistics, self.used = self.coefficient, "coefficient"
        if statistics is None:
            return None
        healthy = statistics.nonfinite == 0
        self._skipped = self.skipped + (~healthy).to(self._dtype)
        last = self._errors.state["last"]
        statistics = self._errors.attach(statistics)
        if self.spending.cadence.counts_costs:
            self.spending.account.moved = has_moved(last, statistics).to(self._dtype)
        if self.observer.by_module and not self.from_tokens:  # tokens say nothing of modules
            self.modules.append(take_apart(sums, statistics, self.observer.module_labels, step + 1))
        return statistics

    @property
    def from_tokens(self) -> bool:
        """Whether this step's statistics are the coefficient estimator's."""
        return self.estimator == "coefficient" or (self._options.estimator == "auto" and self.observer.seen.outside)

    @property
    def is_measured(self) -> bool:
        """Whether the step under way is measured."""
        return self.observer.measuring or (self.estimator == "coefficient" and self.due)

    @property
    def skipped_on_host(self) -> float:
        """:attr:`skipped` as a number; the host waits for a device."""
        return float(self._skipped)

    @property
    def state_of_errors(self) -> Mapping[str, Tensor]:
        """What the statistics' standard errors go on from."""
        return self._errors.state

    def taken_apart(self, steps: int) -> list[ModuleStatistics]:
        """Statistics by module, oldest first. Raises RuntimeError where ``steps`` steps have brought none."""
        if not self.modules:
            raise RuntimeError(
                f"mixer.report() has nothing to tell yet: with report_interval={self._options.report_interval} and "
                f"one measurement in {self.spending.cadence.interval} steps at present, {steps} steps hold none that "
                "was taken apart by module"
            )
        return list(self.modules)

    # -- estimators -----------------------------------------------------------------------------------------------

    def _confirm(self, silent: float, n: float) -> None:
        """In the first step with contributions, on every rank: did hooks run on all of them? The only wait for the
        device.

        Args:
            silent: ranks on which none has run. n: contributions of all ranks.
        """
        if silent > 0 or (n == 0 and not self.observer.seen.outside):
            raise RuntimeError(f"{NOTHING_OBSERVED} ({silent:.0f} of {self.topology.ranks} ranks)")
        self.confirmed = n > 0  # passes over mixed batches show nothing

    def _lone(self) -> tuple[bool, bool]:
        """Of SFT and RL, whether a lone contribution is compared with earlier steps."""
        if self.estimator == "sequence" or not (self.topology.ranks == 1 or self.topology.sharded):
            return False, False  # a lone sequence is no lone contribution of a branch
        counts = self.observer.seen.counts
        return counts[Branch.SFT] == 1, counts[Branch.RL] == 1

    def _noise_from_time(self) -> Tensor:
        """``[2]``: noise of lone contributions, of the elements that this rank holds; 0 where there are several."""
        lone = self._lone()
        if not any(lone):
            return self._no_noise
        found = torch.zeros(2, dtype=self._dtype, device=self.device)
        for k, branch in enumerate(Branch):
            if lone[k]:
                found[k] = noise_from_time(branch, self.observer.ledgers, self._means, self.device)
        return found

    def _from_sums(self, sums: StepSums, present: Tensor, step: int) -> Statistics:
        n = sums.n * present
        noise = noise_from_sums(sums, n)
        lone = [branch for branch, alone in zip(Branch, self._lone(), strict=True) if alone]
        if lone:
            known = n > 0
            by_time = torch.where(known, sums.time_noise, NAN)
            noise = torch.stack([(by_time if b in lone else noise)[k] for k, b in enumerate(Branch)])
            healthy = known & (sums.nonfinite == 0)
            for k, branch in enumerate(Branch):
                if branch in lone:
                    take_in(branch, self.observer.ledgers, self._means, healthy[k], step)
        return pair_statistics(noise=noise, norms=sums.norms, n=n, nonfinite=sums.nonfinite)

    def _from_tokens(self) -> Statistics | None:
        """The coefficient estimator's statistics of the step; None where it was not fed."""
        if not self._rows and not (self.estimator == "coefficient" and self.due):
            return None
        rows = torch.cat(self._rows) if self._rows else torch.zeros(0, 8, dtype=self._dtype, device=self.device)
        if self.topology.ranks > 1:
            rows = gather_rows(rows, self._options.process_group)
        return statistics_from_rows(rows, self._options.coefficient)

    def go_on_from(self, earlier: Measurement) -> None:
        """Takes over what does not belong to single parameters: counts and the statistics' errors."""
        self._skipped = earlier.skipped.to(self.device)
        self._errors.state = {name: value.to(self.device) for name, value in earlier._errors.state.items()}
        self.confirmed = self.confirmed or earlier.confirmed
        self.spending.account = earlier.spending.account

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """What the next step needs: tensors alone, on the CPU."""
        # moving means belong to one process: with several ranks they would be one rank's own
        means = self._means if self.topology.ranks == 1 else []
        worth = {} if self.worth is None else {"worth": self.worth.state_dict(alone=self.topology.ranks == 1)}
        own = {"sequences": self.observer.history.state_dict()} if isinstance(self.observer, SequenceObserver) else {}
        return (
            worth
            | own
            | {
                "skipped": self.skipped.to("cpu", copy=True),
                "means": [_on_cpu(m.state) for m in means],
                "uncertainty": _on_cpu(self._errors.state),
                "cadence": self.spending.cadence.state_dict(),
            }
        )

    @property
    def sketches(self) -> list[tuple[torch.device, int]]:
        """Device and size of each sketch whose moving mean is part of the state."""
        return [(x.device, x.layout.size) for x in self.observer.ledgers] if self.topology.ranks == 1 else []

    @property
    def is_exact(self) -> bool:
        """Whether moving means are of gradients as they are, and not of sketches."""
        return self.estimator == "exact"

    def take_state(self, state: dict) -> None:
        """Continues where :meth:`state_dict` left off: its parts, read as :class:`gac.saved.MixerState` says."""
        self._skipped = state["skipped"]
        self._errors.state = state["uncertainty"]
        if "cadence" in state:
            self.spending.cadence.load_state_dict(state["cadence"])
        for k, means in enumerate(self._means):
            means.state = state["means"][k] if state["means"] else {}
        if isinstance(self.observer, SequenceObserver):
            self.observer.history.take_state(state.get("sequences"), self.device)
        if self.worth is not None and "worth" in state:
            self.worth.take_state(state["worth"])


def _on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to("cpu", copy=True) for name, value in state.items()}


def _estimator(options: Options, model: nn.Module, parameters: Sequence[tuple[str, nn.Parameter]], t: Topology) -> str:
    return choose_estimator(
        options.estimator,
        elements=sum(local_numel(p) for _, p in parameters),
        model_bytes=sum(local_numel(p) * p.element_size() for p in model.parameters()),
        ranks=t.ranks,
        sharded=t.sharded,
        running=_running(True, t, options),
    )


def _running(exact: bool, t: Topology, options: Options) -> bool:
    return reads_running_sums(exact=exact, ranks=t.ranks, sharded=t.sharded, managed=t.managed, in_place=options.hooks)
