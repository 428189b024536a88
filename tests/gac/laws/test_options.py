"""Every option of every law that sets mu: impossible values are refused by name, and state is resumed exactly."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

import gac
from gac.laws import base
from tests.gac.laws.test_edges import LAWS, statistics

NAN = math.nan
LAWS_THAT_SET_MU = {name: cls for name, cls in base._LAWS.items() if not issubclass(cls, gac.laws.RuleLaw)}

IMPOSSIBLE = {
    ("gac", "half_life"): (-1.0, 0.0, NAN, "7", True, math.inf),
    ("gac", "alpha"): (-0.1, 1.1, NAN, "KL", None),
    ("gac", "prior"): (-0.1, 1.1, NAN, "0.5", {"peak": 1.0}, True),
    ("gac", "prior_weight"): (-0.1, 1.1, NAN, "SE", None),
    ("gac", "prior_sd"): (0.0, -0.1, NAN, "se"),
    ("gac", "cap"): (-0.01, 1.1, NAN),
    ("gac", "mu_min"): (-0.1, 1.1, NAN),
    ("gac", "mu_max"): (-0.1, 1.1, NAN),
    ("gac", "start"): (-0.1, 1.1, 0.01, 0.99, NAN),
    ("gac", "momentum"): (-0.1, 1.0, NAN, "0.9", True),
    ("aim", "alpha"): (-0.1, 1.1, NAN, "kl", None),
    ("aim", "alpha_max"): (-0.1, 1.1, NAN),
    ("aim", "trust"): (0.0, 1.0, NAN, "0.5"),
    ("aim", "spread"): (0.0, 1.1, NAN),
    ("aim", "mu"): (-0.1, 1.1, NAN, "0.5"),
    ("aim", "cap"): (-0.01, 1.1, NAN),
    ("aim", "share_min"): (-0.1, 1.1, 0.96, NAN),
    ("aim", "share_max"): (-0.1, 1.1, 0.04, NAN),
    ("aim", "mu_min"): (-0.1, 1.1, NAN),
    ("aim", "mu_max"): (-0.1, 1.1, NAN),
    ("aim", "start"): (-0.1, 1.1, 0.0005, 0.9999, NAN),
    ("aim", "momentum"): (-0.1, 1.0, NAN, "0.9", True),
    ("paper", "ema_beta"): (-0.1, 1.1, NAN),
    ("paper", "mu_min"): (-0.1, 1.1),
    ("paper", "mu_max"): (-0.1, 1.1),
    ("paper", "mu_update_freq"): (0, -1, 2.5, NAN),
    ("paper", "alpha_static"): (-0.1, 1.1, "kl"),
    ("paper", "init_mu"): (-0.1, 1.1, 0.95),
    ("paper", "mu_change_cap"): (-0.1, 1.1),
    ("paper", "delta_g2_cap_ratio"): (-0.1, NAN),
    ("paper", "blend"): (-0.1, 1.1),
    ("paper", "prior"): (2.0, [0.5]),
    ("fixed", "mu"): (-0.1, 1.1, NAN, "0.5"),
    ("chord-mu", "warmup"): (-1, NAN),
    ("chord-mu", "decay"): (-1, NAN),
    ("chord-mu", "peak"): (-0.1, 1.1),
    ("chord-mu", "valley"): (-0.1, 1.1),
    ("sequential", "split"): (-1, 2.5, NAN),
    ("kl-ctrl", "target"): (0.0, -0.02, NAN),
    ("kl-ctrl", "gain"): (-0.1, NAN),
    ("kl-ctrl", "start"): (0.0, 0.95, NAN),
    ("kl-ctrl", "mu_min"): (-0.1, 1.1),
    ("kl-ctrl", "mu_max"): (-0.1, 1.1),
    ("entropy-ctrl", "target"): (-1.0, NAN),
    ("entropy-ctrl", "rate"): (-1.0, NAN),
    ("entropy-ctrl", "start"): (0.0, 0.99),
    ("entropy-ctrl", "mu_min"): (-0.1, 1.1),
    ("entropy-ctrl", "mu_max"): (-0.1, 1.1),
}


@pytest.mark.parametrize(
    ("law", "option", "value"),
    [(law, option, value) for (law, option), values in IMPOSSIBLE.items() for value in values],
)
def test_impossible_values_are_refused_by_name(law, option, value):
    with pytest.raises((ValueError, TypeError), match=rf"\b{option}\b"):
        gac.Controller(law, **{option: value})


def test_no_option_was_forgotten():
    known = {(name, option) for name, cls in LAWS_THAT_SET_MU.items() for option in inspect.signature(cls).parameters}
    assert known == set(IMPOSSIBLE)


@pytest.mark.parametrize("law", ["gac", "paper", "kl-ctrl", "entropy-ctrl"])
def test_bounds_the_wrong_way_round(law):
    with pytest.raises(ValueError, match=r"mu_min must not exceed mu_max, got 0.6 > 0.4"):
        gac.Controller(law, mu_min=0.6, mu_max=0.4)


@pytest.mark.parametrize("law", ["gac", "paper"])
def test_a_prior_function_out_of_range(law):
    controller = gac.Controller(law, prior=lambda step: 1.5)
    with pytest.raises(ValueError, match=r"prior must be in \[0, 1\], but its function returned 1.5 at step"):
        controller.update(None)


def test_priors_of_a_schedule():
    prior = {"warmup": 0, "decay": 10, "peak": 1.5, "valley": 0.1}
    with pytest.raises(ValueError, match=r"peak of the prior must be in \[0, 1\], got 1.5"):
        gac.Controller("gac", prior=prior)
    with pytest.raises(ValueError, match="warmup and decay must not be negative"):
        gac.Controller("gac", prior=prior | {"peak": 0.9, "decay": -1})


def test_alpha_of_a_step():
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\]"):
        gac.Controller("gac").update(None, alpha=1.5)


@pytest.mark.parametrize("case", LAWS)
def test_a_resumed_law_goes_on_exactly(case, tmp_path):
    name, options, _ = LAWS[case]
    rows = [(1.0 + k, 2.0, 0.5 - k, 3.5, 0.3, 0.2 if k % 2 else NAN, 0.6, 0.0) for k in range(12)]
    a = gac.Controller(name, **options)
    for k in range(6):
        a.update(statistics(rows[k]) if k != 3 else None, kl=0.01 * k, entropy=1.0 + k)
    torch.save(a.state_dict(), tmp_path / "state.pt")
    b = gac.Controller(name, **options)
    b.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for k in range(6, 12):
        for controller in (a, b):
            controller.update(statistics(rows[k]), kl=0.01 * k, entropy=1.0 + k)
        for key, value in a.law.state.items():
            assert torch.equal(torch.nan_to_num(value, -7.0), torch.nan_to_num(b.law.state[key], -7.0)), key
    assert a.steps == b.steps == 12


def test_states_that_do_not_fit():
    saved = gac.Controller("gac").state_dict()
    older = saved | {"state": {k: v for k, v in saved["state"].items() if k != "mu_se"}}
    with pytest.raises(ValueError, match=r'^state_dict\["state"\] lacks mu_se: it comes from another version'):
        gac.Controller("gac").load_state_dict(older)
    other_shape = saved | {"state": saved["state"] | {"waiting": torch.zeros(())}}
    with pytest.raises(ValueError, match=r'\["waiting"\] must have the shape \(3,\), got \(\)'):
        gac.Controller("gac").load_state_dict(other_shape)
    with pytest.raises(ValueError, match=r"lacks alpha, kl: .*alpha='kl'"):
        gac.Controller("gac", alpha="kl").load_state_dict(saved)
    with pytest.raises(ValueError, match="of law 'gac', this controller has 'fixed'"):
        gac.Controller("fixed").load_state_dict(saved)


def test_a_law_leaves_the_registry_with_its_aliases():
    base.register("passing", "other-name")(type("PassingLaw", (base.Law,), {}))
    assert "passing" in gac.laws.available()
    assert "other-name" in base._ALIASES
    known = set(base._ALIASES)
    base.unregister("passing")
    assert "passing" not in gac.laws.available()
    assert known - set(base._ALIASES) == {"other-name"}
    base.unregister("passing")  # twice is no error
    with pytest.raises(ValueError, match="unknown law 'other-name'"):
        gac.laws.create("other-name")
