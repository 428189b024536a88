"""The coefficient estimator over micro-batches and ranks, against plain Python; through ``gac.patch``."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import gac
from gac.observe.reduction import gather_rows
from gac.statistics.coefficient import CoefficientOptions, sequence_rows, statistics_from_rows
from tests.gac.distributed.processes import on_ranks
from tests.gac.statistics.coefficients import by_definition

NUMBERS = ("sigma_s2", "sigma_r2", "delta_g2", "n_s", "n_r")
VARIANTS = [(z, phi, trim) for z in (True, False) for phi in (True, False) for trim in (0.0, 0.1, 0.29)]


def sequences(count: int, seed: int, *, length: int = 6, experts: float = 0.4):
    """Token tensors of ``count`` sequences: some have no tokens, advantages differ within a sequence."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -2 * torch.rand(count, length, generator=generator, dtype=torch.float64)
    advantages = torch.randn(count, length, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, length + 1, (count, 1), generator=generator)
    mask = torch.arange(length) < lengths
    return logprobs, advantages, mask, torch.rand(count, generator=generator) < experts


def numbers(found: gac.Statistics) -> list[float]:
    return [float(getattr(found, name)) for name in NUMBERS]


def assert_same(found: gac.Statistics, expected: dict[str, float] | list[float], *, rel: float) -> None:
    expected = list(expected.values()) if isinstance(expected, dict) else expected
    assert numbers(found) == pytest.approx(expected, rel=rel, nan_ok=True)


@pytest.mark.parametrize(("z_normalize", "phi", "trim"), VARIANTS)
def test_every_variant_is_its_definition(z_normalize, phi, trim):
    for seed, count in enumerate((1, 2, 5, 12, 40)):
        data = sequences(count, seed)
        options = {"z_normalize": z_normalize, "phi": phi, "trim": trim}
        assert_same(gac.coefficient_statistics(*data, **options), by_definition(*data, **options), rel=1e-9)


def test_how_many_are_trimmed_is_counted_in_double_precision():
    """``int(n * trim)``: of 100 and 0.29 it is 28 (28.999...96 in double precision), where single precision says 29."""
    for n in (3, 4, 10, 30, 69, 70, 100):
        logprobs = -(torch.linspace(0, 1, n, dtype=torch.float64)[:, None] ** 3)
        data = (logprobs, torch.zeros(n, dtype=torch.float64), torch.ones(n, 1), torch.ones(n, dtype=torch.bool))
        for trim in (0.1, 0.29, 0.35):
            expected = by_definition(data[0], data[1][:, None], *data[2:], z_normalize=False, phi=True, trim=trim)
            found = gac.coefficient_statistics(*data, z_normalize=False, trim=trim)
            assert float(found.sigma_s2) == pytest.approx(expected["sigma_s2"], rel=1e-9), (n, trim)


@pytest.mark.parametrize(("z_normalize", "phi", "trim"), VARIANTS[1::3])
def test_order_and_split_do_not_matter(z_normalize, phi, trim):
    options = CoefficientOptions(z_normalize, phi, trim)
    data = sequences(24, 7)
    whole = statistics_from_rows(sequence_rows(*data), options)
    generator = torch.Generator().manual_seed(0)
    for sizes in ([24], [1] * 24, [10, 0, 14], [5, 7, 12]):
        order = torch.randperm(24, generator=generator)
        parts = [sequence_rows(*(x[k] for x in data)) for k in order.split(sizes)]
        assert_same(statistics_from_rows(torch.cat(parts), options), numbers(whole), rel=1e-12)


class TestEdges:
    def test_everything_masked(self):
        logprobs, advantages, mask, is_expert = sequences(6, 1)
        found = gac.coefficient_statistics(logprobs, advantages, mask & False, is_expert)
        assert (float(found.n_s), float(found.n_r), float(found.nonfinite)) == (0, 0, 0)
        assert all(math.isnan(float(getattr(found, name))) for name in NUMBERS[:3])

    @pytest.mark.parametrize("z_normalize", [True, False])
    def test_one_branch(self, z_normalize):
        logprobs, advantages, mask, is_expert = sequences(8, 2)
        found = gac.coefficient_statistics(logprobs, advantages, mask, is_expert | True, z_normalize=z_normalize)
        assert math.isfinite(float(found.sigma_s2))
        assert math.isnan(float(found.sigma_r2))
        assert math.isnan(float(found.delta_g2)) == z_normalize, "shared response tokens are those of rollouts"
        found = gac.coefficient_statistics(logprobs, advantages, mask, is_expert & False, z_normalize=z_normalize)
        assert math.isnan(float(found.sigma_s2))
        assert math.isfinite(float(found.sigma_r2))
        assert math.isfinite(float(found.delta_g2))

    def test_no_variance(self):
        """All advantages 0 and one probability: the variances are their floor and z-normalised constants are 0."""
        shape = (5, 4)
        found = gac.coefficient_statistics(
            torch.full(shape, -0.5), torch.zeros(5), torch.ones(shape), torch.tensor([True, True, False, False, False])
        )
        assert float(found.sigma_s2) == float(found.sigma_r2) == pytest.approx(1e-8)
        assert float(found.delta_g2) == pytest.approx(0.0, abs=1e-15)
        raw = gac.coefficient_statistics(
            torch.full(shape, -0.5), torch.zeros(5), torch.ones(shape), torch.zeros(5, dtype=torch.bool),
            z_normalize=False,
        )  # fmt: skip
        p = math.exp(-0.5)
        assert float(raw.delta_g2) == pytest.approx((p * (1 - p)) ** 2)

    def test_no_rows(self):
        data = sequences(0, 0)
        found = gac.coefficient_statistics(*data)
        assert (float(found.n_s), float(found.n_r)) == (0, 0)
        assert math.isnan(float(found.delta_g2))


# -- several ranks ------------------------------------------------------------------------------------------------


def mixed_step(mixer: gac.Mixer, data) -> list[float]:
    """One backward pass over a mixed batch, also the very first: what its tokens say."""
    loss = mixer._model(torch.ones(2)).sum()
    mixer.mixed_loss(sft_loss=loss, rl_loss=-loss).backward()
    mixer.observe_tokens(*data)
    mixer.step()
    assert 0.0 < float(mixer.mu) < 1.0
    return numbers(mixer.coefficient)


SHARES = [(3, 5), (0, 4), (4, 0), (0, 0), (1, 9)]


def on_a_rank(rank: int, world: int) -> tuple:
    gathered = []
    for case, share in enumerate(SHARES):
        data = sequences(sum(share), case)
        own = slice(0, share[0]) if rank == 0 else slice(share[0], None)
        gathered.append(gather_rows(sequence_rows(*(x[own] for x in data)), None))
    model = torch.nn.Linear(2, 1)
    with gac.patch(model, estimator="coefficient") as mixer:
        for case, share in enumerate(SHARES[:3]):
            data = sequences(sum(share), case)
            own = slice(0, share[0]) if rank == 0 else slice(share[0], None)
            mixer.observe_tokens(*(x[own] for x in data))
            mixer.step()
        found = numbers(mixer.statistics), float(mixer.mu), mixer.metrics(wait=True)["estimator"]
    mixed = []
    for estimator in ("auto", "exact"):
        with gac.patch(torch.nn.Linear(2, 1), estimator=estimator, interval=1) as mixer:
            for case in range(2):
                mixed.append(mixed_step(mixer, sequences(5, 2 * case + rank)))
    return gathered, found, mixed


@pytest.mark.timeout(120)
def test_two_ranks(tmp_path: Path):
    """Every rank gets the rows of both, in the order of ranks, whatever the shares; 0 rows are a share too."""
    ranks = on_ranks(2, tmp_path, on_a_rank, preload=__name__, seconds=100)
    (gathered, found, mixed), (other, other_found, other_mixed) = ranks
    for case, share in enumerate(SHARES):
        rows = sequence_rows(*sequences(sum(share), case))
        assert torch.equal(gathered[case], rows)
        assert torch.equal(other[case], rows)
    assert found == other_found
    with gac.patch(torch.nn.Linear(2, 1), estimator="coefficient") as mixer:
        for case, share in enumerate(SHARES[:3]):
            mixer.observe_tokens(*sequences(sum(share), case))
            mixer.step()
        assert found == (pytest.approx(numbers(mixer.statistics), rel=1e-12), float(mixer.mu), "coefficient")
    assert mixed == other_mixed
    whole = [statistics_from_rows(torch.cat([sequence_rows(*sequences(5, s)) for s in pair]), CoefficientOptions())
             for pair in ((0, 1), (2, 3))]  # fmt: skip
    assert mixed == [pytest.approx(numbers(one), rel=1e-12) for one in whole * 2]


# -- through gac.patch --------------------------------------------------------------------------------------------


def test_micro_batches_of_different_lengths():
    """Rows of a step's micro-batches give the statistics of the whole batch; without hooks on the model."""
    model = torch.nn.Linear(3, 1)
    with gac.patch(model, estimator="coefficient", coefficient={"z_normalize": False, "trim": 0.2}) as mixer:
        assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
        for step in range(4):
            data = sequences(12, step)
            for part, length in ((slice(0, 5), 6), (slice(5, 12), 9)):
                extra = length - 6
                padded = [torch.nn.functional.pad(x[part].double(), (0, extra)) for x in data[:3]]
                mixer.observe_tokens(*padded, data[3][part])
            (mixer.mixed_loss(sft_loss=model(torch.ones(3)).sum(), rl_loss=model(torch.ones(3)).sum())).backward()
            mixer.step()
            expected = gac.coefficient_statistics(*data, z_normalize=False, trim=0.2)
            assert_same(mixer.statistics, numbers(expected), rel=1e-12)
            assert mixer.coefficient is not None
        metrics = mixer.metrics(wait=True)
        assert metrics["estimator"] == "coefficient"
        assert math.isfinite(metrics["sigma_s2_se"])
        assert math.isnan(metrics["distance2"]), "no gradient was measured"


def test_beside_another_estimator():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    with gac.patch(model, estimator="exact") as mixer:
        for observed in (True, False):
            for branch in (mixer.sft, mixer.rl):
                with branch():
                    for _ in range(2):
                        mixer.backward(model(torch.randn(2, 3)).square().sum())
            if observed:
                mixer.observe_tokens(*sequences(9, 3))
            mixer.step()
            assert mixer.metrics(wait=True)["estimator"] == "exact"
            assert math.isfinite(float(mixer.statistics.distance2))
            if observed:
                assert_same(mixer.coefficient, numbers(gac.coefficient_statistics(*sequences(9, 3))), rel=1e-12)
            else:
                assert mixer.coefficient is None


def test_a_step_that_lacks_a_branch_or_all_tokens():
    with gac.patch(torch.nn.Linear(2, 1), estimator="coefficient") as mixer:
        for case in range(6):
            logprobs, advantages, mask, is_expert = sequences(8, case)
            if case == 3:
                mask = mask & False
            mixer.observe_tokens(logprobs, advantages, mask, is_expert | (case == 4))
            mixer.step()
            assert 0.05 <= float(mixer.mu) <= 0.95
            assert math.isfinite(mixer.metrics(wait=True)["mu_raw"])
        with pytest.raises(RuntimeError, match=r"observe_tokens|nothing observed"):
            mixer.step()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"coefficient": {"trim": 0.5}}, ValueError, "trim"),
        ({"coefficient": {"trimm": 0.1}}, TypeError, "trimm"),
        ({"metric": "optimizer"}, ValueError, "reads no gradients|optimizer"),
    ],
)
def test_refused(options, error, match):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters()) if "metric" in options else None
    with pytest.raises(error, match=match):
        gac.patch(model, estimator="coefficient", optimizer=optimizer, **options)
