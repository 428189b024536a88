"""The ms-swift adapter over a stand-in for its GRPO trainer, with the methods of 4.6.0 that the adapter meets.

From swift/rlhf_trainers/grpo_trainer.py (``__init__``, ``compute_loss``, ``_compute_loss_and_metrics``,
``_get_per_token_logps_and_entropies``, ``chord_sft_iterator``), swift/rlhf_trainers/utils.py (``compute_chord_loss``)
and swift/trainers/trainer_factory.py.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from gac.losses import sft_token_loss
from gac.trainers.adapters import swift as adapter
from tests.gac.models import VOCABULARY, tiny_model

ROWS, PROMPT, LENGTH = 2, 3, 8
INSTALLED = importlib.util.find_spec("swift") is not None and importlib.util.find_spec("modelscope") is not None


def token_ids(count, seed):
    return torch.randint(0, VOCABULARY, (count, LENGTH), generator=torch.Generator().manual_seed(seed))


class Template:
    padding_free, sequence_parallel_size = False, 1

    def data_collator(self, rows):
        ids = torch.stack([row["ids"] for row in rows])
        labels = ids.clone()
        labels[:, :PROMPT] = -100
        return {"input_ids": ids, "labels": labels, "loss_scale": None}


class GRPOTrainer(Trainer):
    """A transformers trainer with ms-swift's seams; its own mixed loss is CHORD's, with a constant."""

    def __init__(self, *args, chord_sft_dataset=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.template = Template()
        self.chord_sft_iterator = None
        if chord_sft_dataset:
            self.chord_sft_iterator = itertools.cycle(chord_sft_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch = SimpleNamespace(
            completion_mask=torch.ones(len(inputs["ids"]), LENGTH - PROMPT, dtype=torch.bool),
            advantages=inputs["advantage"],
        )
        loss, _ = self._compute_loss_and_metrics(model, {"input_ids": inputs["ids"]}, batch)
        return loss

    def _get_per_token_logps_and_entropies(self, model, model_inputs, grpo_batch, compute_entropy=False):
        return response_logprobs(model, model_inputs["input_ids"]), None

    def _compute_loss_and_metrics(self, model, model_inputs, grpo_batch):
        logps, _ = self._get_per_token_logps_and_entropies(model, model_inputs, grpo_batch, compute_entropy=False)
        loss = -(grpo_batch.advantages[:, None] * logps).mean()
        if self.chord_sft_iterator is not None:
            raise AssertionError("ms-swift would add CHORD's weighted sum here")
        return loss, {"mode": "train"}


def response_logprobs(model, ids):
    logp = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    return logp[:, PROMPT - 1 :]


def demonstrations():
    return [[{"ids": row} for row in token_ids(ROWS, 100 + k)] for k in range(8)]


def build(package, folder, *, steps=3, dataset=True, options=None):
    factory = type("TrainerFactory", (), {"TRAINER_MAPPING": {"grpo": "swift.rlhf_trainers.GRPOTrainer"}})
    package({"swift.rlhf_trainers": {"GRPOTrainer": GRPOTrainer}, "swift.trainers": {"TrainerFactory": factory}})
    cls = adapter.install(**(options or {}))
    module, _, name = factory.TRAINER_MAPPING["grpo"].rpartition(".")
    assert (module, getattr(adapter, name)) == (adapter.__name__, cls), "what ms-swift's factory resolves"
    args = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=ROWS, gradient_accumulation_steps=2,
        learning_rate=1e-2, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    args.chord_enable_phi_function = False
    data = [
        {"ids": row, "advantage": torch.tensor(a)} for row, a in zip(token_ids(12, 0), (1.0, -0.5) * 6, strict=True)
    ]
    return cls(tiny_model(), args=args, train_dataset=data, chord_sft_dataset=demonstrations() if dataset else None)


def test_one_step_by_hand(package, tmp_path):
    trainer = build(package, tmp_path, steps=1, options={"law": "fixed", "mu": 0.3})
    trainer.train()
    model, advantages = tiny_model(), torch.tensor([1.0, -0.5])
    model.train()
    for k in range(2):
        batch = Template().data_collator(demonstrations()[k])
        sft = sft_token_loss(model(input_ids=batch["input_ids"]).logits, batch["labels"])
        rl = -(advantages[:, None] * response_logprobs(model, token_ids(12, 0)[2 * k : 2 * k + 2])).mean()
        ((0.3 * sft + 0.7 * rl) / 2).backward()
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 1e-2 * theirs.grad)


def test_mu_moves_and_is_logged(package, tmp_path):
    trainer = build(package, tmp_path)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "gac/mu" in entry]
    assert len({entry["gac/mu"] for entry in logs}) == 3
    assert logs[0]["gac/n_s"] == logs[0]["gac/n_r"] == 2 * ROWS, "of both micro-batches"
    assert trainer.chord_sft_iterator is not None


def test_evaluation_is_ms_swifts(package, tmp_path):
    trainer = build(package, tmp_path)
    trainer.model.eval()
    inputs = {"ids": token_ids(ROWS, 5), "advantage": torch.ones(ROWS)}
    loss = trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(loss, -response_logprobs(trainer.model, inputs["ids"]).mean())


def test_errors(package, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="chord_sft_dataset"):
        build(package, tmp_path, dataset=False)
    monkeypatch.setattr(Template, "padding_free", True)
    with pytest.raises(ValueError, match="padding_free"):
        build(package, tmp_path)
    monkeypatch.setattr(Template, "padding_free", False)
    monkeypatch.setattr(GRPOTrainer, "use_liger_loss", True, raising=False)
    with pytest.raises(ValueError, match="use_liger_kernel"):
        build(package, tmp_path)


if INSTALLED:

    def test_what_the_adapter_meets_in_ms_swift(monkeypatch):
        from swift.rlhf_trainers import GRPOTrainer as Published
        from swift.trainers import TrainerFactory

        monkeypatch.setattr(TrainerFactory, "TRAINER_MAPPING", dict(TrainerFactory.TRAINER_MAPPING))
        cls = adapter.install(law="gac")
        assert TrainerFactory.get_trainer_cls(SimpleNamespace(rlhf_type="grpo")) is cls
        assert issubclass(cls, Published)
        for name in ("_compute_loss_and_metrics", "_get_per_token_logps_and_entropies", "compute_loss"):
            ours, theirs = (list(inspect.signature(getattr(c, name)).parameters) for c in (GRPOTrainer, Published))
            assert theirs[: len(ours)] == ours, name
        source = inspect.getsource(Published._compute_loss_and_metrics)
        assert "self.chord_sft_iterator is not None" in source, "what keeps ms-swift from adding its own sum"
        assert "_get_per_token_logps_and_entropies(" in source
