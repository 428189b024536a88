"""The Kronecker sketch on the CPU: its map, its backends, its operator, and that it is unbiased."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import gac_kernels
from gac_kernels import cpu, fallback, reference
from gac_kernels.kronecker import sign_keys
from tests.gac_kernels import kronecker_cases as cases
from tests.gac_kernels.cases import values

BACKENDS = {"reference": reference, "fallback": fallback, "cpu": cpu, "public": gac_kernels}


@pytest.mark.parametrize("check", cases.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backend(backend, check):
    check(BACKENDS[backend], "cpu")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    sides=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    sizes=st.tuples(st.integers(1, 64), st.integers(1, 64)),
    seed=st.integers(-(2**70), 2**70),
    ones=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_any_shape(lengths, sides, sizes, seed, ones, dtype):
    bounds = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    left, right = (values(bounds[-1], side, dtype=dtype, seed=k) for k, side in enumerate(sides))
    shape = (min(sizes[0], sides[0]), min(sizes[1], sides[1] + ones))
    cases.check(fallback, left, right, shape, bounds=bounds, seed=seed, ones=ones)


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(0, 50), seed=st.integers(0, 2**64 - 1))
def test_sketches_add_up(cut, seed):
    """A sequence in two calls is the sequence in one; linear in either side."""
    left, right = values(50, 40), values(50, 70, seed=1)
    keys = torch.tensor(sign_keys(seed))
    out, whole = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    for begin, end in ((0, cut), (cut, 50)):
        gac_kernels.kronecker_sketch(left, right, out, bounds=torch.tensor([begin, end]), keys=keys)
    gac_kernels.kronecker_sketch(-2 * left, right, whole, bounds=torch.tensor([0, 50]), keys=keys, scale=-0.5)
    torch.testing.assert_close(out, whole, rtol=0, atol=1e-3 * 2.0**-10 * 50 * 40)


def test_inner_products_are_unbiased():
    """Over 2,000 seeds, within 4 standard errors: of loud rows, of nearly parallel sequences, of both sides."""
    torch.manual_seed(0)
    tokens, p, q = 12, 40, 48
    loud = torch.linspace(-2, 2, p).exp()
    left = torch.randn(4 * tokens, p) * loud
    right = torch.randn(4 * tokens, q)
    left[tokens : 2 * tokens] = left[:tokens] + 0.1 * left[tokens : 2 * tokens]
    right[tokens : 2 * tokens] = right[:tokens]
    bounds = torch.arange(5) * tokens
    g = torch.einsum("btp, btq -> bpq", left.view(4, tokens, p).double(), right.view(4, tokens, q).double()).flatten(1)
    draws = []
    for seed in range(2000):
        out = torch.zeros(4, 8, 16)
        gac_kernels.kronecker_sketch(left, right, out, bounds=bounds, keys=torch.tensor(sign_keys(seed)))
        flat = out.flatten(1).double()
        draws.append(flat @ flat.T)
    found = torch.stack(draws)
    z = (found.mean(0) - g @ g.T) / (found.std(0) / math.sqrt(len(draws)))
    assert z.abs().max() < 4, z


def test_seeds_give_unrelated_signs():
    """Signs of two sides, of two seeds and of two columns agree as often as coins: within 5 standard deviations."""
    n = 4000
    columns = []
    for seed in (0, 1, 2**32, -1):
        key = torch.tensor(sign_keys(seed))
        for side in (0, 2):
            from gac_kernels.kronecker import signs_of

            columns.append(signs_of(torch.arange(n), 64, key[side], key[side + 1], torch.float64))
    table = torch.cat(columns, dim=1)
    agreement = table.T @ table / math.sqrt(n)
    agreement.fill_diagonal_(0.0)
    assert agreement.abs().max() < 5.5, "the largest of 131,000 normal numbers is 4.6 to 5.4"
    assert (table.sum(0) / math.sqrt(n)).abs().max() < 5


def arguments():
    left, right = values(20, 40), values(20, 33, seed=1)
    return left, right, torch.zeros(2, 8, 8), torch.tensor([0, 7, 20]), torch.tensor(sign_keys(1))


@pytest.mark.parametrize("options", [(None, None, False, 1.0), (None, 13, True, -2.0)])
def test_opcheck(options):
    results = opcheck(torch.ops.gac_kernels.kronecker_sketch_.default, (*arguments(), *options))
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_of_places():
    _, right, *rest = arguments()
    left = torch.arange(20)
    results = opcheck(torch.ops.gac_kernels.kronecker_sketch_.default, (left, right, *rest, 100, None, True, 1.0))
    assert set(results.values()) == {"SUCCESS"}


def test_compiled_calls_equal_eager_calls():
    def double(left, right, out, bounds, keys):
        gac_kernels.kronecker_sketch(left, right, out, bounds=bounds, keys=keys)
        return gac_kernels.kronecker_sketch(left, right, out, bounds=bounds, keys=keys, scale=0.5) * 2

    eager, compiled = arguments(), arguments()
    expected = double(*eager)
    got = torch.compile(double, fullgraph=True, backend="aot_eager")(*compiled)
    assert torch.equal(expected, got)
    assert torch.equal(eager[2], compiled[2])


def test_no_gradient_flows_through_it():
    left, right, out, bounds, keys = arguments()
    found = gac_kernels.kronecker_sketch(left.requires_grad_(), right.requires_grad_(), out, bounds=bounds, keys=keys)
    assert not found.requires_grad
