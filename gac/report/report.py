"""What the gradients say: signal-to-noise ratio, noise scale and agreement of both branches, overall and by module.

From the statistics of single steps to numbers that can be read. With ``<.>`` for an average over steps, of the whole
model or of one module:

    |g_b|^2      = <norm_b2> - <sigma_b2>                    squared norm of the true gradient, unbiased
    SNR_b        = |g_b|^2 / <sigma_b2>                      signal over noise of the gradient of one step
    B_simple     = <n_b * sigma_b2> / |g_b|^2                noise scale, in contributions
    cosine       = <dot> / sqrt(|g_s|^2 |g_r|^2)             between the true gradients
    disagreement = <delta_g2>                                a module's share of it adds up to 1 over modules

Averages come first, ratios and clamping last: ratios of noisy numbers are biased, and so are clamped ones. The noise
scale is that of McCandlish, Kaplan, Amodei and the OpenAI Dota team 2018 (*An Empirical Model of Large-Batch
Training*): a batch of B makes ``1 / (1 + B_simple / B)`` of the progress of a noiseless step, hence half at
``B = B_simple``. docs/report.md has derivations, assumptions and limits.

Standard errors come from the spread over steps (:func:`gac.report.estimates.estimate`). They hold where steps are
independent; a mean that drifts within the average widens them.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gac.report.by_source import from_json, source_sentence, source_table, to_json
from gac.report.estimates import FEWEST
from gac.report.history import read_history
from gac.report.mix import Mix
from gac.report.sentences import TITLES, Findings, sentences
from gac.report.signals import (
    BRANCHES,
    WHOLE,
    BranchSignal,
    ModuleSummary,
    contribution_counts,
    map_column,
    series_of,
    summaries,
)
from gac.report.text_table import share_text, text_table
from gac.sequences.sources import SourceTable
from gac.statistics.by_module import ModuleStatistics


class Report:
    """Signal, noise and agreement of a run's gradients.

    Attributes:
        history: the steps it was made from, oldest first.
        whole: the :class:`ModuleSummary` of the whole model.
        modules: those of the modules, in model order.
        unit: what noise scales are counted in.
        counted: whether the steps tell how many contributions they had.
        batch: for ``"sft"`` and ``"rl"`` the batch of a step in that unit, averaged as everything else; NaN where
            the branch was absent.
        informative_groups: share of the groups of rollouts whose rewards differ, averaged alike; NaN: not told.
        sources: what each source of data gives; None where rows were not told theirs.
        mix: where the law stands; None: not told.
        in_torch: why steps end in torch rather than in one piece; None: they do not, or not told.
    """

    def __init__(
        self,
        history: Sequence[ModuleStatistics],
        *,
        half_life: float = 200.0,
        sizes: Mapping[str, float] | None = None,
        unit: str | None = None,
        sources: SourceTable | None = None,
        mix: Mix | None = None,
        in_torch: str | None = None,
    ) -> None:
        """
        Args:
            history: statistics by module of measured steps, oldest first; all of one model.
            half_life: a measurement that lies so many optimizer steps back counts half; ``math.inf`` counts all alike.
            sizes: for ``"sft"`` and ``"rl"`` how many of ``unit`` a contribution holds (sequences or tokens of a
                micro-batch of one rank). Without it noise scales are in contributions.
            unit: the name of what ``sizes`` counts, in the plural.
            sources: what each source of data gives, of :meth:`gac.Mixer.sources`.
            mix: where the law stands.
            in_torch: why steps end in torch, if they do.

        Raises:
            ValueError: no steps, steps of different models, or an impossible option.
        """
        if not half_life > 0:
            raise ValueError(f"half_life must be a positive number of optimizer steps, got {half_life!r}")
        if sizes is not None and (set(sizes) != {"sft", "rl"} or not all(0 < v < math.inf for v in sizes.values())):
            raise ValueError(f"sizes must hold positive numbers for 'sft' and 'rl', got {dict(sizes)!r}")
        if (sizes is None) != (unit is None):
            raise ValueError("sizes and unit belong together: how many of what a contribution holds")
        self.history = [s for s in history if s.whole is None or not float(s.whole.nonfinite) > 0]
        if not self.history:
            what = "all of its steps have non-finite gradients" if history else "it is empty"
            raise ValueError(f"no measured step in the history: {what}; train with report_interval=10, say")
        labels = self.history[-1].labels
        for statistics in self.history:
            if statistics.labels != labels:
                raise ValueError(
                    f"steps {statistics.step} and {self.history[-1].step} have different modules: "
                    "make a report of the steps of one model"
                )
        self.sources, self.mix, self.in_torch = sources, mix, in_torch
        self.half_life = float(half_life)
        self.sizes = dict(sizes) if sizes else None
        self._counts = contribution_counts(self.history)
        self.counted = self._counts is not None
        self.unit = (unit or "contributions") if self.counted else "batches of a step"
        self._series = series_of(self.history, self._counts, self.sizes)
        steps = torch.tensor([s.step for s in self.history], dtype=torch.float64)
        weights = torch.exp2((steps - steps[-1]) / self.half_life)
        self.batch = self._batch(weights)
        told = [math.nan if s.informative_groups is None else s.informative_groups for s in self.history]
        shares = torch.tensor(told, dtype=torch.float64)
        known = weights * ~shares.isnan()
        self.informative_groups = float((known * shares.nan_to_num()).sum() / known.sum())
        self.whole, *self.modules = summaries((WHOLE, *labels), self._series, weights)

    @classmethod
    def from_run(cls, path: str | Path, *, last: int | None = None, **options: Any) -> Report:
        """The report of a run directory (or history file), of its last ``last`` measured steps.

        Raises what :func:`read_history` raises.
        """
        if last is not None and last < 1:
            raise ValueError(f"last must be a number of measured steps from 1 on, got {last!r}")
        history = read_history(path)
        return cls(history[-last:] if last else history, **options)

    def _batch(self, weights: Tensor) -> dict[str, float]:
        if self._counts is None:
            return dict.fromkeys(BRANCHES.values(), 1.0)
        batch = {}
        for branch, counts in zip(BRANCHES.values(), self._counts.unbind(-1), strict=True):
            w = weights * (counts > 0)
            size = self.sizes[branch] if self.sizes else 1.0
            batch[branch] = float((w * counts.nan_to_num()).sum() / w.sum()) * size
        return batch

    def module(self, label: str) -> ModuleSummary:
        """The row of one module."""
        for row in self.modules:
            if row.label == label:
                return row
        raise KeyError(f"no module {label!r}; known: {', '.join(row.label for row in self.modules)}")

    # -- over time ----------------------------------------------------------------------------------------------

    def maps(self, *, columns: int = 120, half_life: float | None = None) -> dict[str, Any]:
        """Numbers by module and time, for a picture.

        Neighbouring steps are averaged into at most ``columns`` columns, and each column with its neighbours, weighted
        ``2^-(distance/half_life)``: a distance in columns, by default a twentieth of them and at least 1.5.

        Returns:
            ``steps``, the ``C`` columns' middle steps; ``labels``; and for each of ``disagreement`` (share of the
            whole model's), ``cosine``, ``noise_sft`` and ``noise_rl`` (``sigma2 / norm2``: 1 is noise alone) a pair of
            lists, ``[M][C]`` for modules and ``[C]`` for the whole model (for the disagreement: its part of the
            squared distance). NaN where not measurable.
        """
        total = len(self.history)
        edges = torch.linspace(0, total, min(columns, total) + 1, dtype=torch.float64).round().long()
        chunks = [slice(a, b) for a, b in pairwise(edges.tolist())]
        x = {name: torch.stack([c[chunk].nanmean(0) for chunk in chunks]) for name, c in self._series.items()}
        steps = torch.tensor([float(s.step) for s in self.history], dtype=torch.float64)
        at = torch.arange(len(chunks), dtype=torch.float64)
        half_life = max(1.5, len(chunks) / 20) if half_life is None else half_life
        parts: dict[str, list[Tensor]] = {"disagreement": [], "cosine": [], "noise_sft": [], "noise_rl": []}
        for column in at:
            weights = torch.exp2(-(at - column).abs() / half_life)
            for name, values in map_column(x, weights).items():
                parts[name].append(values)
        grids = {name: torch.stack(values, -1) for name, values in parts.items()}
        return {
            "steps": [float(steps[chunk].mean()) for chunk in chunks],
            "labels": [row.label for row in self.modules],
            **{name: (grid[1:].tolist(), grid[0].tolist()) for name, grid in grids.items()},
        }

    def plot(self, path: str | Path, *, title: str = "") -> None:
        """A heat map of modules over steps, as a PNG (or what the suffix says). Needs matplotlib."""
        from gac.plots import draw_modules

        draw_modules(self.maps(), path, title=title)

    # -- as text ------------------------------------------------------------------------------------------------

    def headline(self) -> str:
        """Which steps, and how they are weighted."""
        first, last, count = self.history[0].step, self.history[-1].step, len(self.history)
        if count == 1:
            return f"Gradients of step {last}, measured once: no standard errors"
        text = f"Gradients of {count} measured steps from {first} to {last}"
        if math.isfinite(self.half_life):
            text += f"; what lies {self.half_life:g} steps back counts half"
        return text + ("" if count >= FEWEST else "; too few for standard errors")

    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Columns and rows of the tables: both branches of the whole model, the modules, sources of data."""
        present = [name for name in BRANCHES.values() if getattr(self.whole, name).norm.known]
        both = len(present) == 2
        overall = [
            [
                TITLES[name],
                *(getattr(getattr(self.whole, name), key).text() for key in ("signal", "noise", "snr")),
                f"{self.batch[name]:.4g}",
                getattr(self.whole, name).noise_scale.text(),
            ]
            for name in present
        ]
        columns = ["module"]
        for name in present:
            columns += [f"{TITLES[name]} SNR", f"{TITLES[name]} scale", f"{TITLES[name]} noise"]
        columns += ["cosine", "disagreement"] if both else []
        rows = []
        for row in (self.whole, *self.modules):
            cells = [row.label]
            for branch in (getattr(row, name) for name in present):
                cells += [branch.snr.text(), branch.noise_scale.text(), share_text(branch.noise_share)]
            rows.append(cells + ([row.cosine.text(), row.disagreement_share.text(percent=True)] if both else []))
        head = ["branch", "signal |g|^2", "noise sigma^2", "SNR", f"batch ({self.unit})", "noise scale"]
        return [(head, overall), (columns, rows), *([] if self.sources is None else [source_table(self.sources)])]

    def reading(self) -> list[str]:
        """What the numbers mean, a sentence or two each."""
        unit = self.unit if self.counted else None
        found = sentences(Findings(self.whole, self.modules, self.batch, unit, self.informative_groups))
        of_sources = "" if self.sources is None else source_sentence(self.sources)
        of_mix = "" if self.mix is None else self.mix.sentence()
        of_end = "" if self.in_torch is None else f"Steps end in torch, not in one piece: {self.in_torch}."
        return [sentence for sentence in (of_mix, *found, of_sources, of_end) if sentence]

    def __str__(self) -> str:
        text = (textwrap.fill(sentence, 110) for sentence in self.reading())
        return "\n".join([self.headline(), *(text_table(*table) for table in self.tables()), *text])

    def __rich__(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = [Text(self.headline())]
        for columns, rows in self.tables():
            table = Table(box=SIMPLE_HEAD)
            for index, column in enumerate(columns):
                table.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
            for row in rows:
                table.add_row(*row)
            parts.append(table)
        return Group(*parts, *(Text(sentence) for sentence in self.reading()))

    # -- as JSON ------------------------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """All numbers, as :mod:`json` takes them; what is not known is None."""
        branch = lambda b: {key: getattr(b, key).as_json() for key in BranchSignal.__dataclass_fields__}
        row = lambda r: {
            "sft": branch(r.sft),
            "rl": branch(r.rl),
            "cosine": r.cosine.as_json(),
            "disagreement": r.disagreement.as_json(),
            "disagreement_share": r.disagreement_share.as_json(),
        }
        return {
            "steps": [self.history[0].step, self.history[-1].step],
            "measured": len(self.history),
            "half_life": self.half_life if math.isfinite(self.half_life) else None,
            "unit": self.unit,
            "batch": {name: value if math.isfinite(value) else None for name, value in self.batch.items()},
            "informative_groups": None if math.isnan(self.informative_groups) else self.informative_groups,
            "whole": row(self.whole),
            "modules": {r.label: row(r) for r in self.modules},
            "sources": None if self.sources is None else to_json(self.sources),
            "mix": None if self.mix is None else self.mix.as_json(),
            "in_torch": self.in_torch,
            "reading": self.reading(),
        }

    def save(self, path: str | Path) -> None:
        """Writes the report and its history as one JSON file, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "report": self.as_json(),
            "options": {
                "half_life": self.half_life if math.isfinite(self.half_life) else None,
                "sizes": self.sizes,
                "unit": self.unit if self.sizes else None,
            },
            "history": [statistics.to_record() for statistics in self.history],
        }
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Reads what :meth:`save` wrote. Raises ValueError for another file."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not {"options", "history"} <= set(content):
            raise ValueError(f"{path} is not a saved report: pass a file that Report.save wrote")
        options = dict(content["options"])
        report = content.get("report", {})
        sources, mix, options["in_torch"] = map(report.get, ("sources", "mix", "in_torch"))  # None in files of before
        options["mix"] = None if mix is None else Mix.from_json(mix)
        options["sources"] = None if sources is None else from_json(sources)
        options["half_life"] = math.inf if options["half_life"] is None else options["half_life"]
        return cls([ModuleStatistics.from_record(record) for record in content["history"]], **options)
