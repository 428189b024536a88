import json
import math
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from gac.losses import sft_token_loss
from gac.tasks.characters import build_character_tokenizer
from gac.trainers import HybridGRPOConfig
from gac.trainers.demonstrations import DemonstrationCollator, EpochSampler
from gac.trainers.groups import GroupLayout, take_rows
from gac.trainers.hybrid_grpo import complete_checkpoints
from tests.gac.trainers.conftest import DEMONSTRATIONS, PROMPTS, last_digit_reward, tiny_model

TIMING = {
    "step_time",
    "gac/seconds",
    "gac/overhead",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
}


class Gradients(TrainerCallback):
    """Keeps the gradients with which the optimizer steps, and the model before its first one."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters()})


def histories(trainer):
    return [{k: v for k, v in entry.items() if k not in TIMING} for entry in trainer.state.log_history]


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_without_sft_weight_the_run_is_trls_own(trainer, config, loss_type, monkeypatch):
    """But for the order of rollouts: TRL's own shuffling is replaced by the one that keeps groups together."""
    monkeypatch.setattr(
        "trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: take_rows(batch, GroupLayout(8, 4).shuffled())
    )
    hybrid_gradients, plain_gradients = Gradients(), Gradients()
    hybrid = trainer(mu=0.0, loss_type=loss_type, callbacks=[hybrid_gradients])
    hybrid.train()
    plain = GRPOTrainer(
        tiny_model(),
        last_digit_reward,
        config(cls=GRPOConfig, loss_type=loss_type),
        Dataset.from_list(PROMPTS),
        processing_class=build_character_tokenizer(),
        callbacks=[plain_gradients],
    )
    plain.train()
    assert any(g.abs().max() > 0 for g in plain_gradients.steps[0].values())
    for left, right in zip(hybrid_gradients.steps, plain_gradients.steps, strict=True):
        assert_same(left, right)
    assert_same(hybrid.model.state_dict(), plain.model.state_dict())
    shared = [k for k in plain.state.log_history[0] if k not in TIMING]
    assert {k: hybrid.state.log_history[0][k] for k in shared} == {k: plain.state.log_history[0][k] for k in shared}


@pytest.mark.parametrize(("accumulation", "batch", "phi"), [(1, 8, False), (4, 2, False), (4, 2, True)])
def test_sft_gradient_is_the_token_mean_of_the_whole_window(trainer, accumulation, batch, phi):
    kept = Gradients()
    trainer(
        mu=1.0,
        max_steps=1,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
        sft_batch_size=batch,
        sft_loss="phi" if phi else "nll",
        callbacks=[kept],
        seed=5,
    ).train()
    model = tiny_model()
    window = DemonstrationCollator(build_character_tokenizer(), DEMONSTRATIONS)(EpochSampler(50, 5).take(0, 8))
    assert len(set(window.attention_mask.sum(1).tolist())) > 1  # unequal lengths, or the test shows nothing
    logits = model(input_ids=window.input_ids, attention_mask=window.attention_mask).logits
    sft_token_loss(logits, window.labels, phi=phi).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(kept.steps[0][name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_mixed_gradient_and_loss_are_the_weighted_sums(trainer):
    kept = {}
    for mu in (0.0, 0.25, 1.0):
        kept[mu] = Gradients()
        run = trainer(mu=mu, max_steps=1, callbacks=[kept[mu]])
        run.train()
        kept[mu].entry = run.state.log_history[0]
    for name, mixed in kept[0.25].steps[0].items():
        expected = 0.25 * kept[1.0].steps[0][name] + 0.75 * kept[0.0].steps[0][name]
        torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-7)
    loss = {mu: gradients.entry["loss"] for mu, gradients in kept.items()}
    assert loss[0.25] == pytest.approx(0.25 * loss[1.0] + 0.75 * loss[0.0], rel=1e-5, abs=1e-6)
    sft = {gradients.entry["gac/sft_loss"] for gradients in kept.values()}
    assert max(sft) == pytest.approx(min(sft))  # logged without its weight
    assert loss[1.0] == pytest.approx(max(sft), rel=1e-5)


def test_metrics_reach_the_logger_and_the_model_is_left_without_hooks(trainer):
    run = trainer(law="gac", law_options={"start": 0.3, "cap": 0.01})
    run.train()
    entry = run.state.log_history[1]
    for name in ("mu", "mu_raw", "sigma_s2", "sigma_r2", "delta_g2", "norm_s2", "norm_r2", "cosine", "seconds"):
        assert math.isfinite(entry[f"gac/{name}"])
    assert entry["gac/n_s"] == entry["gac/n_r"] == 2
    assert run.mixer.controller.law.cap == 0.01
    assert run.mixer.controller.law.momentum == 0.9, "that of the Adam which the trainer made"
    assert abs(entry["gac/mu"] - 0.3) > 0
    assert float(run.mixer.mu) == pytest.approx(entry["gac/mu"])
    assert "gac/prior" not in entry  # not measured: absent, not a number
    assert entry["gac/informative_groups"] == pytest.approx(1 - entry["frac_reward_zero_std"])
    assert (entry["gac/silent_s"], entry["gac/silent_r"]) == (0, 0)
    parameters = list(run.model.parameters())
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters)
    run.model(input_ids=torch.ones(1, 2, dtype=torch.int64)).logits.sum().backward()


def test_evaluation_is_not_weighted(trainer):
    from datasets import Dataset

    run = trainer(mu=0.75, per_device_eval_batch_size=4)
    run.train()
    run.model.eval()
    batch = run._prepare_inputs([{"prompt": "1+1="}] * 4)
    with torch.no_grad():
        ours = run.compute_loss(run.model, batch)
        theirs = GRPOTrainer.compute_loss(run, run.model, batch)
    assert torch.equal(ours, theirs)
    assert "eval_loss" in run.evaluate(Dataset.from_list(PROMPTS[:4]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps_per_generation": 4},  # a checkpoint between two optimizer steps on the same rollouts
        {"num_iterations": 2, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8},
    ],
    ids=["default", "steps_per_generation", "num_iterations"],
)
def test_resume_continues_bit_for_bit(trainer, tmp_path, options):
    common = {"max_steps": 7, "save_strategy": "steps", "save_steps": 5, "law": "gac", **options}
    whole = trainer(output_dir=str(tmp_path / "whole"), **common)
    whole.train()
    checkpoint = complete_checkpoints(str(tmp_path / "whole"))[0]
    assert checkpoint.endswith("checkpoint-5")
    resumed = trainer(output_dir=str(tmp_path / "resumed"), model=tiny_model(seed=9), **common)
    torch.manual_seed(123)  # whatever happened before must not matter
    resumed.train(resume_from_checkpoint=checkpoint)
    assert json.dumps(histories(whole)[5:7]) == json.dumps(histories(resumed)[5:7])
    assert_same(whole.model.state_dict(), resumed.model.state_dict())


def test_resume_in_a_later_epoch(trainer, tmp_path):
    # 4 prompts a step and 36 prompts: an epoch has 9 steps
    common = {
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 10,
        "per_device_train_batch_size": 8,
    }
    whole = trainer(output_dir=str(tmp_path / "whole"), **common)
    whole.train()
    assert whole.state.epoch > 1
    resumed = trainer(output_dir=str(tmp_path / "resumed"), **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-10"))
    assert json.dumps(histories(whole)[10:12]) == json.dumps(histories(resumed)[10:12])


def test_train_twice_goes_on(trainer):
    run = trainer(law="gac", max_steps=1)
    run.train()
    mu = float(run.mixer.mu)
    run.args.max_steps = 2
    run.train()
    assert run.mixer.controller.steps == 3
    assert float(run.mixer.mu) != mu


def test_incomplete_checkpoints_are_not_offered(trainer, tmp_path):
    run = trainer(max_steps=2, save_strategy="steps", save_steps=1)
    run.train()
    folders = complete_checkpoints(run.args.output_dir)
    assert [folder.rpartition("-")[2] for folder in folders] == ["1", "2"]
    (tmp_path / "out" / "checkpoint-2" / "gac_state.pt").unlink()
    assert complete_checkpoints(run.args.output_dir) == folders[:1]
    with pytest.raises(ValueError, match="cut short"):
        trainer(max_steps=3).train(resume_from_checkpoint=folders[1])
    assert complete_checkpoints(str(tmp_path / "absent")) == []


def test_lora_trains_adapters_only(trainer):
    from peft import LoraConfig

    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = trainer(law="gac", peft_config=peft_config)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    run.train()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert math.isfinite(run.state.log_history[1]["gac/sigma_s2"])


def test_a_loss_that_bypasses_the_weighting_is_refused(trainer, monkeypatch):
    def fused(self, model, inputs, num_items_in_batch=None):
        loss = GRPOTrainer.compute_loss(self, model, self._prepare_inputs(inputs))
        loss.backward()
        return loss.detach()

    run = trainer()
    monkeypatch.setattr(GRPOTrainer, "training_step", fused)
    with pytest.raises(RuntimeError, match="compute_loss"):
        run.train()


def test_ligers_fused_loss_is_refused(trainer):
    options = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": True}}
    with pytest.raises((ValueError, ImportError), match=r"(?i)liger|fused_linear_cross_entropy"):
        trainer(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"law": "nonsense"}, "unknown law 'nonsense'.*gac"),
        ({"law_options": {"nonsense": 1}}, "no option nonsense"),
        ({"law": "fixed", "law_options": {"mu": 2.0}}, r"mu must be in \[0, 1\]"),
        ({"mu": 0.5, "law": "chord-mu"}, "cannot be combined"),
        ({"estimator": "nonsense"}, "unknown estimator.*sketch"),
        ({"sft_loss": "nonsense"}, "unknown sft_loss"),
        ({"loss_type": "nonsense"}, "unknown loss_type 'nonsense'.*dapo"),
        ({"sft_batch_size": 0}, "sft_batch_size must be at least 1"),
    ],
)
def test_wrong_options_are_refused_at_construction(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_wrong_data_and_arguments_are_refused_before_training(trainer, config):
    with pytest.raises(ValueError, match=r"'prompt' and 'completion'.*'answer'"):
        trainer(sft_dataset=[{"answer": "1+1=2"}])
    with pytest.raises(ValueError, match="empty"):
        trainer(sft_dataset=[])
    with pytest.raises(ValueError, match="sft_dataset is missing"):
        trainer(sft_dataset=None)
    plain = config(cls=GRPOConfig)
    assert not isinstance(plain, HybridGRPOConfig)
    from gac.trainers import HybridGRPOTrainer

    with pytest.raises(TypeError, match="HybridGRPOConfig"):
        HybridGRPOTrainer(tiny_model(), last_digit_reward, plain, None, DEMONSTRATIONS)


def test_importing_the_package_loads_no_trainer():
    modules = "gac, gac.losses, gac.plots, gac.tasks.problems, gac.trainers"
    code = f"import sys, {modules}; assert not {{'transformers', 'trl', 'matplotlib'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
