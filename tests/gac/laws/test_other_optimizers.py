"""The momentum of optimizers that people bring. torch's, transformers' and accelerate's are the real ones; those of
packages that are not installed here are stand-ins with the names and the ``param_groups`` that these packages write."""

from __future__ import annotations

import warnings

import accelerate
import pytest
import torch
from torch.optim import Optimizer

import gac
from gac.laws import momentum
from gac.laws.base import momentum_of


def parameters(count: int = 1) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(3, 3)) for _ in range(count)]


def stand_in(name: str, *groups: dict, bases: tuple[type, ...] = (Optimizer,)) -> Optimizer:
    """An optimizer of the class ``name``, each of whose groups has one parameter and the given entries."""
    kind = type(name, bases, {"__init__": lambda self, groups: Optimizer.__init__(self, groups, {})})
    return kind([{"params": parameters(), "lr": 0.1, **group} for group in groups])


@pytest.fixture(autouse=True)
def errors(monkeypatch):
    """A warning is an error, and every test hears of an optimizer for the first time."""
    monkeypatch.setattr(momentum, "_named", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def real_optimizers():
    sgd = lambda **options: torch.optim.SGD(parameters(), lr=0.1, **options)
    yield "SGD", sgd(), 0.0
    yield "SGD with momentum", sgd(momentum=0.95), 0.95
    yield "Nesterov", sgd(momentum=0.8, nesterov=True), 0.8
    yield "RMSprop", torch.optim.RMSprop(parameters(), lr=0.1, alpha=0.99), 0.0
    yield "RMSprop with momentum", torch.optim.RMSprop(parameters(), lr=0.1, momentum=0.7), 0.7
    for name in ("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SparseAdam"):
        yield name, getattr(torch.optim, name)(parameters(), betas=(0.8, 0.99)), 0.8
    for name in ("Adagrad", "Adadelta", "Rprop", "ASGD", "Adafactor"):
        yield name, getattr(torch.optim, name)(parameters(), lr=0.1), 0.0
    if hasattr(torch.optim, "Muon"):
        yield "Muon", torch.optim.Muon(parameters(), momentum=0.9), 0.9
    from transformers.optimization import Adafactor

    adafactor = lambda **options: Adafactor(parameters(), lr=0.1, relative_step=False, **options)
    yield "Adafactor of transformers", adafactor(), 0.0
    yield "the same with beta1", adafactor(beta1=0.9), 0.9


REAL = list(real_optimizers())


@pytest.mark.parametrize(("optimizer", "expected"), [row[1:] for row in REAL], ids=[row[0] for row in REAL])
def test_optimizers_that_are_installed(optimizer, expected):
    assert momentum_of(optimizer) == expected


@pytest.mark.parametrize("named", [False, True])
def test_the_optimizer_that_accelerate_wraps(named):
    """Whether it is found at its first step or told: the wrapper's own hooks would not do."""
    accelerator = accelerate.Accelerator(cpu=True)
    # shared by all of a process: a trainer that broke off within an accumulation leaves steps forbidden
    accelerator.gradient_state._set_sync_gradients(True)
    try:
        model, optimizer = accelerator.prepare(*model_and_adam())
        assert momentum_of(optimizer) == 0.7
        with gac.patch(model, optimizer=optimizer if named else None) as mixer:
            with mixer.sft():
                mixer.backward(model(torch.ones(2, 3)).sum())
            optimizer.step()
            assert mixer.controller.law.momentum == 0.7
            assert mixer.controller.steps == named, "steps of the optimizer that was named end the mixer's"
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_an_optimizer_that_never_was_one_is_refused():
    class Bare(Optimizer):
        def __init__(self):
            self.param_groups = []

    with pytest.raises(TypeError, match="Bare is an optimizer without hooks"):
        gac.patch(torch.nn.Linear(3, 2), optimizer=Bare())


def model_and_adam():
    model = torch.nn.Linear(3, 2)
    return model, torch.optim.Adam(model.parameters(), betas=(0.7, 0.9))


STAND_INS = {
    "AdamW8bit": ([{"betas": (0.9, 0.999), "eps": 1e-8}], 0.9),
    "PagedAdamW32bit": ([{"betas": [0.85, 0.999], "eps": 1e-8}], 0.85),
    "AdamWFp8": ([{"betas": (0.9, 0.99), "lr": torch.tensor(0.1)}], 0.9),
    "RMSprop8bit": ([{"betas": (0.99, 0.0), "eps": 1e-8}], 0.0),  # (alpha, momentum): its kernels use alpha alone
    "Lion": ([{"betas": (0.9, 0.99)}], 0.99),
    "PagedLion8bit": ([{"betas": (0.95, 0.98)}], 0.98),
    "FusedLion": ([{"betas": (0.9, 0.99), "bias_correction": True}], 0.99),
    "AdamWScheduleFree": ([{"betas": (0.9, 0.999), "train_mode": True, "weight_sum": 0.0}], 0.0),
    "SGDScheduleFree": ([{"momentum": 0.9, "train_mode": True, "weight_sum": 0.0}], 0.0),
    "SingleDeviceMuonWithAuxAdam": (
        [{"momentum": 0.95, "use_muon": True}, {"betas": (0.8, 0.95), "eps": 1e-10, "use_muon": False}],
        0.8,
    ),
    "Muon": ([{"momentum": 0.95, "adamw_betas": (0.9, 0.95)}], 0.9),
    "AdEMAMix": ([{"betas": (0.9, 0.999, 0.9999), "alpha": 5.0}], 0.9),
    "Adafactor": ([{"beta1": 0.9}, {"beta1": None}], 0.0),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_optimizers_of_other_packages(name):
    groups, expected = STAND_INS[name]
    assert momentum_of(stand_in(name, *groups)) == expected


def test_a_lion_of_ones_own():
    lion = type(stand_in("Lion", {"betas": (0.9, 0.99)}))
    assert momentum_of(stand_in("Mine", {"betas": (0.9, 0.99)}, bases=(lion,))) == 0.99


def test_lion_keeps_what_is_said():
    """The share by which a gradient's part in the direction shrinks from step to step, in Lion's own recursion."""
    b1, b2 = 0.9, 0.99
    kept, parts = 0.0, []
    for gradient in (1.0, 0.0, 0.0, 0.0):
        parts.append(b1 * kept + (1 - b1) * gradient)
        kept = b2 * kept + (1 - b2) * gradient
    assert parts[2] / parts[1] == pytest.approx(b2)
    assert parts[3] / parts[2] == pytest.approx(b2)


class Wrapper:
    """As engines wrap: DeepSpeed's ZeRO shows the groups of the optimizer inside, its engine's wrapper may not."""

    def __init__(self, optimizer, shows=True):
        self.optimizer = optimizer
        if shows:
            self.param_groups = optimizer.param_groups


@pytest.mark.parametrize("shows", [True, False])
def test_wrappers(shows):
    adam = torch.optim.Adam(parameters(), betas=(0.6, 0.9))
    assert momentum_of(Wrapper(adam, shows)) == 0.6
    assert momentum_of(Wrapper(Wrapper(adam), shows)) == 0.6
    assert momentum_of(Wrapper(stand_in("FusedLion", {"betas": (0.9, 0.99)}), shows)) == 0.99, "its kind is inside"
    itself = Wrapper(adam)
    itself.optimizer = itself
    assert momentum_of(itself) == 0.6


def test_the_schedule_free_wrapper_takes_the_steps_of_the_optimizer_inside():
    class ScheduleFreeWrapper:
        def __init__(self, base):
            self.base, self.momentum = base, 0.9

        @property
        def param_groups(self):
            return self.base.param_groups

    assert momentum_of(ScheduleFreeWrapper(torch.optim.SGD(parameters(), lr=0.1, momentum=0.3))) == 0.3


def test_an_unknown_optimizer_is_named_once():
    for optimizer in (stand_in("Sophisticated", {"rho": 0.9}), stand_in("Half", {"betas": (0.9, 0.99)}, {"rho": 0.9})):
        with pytest.warns(UserWarning, match=rf"momentum of {type(optimizer).__name__}.*momentum=0.9"):
            assert momentum_of(optimizer) == 0.0
        assert momentum_of(optimizer) == 0.0, "a warning would be an error here"
    with pytest.warns(UserWarning, match="LBFGS"):
        assert momentum_of(torch.optim.LBFGS(parameters())) == 0.0
