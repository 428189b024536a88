"""Runs of several laws and seeds side by side: where they live, what they share, what they come to."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gac.runs.config import TrainConfig, changed_flags, parse_law
from gac.runs.console import markdown_table
from gac.runs.errors import UsageError
from gac.runs.folder import CONFIG, METRICS, SUMMARY, read_json, read_metrics, versions, write_json, write_text

COLUMNS = ("law", "warm start", "final", "last four", "lowest", "highest", "regret", "mean mu", "GAC share")
"""Accuracies are means over seeds; "last four" is the mean of a run's last four evaluations, of which the next two
columns give the lowest and highest seed, and "regret" what it lacks to that of the best constant."""


def run_directory(out: Path, law: str, seed: int) -> Path:
    """Where the run of a law and seed lives."""
    return out / "runs" / re.sub(r"[^\w.=,-]", "-", law) / f"seed{seed}"


def warm_start_directory(out: Path, seed: int) -> Path:
    """Where the starting model of a seed lives."""
    return out / "warm_start" / f"seed{seed}"


def check_stored(out: Path, wanted: TrainConfig) -> None:
    """Refuses to mix a run that was made with other options into the comparison; threads may differ.

    Raises:
        UsageError: `out` holds such a run.
    """
    if not (out / CONFIG).exists():
        return
    stored = read_json(out / CONFIG)["options"]
    if flags := changed_flags(wanted, stored, may_change=("threads",)):
        raise UsageError(f"{out} holds a run made with other options ({flags}); choose another --out")


def result_line(out: Path) -> str:
    """Accuracy before and after a finished run."""
    summary = read_json(out / SUMMARY)
    return f"accuracy {summary['warm_start_accuracy']:.3f} -> {summary['final_accuracy']:.3f}"


def collect(
    out: Path, config: TrainConfig, laws: Sequence[str], seeds: Sequence[int], command: Sequence[str]
) -> list[list[str]]:
    """Reads all runs of a comparison; writes `compare.json`, `compare.md` and `compare.png`.

    Args:
        out: where the comparison lives.
        config: what its runs share.
        laws, seeds: of the runs; all of them are finished.
        command: the words of the command line, for `compare.json`.

    Returns:
        A row of :data:`COLUMNS` for each law.
    """
    from gac.plots import draw_comparison

    runs = {
        law: [
            {
                "seed": seed,
                "summary": read_json(run_directory(out, law, seed) / SUMMARY),
                "records": read_metrics(run_directory(out, law, seed) / METRICS),
            }
            for seed in seeds
        ]
        for law in laws
    }
    late = {law: _mean(run["summary"]["last_four_accuracy"] for run in runs[law]) for law in laws}
    best = best_constant(late)
    regret = {law: None if best is None else late[best] - late[law] for law in laws}
    rows = [_row(law, [run["summary"] for run in runs[law]], regret[law]) for law in laws]
    curves = {
        law: [
            {
                "seed": run["seed"],
                "summary": run["summary"],
                "accuracy": [[r["step"], r["accuracy"]] for r in run["records"] if "accuracy" in r],
                "mu": [round(r["gac/mu"], 5) for r in run["records"]],
            }
            for run in runs[law]
        ]
        for law in laws
    }
    write_json(
        out / "compare.json",
        {
            "command": list(command),
            "options": vars(config),
            "seeds": list(seeds),
            "versions": versions(),
            "best_constant": best,
            "regret": regret,
            "laws": curves,
        },
    )
    write_text(out / "compare.md", markdown_table(COLUMNS, rows))
    draw_comparison(runs, out / "compare.png", title=f"{', '.join(config.task)}, {len(seeds)} seeds", best=best)
    return rows


def best_constant(late: Mapping[str, float]) -> str | None:
    """The constant that was best in hindsight; None where none was compared.

    It is chosen on the runs that it is judged by, which favours it: among near ties it is the luckiest.

    Args:
        late: late accuracy of every law, the mean over seeds.
    """
    constants = [law for law in late if parse_law(law)[0] == "fixed"]
    return max(constants, key=lambda law: late[law], default=None)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _row(law: str, summaries: Sequence[dict[str, Any]], regret: float | None) -> list[str]:
    mean = lambda key: _mean(summary[key] for summary in summaries)
    late = [summary["last_four_accuracy"] for summary in summaries]
    return [
        law,
        f"{mean('warm_start_accuracy'):.3f}",
        f"{mean('final_accuracy'):.3f}",
        f"{mean('last_four_accuracy'):.3f}",
        f"{min(late):.3f}",
        f"{max(late):.3f}",
        "-" if regret is None else f"{regret + 0.0:+.3f}",
        f"{mean('mean_mu'):.3f}",
        f"{100 * mean('gac_share'):.2f}%",
    ]
