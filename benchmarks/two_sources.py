"""Whether two sources of demonstrations, one right and one with wrong answers, can be told apart while a model trains.

    python -m benchmarks.two_sources   # about 30 minutes of one core; writes benchmarks/results/two_sources.json
    python -m benchmarks.two_sources --tasks chain_sum --seeds 1 --steps 20 --runs 0 --out FILE

The study's small model at its warm start, and its data. Of the 400 demonstrations 200 keep their answers and 200 get
another problem's. A step has 16 of each, drawn with replacement, and 8 rollouts of each of some prompts, whose
advantages are GRPO's; all of them go through one mixed backward pass with ``mixer.batch(sources=...)``.

*Training*: so many steps with law ``gac``, for each task and seed; the cosines of both sources with the RL gradient and
their difference, with jackknife errors over steps. *Coverage*: the model stands still and rollouts are drawn from a
pool, so that the cosines of mean gradients are known exactly, in float64; runs of one length, with new draws and new
signs, are held against them, which says whether the errors are right.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gac
from benchmarks.study.methods import GENERATIONS
from benchmarks.study.rows import Row
from benchmarks.study.training import warm_start
from gac.sequences.sources import StepOfSources
from gac.statistics.branch import Branch

RESULTS = Path(__file__).parent / "results" / "two_sources.json"
TASKS = ("spell_backward", "chain_sum", "leg_counting", "mini_sudoku")
RIGHT, WRONG, ROLLED = "right", "wrong", "rollouts"
LR = 1e-4
"""What tuning chose for law ``gac`` on the small model."""

OF_EACH = 16
"""Demonstrations of each source in a step."""

POOL = 128
"""Groups of rollouts that runs of a model that stands still draw from."""

Pair = tuple[list[int], list[int]]
"""Tokens of a prompt and of its completion."""

Group = tuple[list[Pair], Tensor]
"""Rollouts of one prompt and their advantages."""


def with_wrong_answers(rows: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The same problems, each with an answer that another of them has and that is not its own; of its length if any."""
    draw, found = random.Random(seed), []
    for row in rows:
        others = [other["answer"] for other in rows if other["answer"] != row["answer"]]
        alike = [answer for answer in others if len(answer) == len(row["answer"])]
        answer = draw.choice(alike or others)
        found.append(row | {"answer": answer, "completion": answer})
    return found


class Loop:
    """A plain training loop over two sources of demonstrations and rollouts of the model itself.

    Args:
        task: of the study. seed: of its data, of the warm start and of what is drawn. prompts: of a step.
        cache: keeps warm starts.
    """

    def __init__(self, task: str, seed: int, prompts: int, cache: Path) -> None:
        from gac.tasks.models import load_model
        from gac.trainers.demonstrations import encode_pair

        data, folder = warm_start(Row("two_sources", task, "small", "gac", "", LR, seed), cache)
        self.model, self.tokenizer = load_model(str(folder), tokenizer_as_saved=False)
        self.model.train()
        half = len(data["demonstrations"]) // 2
        sources = {
            RIGHT: data["demonstrations"][:half],
            WRONG: with_wrong_answers(data["demonstrations"][half:], seed),
        }
        self.sources: dict[str, list[Pair]] = {
            name: [encode_pair(self.tokenizer, row["prompt"], row["completion"], name) for row in rows]
            for name, rows in sources.items()
        }
        self.right_answers: list[Pair] = [  # of the problems that have wrong ones
            encode_pair(self.tokenizer, row["prompt"], row["completion"], RIGHT)
            for row in data["demonstrations"][half:]
        ]
        self.prompts, self.each = data["prompts"], prompts
        self.length = max(len(row["answer"]) for split in data.values() for row in split) + 1
        self.draw = random.Random(seed)
        torch.manual_seed(seed)
        self.mixer = gac.patch(self.model, estimator="sequence", interval=1)

    def rollouts(self, count: int) -> list[Group]:
        """Groups of 8 rollouts of one prompt each, with their advantages."""
        from transformers import GenerationConfig

        from gac.tasks.evaluation import encode_prompts, inference_mode_of
        from gac.tasks.problems import exact_match

        chosen = self.draw.choices(self.prompts, k=count)
        end = self.tokenizer.eos_token_id
        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=self.length,
            num_return_sequences=GENERATIONS, pad_token_id=self.tokenizer.pad_token_id, eos_token_id=end,
        )  # fmt: skip
        with inference_mode_of(self.model):
            batch = encode_prompts(self.tokenizer, [row["prompt"] for row in chosen])
            tokens = self.model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :]
        groups = []
        for row, of_prompt in zip(chosen, tokens.view(count, GENERATIONS, -1).tolist(), strict=True):
            cut = [own[: own.index(end) + 1] if end in own else own for own in of_prompt]
            texts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in cut]
            rewards = torch.tensor([exact_match(text, row["answer"]) for text in texts])
            prompt = list(self.tokenizer(row["prompt"])["input_ids"])
            groups.append(([(prompt, ids) for ids in cut], (rewards - rewards.mean()) / (rewards.std() + 1e-4)))
        return groups

    def log_likelihoods(self, pairs: Sequence[Pair]) -> Tensor:
        """``[B]``: of each completion, a mean over its tokens, so that rows are alike."""
        from gac.trainers.demonstrations import pad_demonstrations

        rows = [(p + c, [-100] * len(p) + c) for p, c in pairs]
        batch = pad_demonstrations(rows, self.tokenizer.pad_token_id)
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        wanted = batch.labels[:, 1:]
        taken = logits[:, :-1].log_softmax(-1).gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
        there = (wanted >= 0).to(taken.dtype)
        return (taken * there).sum(1) / there.sum(1)

    def measure(self, groups: Sequence[Group]) -> None:
        """One mixed backward pass over demonstrations of both sources and these rollouts."""
        pairs = [pair for own in self.sources.values() for pair in self.draw.choices(own, k=OF_EACH)]
        labels = [name for name in self.sources for _ in range(OF_EACH)]
        demonstrations, rolled = len(pairs), GENERATIONS * len(groups)
        pairs += [pair for own, _ in groups for pair in own]
        numbers = torch.arange(len(groups)).repeat_interleave(GENERATIONS)
        is_expert = torch.arange(len(pairs)) < demonstrations
        with self.mixer.batch(
            is_expert=is_expert,
            groups=torch.cat([torch.full((demonstrations,), -1), numbers]),
            sources=labels + [ROLLED] * rolled,
        ):
            logp = self.log_likelihoods(pairs)
            advantages = torch.cat([own for _, own in groups])
            sft, rl = -logp[:demonstrations].mean(), -(advantages * logp[demonstrations:]).mean()
            self.mixer.mixed_loss(sft_loss=sft, rl_loss=rl).backward()

    def train(self, steps: int) -> float:
        """So many steps of AdamW; the share of groups that taught something."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)
        taught = []
        for _ in range(steps):
            groups = self.rollouts(self.each)
            self.measure(groups)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            self.mixer.step()
            optimizer.zero_grad()
            taught.append(statistics.fmean(float(own.abs().max() > 0) for _, own in groups))
        return statistics.fmean(taught)

    def stand_still(self, steps: int, pool: Sequence[Group]) -> None:
        """So many steps whose rollouts are drawn from a pool and that change nothing."""
        for _ in range(steps):
            self.measure(self.draw.choices(pool, k=self.each))
            self.mixer.step()
            self.model.zero_grad()

    def exact_cosines(self, pool: Sequence[Group]) -> dict[str, float]:
        """Of the mean gradients of both sources with that of the pool, in float64."""
        parameters = list(self.model.parameters())
        self.model.double()
        with self.mixer.aside():
            gradients = []
            parts = [(own, torch.ones(len(own))) for own in self.sources.values()]
            parts.append(([pair for own, _ in pool for pair in own], torch.cat([own for _, own in pool])))
            for pairs, weights in parts:
                total = torch.zeros((), dtype=torch.float64)
                for k in range(0, len(pairs), 256):
                    logp = self.log_likelihoods(pairs[k : k + 256])
                    total = total - (weights[k : k + 256].double() * logp).sum()
                found = torch.autograd.grad(total, parameters)
                gradients.append(torch.cat([g.flatten() for g in found]))
        self.model.float()
        right, wrong, rl = (g / g.norm() for g in gradients)
        exact = {RIGHT: float(right @ rl), WRONG: float(wrong @ rl)}
        return exact | {"difference": exact[RIGHT] - exact[WRONG]}

    @property
    def history(self) -> list[StepOfSources]:
        """What the steps so far have shown."""
        return list(self.mixer._sequences("benchmarks.two_sources").history.sources)


def inner_products(history: Sequence[StepOfSources]) -> Tensor:
    """``[steps, 5]`` float64, unbiased, of mean gradients: RL with right, with wrong, squares of right, wrong, RL."""
    rows = []
    for step in history:
        gram, (power, n) = step.gram.double(), step.numbers.double()
        square = lambda k: (gram[k, k] - power[k]) / (n[k] * (n[k] - 1))  # noqa: B023 - used at once
        right, wrong = (step.sources.index((name, Branch.SFT)) for name in (RIGHT, WRONG))
        rl = len(step.sources) + 1
        dots = [gram[k, rl] / (n[k] * n[rl]) for k in (right, wrong)]
        rows.append(torch.stack([*dots, square(right), square(wrong), square(rl)]))
    return torch.stack(rows)


def cosines(history: Sequence[StepOfSources]) -> dict[str, float | list[float]]:
    """Cosines of both sources with the RL gradient, their difference, and jackknife errors over steps.

    The difference's own jackknife leaves the same step out of both: they share the RL gradient. ``z`` is the difference
    over its error; NaN where an unbiased square is not positive.
    """
    values = inner_products(history)
    count = len(values)

    def of(means: Tensor) -> Tensor:  # [..., 3]: right, wrong, difference
        dot, square, rl = means[..., :2], means[..., 2:4], means[..., 4:]
        pair = torch.where((square > 0) & (rl > 0), dot / (square * rl).abs().sqrt(), math.nan)
        return torch.cat([pair, pair[..., :1] - pair[..., 1:]], dim=-1)

    whole, left_out = of(values.mean(0)), of((values.sum(0) - values) / (count - 1))
    errors = ((left_out - left_out.mean(0)).square().sum(0) * (count - 1) / count).sqrt()
    found = {
        name: [float(value), float(error)]
        for name, value, error in zip((RIGHT, WRONG, "difference"), whole, errors, strict=True)
    }
    return found | {"z": float(whole[2] / errors[2])}


def train(task: str, seed: int, prompts: int, steps: int, cache: Path) -> dict[str, Any]:
    """One training run: cosines after a quarter, half and all of the steps."""
    began = time.process_time()
    loop = Loop(task, seed, prompts, cache)
    taught = loop.train(steps)
    looks = sorted({max(4, steps // 4), max(4, steps // 2), steps})
    return {
        "task": task,
        "seed": seed,
        "prompts": prompts,
        "after": {str(k): cosines(loop.history[:k]) for k in looks},
        "groups_that_taught": taught,
        "mu": float(loop.mixer.mu),
        "processor_seconds": round(time.process_time() - began, 1),
    }


def cover(task: str, seed: int, prompts: int, runs: int, steps: int, cache: Path) -> dict[str, Any]:
    """Runs of steps of a model that stands still, each against the exact cosines."""
    loop = Loop(task, seed, prompts, cache)
    pool = loop.rollouts(POOL)
    exact = loop.exact_cosines(pool)
    loop.stand_still(runs * steps, pool)
    own = [cosines(loop.history[k * steps : (k + 1) * steps]) for k in range(runs)]
    found: dict[str, Any] = {"task": task, "seed": seed, "prompts": prompts, "steps": steps, "exact": exact}
    for name, truth in exact.items():
        pairs = [run[name] for run in own if not any(map(math.isnan, run[name]))]
        scores = [(value - truth) / error for value, error in pairs]
        found[name] = {
            "runs": runs,
            "with_a_cosine": len(pairs),
            "within_1": sum(abs(score) <= 1 for score in scores),
            "within_2": sum(abs(score) <= 2 for score in scores),
            "mean": statistics.fmean(value for value, _ in pairs) if pairs else math.nan,
            "spread": statistics.stdev(value for value, _ in pairs) if len(pairs) > 1 else math.nan,
            "median_error": statistics.median(error for _, error in pairs) if pairs else math.nan,
        }
    return found


def main(argv: list[str] | None = None) -> None:
    """Runs what is asked for and writes it after every part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--prompts", type=int, default=16, help="of a step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--runs", type=int, default=20, help="of a model that stands still; 0 leaves them out")
    parser.add_argument("--run-steps", type=int, default=25)
    parser.add_argument("--run-prompts", type=int, default=8)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "gac_two_sources")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    about = {"torch": torch.__version__, "model": "the study's small one, 0.3 M parameters", "lr": LR, "pool": POOL}
    command = " ".join(["python -m benchmarks.two_sources", *(argv if argv is not None else sys.argv[1:])])
    result: dict[str, Any] = {"command": command, "about": about, "training": [], "coverage": []}

    def keep(kind: str, row: dict[str, Any]) -> None:
        print(json.dumps(row), flush=True)
        result[kind].append(row)
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    for seed in options.seeds:
        for task in options.tasks:
            keep("training", train(task, seed, options.prompts, options.steps, options.cache))
    seed, runs = options.seeds[0], options.runs
    for task in options.tasks if runs else ():
        keep("coverage", cover(task, seed, options.run_prompts, runs, options.run_steps, options.cache))


if __name__ == "__main__":
    main()
