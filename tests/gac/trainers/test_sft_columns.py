"""Demonstrations in the columns of SFT data sets, packed and not: the loss and gradient of TRL's own SFT trainer."""

import json
import re
import types

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from gac.losses import sft_token_loss
from gac.trainers.demonstrations import DemonstrationCollator
from gac.trainers.packing import PackedCollator, require_separable
from gac.trainers.prompts import demonstrations_of
from tests.gac.trainers.conftest import DEMONSTRATIONS, TINY_RUN, tiny_model, with_demonstrations
from tests.gac.trainers.test_trl_rollouts import chat_tokenizer

ROWS = [*DEMONSTRATIONS[::5], {"prompt": "7+7=", "completion": "14, " * 3}]  # 11, of unequal lengths
LENGTH = 64
GENERATION = (
    "{% for m in messages %}[{{ m.role[0] }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)
ask = lambda row: {"role": "user", "content": row["prompt"]}
reply = lambda row: {"role": "assistant", "content": row["completion"]}

COLUMNS = {
    "text": (lambda row: {"text": row["prompt"] + row["completion"]}, {}, {}),
    "pairs": (lambda row: {"prompt": row["prompt"], "completion": row["completion"]}, {}, {}),
    "pairs, all": (
        lambda row: {"prompt": row["prompt"], "completion": row["completion"]},
        {"completion_only": False},
        {"completion_only_loss": False},
    ),
    "chats": (lambda row: {"prompt": [ask(row)], "completion": [reply(row)]}, {}, {}),
    "messages": (
        lambda row: {"messages": [ask(row), reply(row), {"role": "user", "content": "?"}, reply(row)]},
        {},
        {"assistant_only_loss": True},
    ),
    "messages, all": (lambda row: {"messages": [ask(row), reply(row)]}, {"completion_only": False}, {}),
}
"""Columns, and what makes our trainer and TRL's put the loss on the same tokens."""


class Gradients(TrainerCallback):
    """Keeps the gradient of the first step."""

    def __init__(self):
        self.first = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.first = self.first or {name: p.grad.clone() for name, p in model.named_parameters()}


def tokenizer():
    made = chat_tokenizer()
    made.chat_template = GENERATION
    return made


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def of_trl(rows, folder, **options):
    """Loss and gradient of TRL's SFT trainer for a batch of all rows."""
    shared = {key: TINY_RUN[key] for key in ("use_cpu", "bf16", "gradient_checkpointing", "report_to", "disable_tqdm")}
    config = SFTConfig(str(folder), max_length=LENGTH, **shared, **options)
    trainer = SFTTrainer(tiny_model(), config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer())
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    loss.backward()
    return loss.detach(), gradients(trainer.model)


def assert_close(found, expected):
    """In float32, sums in another order."""
    assert max(g.abs().max() for g in expected.values()) > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def collator(rows, *, packing, **options):
    collate = DemonstrationCollator(tokenizer(), rows, max_length=LENGTH, **options)
    return PackedCollator(collate, LENGTH) if packing else collate


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_loss_and_gradient_are_those_of_trls_sft_trainer(tmp_path, columns, packing):
    shape, ours, theirs = COLUMNS[columns]
    rows = [shape(row) for row in ROWS]
    expected, gradient = of_trl(rows, tmp_path, packing=packing, **theirs)
    collate = collator(rows, packing=packing, **ours)
    assert (len(collate) < len(rows)) == packing
    batch, model = collate(range(len(collate))), tiny_model()
    loss = sft_token_loss(model(**batch.model_inputs(), use_cache=False).logits, batch.labels)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_close(gradients(model), gradient)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_demonstrations_do_not_see_each_other(attention):
    """Each has the logits that it has alone, within a few roundings of float32."""
    model = tiny_model()
    model.set_attn_implementation(attention)
    require_separable(model)
    collate = collator([{"text": row["prompt"] + row["completion"]} for row in ROWS], packing=True)
    batch = collate(range(len(collate)))
    assert batch.input_ids.shape == (1, sum(batch.lengths))
    assert len(batch.lengths) == len(ROWS)
    logits = model(**batch.model_inputs(), use_cache=False).logits[0].split(batch.lengths)
    for ids, found in zip(batch.input_ids[0].split(batch.lengths), logits, strict=True):
        torch.testing.assert_close(found, model(input_ids=ids[None]).logits[0], rtol=1e-5, atol=1e-6)


def test_the_hybrid_trainer_packs(trainer):
    """A window of all demonstrations has one gradient and one set of token statistics, packed or not."""
    rows = [{"text": row["prompt"] + row["completion"]} for row in ROWS]
    found = {}
    for packing, size in ((False, len(ROWS)), (True, len(collator(rows, packing=True)))):
        kept = Gradients()
        run = trainer(
            mu=0.5, max_steps=1, gradient_accumulation_steps=1, sft_dataset=rows, sft_max_length=LENGTH,
            sft_batch_size=size, sft_packing=packing, estimator="coefficient", callbacks=[kept],
        )  # fmt: skip
        assert run._sampler.size == size
        run.train()
        found[packing] = kept.first, {k: v for k, v in run.state.log_history[0].items() if k.startswith("gac/")}
    assert_close(found[True][0], found[False][0])
    for metrics in (found[True][1], found[False][1]):
        for name in ("gac/seconds", "gac/overhead"):
            metrics.pop(name, None)
    assert found[True][1]["gac/sigma_s2"] > 0
    assert found[True][1] == pytest.approx(found[False][1], rel=1e-5)


class Recurrent(torch.nn.Module):
    """As much of a model as is looked at."""

    def __init__(self, attention="sdpa", kinds=("full_attention",)):
        super().__init__()
        text = types.SimpleNamespace(layer_types=list(kinds))
        self.config = types.SimpleNamespace(_attn_implementation=attention, get_text_config=lambda: text)

    def forward(self, input_ids, attention_mask=None): ...


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Recurrent("paged_attention"), "sft_packing=True.*attn_implementation='paged_attention'"),
        (Recurrent(kinds=["full_attention", "linear_attention"]), "sft_packing=True.*has linear_attention"),
        (Recurrent(), "position_ids, which Recurrent does not take"),
    ],
)
def test_models_that_mix_up_packs_are_refused(model, message):
    with pytest.raises(ValueError, match=message) as raised:
        require_separable(model)
    assert "sft_packing=False" in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sft_packing=True needs sft_max_length"),
        ({"sft_max_length": 8, "estimator": "sequence"}, "sft_packing=True.*estimator='sequence'"),
        ({"sft_max_length": 8, "law": "hpt"}, "law='hpt'.*sft_packing=True"),
    ],
)
def test_packing_is_refused_where_it_has_no_meaning(trainer, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(sft_packing=True, prompts=with_demonstrations(), **options)


def test_what_the_assistant_says_has_labels_in_every_turn():
    made = tokenizer()
    made.chat_template = "{{ prefix }}" + GENERATION
    say = lambda role, text: {"role": role, "content": text}
    talk = [say("system", "S"), say("user", "1"), say("assistant", "2"), say("user", "3"), say("assistant", "4")]
    rows = [{"messages": [*talk, say("user", "5")], "chat_template_kwargs": {"prefix": "P"}}]
    batch = DemonstrationCollator(made, rows, template={"prefix": "never"})([0])
    assert made.decode(batch.input_ids[0]) == "P[s]S[u]1[a]2<eos>[u]3[a]4<eos>"
    assert made.decode(batch.labels[batch.labels != -100]) == "2<eos>4<eos>"
    for name, column in (("tools", json.dumps([{"name": "T"}])), ("tools", [{"name": "T"}])):
        made.chat_template = "{{ tools[0].name }}" + GENERATION
        batch = DemonstrationCollator(made, [{"messages": talk, name: column}])([0])
        assert made.decode(batch.input_ids[0]).startswith("T[s]S")
    with pytest.raises(ValueError, match="row 0: no message of role 'assistant'"):
        DemonstrationCollator(tokenizer(), [{"messages": talk[:2]}])
    made.chat_template = "{{ messages | length }}" + GENERATION
    with pytest.raises(ValueError, match="prefix"):
        DemonstrationCollator(made, [{"messages": talk}])


@pytest.mark.parametrize("law", ["gac", "hpt"])
def test_demonstrations_are_rendered_as_prompts_are(trainer, law):
    """With the template's options and the tools that TRL's own prompts have; those of prompts too."""
    made = tokenizer()
    made.chat_template = "{{ thinking }}" + GENERATION
    rows = [{"prompt": [ask(row)], "completion": [reply(row)], "demonstration": [reply(row)]} for row in ROWS[:-1]]
    run = trainer(
        law=law, sft_dataset=rows if law == "gac" else None, prompts=rows, reward=lambda prompts, **_: [0.0] * 8,
        chat_template_kwargs={"thinking": "OFF"}, max_steps=1, processing_class=made, observe_tokens=True,
    )  # fmt: skip
    run.train()
    prompt = made.decode(run._tokenize_prompts([rows[0]["prompt"]])[0][0])
    assert prompt == "OFF[u]0+4=[a]"
    if law == "gac":
        shown = [made.decode(run._collate([0]).input_ids[0])]
    else:  # no rollout is correct: every prompt's demonstration is trained on
        parts = [demonstrations_of(part, made.pad_token_id).input_ids for part in run._buffered_inputs]
        shown = [made.decode(row, skip_special_tokens=False) for part in parts for row in part]
        assert len(shown) == 2
    pattern = r"OFF\[u\]\d+\+\d+=\[a\]\d+<eos>(<pad>)*"
    assert all(re.fullmatch(pattern, text) for text in shown), shown
