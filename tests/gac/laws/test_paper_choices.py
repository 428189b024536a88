"""The figures of docs/paper.md: what each choice in the authors' code and text does to mu.

Every row of the page's tables is computed here and looked up on the page; ``-rP`` prints them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import gac
from gac.laws.base import closed_form
from tests.gac.laws.draws import Truth

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "paper.md").read_text()
PROSE = " ".join(PAGE.split())
S = gac.Statistics
ONLY_SFT_NOISE, ONLY_RL_NOISE = S(1.0, 0.0, 0.0), S(0.0, 1.0, 0.0)  # raw = 0 and raw = 1


def on_page(*cells: str | float) -> None:
    """One row of a table of the page."""
    row = "| " + " | ".join(str(cell) for cell in cells) + " |"
    print(row)
    assert row in PAGE, f"docs/paper.md lacks the row {row}"


def raw(sigma_s2: float, sigma_r2: float, delta_g2: float) -> float:
    return closed_form(sigma_s2, sigma_r2, delta_g2, 0.5)


# -- smoothing, blend, interval ---------------------------------------------------------------------------------------

LATER = (10, 100, 1000)
VARIANTS = {
    "`paper`, defaults (prior held at 0.5)": ("paper", {"prior": 0.5}),
    "`paper`, `mu_update_freq=1`": ("paper", {"prior": 0.5, "mu_update_freq": 1}),
    "`paper`, no prior (`blend=1`)": ("paper", {"blend": 1.0, "init_mu": 0.05}),
    "`gac`, defaults": ("gac", {"start": 0.05}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_response_to_a_step_of_the_estimate(name):
    """Change of mu after the statistics go from raw = 0 to raw = 1, once mu has settled at the former."""
    law, options = VARIANTS[name]
    controller = gac.Controller(law, **options)
    for _ in range(100):
        controller.update(ONLY_SFT_NOISE)
    before, after = float(controller.mu), {}
    for step in range(1, max(LATER) + 1):
        controller.update(ONLY_RL_NOISE)
        after[step] = float(controller.mu) - before
    on_page(name, *(f"{after[step]:.4f}" for step in LATER))


def test_weight_of_the_estimate_with_and_without_a_memory_of_its_own():
    """``m' = beta*m + (1-beta)*raw`` with ``m`` the last mu (code) or the last ``m`` (text); then the blend."""
    beta, blend = 0.99, 0.5
    own = fed_back = 0.0
    reached = {}
    for step in range(1, 1001):  # raw = 1, prior 0, no cap
        own = beta * own + (1 - beta)
        fed_back = blend * (beta * fed_back + (1 - beta))
        reached[step] = (blend * own, fed_back)
    on_page("text: its own last value", *(f"{reached[step][0]:.4f}" for step in LATER))
    on_page("code: the last `mu`", *(f"{reached[step][1]:.4f}" for step in LATER))
    assert fed_back == pytest.approx(blend * (1 - beta) / (1 - blend * beta))


def test_the_first_batch_is_remembered():
    """The first refresh sets the average; each later one multiplies what is left of it by beta."""
    paper, ours = gac.Controller("paper"), gac.Controller("gac")
    left = {}
    for step in range(1001):
        told = S(1.0, 1.0, 1.0) if step == 0 else S(0.0, 0.0, 0.0)
        paper.update(told, step=step)
        ours.update(told)
        left[step] = float(paper.law.state["average"][0]), float(ours.law.smoothed()[0])
    for step in (10, 100, 1000):
        on_page(step, *(f"{value:.3f}" for value in left[step]))
    assert left[1000][0] == pytest.approx(0.99**100)


def test_the_published_trajectory_hardly_moves_with_its_batches():
    run = json.loads((ROOT / "tests/data/paper_law.json").read_text())["defaults_no_prior"]
    batches = []
    for entry in run["steps"]:
        statistics = gac.coefficient_statistics(*tensors(entry), z_normalize=False)
        batches.append(raw(*(float(getattr(statistics, n)) for n in ("sigma_s2", "sigma_r2", "delta_g2"))))
    smoothed = [entry["raw"] for entry in run["steps"]]
    on_page("raw of one batch", len(batches), f"{min(batches):.3f}", f"{max(batches):.3f}")
    on_page("raw after smoothing", len(batches), f"{min(smoothed):.4f}", f"{max(smoothed):.4f}")


def tensors(entry: dict) -> tuple[torch.Tensor, ...]:
    logprobs = torch.tensor(entry["logprob"], dtype=torch.float64)
    mask = torch.arange(logprobs.shape[1]) < torch.tensor(entry["length"])[:, None]
    return logprobs, torch.tensor(entry["advantages"], dtype=torch.float64), mask, torch.tensor(entry["expert"])


@pytest.mark.parametrize("half_life", [7, 70])
@pytest.mark.parametrize("directions", [1, 4, 20])
def test_averaging_mu_against_averaging_the_statistics(directions, half_life):
    """Steady state, sigma_s2 = 1, sigma_r2 = 4, delta_g2 = 4 (mu* = 2/3), the same half-life either way."""
    truth, steps = Truth(1.0, 4.0, 4.0, directions), 6 * half_life
    drawn = truth.draw(1000, steps, generator=torch.Generator().manual_seed(directions))
    weights = 0.5 ** (torch.arange(steps - 1, -1, -1.0, dtype=torch.float64) / half_life)
    weights /= weights.sum()
    numbers = [drawn[name] for name in ("sigma_s2", "sigma_r2", "delta_g2")]
    of_mu = closed_form(*(x.clamp(min=0.0) for x in numbers), 0.5) @ weights
    of_statistics = closed_form(*((x @ weights).clamp(min=0.0) for x in numbers), 0.5)
    off = [x - truth.mu() for x in (of_mu, of_statistics)]
    bias, error = [float(x.mean()) for x in off], [float(x.square().mean().sqrt()) for x in off]
    on_page(directions, half_life, *(f"{x:+.3f}" for x in bias), *(f"{x:.3f}" for x in error))
    if directions == 20:
        assert error[1] < error[0]


def test_cap_ratio():
    """sigma_s2 = 1, sigma_r2 = 4: what is left of the disagreement's pull towards alpha = 0.5."""
    for delta_g2 in (5.0, 50.0, 500.0):
        cells = []
        for ratio in (0.0, 2.0, 1.0):
            controller = gac.Controller("paper", delta_g2_cap_ratio=ratio)
            controller.update(S(1.0, 4.0, delta_g2))
            cells.append(f"{float(controller.law.state['raw']):.3f}")
        on_page(f"{delta_g2:g}", *cells)


# -- the proxies ------------------------------------------------------------------------------------------------------


def tokens(
    demonstrations: int = 8, groups: int = 8, rollouts: int = 8, *, divide: bool = True, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch as GRPO makes it: half of the tokens near certain, rewards 0 or 1, 32 to 96 tokens a sequence.

    Advantages are centred in their group and, with ``divide``, divided by the group's deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)
    rows = demonstrations + groups * rollouts
    p = torch.where(uniform(rows, 96) < 0.5, 1 - 0.05 * uniform(rows, 96), 0.05 + 0.9 * uniform(rows, 96))
    skill = 0.6 + 0.8 * uniform(rows, 1)  # sequences differ in how likely they are
    rewards = (uniform(groups, rollouts) < uniform(groups, 1)).double()
    advantages = rewards - rewards.mean(1, keepdim=True)
    if divide:
        advantages = advantages / (rewards.std(1, unbiased=False, keepdim=True) + 1e-6)
    advantages = torch.cat([torch.zeros(demonstrations, dtype=torch.float64), advantages.flatten()])
    mask = torch.arange(96) < (32 + 65 * uniform(rows, 1)).long()
    return skill * p.log(), advantages, mask, torch.arange(rows) < demonstrations


def proxies(batch, **options) -> tuple[float, float, float, float]:
    """sigma_s2, sigma_r2, delta_g2 and raw."""
    statistics = gac.coefficient_statistics(*batch, **options)
    values = [float(getattr(statistics, name)) for name in ("sigma_s2", "sigma_r2", "delta_g2")]
    return (*values, raw(*values))


def test_z_normalisation():
    for name, divide in (("divided by the group's deviation", True), ("only centred", False)):
        batch = tokens(divide=divide)
        for kind, z in (("code", False), ("text", True)):
            on_page(name, kind, *(f"{value:.3f}" for value in proxies(batch, z_normalize=z)))
    # z-normalised coefficients of correlation rho differ by 2*(1-rho), whatever their sizes
    deltas = [proxies(tokens(seed=seed), z_normalize=True)[2] for seed in range(50)]
    cells = min(deltas), sum(deltas) / 50, max(deltas)
    print(*(f"{x:.2f}" for x in cells))
    assert f"between {cells[0]:.2f} and {cells[2]:.2f}, {cells[1]:.2f} on average" in PROSE


@pytest.mark.parametrize("demonstrations", [8, 64])
def test_demonstrations_without_an_rl_coefficient(demonstrations):
    batch = tokens(demonstrations)
    with_them = proxies(batch, z_normalize=False)
    rollouts = [x[~batch[3]] for x in batch]
    delta = float(gac.coefficient_statistics(*rollouts, z_normalize=False).delta_g2)
    without = raw(with_them[0], with_them[1], delta)
    on_page(demonstrations, f"{with_them[2]:.3f}", f"{with_them[3]:.3f}", f"{delta:.3f}", f"{without:.3f}")


@pytest.mark.parametrize("demonstrations", [1, 9, 64, 1024])
def test_trimming(demonstrations):
    cells = []
    for trim in (0.0, 0.1):
        sigma_s2, *_, value = proxies(tokens(demonstrations), z_normalize=False, trim=trim)
        cells += [f"{sigma_s2:.4f}" if sigma_s2 > 1e-6 else f"{sigma_s2:.0e}", f"{value:.3f}"]
    on_page(demonstrations, *cells)


def test_a_normal_distribution_keeps_less_than_half_of_its_variance():
    nll = torch.randn(100_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 10
    ones = torch.ones_like(nll)
    cut, whole = (
        float(gac.coefficient_statistics(-nll, 0 * nll, ones, ones[:, 0].bool(), trim=trim).sigma_s2)
        for trim in (0.1, 0.0)
    )
    z, density = 1.2815515655446004, math.exp(-(1.2815515655446004**2) / 2) / math.sqrt(2 * math.pi)
    theory = 1 - 2 * z * density / 0.8
    assert cut / whole == pytest.approx(theory, abs=0.01)
    assert f"{theory:.3f} of its variance" in PROSE


@pytest.mark.parametrize("groups", [8, 32, 128])
def test_the_proxies_do_not_know_how_large_the_batch_is(groups):
    """Against variances of the means, which is what more rollouts reduce."""
    batch = tokens(demonstrations=8, groups=groups)
    sigma_s2, sigma_r2, delta_g2, value = proxies(batch, z_normalize=False)
    of_means = raw(sigma_s2 / 8, sigma_r2 / (8 * groups), 0.0)
    on_page(8 * groups, f"{sigma_r2:.3f}", f"{value:.3f}", f"{raw(sigma_s2, sigma_r2, 0.0):.3f}", f"{of_means:.3f}")
    assert delta_g2 > 0


def test_a_batch_without_demonstrations():
    """Counted as noise-free (their code), or not at all (ours). True values: all of size 1, mu* = 0.5."""
    whole, without = S(1.0, 1.0, 1.0), S(math.nan, 1.0, 1.0)
    as_theirs = S(0.0, 1.0, 1.0)
    for name, batches in (("the first of 2", 2), ("the first of 100", 100)):
        values = []
        for first in (as_theirs, without):
            controller = gac.Controller("paper", mu_update_freq=1)
            for told in [first, *[whole] * (batches - 1)]:
                controller.update(told)
            values.append(f"{float(controller.law.state['raw']):.3f}")
        on_page(name, *values)


def test_ranks_that_see_different_demonstrations():
    """sigma_r2 is all-reduced in their code, sigma_s2 and delta_g2 are not: each rank has a raw of its own."""
    values = []
    for seed in range(200):
        batch = tokens(demonstrations=8, groups=2, seed=seed)
        statistics = gac.coefficient_statistics(*batch, z_normalize=False)
        values.append(raw(float(statistics.sigma_s2), 0.8, float(statistics.delta_g2)))
    spread = torch.tensor(values)
    print(f"{spread.min():.3f} {spread.max():.3f} {spread.std():.3f}")
    assert f"from {spread.min():.3f} to {spread.max():.3f}" in PROSE
