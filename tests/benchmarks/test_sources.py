"""Two sources of demonstrations, and errors at equal bytes: what is computed, on a model of one warm step."""

from __future__ import annotations

import math

import pytest
import torch

import gac
from benchmarks.equal_bytes import FIELDS, Steps, best_mu
from benchmarks.study.tasks import TASKS
from benchmarks.two_sources import OF_EACH, RIGHT, WRONG, Loop, cosines, with_wrong_answers
from gac.sequences.sources import StepOfSources, table_of
from gac.statistics import Branch


def history(steps, seed=0):
    """Sources with known gradients: ``[20]``, the RL gradient along the right one's."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(3, 20, generator=generator, dtype=torch.float64)
    means[2] = means[0] + 0.3 * means[2]
    found = []
    for _ in range(steps):
        rows = [mean + torch.randn(6, 20, generator=generator, dtype=torch.float64) for mean in means]
        totals = torch.stack([own.sum(0) for own in rows] + [rows[0].sum(0) + rows[1].sum(0), rows[2].sum(0)])
        power = [float(own.square().sum()) for own in rows]
        numbers = torch.tensor([[*power, power[0] + power[1], power[2]], [6.0, 6.0, 6.0, 12.0, 6.0]])
        sources = ((RIGHT, Branch.SFT), (WRONG, Branch.SFT), ("rollouts", Branch.RL))
        found.append(StepOfSources(sources, totals @ totals.T, numbers.double()))
    return found


def test_cosines_are_those_of_the_table_and_the_difference_is_paired():
    steps = history(12)
    found, table = cosines(steps), table_of(steps)
    for name in (RIGHT, WRONG):
        assert found[name] == pytest.approx([table[name].cosine, table[name].cosine_se], rel=1e-9)
    left_out = [cosines(steps[:k] + steps[k + 1 :])["difference"][0] for k in range(12)]
    mean = sum(left_out) / 12
    error = math.sqrt(sum((x - mean) ** 2 for x in left_out) * 11 / 12)
    assert found["difference"] == pytest.approx([found[RIGHT][0] - found[WRONG][0], error])
    assert found["z"] == pytest.approx(found["difference"][0] / error)


def test_wrong_answers_are_wrong_and_look_right():
    answers = ["ab", "cd", "ab", "efg", "hijk"]
    found = with_wrong_answers([{"prompt": str(k), "answer": a, "completion": a} for k, a in enumerate(answers)], 3)
    for row, right in zip(found, answers, strict=True):
        assert row["answer"] == row["completion"] != right
        assert row["answer"] in answers
    assert {found[0]["answer"], found[2]["answer"]} == {"cd"}  # of the same length where there is one


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS["chain_sum"].warm_start_steps, "small", 1)
        found = Loop("chain_sum", 1, 2, tmp_path_factory.mktemp("cache"))
    found.sources = {name: own[:12] for name, own in found.sources.items()}
    return found


def test_exact_cosines_are_what_steps_come_to(loop):
    """A pool in which rollouts teach: the sources' cosines of 6 steps are within 5 errors of the exact ones."""
    pool = loop.rollouts(3)
    pool = [(pairs, torch.linspace(-1, 1, len(pairs))) for pairs, _ in pool]
    before = [p.detach().clone() for p in loop.model.parameters()]
    exact = loop.exact_cosines(pool)
    loop.each = 8
    loop.stand_still(6, pool)
    found = cosines(loop.history)
    for name, value in exact.items():
        assert abs(found[name][0] - value) < 5 * found[name][1], (name, value, found[name])
        assert found[name][1] < 0.5
    assert all(torch.equal(a, b) for a, b in zip(before, loop.model.parameters(), strict=True))
    assert int(loop.mixer.statistics.n_s) == 2 * OF_EACH
    loop.each = 2
    assert 0 <= loop.train(1) <= 1
    assert not all(torch.equal(a, b) for a, b in zip(before, loop.model.parameters(), strict=True))


def test_the_truth_of_a_step_is_the_mean_over_steps(loop):
    """Both ways measure the steps whose noise the truth is; means over 8 draws lie within 5 errors of it."""
    steps = Steps(loop, loop.sources[RIGHT])
    steps.pool = [(pairs, torch.linspace(-1, 1, len(pairs))) for pairs, _ in steps.pool[:4]]
    truth = steps.truth()
    for options, take in (
        ({"estimator": "exact"}, steps.by_micro_batches),
        ({"estimator": "sequence", "sketch_size": 32}, steps.by_sequences),
    ):
        rows = []
        with gac.patch(loop.model, interval=1, law="fixed", mu=0.5, **options) as mixer:
            for _ in range(8):
                take(mixer, *steps.draw())
                mixer.step()
                loop.model.zero_grad()
                rows.append([float(getattr(mixer.statistics, field)) for field in FIELDS])
        table = torch.tensor(rows, dtype=torch.float64)
        off = (table.mean(0) - truth).abs() / (table.std(0) / math.sqrt(len(table)))
        assert (off < 5).all(), (options, off)


def test_the_best_mu_has_the_least_error():
    sigma_s, sigma_r, delta = 2.0, 3.0, 4.0
    mu = torch.linspace(0, 1, 1001, dtype=torch.float64)
    error = (mu - 0.5) ** 2 * delta + mu**2 * sigma_s + (1 - mu) ** 2 * sigma_r
    best = best_mu(torch.tensor([sigma_s, sigma_r, delta + sigma_s + sigma_r]))
    assert float(best) == pytest.approx(float(mu[error.argmin()]), abs=1e-3)
