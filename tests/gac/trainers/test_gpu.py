"""Trainers on a GPU: what is measured there is what a CPU measures, and nothing of it stays behind on the host.

The other tests of trainers run on the CPU wherever they are. ``benchmarks/gpu_suite.sh`` collects this file where TRL
is missing, too.
"""

import math

import pytest
import torch

from gac.ending import why_in_torch
from tests.gac.trainers.conftest import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(120),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = "cuda"


@pytest.fixture
def run(trainer):
    """Trains on a device, ``use_cpu`` included; the trainer that did."""
    for package in ("trl", "datasets"):
        pytest.importorskip(package)

    def train(device, resume=None, **options):
        made = trainer(model=tiny_model(), law="gac", use_cpu=device == "cpu", **options)
        made.train(resume_from_checkpoint=resume)
        assert {p.device.type for p in made.model.parameters()} == {device}
        return made

    return train


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_demonstrations_measure_what_they_measure_on_a_cpu(run):
    """In the first step, whose demonstrations a model sees that nothing has changed; rollouts are the device's own."""
    there, here = (run(device, max_steps=1, estimator="exact") for device in (DEVICE, "cpu"))
    for name in ("norm_s2", "sigma_s2"):
        found, expected = (trainer.mixer.metrics(wait=True)[name] for trainer in (there, here))
        assert expected > 0
        assert found == pytest.approx(expected, rel=1e-3), name
    assert there.mixer.metrics(wait=True)["sigma_r2"] > 0


@pytest.mark.parametrize("estimator", ["sketch", "sequence"])
def test_a_run_is_measured_in_every_step(run, estimator):
    trainer = run(DEVICE, max_steps=4, estimator=estimator, bf16=True)
    assert trainer.mixer.estimator == estimator
    assert why_in_torch(trainer.mixer.controller.law, torch.device(DEVICE)) is None
    assert trainer.mixer.controller.steps == 4
    mus = logged(trainer, "gac/mu")
    assert len(mus) == 4
    assert all(0.0 < mu < 1.0 for mu in mus)
    assert all(math.isfinite(value) for value in logged(trainer, "gac/sigma_s2"))


def test_a_run_goes_on_from_its_checkpoint(run, tmp_path):
    folder = str(tmp_path / "out")
    whole = run(DEVICE, max_steps=3, save_strategy="steps", save_steps=2, output_dir=folder)
    resumed = run(DEVICE, max_steps=3, resume=f"{folder}/checkpoint-2", output_dir=str(tmp_path / "resumed"))
    assert resumed.mixer.controller.steps == whole.mixer.controller.steps == 3
    weights = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    for one, other in weights:  # a backward pass adds up in any order there
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_callback_measures_what_it_measures_on_a_cpu(tmp_path):
    """In transformers' own trainer: no TRL."""
    pytest.importorskip("accelerate")
    from tests.gac.trainers import test_callback as plain

    mus = {}
    for device in (DEVICE, "cpu"):
        trainer = plain.build(tmp_path / device, use_cpu=device == "cpu")
        trainer.train()
        assert {p.device.type for p in trainer.model.parameters()} == {device}
        mus[device] = plain.logged(trainer, "mu")
    assert len(mus[DEVICE]) == len(mus["cpu"]) > 0
    assert mus[DEVICE] == pytest.approx(mus["cpu"], rel=1e-3)
