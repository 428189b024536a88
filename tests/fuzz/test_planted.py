"""Faults that are planted, in the package and in the kernels: the fuzzer finds each within a few draws."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gac
from gac import branches, measurement, mixer, weights
from gac.fused import host as fused_host
from gac.fused import law as fused_law
from gac.observe import contribution, observer, pending, structure
from gac.observe.accumulated import Accumulated
from gac.observe.ledger import Ledger
from gac.statistics import Branch
from gac_kernels import cpu
from tests.fuzz import kernels
from tests.fuzz.__main__ import main
from tests.fuzz.drawing import drawn
from tests.fuzz.judge import judge, known_as, shrunk


def _change_weights(monkeypatch, change):
    """Changes weights after they were made, on the device or on the host."""
    for kind in (weights.Weights, weights.HostWeights):

        def changed(self, mu, real=kind.__init__):
            real(self, mu)
            change(self)

        monkeypatch.setattr(kind, "__init__", changed)


def _wrong_weight(monkeypatch):
    def swap(made):
        made.of = dict(zip(made.of, reversed(made.of.values()), strict=True))

    _change_weights(monkeypatch, swap)


def _weight_not_undone(monkeypatch):
    def keep(made):
        made.undone = {branch: torch.ones(()) for branch in made.undone}

    _change_weights(monkeypatch, keep)


def _branches_swapped(monkeypatch):
    real = Ledger.end
    other = {Branch.SFT: Branch.RL, Branch.RL: Branch.SFT}
    monkeypatch.setattr(Ledger, "end", lambda self, branch, scale: real(self, other[branch], scale))


def _previous_forgotten(monkeypatch):
    real = Ledger.begin

    def begin(self):
        real(self)
        if self.previous is not None:
            self.previous.zero_()

    monkeypatch.setattr(Ledger, "begin", begin)


def _tokens_ignored(monkeypatch):
    real = contribution.Contribution
    monkeypatch.setattr(observer, "Contribution", lambda branch, tokens: real(branch, None))


def _gradients_lost(monkeypatch):
    """A pass that reaches fewer parameters than the first one of its kind leaves out one of them."""
    real = pending.Pending.take

    def take(self, moments):
        if len(self.gradients) > 1:
            self.gradients.pop(next(iter(self.gradients)))
        return real(self, moments)

    monkeypatch.setattr(pending.Pending, "take", take)


def _gradient_changed(monkeypatch):
    real = observer.Observer.finish

    def finish(self):
        real(self)
        for parameter in self.parameters[:1]:
            if parameter.grad is not None and not parameter.grad.is_sparse:
                parameter.grad.mul_(1.001)

    monkeypatch.setattr(observer.Observer, "finish", finish)


def _momentum_ignored(monkeypatch):
    monkeypatch.setattr(gac.Mixer, "_measure_by", lambda self, optimizer: self._measurement.follow(optimizer))


def _state_forgotten(monkeypatch):
    monkeypatch.setattr(gac.Controller, "load_state_dict", lambda self, state: None)


def _thaw_unnoticed(monkeypatch):
    monkeypatch.setattr(structure.Structure, "check", lambda self: None)


def _unfreezing_forgotten(monkeypatch):
    monkeypatch.setattr(gac.Mixer, "repatch", lambda self: None)
    monkeypatch.setattr(structure.Structure, "check", lambda self: None)


def _foreign_error(monkeypatch):
    """Of the end of a step, in one piece by the library or in Python."""
    monkeypatch.setattr(fused_law, "update", lambda *arguments: {}["mu"])
    monkeypatch.setattr(fused_host.HostProgram, "__call__", lambda *arguments, **more: {}["mu"])


def _compiled_left_out(monkeypatch):
    """The last parameter of a compiled module goes unwatched."""
    real = mixer.trainable

    def some(model, *, owner):
        named = real(model, owner=owner)
        return named[:-1] if "_orig_mod" in named[-1][0] else named

    monkeypatch.setattr(mixer, "trainable", some)


def _mixed_by_the_other_weights(monkeypatch):
    real = branches.Branches.mixed
    monkeypatch.setattr(branches.Branches, "mixed", lambda self, sft_loss, rl_loss: real(self, rl_loss, sft_loss))


def _last_tokens_alone(monkeypatch):
    real = measurement.Measurement.observe_tokens

    def observe_tokens(self, *tokens):
        self._rows.clear()
        real(self, *tokens)

    monkeypatch.setattr(measurement.Measurement, "observe_tokens", observe_tokens)


def _mixed_passes_watched(monkeypatch):
    """What a mixed pass adds is taken for a part of the next contribution."""
    monkeypatch.setattr(Accumulated, "changed", lambda self: False)


def _threads_unseen(monkeypatch):
    real = observer.Observer._notice

    def notice(self, index, gradient):
        if threading.get_ident() == self._passes._caller or self.branch is None:
            real(self, index, gradient)

    monkeypatch.setattr(observer.Observer, "_notice", notice)


def _turns_not_taken(monkeypatch):
    """Whoever comes later gives up what is under way."""
    real = observer.Observer.contribution

    def contribution(self, tokens=None):
        self._passes.lock = threading.RLock()
        return real(self, tokens)

    monkeypatch.setattr(observer.Observer, "contribution", contribution)


def _inference_not_left(monkeypatch):
    namespace = SimpleNamespace(inference_mode=lambda mode: nullcontext(), no_grad=torch.no_grad)
    monkeypatch.setattr(mixer, "torch", namespace)


FAULTS = {
    fault.__name__.strip("_").replace("_", " "): fault
    for fault in (
        _wrong_weight,
        _weight_not_undone,
        _branches_swapped,
        _previous_forgotten,
        _tokens_ignored,
        _gradients_lost,
        _gradient_changed,
        _momentum_ignored,
        _state_forgotten,
        _thaw_unnoticed,
        _unfreezing_forgotten,
        _foreign_error,
        _compiled_left_out,
        _mixed_by_the_other_weights,
        _last_tokens_alone,
        _mixed_passes_watched,
        _threads_unseen,
        _turns_not_taken,
        _inference_not_left,
    )
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(name, monkeypatch):
    """Within 150 draws, as nothing that is known; and what is shrunk still shows it."""
    FAULTS[name](monkeypatch)
    for number in range(150):
        failure = judge(drawn(20_000, number))
        if failure is not None and not known_as(failure):
            break
    else:
        pytest.fail("not found")
    least = shrunk(failure, limit=60)
    assert judge(least.draw) is not None
    print(f"{name}: draw {number}, {least.kind}: {least.what[:200]}")


def test_a_failure_fails_the_command_and_says_how_to_repeat_it(monkeypatch, capsys):
    _weight_not_undone(monkeypatch)
    assert main(["--target", "mixer", "--number", "0", "--seed", "20000"]) == 1
    out = capsys.readouterr().out
    assert "FAILED different, draw 0 of seed 20000" in out
    code = out[out.index("    from tests.fuzz.draw") : out.index("  1 new findings")]
    exec(textwrap.dedent(code))
    assert "Failure(" in capsys.readouterr().out, "the code shows it again"


def _off(function, change):
    """An operation whose result is changed on the way out."""

    def wrapped(*arguments, **options):
        got = function(*arguments, **options)
        return got if got is None else change(got)

    return wrapped


KERNEL_FAULTS = {
    "moments": lambda got: got * (1 + 1e-9),
    "pair_moments": lambda got: got * (1 + 1e-9),
    "sketch": lambda got: got * (1 + 1e-4),
    "absorb_": lambda got: got * (1 + 1e-9),
    "accumulate_": lambda got: got * (1 + 1e-4),
    "absorb_sketch_": lambda got: got * (1 + 1e-4),
    "token_moments": lambda got: got * (1 + 1e-9),
}


@pytest.mark.parametrize("operation", KERNEL_FAULTS)
def test_planted_faults_of_kernels_are_found(operation, monkeypatch):
    monkeypatch.setattr(cpu, operation, _off(getattr(cpu, operation), KERNEL_FAULTS[operation]))
    tally = kernels.fuzz(20_000, range(150), backend="cpu")
    assert tally.failures, operation
    assert all(f"operation={operation!r}" in failure for failure in tally.failures)


def test_a_sketch_with_a_wrong_sign_is_found(monkeypatch):
    real = cpu.sketch

    def wrong(tensors, out, **options):
        got = real(tensors, out, **options)
        if out.numel():
            out[-1] = -out[-1]
        return got

    monkeypatch.setattr(cpu, "sketch", wrong)
    assert kernels.fuzz(20_000, range(100), backend="cpu").failures


@pytest.mark.parametrize("operation", ["accumulate_", "absorb_sketch_"])
def test_a_total_with_a_wrong_element_is_found(operation, monkeypatch):
    real = getattr(cpu, operation)

    def wrong(tensors, *vectors, **options):
        got = real(tensors, *vectors, **options)
        total = vectors[operation == "absorb_sketch_"]
        if total.numel():
            total[-1] *= 1 + 1e-5
        return got

    monkeypatch.setattr(cpu, operation, wrong)
    tally = kernels.fuzz(20_000, range(150), backend="cpu")
    assert tally.failures
    assert all(f"operation={operation!r}" in failure for failure in tally.failures)


def test_the_command_by_two_processes():
    """As `make fuzz` starts it."""
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        "--draws",
        "6",
        "--seconds",
        "100",
        "--workers",
        "2",
        "--seed",
        "20000",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert "mixer: 6 draws" in done.stdout
    assert "kernels: 6 draws" in done.stdout
