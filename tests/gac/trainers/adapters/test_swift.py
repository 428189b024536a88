"""The ms-swift adapter over a stand-in for its GRPO trainer, with the methods of 4.6.0 that the adapter meets.

From swift/rlhf_trainers/grpo_trainer.py (``__init__``, ``compute_loss``, ``_compute_loss_and_metrics``,
``_get_per_token_logps_and_entropies``, ``chord_sft_iterator``), swift/rlhf_trainers/utils.py (``compute_chord_loss``)
and swift/trainers/trainer_factory.py.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import json
import os
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

    def test_a_run_of_ms_swift(tmp_path, monkeypatch):
        """Four steps of its GRPO with demonstrations, all local, then the last two again from a checkpoint."""
        from swift import rlhf_main
        from swift.arguments import RLHFArguments
        from swift.rewards import ORM, orms
        from swift.trainers import TrainerFactory

        from gac.tasks.characters import build_character_tokenizer
        from gac.tasks.models import build_small_model

        class LastCharacter(ORM):
            def __call__(self, completions, **kwargs):
                return [float(sum(map(ord, text)) % 2) for text in completions]

        monkeypatch.setitem(orms, "last-character", LastCharacter)
        monkeypatch.setattr(TrainerFactory, "TRAINER_MAPPING", dict(TrainerFactory.TRAINER_MAPPING))
        tokenizer = build_character_tokenizer()
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        tokenizer.save_pretrained(tmp_path / "model")
        build_small_model(tokenizer, hidden_size=16, layers=1, heads=2).save_pretrained(tmp_path / "model")
        question = lambda a: {"role": "user", "content": f"{a}+{a}="}
        rows = {
            "prompts": [[question(a)] for a in range(16)],
            "demonstrations": [[question(a), {"role": "assistant", "content": str(2 * a)}] for a in range(16)],
        }
        for name, conversations in rows.items():
            lines = [json.dumps({"messages": messages}) for messages in conversations]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        (tmp_path / "plugin.py").write_text("from gac.trainers.adapters import swift\nswift.install(law='gac')\n")

        def run(**options):
            return rlhf_main(
                RLHFArguments(
                    rlhf_type="grpo",
                    model=str(tmp_path / "model"),
                    model_type="qwen2",
                    template="dummy",
                    torch_dtype="float32",
                    tuner_type="full",
                    use_hf=True,
                    gradient_checkpointing=False,
                    dataset=[str(tmp_path / "prompts.jsonl")],
                    split_dataset_ratio=0.0,
                    dataset_num_proc=1,
                    chord_sft_dataset=[str(tmp_path / "demonstrations.jsonl")],
                    chord_sft_per_device_train_batch_size=2,
                    chord_mu_warmup_steps=0,
                    chord_mu_decay_steps=0,
                    chord_mu_peak=0.5,
                    chord_mu_valley=0.5,
                    external_plugins=[str(tmp_path / "plugin.py")],
                    reward_funcs=["last-character"],
                    num_generations=4,
                    per_device_train_batch_size=4,
                    gradient_accumulation_steps=2,
                    max_completion_length=4,
                    max_steps=4,
                    logging_steps=1,
                    save_steps=2,
                    learning_rate=1e-3,
                    report_to=[],
                    eval_strategy="no",
                    output_dir=str(tmp_path / "out"),
                    **options,
                )
            )

        mus = lambda result: [entry["gac/mu"] for entry in result["log_history"] if "gac/mu" in entry]
        whole = run()
        assert len(set(mus(whole))) == 4
        assert {"gac/sigma_s2", "gac/sigma_r2", "gac/delta_g2"} <= set(whole["log_history"][0])
        middle = os.path.join(os.path.dirname(whole["last_model_checkpoint"]), "checkpoint-2")
        resumed = run(resume_from_checkpoint=middle)
        assert mus(resumed)[:2] == mus(whole)[:2]
        assert len(mus(resumed)) == 4
