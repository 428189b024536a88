"""Totals that nobody clears: a step's books are those of a ledger that is new."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gac.observe import ledger as ledgers
from gac.observe.contribution import Contribution
from gac.observe.ledger import Ledger
from gac.observe.outdated import Outdated
from gac.statistics import Branch
from gac_kernels import SketchLayout
from gac_kernels.cpu.ending import serves

needs_library = pytest.mark.skipif(not serves(), reason="the CPU library does not serve")

NUMELS = (300, 70, 0, 1025)
FORMS = {
    "running sums": {"lossless": False, "running": True},
    "running sums, exact": {"lossless": True, "running": True},
    "incoming gradients": {"lossless": False, "running": False},
    "exact": {"lossless": True, "running": False},
}
SCALES = {Branch.SFT: torch.tensor(2.0), Branch.RL: torch.tensor(0.25)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(ledgers, "SMALLEST_SKETCH", 1024)


def new(form, *, by_module=False):
    ledger = Ledger(NUMELS, torch.device("cpu"), modules=[0, 0, 1, 1], module_count=2, **FORMS[form])
    ledger.by_module = by_module
    return ledger


def contribute(ledger, branch, calls, seed):
    """``calls``: regions of each call; the last of them ``None``: it is given up."""
    generator = torch.Generator().manual_seed(seed)
    given_up = calls[-1] is None
    ledger.begin()
    for regions in calls[: len(calls) - given_up]:
        gradients = [torch.randn(NUMELS[k], generator=generator) for k in regions]
        ledger.read(branch, regions, gradients, SCALES[branch])
    if not given_up:
        ledger.end(branch, SCALES[branch])


def books(ledger):
    """All that is read of a step. What stands nowhere else first: the order in which readers come is no matter."""
    found = [ledger.inner(ledger.both_totals), ledger.powers(), ledger.nonfinite()]
    found += [ledger.totals[branch].clone() for branch in Branch]
    found += [ledger.previous.clone()] if ledger.previous is not None else []
    if ledger.by_module:
        found += [ledger.module_powers(), ledger.module_inner(ledger.both_totals)]
    return found


def agree(ledger, fresh):
    for found, wanted in zip(books(ledger), books(fresh), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("by_module", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "steps",
    [
        [(Branch.SFT, [[0, 1, 2, 3]]), (Branch.RL, [[0, 1, 2, 3]]), (Branch.SFT, [[3, 2, 1, 0]])],
        [(Branch.RL, [[0], [2, 3]]), (Branch.RL, [[0, 1]]), (Branch.SFT, [[1, 3]])],
        [(Branch.SFT, [[0, 1]])],
        [],
    ],
)
def test_a_second_step(form, by_module, steps):
    """Whole and partial contributions, a branch or all of them missing."""
    ledger, fresh = new(form, by_module=by_module), new(form, by_module=by_module)
    for seed, branch in enumerate(Branch):
        contribute(ledger, branch, [[0, 1, 2, 3]], seed)
    ledger.clear()
    for seed, (branch, calls) in enumerate(steps, start=10):
        if FORMS[form]["running"]:
            calls = [sorted({k for regions in calls for k in regions})]
        for one in (ledger, fresh):
            contribute(one, branch, calls, seed)
    if steps:
        agree(ledger, fresh)
    else:
        assert not ledger.both_totals.any()


regions = st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True)
step = st.lists(
    st.tuples(st.sampled_from(list(Branch)), regions, st.booleans(), st.sampled_from(["", "know", "read"])), max_size=4
)


@needs_library
@settings(max_examples=40, deadline=None)
@given(form=st.sampled_from(sorted(FORMS)), steps=st.lists(step, min_size=2, max_size=4), by=st.booleans())
def test_any_steps(form, steps, by):
    """Given up or not, with sums that are read anew and totals that somebody looks at in between."""
    ledger, seed = new(form, by_module=by), 0
    for contributions in steps:
        fresh = new(form, by_module=by)
        for branch, own, gives_up, between in contributions:
            seed += 1
            for one in (ledger, fresh):
                contribute(one, branch, [own, None] if gives_up else [own], seed)
                if between == "know" and FORMS[form]["running"]:
                    one.know(own, [torch.full((NUMELS[k],), 0.5) for k in own])
                if between == "read":
                    books(one) if one._scales else None
        if ledger._scales:
            agree(ledger, fresh)
        ledger.clear()


@needs_library
@pytest.mark.parametrize("form", FORMS)
def test_sums_in_one_call_are_those_of_the_parts(form):
    """Also where a step reaches other regions than the one before, or one branch alone."""
    ledger = new(form)
    for reached, other in (([3, 0], Branch.RL), ([1, 3], Branch.RL), ([0, 3], Branch.SFT)):
        told = [Contribution(Branch.SFT, None), Contribution(other, 3.0), Contribution(other, torch.tensor(0.0))]
        fresh = new(form)
        for one in (ledger, fresh):
            for seed, contribution in enumerate(told):
                contribute(one, contribution.branch, [reached], seed)
            contribute(one, Branch.SFT, [[1], None], 9)
        found = ledger.sums_on_host(told)
        powers, norms = fresh.powers_on_host(), fresh.inner(fresh.both_totals).tolist()
        wanted = [powers[0], 0, 1, 0, 1, 0, float(fresh.nonfinite()), 0, *norms, 0, 0]
        of_other = int(other is Branch.RL)
        for at, value in ((0, powers[1] / 3), (2, 3), (4, 1)):
            wanted[at + of_other] += value
        found, wanted = (torch.tensor(x, dtype=torch.float64) for x in (found, wanted))
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
        assert ledger.inner(ledger.both_totals).tolist() == norms, "totals stay"
        assert not ledger._rows.any()
        ledger.clear()


def test_many_contributions_get_rows_of_their_own():
    ledger = new("exact")
    for _ in range(2):
        told = [Contribution(Branch.SFT, None)] * 19
        for seed in range(19):
            contribute(ledger, Branch.SFT, [[0, 1, 2, 3]], seed)
        powers = ledger.powers_on_host()
        if (found := ledger.sums_on_host(told)) is not None:
            assert abs(found[0] - sum(powers)) <= 1e-13 * sum(powers)
        ledger.clear()


def test_what_may_not_stay_is_cleared_at_once():
    layout = SketchLayout.per_tensor([5, 3])
    vector = torch.ones(layout.size)
    outdated = Outdated(vector, layout, may_stay=False)
    outdated.forget()
    assert not vector.any()
    assert not outdated.take([0, 1])


def test_regions_are_taken_once():
    layout = SketchLayout.per_tensor([5, 0, 3])
    vector = torch.ones(layout.size)
    outdated = Outdated(vector, layout, may_stay=True)
    assert not outdated.take([0, 2]), "nothing is outdated before a step has ended"
    outdated.forget()
    assert outdated.take([0])
    assert not outdated.take([2, 0]), "one of them is new"
    assert vector[5:].eq(0).all()
    assert vector[:5].eq(1).all()
    outdated.settle()
    assert vector[:5].eq(1).all()
    outdated.forget()
    outdated.settle()
    assert not vector.any()
    outdated.forget()
    outdated.renew()
    vector.fill_(1.0)
    outdated.settle()
    assert vector.all()


def test_regions_that_are_written_by_their_flags():
    """Whoever writes a region makes its flag 0; the others are outdated still, and asked for again the same."""
    layout = SketchLayout.per_tensor([5, 0, 3, 2])
    vector = torch.ones(layout.size)
    outdated = Outdated(vector, layout, may_stay=True)
    assert outdated.by_region() is None
    outdated.forget()
    flags = outdated.by_region()
    assert flags.tolist() == [1, 1, 1, 1]
    flags[2] = 0
    assert outdated.by_region() is flags
    assert outdated.take([0])
    assert not outdated.take([2])
    assert outdated.by_region().tolist() == [0, 1, 0, 1]
    outdated.settle()
    assert vector[:8].eq(1).all()
    assert not vector[8:].any()
    outdated.forget()
    outdated.by_region()
    outdated.renew()
    vector.fill_(1.0)
    outdated.settle()
    assert vector.all()
    outdated.forget()
    outdated.by_region()
    outdated.forget()
    outdated.settle()
    assert not vector.any()
