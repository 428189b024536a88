"""What a mixer has found: statistics, metrics, reports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gac.statistics.by_module import ModuleStatistics
from gac.statistics.step import Statistics

if TYPE_CHECKING:
    from gac.ending import Ending
    from gac.laws.controller import Controller
    from gac.measurement import Measurement
    from gac.options import Options
    from gac.report import Report


class Results:
    """What :class:`gac.Mixer` tells of the steps that have ended."""

    controller: Controller
    _ending: Ending
    _measurement: Measurement
    _options: Options

    if TYPE_CHECKING:

        def _settle(self) -> None: ...

        def _known_sources(self) -> Any: ...

    @property
    def statistics(self) -> Statistics | None:
        """Statistics of the last step, as 0-dim tensors on the device; None where it measured none."""
        self._settle()
        return self._ending.statistics

    @property
    def coefficient(self) -> Statistics | None:
        """The coefficient estimator's statistics of the last step; None without :meth:`observe_tokens`."""
        return self._measurement.coefficient

    @property
    def modules(self) -> ModuleStatistics | None:
        """Statistics by module, of the newest step that was taken apart (every ``report_interval`` measured steps)."""
        self._settle()
        return self._measurement.modules[-1] if self._measurement.modules else None

    def report(self, **options: Any) -> Report:
        """What the gradients say so far, overall and by module: signal-to-noise ratio, noise scale, disagreement.

        It averages over the steps that were taken apart (every ``report_interval`` measured steps, the last 512 at
        most), with mu and the law's aim first and a part for each source that :meth:`batch` was told of, says why steps
        end in torch where they do, and waits for the device. ``print`` it; ``options`` are those of
        :class:`gac.report.Report`. Raises RuntimeError where no step was taken apart yet.
        """
        from gac.report import Mix, Report

        self._settle()
        told = {
            "sources": self._known_sources(),
            "mix": Mix.of(self._ending.metrics(wait=True)),
            "in_torch": self._ending.why_in_torch,
        }
        return Report(self._measurement.taken_apart(self.controller.steps), **(told | options))

    @property
    def interval(self) -> int:
        """Steps from one measurement to the next, at present."""
        return self._measurement.spending.cadence.interval

    def metrics(self, *, wait: bool = False, measured: bool = False) -> dict[str, float | str]:
        """Numbers of the newest step that has reached the host (``wait``: of the last one); empty before the first.

        Args:
            measured: of the newest step that was measured. A budget leaves steps out, whose statistics are NaN.

        Returns:
            ``mu`` (of the step to come), ``mu_raw`` (the law's estimate before prior and guardrails), ``mu_se`` (its
            standard error), ``prior``, what else the law shows, the fields of :class:`gac.Statistics`, ``cosine``,
            ``skipped`` (steps dropped for non-finite gradients so far), ``silent_s`` and ``silent_r`` (1 where the
            branch took part and its gradient was exactly 0, else 0; after 5 steps in a row a warning names it),
            ``seconds`` (host time spent in GAC during the step), ``overhead`` (that time over all other time, of late;
            NaN in the first ten steps of a budget), ``step`` and the name of the ``estimator`` (with ``+time`` where a
            lone contribution was compared with earlier steps). NaN: not measured. Behind ``name/`` if it has one.
        """
        if wait:
            self._settle()
        prefix = "" if self._options.name is None else f"{self._options.name}/"
        return {prefix + name: value for name, value in self._ending.metrics(wait=wait, measured=measured).items()}
