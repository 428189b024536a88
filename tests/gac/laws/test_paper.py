"""The authors' published controller, replayed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import gac
from gac.schedules import warmup_cosine

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "paper_law.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_trajectories_of_the_authors_controller(name):
    run = GOLDEN[name]
    config = dict(run["config"])
    phi, trim = config.pop("use_phi_in_sft", True), config.pop("trim_ratio_sft", 0.1)
    controller = gac.Controller(law="paper", blend=run["blend"], **config)
    for entry in run["steps"]:
        logprobs = torch.tensor(entry["logprob"], dtype=torch.float64)
        mask = torch.arange(logprobs.shape[1]) < torch.tensor(entry["length"])[:, None]
        statistics = gac.coefficient_statistics(
            logprobs,
            torch.tensor(entry["advantages"], dtype=torch.float64),
            mask,
            torch.tensor(entry["expert"]),
            z_normalize=False,
            phi=phi,
            trim=trim,
        )
        mu = controller.update(statistics, step=entry["step"], prior=entry["prior"], alpha=run["alpha"])
        assert float(mu) == pytest.approx(entry["mu"], rel=1e-9)
        assert float(controller.law.state["raw"]) == pytest.approx(entry["raw"], rel=1e-9)
        for key, value in zip(("sigma_s2", "sigma_r2", "delta_g2"), controller.law.state["average"], strict=True):
            assert float(value) == pytest.approx(entry[key], rel=1e-9)
        if run["prior"]:
            assert warmup_cosine(entry["step"], *run["prior"]) == pytest.approx(entry["prior"], rel=1e-12)


def test_by_hand():
    """raw = 3/4; ada = .99*.5 + .01*raw = .5025; half of it and half of the prior .2 are .35125; the cap allows .01."""
    told = gac.Statistics(sigma_s2=1.0, sigma_r2=3.0, delta_g2=0.0)
    free = gac.Controller(law="paper", prior=0.2, mu_change_cap=1.0)
    assert float(free.update(told)) == pytest.approx(0.35125, rel=1e-8)
    assert float(gac.Controller(law="paper", prior=0.2).update(told)) == pytest.approx(0.49)
    for _ in range(9):
        free.update(gac.Statistics(sigma_s2=9.0, sigma_r2=3.0, delta_g2=0.0))
    assert float(free.law.state["raw"]) == pytest.approx(0.75, rel=1e-8), "taken over in every tenth step"
    free.update(gac.Statistics(sigma_s2=2.0, sigma_r2=3.0, delta_g2=0.0))
    assert float(free.law.state["raw"]) == pytest.approx(3 / 4.01, rel=1e-8)


def test_with_its_defaults_the_statistics_move_mu_by_at_most_a_hundredth():
    """lambda*(1-beta)/(1-lambda*beta) = 0.0099: the span between raw = 0 and raw = 1 in steady state."""
    ends = []
    for sigma_s2, sigma_r2 in ((1.0, 0.0), (0.0, 1.0)):
        controller = gac.Controller(law="paper", prior=0.5)
        for _ in range(200):
            controller.update(gac.Statistics(sigma_s2=sigma_s2, sigma_r2=sigma_r2, delta_g2=0.0))
        ends.append(float(controller.mu))
    assert ends[1] - ends[0] == pytest.approx(0.5 * 0.01 / (1 - 0.5 * 0.99), abs=2e-4)
    assert ends[1] - ends[0] < 0.00991


def test_delta_cap():
    controller = gac.Controller(law="paper", delta_g2_cap_ratio=2.0, blend=1.0, ema_beta=0.0, mu_change_cap=1.0)
    controller.update(gac.Statistics(sigma_s2=1.0, sigma_r2=3.0, delta_g2=100.0))
    assert float(controller.mu) == pytest.approx((0.5 * 8 + 3) / (8 + 1 + 3), rel=1e-7)


def test_missing_and_poisoned_statistics_are_not_taken_over():
    controller = gac.Controller(law="paper", mu_update_freq=1, blend=1.0)
    controller.update(gac.Statistics(sigma_s2=1.0, sigma_r2=1.0, delta_g2=1.0))
    before = {k: v.clone() for k, v in controller.law.state.items()}
    controller.update(gac.Statistics(sigma_s2=math.nan, sigma_r2=math.inf, delta_g2=math.nan, nonfinite=3.0))
    assert torch.equal(controller.law.state["average"], before["average"])
    assert torch.equal(controller.mu, before["mu"])
