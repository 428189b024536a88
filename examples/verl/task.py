"""The data of `run.sh` in verl's format, and the reward that verl calls: greatest common divisors of reasoning-gym.

    python examples/verl/task.py --out data

Takes a few seconds and needs `pip install '.[train]'`. Writes train.parquet, whose rows hold a demonstration each, and
val.parquet, whose rows hold none.
"""

import argparse
from pathlib import Path
from typing import Any

from gac.tasks.chat import chat_match

TASK = "gcd:numbers=2,max_value=200"


def row(record: dict[str, Any], index: int, *, demonstrate: bool) -> dict[str, Any]:
    """A row of verl's data set from one of `gac.tasks.chat.chat_rows`."""
    text = record["completion"][-1]["content"] if demonstrate else None
    return {
        "data_source": "gcd",
        "prompt": record["prompt"],
        "reward_model": {"style": "rule", "ground_truth": record["answer"]},
        "extra_info": {"index": index, "demonstration": text},
    }


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None, **_: Any) -> float:
    """1.0 for a reply with the right answer, as `reward.custom_reward_function` of verl calls it."""
    return chat_match(solution_str, ground_truth)


def main() -> None:
    from datasets import Dataset

    from gac.tasks.chat import chat_rows
    from gac.tasks.problems import build_splits, parse_task

    options = argparse.ArgumentParser(description="Writes train.parquet and val.parquet for run.sh.")
    options.add_argument("--out", type=Path, default=Path("data"), help="folder of the files")
    options.add_argument("--rows", type=int, default=2000, help="training rows")
    args = options.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    problems = build_splits([parse_task(TASK)], heldout=200, demonstrations=0, prompts=args.rows, seed=0)
    for name, part in (("train", problems.prompts), ("val", problems.heldout)):
        rows = [row(record, index, demonstrate=name == "train") for index, record in enumerate(chat_rows(part))]
        Dataset.from_list(rows).to_parquet(str(args.out / f"{name}.parquet"))
        print(f"{args.out / name}.parquet: {len(rows)} rows")


if __name__ == "__main__":
    main()
