"""What the warm starts of the study's tasks reach: the accuracy that a run begins with.

python -m benchmarks.study.calibration --calibrate     # writes benchmarks/results/study/calibration.json
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.study.models import SIZES, WARM_START_BATCH, build
from benchmarks.study.tasks import TASKS, distinct_problems, task_data

CALIBRATION = Path(__file__).parent.parent / "results" / "study" / "calibration.json"


def calibrate(task: str, size: str, seed: int, *, room: bool) -> dict[str, Any]:
    """What a warm start of a task gives: held-out accuracy, pass rate of samples at temperature 1, processor time.

    With `room` also the accuracy after a warm start of three times the steps on all prompts, three times as many
    problems: what is left to learn.
    """
    from gac.tasks.evaluation import accuracy
    from gac.tasks.warm_start import warm_start

    data, chosen = task_data(task, seed), TASKS[task]
    rows = [*data.heldout, *data.prompts]
    length = max(len(row["answer"]) for row in rows) + 1
    steps = chosen.warm_start_steps[size]

    def trained(problems: list[dict[str, Any]], steps: int) -> tuple[Any, Any]:
        model, tokenizer = build(size, (row["prompt"] + row["answer"] for row in rows), seed)
        warm_start(
            model, tokenizer, problems,
            steps=steps, batch_size=WARM_START_BATCH, lr=SIZES[size].warm_start_lr, seed=seed,
        )  # fmt: skip
        return model, tokenizer

    began = time.process_time()  # one thread; processes beside this one do not count
    model, tokenizer = trained(data.demonstrations, steps)
    record = {
        "task": task,
        "size": size,
        "seed": seed,
        "steps": steps,
        "processor_seconds": round(time.process_time() - began, 1),
        "accuracy": round(accuracy(model, tokenizer, data.heldout, max_new_tokens=length), 4),
        "sampled": round(sampled_pass_rate(model, tokenizer, data.heldout, length, seed), 4),
    }
    if room:
        model, tokenizer = trained(data.prompts, 3 * steps)
        record["accuracy_all_prompts"] = round(accuracy(model, tokenizer, data.heldout, max_new_tokens=length), 4)
    return record


def sampled_pass_rate(model: Any, tokenizer: Any, rows: list[dict[str, Any]], length: int, seed: int) -> float:
    """Share of samples that are right, one for each row."""
    import torch
    from transformers import GenerationConfig

    from gac.tasks.evaluation import encode_prompts, inference_mode_of
    from gac.tasks.problems import exact_match

    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with inference_mode_of(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batch = encode_prompts(tokenizer, [row["prompt"] for row in rows])
        tokens = model.generate(**batch, generation_config=settings)
    texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(exact_match(text, row["answer"]) for text, row in zip(texts, rows, strict=True)) / len(rows)


def main(arguments: list[str] | None = None) -> None:
    """``python -m benchmarks.study.calibration``: lists the tasks with an example, or measures their warm starts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.calibration", description=main.__doc__)
    parser.add_argument(
        "--calibrate", action="store_true", help="measure the warm starts; goes on where it was stopped"
    )
    parser.add_argument("--room", action="store_true", help="also what three times the problems and steps give")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    sizes = ("small", "medium", "large")
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=sizes)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=CALIBRATION, help="default: %(default)s")
    options = parser.parse_args(arguments)
    if not options.calibrate:
        for task in TASKS.values():
            prompt, answer = distinct_problems(task, 1, 0)[0]
            print(f"{task.name:18}{task.domain:9}{task.role:14}{prompt} -> {answer}")
        return
    import torch

    torch.set_num_threads(1)
    kept: dict[str, dict[str, Any]] = {}
    if options.out.exists():
        kept = {_cell(record): record for record in json.loads(options.out.read_text())["records"]}
    rank = [*TASKS, *sizes]
    for size, task, seed in itertools.product(options.sizes, options.tasks, options.seeds):
        cell = f"{task}/{size}/{seed}"
        if kept.get(cell, {}).get("steps") == TASKS[task].warm_start_steps[size]:
            continue
        kept[cell] = calibrate(task, size, seed, room=options.room)
        print(json.dumps(kept[cell]), flush=True)
        order = sorted(kept.values(), key=lambda r: (rank.index(r["task"]), rank.index(r["size"]), r["seed"]))
        _write(options.out, order)


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    """One record a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n  ".join(json.dumps(record) for record in records)
    command = "python -m benchmarks.study.calibration --calibrate"
    path.write_text(f'{{"command": "{command}",\n "records": [\n  {lines}\n]}}\n')


def _cell(record: dict[str, Any]) -> str:
    return f"{record['task']}/{record['size']}/{record['seed']}"


if __name__ == "__main__":
    main()
