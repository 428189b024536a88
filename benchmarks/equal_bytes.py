"""The error of one step's mu at equal cost: single sequences in one pass, and the sketch with 4 contributions a branch.

    python -m benchmarks.equal_bytes    # about 5 minutes of one core; writes benchmarks/results/equal_bytes.json

The study's small model at its warm start stands still; steps of 32 demonstrations and 8 groups of 8 rollouts are drawn
from its 400 demonstrations and from a pool of groups. So the noise of a step, the disagreement and the best mu are
known exactly, in float64. Each step is measured both ways. Bytes are those that measuring holds and those that its
kernels read and write in a step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import gac
import gac.observe.ledger
import gac.sequences.step
from benchmarks.study.methods import GENERATIONS, STEP_DEMONSTRATIONS
from benchmarks.two_sources import POOL, RIGHT, TASKS, Group, Loop, Pair

RESULTS = Path(__file__).parent / "results" / "equal_bytes.json"
CONTRIBUTIONS = 4
GROUPS = 8
SIZES = (8, 16, 32)
FIELDS = ("sigma_s2", "sigma_r2", "distance2")


def best_mu(statistics: Tensor) -> Tensor:
    """``[..., 3]`` of :data:`FIELDS` -> ``[...]``: alpha = 1/2 of the disagreement, the noise as it is."""
    sigma_s, sigma_r, distance2 = statistics.unbind(-1)
    return ((distance2 - sigma_s - sigma_r) / 2 + sigma_r) / distance2


class Steps:
    """Steps of a model that stands still.

    Args:
        loop: model and data. demonstrations: from which they are drawn.
    """

    def __init__(self, loop: Loop, demonstrations: Sequence[Pair]) -> None:
        self.loop, self.demonstrations = loop, demonstrations
        loop.mixer.unpatch()
        self.pool = loop.rollouts(POOL)

    def draw(self) -> tuple[list[Pair], list[Group]]:
        """One step."""
        draw = self.loop.draw
        return draw.choices(self.demonstrations, k=STEP_DEMONSTRATIONS), draw.choices(self.pool, k=GROUPS)

    def sft(self, pairs: Sequence[Pair]) -> Tensor:
        """What some demonstrations are of a step's loss."""
        return -self.loop.log_likelihoods(pairs).sum() / STEP_DEMONSTRATIONS

    def rl(self, groups: Sequence[Group]) -> Tensor:
        """What some groups are of a step's loss."""
        return _of_rollouts(self.loop.log_likelihoods([pair for own, _ in groups for pair in own]), groups)

    def truth(self) -> Tensor:
        """``[3]`` float64: what :data:`FIELDS` are over all steps that may be drawn."""
        model = self.loop.model.double()
        parameters = list(model.parameters())
        means, noises = [], []
        for count, parts in (
            (STEP_DEMONSTRATIONS, [lambda x=pair: self.sft([x]) for pair in self.demonstrations]),
            (GROUPS, [lambda x=group: self.rl([x]) for group in self.pool]),
        ):
            total, squares = torch.zeros((), dtype=torch.float64), 0.0
            for loss in parts:
                found = torch.cat([g.flatten() for g in torch.autograd.grad(loss(), parameters)])
                total, squares = total + found, squares + float(found.square().sum())
            mean = total / len(parts)
            means.append(count * mean)
            noises.append(count * (squares / len(parts) - float(mean.square().sum())))
        model.float()
        return torch.tensor([*noises, float((means[0] - means[1]).square().sum()) + sum(noises)], dtype=torch.float64)

    def by_micro_batches(self, mixer: gac.Mixer, pairs: list[Pair], groups: list[Group]) -> None:
        """As many passes of each branch as it has contributions."""
        own, other = len(pairs) // CONTRIBUTIONS, len(groups) // CONTRIBUTIONS
        for k in range(CONTRIBUTIONS):
            with mixer.sft():
                mixer.backward(self.sft(pairs[k * own : (k + 1) * own]))
            with mixer.rl():
                mixer.backward(self.rl(groups[k * other : (k + 1) * other]))

    def by_sequences(self, mixer: gac.Mixer, pairs: list[Pair], groups: list[Group]) -> None:
        """One mixed pass."""
        everything = [*pairs, *(pair for own, _ in groups for pair in own)]
        numbers = torch.arange(len(groups)).repeat_interleave(GENERATIONS)
        is_expert = torch.arange(len(everything)) < len(pairs)
        with mixer.batch(is_expert=is_expert, groups=torch.cat([torch.full((len(pairs),), -1), numbers])):
            logp = self.loop.log_likelihoods(everything)
            sft = -logp[: len(pairs)].sum() / STEP_DEMONSTRATIONS
            mixer.mixed_loss(sft_loss=sft, rl_loss=_of_rollouts(logp[len(pairs) :], groups)).backward()


def _of_rollouts(logp: Tensor, groups: Sequence[Group]) -> Tensor:
    return -(torch.cat([own for _, own in groups]) * logp).sum() / (GROUPS * GENERATIONS)


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Bytes that the kernels which measure are given, to read or to add to."""
    found: list[int] = []

    def counting(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            tensors = [t for x in args for t in (x if isinstance(x, (list, tuple)) else [x]) if isinstance(t, Tensor)]
            found.append(sum(t.nbytes for t in tensors))
            return function(*args, **options)

        return call

    with contextlib.ExitStack() as stack:
        for module, names in (
            (gac.observe.ledger, ("sketch", "absorb_", "absorb_sketch_")),
            (gac.sequences.step, ("kronecker_sketch", "moments")),
        ):
            for name in names:
                stack.enter_context(mock.patch.object(module, name, counting(getattr(module, name))))
        yield found


def measure(task: str, seed: int, draws: int, cache: Path) -> dict[str, Any]:
    """Errors of both ways over so many steps, the same for each."""
    loop = Loop(task, seed, GROUPS, cache)
    demonstrations = loop.sources[RIGHT] + loop.right_answers
    steps = Steps(loop, demonstrations)
    truth = steps.truth()
    drawn = [steps.draw() for _ in range(draws)]
    ways: dict[str, tuple[dict[str, Any], Any]] = {
        f"sketch, {CONTRIBUTIONS} contributions": ({"estimator": "sketch"}, steps.by_micro_batches)
    }
    for size in SIZES:
        ways[f"sequence, k = {size}"] = ({"estimator": "sequence", "sketch_size": size}, steps.by_sequences)
    result: dict[str, Any] = {
        "task": task, "seed": seed, "draws": draws, "mu": float(best_mu(truth)),
        "truth": dict(zip(FIELDS, truth.tolist(), strict=True)), "ways": {},
    }  # fmt: skip
    first: Tensor | None = None
    for name, (options, take) in ways.items():
        rows = []
        with counted() as moved, gac.patch(loop.model, interval=1, law="fixed", mu=0.5, **options) as mixer:
            for k, (pairs, groups) in enumerate(drawn):
                if k == 1:
                    moved.clear()  # the first is also held against the gradients
                take(mixer, pairs, groups)
                mixer.step()
                loop.model.zero_grad()
                rows.append([float(getattr(mixer.statistics, field)) for field in FIELDS])
            held = mixer.nbytes
            if options["estimator"] == "sequence":
                held += 4 * (STEP_DEMONSTRATIONS + GROUPS * GENERATIONS) * mixer.coverage.width
        table = torch.tensor(rows, dtype=torch.float64)
        off = (best_mu(table) - best_mu(truth)).square()
        first = off if first is None else first
        less = first - off  # of the same steps
        result["ways"][name] = {
            "rmse_of_mu": float(off.mean().sqrt()),
            "standard_error": float(off.std() / (2 * off.mean().sqrt() * draws**0.5)),
            "relative_rmse": dict(zip(FIELDS, (table / truth - 1).square().mean(0).sqrt().tolist(), strict=True)),
            "less_squared_error": [float(less.mean()), float(less.std() / draws**0.5)],
            "bytes_held": held,
            "bytes_moved": sum(moved) // max(1, draws - 1),
        }
    return result


def main(argv: list[str] | None = None) -> None:
    """Measures the tasks and writes each as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "gac_two_sources")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    command = " ".join(["python -m benchmarks.equal_bytes", *(argv if argv is not None else sys.argv[1:])])
    result: dict[str, Any] = {"command": command, "torch": torch.__version__, "tasks": []}
    for task in options.tasks:
        result["tasks"].append(measure(task, 1, options.draws, options.cache))
        for name, way in result["tasks"][-1]["ways"].items():
            print(f"{task:16} {name:26} mu +- {way['rmse_of_mu']:.3f}  {way['bytes_held']:>9,} B held", flush=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
