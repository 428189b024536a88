"""A run of ``gac audit``: training with the estimators side by side, and what is left of it in files."""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gac.files import load_state, save_whole
from gac.runs.config import TrainConfig
from gac.runs.console import Reporter
from gac.runs.errors import UsageError, usage_errors
from gac.runs.folder import write_config, write_text
from gac.state import Anything, Table

RAW = "audit.pt"
"""The raw numbers of a finished audit in its run directory."""


@dataclasses.dataclass(frozen=True)
class AuditedLaw:
    """The law in charge.

    Attributes:
        name: as it is registered.
        options: as they were given.
        alpha: its constant target.
    """

    name: str
    options: dict[str, Any]
    alpha: float


def audited_law(config: TrainConfig) -> AuditedLaw:
    """The law in charge, where an audit can follow it.

    Raises:
        UsageError: it is unknown, acts per prompt or token, or moves its target.
    """
    from gac.laws.controller import Controller
    from gac.laws.rules import RuleLaw

    name, options = config.law_and_options()
    with usage_errors():
        law = Controller(name, **options).law
    if isinstance(law, RuleLaw):
        raise UsageError(f"--law {config.law} acts per prompt or token, not through one mu: there is none to audit")
    alpha = options.get("alpha", options.get("alpha_static", 0.5))
    if isinstance(alpha, str):
        raise UsageError(f"--law {config.law} moves its target; an audit needs a constant alpha")
    return AuditedLaw(law.name, options, float(alpha))


def run_audit(
    config: TrainConfig,
    out: Path,
    reporter: Reporter,
    *,
    every: int,
    replicates: int,
    warm_start: Path | None,
    command: Sequence[str],
    started: float,
) -> None:
    """Trains as `config` says and leaves the raw numbers in `out`, beside the files of the run.

    Args:
        config: checked, with the defaults of its model.
        out: a run directory that holds no run yet.
        reporter: shows the progress.
        every: steps between two measurements of the truth.
        replicates: independent steps drawn for each of them.
        warm_start: folder of the starting model; None for one in `out`.
        command: the words of the command line.
        started: ``time.perf_counter()`` at the beginning.

    Raises:
        UsageError: the law cannot be followed, or the library rejects an option.
    """
    from gac.runs import training

    config = dataclasses.replace(config, interval=config.interval or 1)  # every step has its truth beside it
    law = audited_law(config)
    setup = training.prepare(config)  # first: what does not load leaves nothing behind
    provenance = write_config(out, vars(config), command, warm_start)
    warm = training.run_warm_start(setup, warm_start or out / training.WARM_START, reporter)

    from gac.audit.record import Record
    from gac.audit.shadow import default_contenders
    from gac.audit.trainer import AuditTrainer

    record = Record(law.alpha)
    trainer_class = functools.partial(
        AuditTrainer,
        record=record,
        contenders=default_contenders(law.options if law.name == "gac" else {}),
        every=every,
        replicates=replicates,
        seed=config.seed,
    )
    summary = training.run_hybrid(setup, out, warm, reporter, started=started, trainer_class=trainer_class)
    about = {
        **provenance,
        "every": every,
        "replicates": replicates,
        "seconds": round(time.perf_counter() - started, 1),
        "accuracy": {"warm_start": warm, "final": summary["final_accuracy"]},
    }
    save_whole({"about": about, "record": dataclasses.asdict(record)}, out / RAW)


def conclude(out: Path, reporter: Reporter, *, data: Path, picture: Path) -> None:
    """Figures from the raw numbers in `out`, shown and written to `data` (JSON) and `picture` (PNG)."""
    from gac.audit.figures import figures
    from gac.audit.picture import draw_audit
    from gac.audit.record import Record
    from gac.audit.report import show

    raw = load_state(out / RAW, Table({"about": Anything(), "record": Anything()}), then="run the audit again")
    record, about = Record.restored(raw["record"]), raw["about"]
    law, options = TrainConfig(**about["options"]).law_and_options()
    found = figures(record, options if law == "gac" else {})
    write_text(data, compact_json({**about, "figures": found.as_json(), "record": record.as_json()}))
    draw_audit(record, picture, title=f"law {law}, seed {about['options']['seed']}")
    show(found, reporter)


def compact_json(value: Any, indent: str = "") -> str:
    """JSON with a line for each entry of a dictionary, and lists of numbers on one line; NaN becomes null."""
    if isinstance(value, dict) and value:
        inner = indent + " "
        lines = (f"{inner}{json.dumps(str(k))}: {compact_json(v, inner).lstrip()}" for k, v in value.items())
        return "{\n" + ",\n".join(lines) + "\n" + indent + "}" + ("\n" if not indent else "")
    if isinstance(value, (list, tuple)):
        plain = not any(isinstance(item, dict) for item in value)
        parts = [compact_json(item, indent).strip() for item in value]
        return "[" + (", " if plain else ",\n" + indent).join(parts) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "null"
    return json.dumps(value)
