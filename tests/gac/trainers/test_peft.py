"""LoRA adapters under the hybrid trainer: what is measured, checkpoints, resuming."""

import json
import os

import pytest
import torch
from peft import LoraConfig, PeftModel

from gac.trainers.hybrid_grpo import complete_checkpoints
from tests.gac.trainers.conftest import tiny_model
from tests.gac.trainers.test_hybrid_grpo import assert_same, histories

OPTIONS = {"law": "gac", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "estimator": "exact"}


@pytest.fixture
def lora():
    return LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights="gaussian")


def test_only_adapters_are_measured(trainer, lora):
    run = trainer(peft_config=lora, gac_report_interval=1, **OPTIONS)
    assert isinstance(run.model, PeftModel)
    gradients = []

    def remember(*_, **__):
        gradients.append({name: p.grad for name, p in run.model.named_parameters() if p.grad is not None})

    sizes, before = [], {name: p.clone() for name, p in run.model.named_parameters()}
    step = run.end_optimizer_step
    run.end_optimizer_step = lambda: (remember(), step(), sizes.append(run.mixer.nbytes))
    run.train()
    adapters = {name: p.numel() for name, p in run.model.named_parameters() if "lora_" in name}
    assert all(gradient.keys() == adapters.keys() for gradient in gradients)
    whole = sum(p.numel() for p in run.model.parameters())
    assert sum(adapters.values()) < 0.1 * whole
    assert 0 < sizes[-1] <= 4 * 4 * sum(adapters.values()) + 4096, "buffers of the adapters' size"
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(adapters)
    found = run.mixer.metrics()
    assert found["sigma_s2"] > 0
    assert found["distance2"] > 0


def test_resume_continues_bit_for_bit(trainer, lora, tmp_path):
    whole = trainer(output_dir=str(tmp_path / "whole"), peft_config=lora, **OPTIONS)
    whole.train()
    checkpoint = complete_checkpoints(str(tmp_path / "whole"))[0]
    files = set(os.listdir(checkpoint))
    assert "adapter_config.json" in files
    assert not {"model.safetensors", "pytorch_model.bin"} & files, "adapters alone"
    resumed = trainer(output_dir=str(tmp_path / "resumed"), model=tiny_model(), peft_config=lora, **OPTIONS)
    torch.manual_seed(123)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert json.dumps(histories(whole)[2:4]) == json.dumps(histories(resumed)[2:4])
    assert_same(whole.model.state_dict(), resumed.model.state_dict())
