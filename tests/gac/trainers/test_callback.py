"""GacCallback in a real transformers Trainer."""

from __future__ import annotations

import math
import os
import shutil

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import gac
from gac.files import DamagedFile
from gac.losses import sft_token_loss
from gac.trainers import GacCallback
from gac.trainers.callback import STATE_FILE
from tests.gac.models import VOCABULARY, tiny_model
from tests.gac.test_files import Malicious

ROWS, LENGTH, STEPS = 2, 8, 4


def rows(count=32):
    """Pairs of a demonstration and a rollout with its advantage."""
    g = torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(0, VOCABULARY, (LENGTH,), generator=g)
    return [{"sft_ids": draw(), "rl_ids": draw(), "advantage": torch.randn((), generator=g)} for _ in range(count)]


def policy_loss(logits, ids, advantages):
    logp = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return -(advantages[:, None] * logp).mean(), logp


class TwoPassTrainer(Trainer):
    """A pass for each branch: statistics on gradients."""

    gac: GacCallback

    def training_step(self, model, inputs, num_items_in_batch=None):
        inputs = self._prepare_inputs(inputs)
        with self.gac.mixer.sft():
            sft = super().training_step(model, {"ids": inputs["sft_ids"]})
        with self.gac.mixer.rl():
            rl = super().training_step(model, {"ids": inputs["rl_ids"], "advantages": inputs["advantage"]})
        return sft + rl

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["ids"]).logits
        if "advantages" in inputs:
            loss, _ = policy_loss(logits, inputs["ids"], inputs["advantages"])
        else:
            loss = sft_token_loss(logits, inputs["ids"])
        return self.gac.mixer.weight * loss


class MixedBatchTrainer(Trainer):
    """One pass over both: the coefficient estimator."""

    gac: GacCallback

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        mixer = self.gac.mixer
        ids = torch.cat([inputs["sft_ids"], inputs["rl_ids"]])
        n = len(inputs["sft_ids"])
        logits = model(input_ids=ids).logits
        advantages = torch.cat([torch.zeros(n), inputs["advantage"]])
        rl, _ = policy_loss(logits[n:], ids[n:], inputs["advantage"])
        _, logp = policy_loss(logits, ids, advantages)
        mixer.observe_tokens(logp.detach(), advantages, torch.ones_like(logp), torch.arange(2 * n) < n)
        return mixer.mixed_loss(sft_loss=sft_token_loss(logits[:n], ids[:n]), rl_loss=rl)


class Recorder(TrainerCallback):
    """What the loggers of report_to do: take the logs as they are handed over."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def arguments(folder, **options):
    defaults = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "max_grad_norm": 1.0,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "remove_unused_columns": False, "optim": "sgd", "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return TrainingArguments(**defaults | options)


def build(folder, cls=TwoPassTrainer, *, callback=None, callbacks=(), attach=True, **options):
    trainer = cls(tiny_model(), args=arguments(folder, **options), train_dataset=rows(), callbacks=list(callbacks))
    trainer.gac = callback or GacCallback(estimator="exact" if cls is TwoPassTrainer else "auto", cap=1.0)
    if attach:
        trainer.gac.attach(trainer)
    return trainer


def logged(trainer, name):
    return [entry[f"gac/{name}"] for entry in trainer.state.log_history if "loss" in entry and f"gac/{name}" in entry]


def parameters(trainer):
    return [p.detach() for p in trainer.model.parameters()]


def by_hand():
    """The same training as a plain loop, each loss divided by the accumulation steps as the trainer does."""
    model, data = tiny_model(), rows()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    mus = []
    with gac.patch(model, estimator="exact", cap=1.0) as mixer:
        for step in range(STEPS):
            for micro in range(2):
                begin = (2 * step + micro) * ROWS
                stack = lambda name: torch.stack([row[name] for row in data[begin : begin + ROWS]])  # noqa: B023
                sft_ids, rl_ids, advantages = stack("sft_ids"), stack("rl_ids"), stack("advantage")
                with mixer.sft():
                    mixer.backward(sft_token_loss(model(input_ids=sft_ids).logits, sft_ids) / 2)
                with mixer.rl():
                    mixer.backward(policy_loss(model(input_ids=rl_ids).logits, rl_ids, advantages)[0] / 2)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            mixer.step()
            optimizer.zero_grad()
            mus.append(float(mixer.mu))
    return mus, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(("optim", "options", "momentum"), [("sgd", {}, 0.0), ("adamw_torch", {}, 0.9),
                                                            ("adamw_torch", {"momentum": 0.5}, 0.5)])  # fmt: skip
def test_the_law_learns_the_optimizers_momentum(tmp_path, optim, options, momentum):
    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.found = callback.mixer.controller.law.momentum

    callback, look = GacCallback(estimator="exact", **options), Look()
    build(tmp_path, callback=callback, callbacks=[look], optim=optim).train()
    assert look.found == momentum


def test_two_passes_with_accumulation_equal_a_loop_by_hand(tmp_path):
    trainer = build(tmp_path)
    trainer.train()
    mus, expected = by_hand()
    assert logged(trainer, "mu") == mus
    assert logged(trainer, "n_s") == logged(trainer, "n_r") == [2.0] * STEPS
    for ours, theirs in zip(parameters(trainer), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert all(not p._post_accumulate_grad_hooks for p in trainer.model.parameters()), "hooks are gone after training"


def test_mixed_batches(tmp_path):
    trainer = build(tmp_path, MixedBatchTrainer)
    trainer.train()
    mus = logged(trainer, "mu")
    assert len(set(mus)) == STEPS
    assert logged(trainer, "n_s") == [2.0 * ROWS] * STEPS, "rows of both micro-batches"
    assert trainer.gac.mixer.metrics()["estimator"] == "coefficient"


def test_coefficient_estimator_leaves_the_model_alone(tmp_path):
    class Hooks(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.seen = [p for p in model.parameters() if p._post_accumulate_grad_hooks or p._backward_hooks]

    callback, hooks = GacCallback(estimator="coefficient"), Hooks()
    trainer = build(tmp_path, MixedBatchTrainer, callback=callback, callbacks=[hooks], max_steps=1)
    trainer.train()
    assert hooks.seen == []
    assert logged(trainer, "n_r") == [2.0 * ROWS]


@pytest.mark.parametrize("cls", [TwoPassTrainer, MixedBatchTrainer])
def test_resume_is_exact(tmp_path, cls):
    straight = build(tmp_path / "straight", cls)
    straight.train()
    options = {"save_strategy": "steps", "save_steps": 2}
    first = build(tmp_path / "cut", cls, **options)
    first.train()
    shutil.rmtree(tmp_path / "cut" / f"checkpoint-{STEPS}")
    second = build(tmp_path / "cut", cls, **options)
    second.train(resume_from_checkpoint=True)
    assert logged(second, "mu") == logged(straight, "mu")
    assert torch.equal(second.gac.mixer.mu, straight.gac.mixer.mu)
    for ours, theirs in zip(parameters(second), parameters(straight), strict=True):
        assert torch.equal(ours, theirs)


def test_resume_from_elsewhere(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    build(tmp_path / "a", **options).train()
    build(tmp_path / "b", learning_rate=0.5, **options).train()  # another run, saved at the same step
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    trainer = build(tmp_path / "b", max_steps=3)
    with pytest.raises(ValueError, match="another run"):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer = build(tmp_path / "c", max_steps=3)
    with pytest.raises(ValueError, match=r"set callback\.resume_from"):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.gac.resume_from = checkpoint
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.gac.mixer.controller.steps == 3
    os.remove(os.path.join(checkpoint, STATE_FILE))
    with pytest.raises(ValueError, match="there is no"):
        trainer.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("damage", ["cut short", "malicious", "mu", "step", "law"])
def test_a_damaged_state_is_refused_before_the_model_is_patched(tmp_path, damage):
    build(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    path, mark = tmp_path / "checkpoint-2" / STATE_FILE, tmp_path / "ran"
    saved = torch.load(path, weights_only=True)
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "malicious":
        torch.save(saved | {"mixer": Malicious(mark)}, path)
    else:
        controller = saved["mixer"]["controller"]
        controller |= {"law": "fixed"} if damage == "law" else {}
        saved |= {"step": True} if damage == "step" else {}
        controller["state"]["mu"].fill_(7.0 if damage == "mu" else 0.5)
        torch.save(saved, path)
    trainer = build(tmp_path, max_steps=3)
    with pytest.raises(DamagedFile) as raised:
        trainer.train(resume_from_checkpoint=str(path.parent))
    assert str(path) in str(raised.value)
    assert "set callback.resume_from" in str(raised.value)
    assert not mark.exists()
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in trainer.model.parameters())
    with pytest.raises(RuntimeError, match="from the beginning"):
        _ = trainer.gac.mixer


def test_a_state_of_another_model_leaves_no_hooks(tmp_path):
    """What the mixer alone can tell: the sizes of moving means."""
    build(tmp_path, save_strategy="steps", save_steps=2, max_steps=2, gradient_accumulation_steps=1).train()
    path = tmp_path / "checkpoint-2" / STATE_FILE
    saved = torch.load(path, weights_only=True)
    saved["mixer"]["means"][0]["sft.mean"] = torch.zeros(3)
    torch.save(saved, path)
    trainer = build(tmp_path, max_steps=3, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match=r'\["sft.mean"\] must have the shape'):
        trainer.train(resume_from_checkpoint=str(path.parent))
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in trainer.model.parameters())


def test_a_second_train_goes_on(tmp_path):
    trainer = build(tmp_path, max_steps=2)
    trainer.train()
    trainer.train()
    assert trainer.gac.mixer.controller.steps == 4


def test_metrics_reach_the_loggers(tmp_path):
    recorder = Recorder()
    trainer = build(tmp_path, callbacks=[recorder], logging_steps=2)
    trainer.train()
    seen = [logs for logs in recorder.logs if "loss" in logs]
    assert len(seen) == 2
    for logs in seen:
        assert {"gac/mu", "gac/sigma_s2", "gac/sigma_r2", "gac/delta_g2", "gac/cosine", "gac/skipped"} <= set(logs)
        assert all(math.isfinite(value) for value in logs.values() if isinstance(value, float))
    mus, _ = by_hand()
    assert [logs["gac/mu"] for logs in seen] == pytest.approx([sum(mus[:2]) / 2, sum(mus[2:]) / 2], rel=1e-6)
    assert seen[1]["gac/step"] == STEPS - 1
    assert not any(key.startswith("gac/") for logs in recorder.logs if "loss" not in logs for key in logs)


def test_given_as_a_callback_only_the_history_has_them(tmp_path):
    recorder, callback = Recorder(), GacCallback(estimator="exact")
    trainer = build(tmp_path, callback=callback, callbacks=[recorder, callback], attach=False, max_steps=1)
    trainer.train()
    assert "gac/mu" not in recorder.logs[0]
    assert len(logged(trainer, "mu")) == 1
    callback.attach(trainer)
    assert trainer.callback_handler.callbacks.count(callback) == 1


def test_laws_that_follow_the_policy_are_told(tmp_path):
    class Told(TwoPassTrainer):
        def compute_loss(self, *args, **kwargs):
            self.gac.observe(kl=torch.tensor(0.5), entropy=1.0)
            return super().compute_loss(*args, **kwargs)

    callback = GacCallback(law="kl-ctrl", estimator="exact")
    trainer = build(tmp_path, Told, callback=callback, max_steps=2)
    trainer.train()
    assert len(set(logged(trainer, "mu"))) == 2
    trainer = build(tmp_path, callback=GacCallback(law="kl-ctrl"), max_steps=1)
    with pytest.raises(RuntimeError, match=r"callback\.observe\(kl=\.\.\.\)"):
        trainer.train()


def test_errors(tmp_path):
    with pytest.raises(RuntimeError, match="beginning of trainer"):
        _ = GacCallback().mixer
    with pytest.raises(ValueError, match="unknown estimator"):
        GacCallback(estimator="guess")
    with pytest.raises(TypeError, match="half_lif"):
        GacCallback(half_lif=3)
    callback = GacCallback()
    args = arguments(tmp_path)
    args.fp16 = True
    with pytest.raises(ValueError, match="bf16=True"):
        callback.on_train_begin(args, None, None, model=tiny_model())
