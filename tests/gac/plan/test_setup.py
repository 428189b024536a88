"""What a plan is made for: the estimator that a mixer would choose, and mistakes."""

from __future__ import annotations

import pytest

import gac
from gac.plan import DEVICES, Noise, Parameters, Setup
from tests.gac.plan.models import Listed, parameters_of

H100 = DEVICES["h100"]


@pytest.mark.parametrize(
    ("shapes", "frozen"),
    [([(2000, 1000)], 0), ([(2200, 2000)], 0), ([(4200, 1000)], 0), ([(8, 300_000)] * 2, 60_000_000)],
)
def test_auto_chooses_as_patch_does(shapes, frozen):
    model = Listed(shapes, frozen=frozen)
    trainable = parameters_of(model).total
    whole = Parameters("model", (trainable + frozen,), (1000,))
    with gac.patch(model) as mixer:
        setup = Setup(whole, H100, trainable=trainable, dtype="fp32")
        assert setup.observed.total == trainable
        assert setup.chosen_estimator() == mixer.estimator


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sharding": "zero"}, "unknown sharding 'zero'; known: ddp, fsdp"),
        ({"ranks": 0}, "ranks must be at least 1, got 0"),
        ({"alpha": 2.0}, r"alpha must be in \[0, 1\], got 2.0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"half_life": 0.0}, "half_life must be positive"),
        ({"trainable": 10**12}, "trainable must be from 1"),
        ({"estimator": "sequence", "sketch_size": 12}, "sketch_size must be one of 8, 16, 32, 64, got 12"),
        ({"estimator": "sequence", "metric": "optimizer"}, "leave metric="),
        ({"estimator": "sequence", "trainable": 1000}, "Leave trainable out"),
        ({"estimator": "sequence", "length": 0}, "length must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Setup(Parameters.of("1B"), H100, **change)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        Noise(rank=0.5)
    with pytest.raises(ValueError, match="ratio must be positive"):
        Noise(ratio=0.0)
