"""Loss scaling of fp16=True: accelerate creates the scaler on accelerators alone, so it is put in place here."""

import pytest
import torch

from tests.gac.trainers.test_hybrid_grpo import Gradients, assert_same


def scaled(trainer, scale, **options):
    run = trainer(law="gac", max_steps=3, **options)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    run.train()
    return run


def test_statistics_are_those_without_scaling(trainer):
    plain = trainer(law="gac", max_steps=3)
    plain.train()
    run = scaled(trainer, 2.0**12)
    expected = plain.mixer.metrics()
    for name, value in run.mixer.metrics().items():
        if name not in ("seconds", "estimator"):
            assert value == pytest.approx(expected[name], rel=1e-5, nan_ok=True), name
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, plain.model.state_dict()[name], rtol=1e-4, atol=1e-6)


def test_a_step_that_overflows_is_dropped_by_both(trainer):
    kept = Gradients()
    run = scaled(trainer, 2.0**127, callbacks=[kept])
    assert run.mixer.metrics()["skipped"] >= 1
    assert not all(torch.isfinite(g).all() for g in kept.steps[0].values())
    history = [entry for entry in run.state.log_history if "gac/mu" in entry]
    assert history[0]["gac/mu"] == pytest.approx(0.5), "nothing was learnt"
    assert run.accelerator.scaler.get_scale() < 2.0**127
    assert all(torch.isfinite(p).all() for p in run.model.parameters())


def test_the_scale_is_saved_with_a_checkpoint(trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    whole = scaled(trainer, 2.0**12, output_dir=str(tmp_path / "whole"), **options)
    resumed = trainer(law="gac", max_steps=3, output_dir=str(tmp_path / "resumed"), **options)
    resumed.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.accelerator.scaler.get_scale() == 2.0**12
    assert_same(whole.model.state_dict(), resumed.model.state_dict())
