"""Every law drives a whole small training run, and the laws that follow the policy get what they follow."""

from __future__ import annotations

import math

import pytest
from transformers import Qwen2ForCausalLM

import gac
from gac.laws.rules import RuleLaw
from gac.trainers import HybridGRPOConfig
from tests.gac.trainers.conftest import DEMONSTRATIONS, tiny_model, with_demonstrations


@pytest.fixture
def saved_model(tmp_path):
    """TRL loads the reference model of a KL term from where the model came from."""
    tiny_model().save_pretrained(tmp_path / "model")
    return Qwen2ForCausalLM.from_pretrained(tmp_path / "model")


def options_of(law):
    """Data and options with which a law can be trained."""
    kind = type(HybridGRPOConfig(law=law, report_to=[], use_cpu=True, bf16=False).build_controller().law)
    from_prompts = issubclass(kind, RuleLaw) and kind.prompt_demonstrations
    options = {"sft_dataset": None if from_prompts else DEMONSTRATIONS}
    if from_prompts:
        options["prompts"] = with_demonstrations()
    if law == "kl-ctrl":
        options["beta"] = 0.01
    if law == "relift":
        options["law_options"] = {"queue": 2}
    return options


@pytest.mark.parametrize("law", gac.laws.available())
def test_every_law_drives_training(trainer, saved_model, law):
    before = {name: p.detach().clone() for name, p in saved_model.named_parameters()}
    hybrid = trainer(saved_model, law=law, max_steps=3, **options_of(law))
    hybrid.train()
    entries = [e for e in hybrid.state.log_history if "gac/mu" in e]
    assert len(entries) == 3
    assert all(0.0 <= e["gac/mu"] <= 1.0 for e in entries)
    if law == "gac":
        assert all(math.isfinite(e["gac/mu_raw"]) for e in entries)
    assert all(p.isfinite().all() for p in hybrid.model.parameters())
    assert any(not p.equal(before[name]) for name, p in hybrid.model.named_parameters())


def test_alpha_that_follows_kl(trainer, saved_model):
    hybrid = trainer(saved_model, law_options={"alpha": "kl"}, beta=0.01, max_steps=2)
    hybrid.train()
    assert math.isfinite(float(hybrid.mixer.controller.law.state["kl"]))


@pytest.mark.parametrize("options", [{"law": "kl-ctrl"}, {"law_options": {"alpha": "kl"}}])
def test_following_kl_without_a_reference_is_refused(trainer, options):
    with pytest.raises(ValueError, match="beta > 0"):
        trainer(**options)
