"""Standard errors of a step: the rule by hand, its edges, and through ``gac.patch``. Coverage: statistics/."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gac
from gac.state import Table, like
from gac.statistics.uncertainty import HALF_LIFE, LEVEL_HALF_LIFE, SuccessiveDifferences, degrees_of_freedom

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)
WRONG = (math.nan, math.inf, -math.inf)
NAMES = ("sigma_s2", "sigma_r2", "distance2", "delta_g2")


def run(values, healthy=None) -> list[float]:
    """Standard errors after each of one estimate's values."""
    differences = SuccessiveDifferences(1, CPU, torch.float64)
    healthy = [YES] * len(values) if healthy is None else healthy
    return [
        float(differences.update(torch.tensor([v], dtype=torch.float64), h))
        for v, h in zip(values, healthy, strict=True)
    ]


def by_hand(values: list[float]) -> float:
    """The docstring's formula, from weighted sums."""

    def weights(half_life, n):
        w = [0.5 ** ((n - 1 - k) / half_life) for k in range(n)]
        return [x / sum(w) for x in w]

    def level(n):
        first = max(0, n - 300)  # what is older weighs 2^(-300/7)
        return sum(w * abs(v) for w, v in zip(weights(LEVEL_HALF_LIFE, n - first), values[first:], strict=False))

    squares = [((values[k] - values[k - 1]) / level(k + 1)) ** 2 / 2 for k in range(1, len(values))]
    average = sum(w * s for w, s in zip(weights(HALF_LIFE, len(squares)), squares, strict=True))
    w = weights(HALF_LIFE, len(squares))
    x = sum(a * a for a in w) + sum(a * b for a, b in itertools.pairwise(w)) / 2
    return level(len(values)) * math.sqrt(average) * (1 + x / 2 + x**2 / 4 + x**3 / 16)


extreme = st.one_of(
    st.sampled_from([0.0, -0.0, 5e-324, -5e-324, sys.float_info.max, -sys.float_info.max, 1e-160, 1e160, *WRONG]),
    st.floats(-30, 30).map(lambda x: 10.0**x),
)


@settings(deadline=None)
@given(rows=st.lists(st.tuples(extreme, extreme, extreme, st.booleans()), min_size=1, max_size=8))
def test_what_it_comes_to_is_never_refused_as_a_state(rows):
    differences = SuccessiveDifferences(3, CPU, torch.float64)
    for *values, healthy in rows:
        differences.update(torch.tensor(values, dtype=torch.float64), torch.tensor(healthy))
        state = differences.state
        read = Table(like(state, SuccessiveDifferences.RANGES)).read(state, "state")
        for name, value in state.items():
            torch.testing.assert_close(read[name], value, rtol=0, atol=0, equal_nan=True)


def test_by_hand():
    values = [3.0, 5.0, -1.0, 4.0, 4.0, 10.0, 2.5, 7.0]
    found = run(values)
    assert math.isnan(found[0])
    assert found[1] == pytest.approx(1.8125 * 2 / math.sqrt(2))
    for n in range(2, len(values) + 1):
        assert found[n - 1] == pytest.approx(by_hand(values[:n]), rel=1e-12), n


def test_the_table_ends_where_nothing_changes():
    generator = torch.Generator().manual_seed(0)
    values = (5 + torch.randn(1100, generator=generator, dtype=torch.float64)).tolist()
    assert run(values)[-1] == pytest.approx(by_hand(values), rel=1e-9)
    assert float(degrees_of_freedom(torch.tensor(1e6, dtype=torch.float64))) == pytest.approx(58.15, abs=0.01)


def test_what_was_not_measured_changes_nothing():
    """NaN, infinity and steps with non-finite gradients: as if they had not been."""
    values, nan = [3.0, 5.0, 4.0, 8.0], math.nan
    clean = run(values)
    gaps = run([nan, 3.0, nan, 5.0, math.inf, 4.0, 99.0, 8.0], [YES, YES, YES, YES, YES, YES, NO, YES])
    assert [gaps[k] for k in (1, 3, 5, 7)] == pytest.approx(clean, nan_ok=True)
    assert gaps[4] == gaps[3]
    assert gaps[6] == gaps[5]


def test_columns_are_independent():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    values[4:9, 1] = math.nan
    together = SuccessiveDifferences(3, CPU, torch.float64)
    last = [together.update(row, YES) for row in values][-1]
    assert last.tolist() == pytest.approx([run(values[:, k].tolist())[-1] for k in range(3)], rel=1e-12)


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**90])
def test_scale(factor):
    values = [3.0, 5.0, 1.0, 4.0, -2.0]
    assert run([factor * v for v in values])[1:] == [factor * e for e in run(values)[1:]], "bit for bit"


def test_edges():
    assert run([0.0] * 5)[1:] == [0.0] * 4
    assert run([7.0] * 5)[1:] == [0.0] * 4
    assert run([0.0, 0.0, 0.0, 1.0])[-1] > 0
    for values in ([1e-30, 1e30, 1e-30], [5e-324, 1e-320, 0.0], [1e300, -1e300, 1e300]):
        assert all(math.isfinite(e) for e in run(values)[1:]), values


@pytest.mark.parametrize("jump", [100.0, 0.01])
def test_another_level(jump):
    """After a jump of the level, errors are those of the new level again within three half-lives."""
    generator = torch.Generator().manual_seed(2)
    noise = 1 + 0.1 * torch.randn(190, generator=generator, dtype=torch.float64)
    noise[100:] *= jump
    found = run(noise.tolist())
    assert found[99] == pytest.approx(0.1, rel=0.3)
    assert 0.7 < found[-1] / (0.1 * jump) < 4.5


@pytest.mark.parametrize("interval", [1, 2])
def test_through_patch(interval):
    """The mixer's errors are those of its own numbers: steps without a branch, spoiled ones, and a saved state."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 2)
    replay = SuccessiveDifferences(4, CPU, torch.float64)
    saved, found = None, []
    with gac.patch(model, estimator="exact", interval=interval, law="fixed") as mixer:
        for step in range(24):
            if step == 12:
                saved = mixer.state_dict()
                mixer.load_state_dict(saved)
            for branch, present in ((mixer.sft, True), (mixer.rl, step not in (4, 5, 6))):
                if present:
                    with branch():
                        for _ in range(2):
                            spoil = math.nan if step == 8 else 1.0
                            mixer.backward(spoil * model(torch.randn(3, 6)).square().sum())
            mixer.step()
            model.zero_grad()
            statistics = mixer.statistics
            if statistics is None:
                assert step % interval
                continue
            numbers = torch.stack([getattr(statistics, name) for name in NAMES])
            errors = torch.stack([getattr(statistics, f"{name}_se") for name in NAMES])
            expected = replay.update(numbers, statistics.nonfinite == 0)
            assert errors.tolist() == pytest.approx(expected.tolist(), rel=1e-12, nan_ok=True), step
            found.append(errors)
            metrics = mixer.metrics(wait=True)
            assert metrics["sigma_s2_se"] == pytest.approx(float(errors[0]), nan_ok=True)
    assert found[-1].isfinite().all()
    assert saved["uncertainty"]["count"].max() >= 12 // interval - 1
