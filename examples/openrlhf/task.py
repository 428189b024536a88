"""The data of `run.sh` in OpenRLHF's format: greatest common divisors of reasoning-gym.

    python examples/openrlhf/task.py --out data

Takes a few seconds and needs `pip install '.[train]'`. Writes train.jsonl and eval.jsonl: `prompt` is a message list,
`label` is JSON with the answer and, in training rows, a demonstration.
"""

import argparse
import json
from pathlib import Path
from typing import Any

TASK = "gcd:numbers=2,max_value=200"


def row(record: dict[str, Any], *, demonstrate: bool) -> dict[str, Any]:
    """A row of OpenRLHF's data set from one of `gac.tasks.chat.chat_rows`."""
    label = {"answer": record["answer"]}
    if demonstrate:
        label["demonstration"] = record["completion"][-1]["content"]
    return {"prompt": record["prompt"], "label": json.dumps(label)}


def main() -> None:
    from gac.tasks.chat import chat_rows
    from gac.tasks.problems import build_splits, parse_task

    options = argparse.ArgumentParser(description="Writes train.jsonl and eval.jsonl for run.sh.")
    options.add_argument("--out", type=Path, default=Path("data"), help="folder of the files")
    options.add_argument("--rows", type=int, default=2000, help="training rows")
    args = options.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    problems = build_splits([parse_task(TASK)], heldout=200, demonstrations=0, prompts=args.rows, seed=0)
    for name, part in (("train", problems.prompts), ("eval", problems.heldout)):
        rows = [row(record, demonstrate=name == "train") for record in chat_rows(part)]
        (args.out / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        print(f"{args.out / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
