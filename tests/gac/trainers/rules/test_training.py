"""Rules inside whole training steps: the gradient that the optimizer gets, recomputed by hand from the rollouts."""

import json
import math

import pytest
import torch
from datasets import Dataset

from gac.tasks.characters import build_character_tokenizer
from gac.trainers.hybrid_grpo import complete_checkpoints
from tests.gac.trainers.conftest import DEMONSTRATIONS, PROMPTS, first_digit_reward, tiny_model, with_demonstrations
from tests.gac.trainers.test_hybrid_grpo import Gradients, assert_same, histories

TOKENIZER = build_character_tokenizer()
ALL = [row | {"demonstration": row["answer"]} for row in PROMPTS]


def solved_by_prompt(prompts, completions, **_):
    """Rollouts of prompts that begin with 0, 1 or 2 alternate between right and wrong, all others are wrong."""
    return [float(prompt[0] in "012" and i % 2 == 0) for i, prompt in enumerate(prompts)]


def one_step(trainer, law, reward=solved_by_prompt, prompts=ALL, **options):
    """Gradient and micro-batches of one step of two micro-batches with two groups of four each."""
    kept = Gradients()
    run = trainer(
        law=law, reward=reward, prompts=prompts, sft_dataset=None, max_steps=1, per_device_train_batch_size=8,
        callbacks=[kept], **options,
    )  # fmt: skip
    run.train()
    return run, kept.steps[0], run._buffered_inputs


def logprobs_and_entropy(model, part):
    """Of completion tokens, ``[B, T]`` each, with a graph."""
    ids = torch.cat([part["prompt_ids"], part["completion_ids"]], 1)
    attention = torch.cat([part["prompt_mask"], part["completion_mask"]], 1)
    length = part["completion_ids"].shape[1]
    full = model(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1].log_softmax(-1)
    return full.gather(2, part["completion_ids"][..., None])[..., 0], -(full.exp() * full).sum(-1)


def group_texts(part):
    """Prompts of a micro-batch, one for each rollout."""
    return TOKENIZER.batch_decode(part["prompt_ids"], skip_special_tokens=True)


def demonstration_terms(model, prompt, *, weigh=lambda entropy: 1.0):
    """Weighted NLL of a prompt's answer and its number of tokens."""
    answer = next(row["answer"] for row in PROMPTS if row["prompt"] == prompt)
    head = TOKENIZER(prompt)["input_ids"]
    ids = [*head, *TOKENIZER(answer, add_special_tokens=False)["input_ids"], TOKENIZER.eos_token_id]
    full = model(input_ids=torch.tensor([ids])).logits[0, len(head) - 1 : -1].log_softmax(-1)
    target = torch.tensor(ids[len(head) :])
    entropy = -(full.exp() * full).sum(-1).mean().item()
    return -weigh(entropy) * full.gather(1, target[:, None]).sum(), len(target)


def mean_demonstration_loss(model, chosen, everyone, **options):
    """Sum over the chosen prompts, divided by the tokens of everyone's demonstrations."""
    tokens = sum(demonstration_terms(model, prompt)[1] for prompt in everyone)
    return sum((demonstration_terms(model, prompt, **options)[0] for prompt in chosen), torch.zeros(())) / tokens


def assert_gradient(kept, model, loss):
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(kept[name], parameter.grad, rtol=2e-4, atol=2e-7)


@pytest.mark.parametrize("coefficient", [1.0, 0.3])
def test_hpt_follows_rl_of_some_prompts_plus_demonstrations_of_the_others(trainer, coefficient):
    run, kept, parts = one_step(trainer, "hpt", law_options={"sft_coefficient": coefficient})
    everyone = [prompt for part in parts for prompt in dict.fromkeys(group_texts(part))]
    failed = [prompt for prompt in everyone if prompt[0] not in "012"]
    assert 0 < len(failed) < len(everyone) == 4
    assert run.state.log_history[0]["gac/demonstrated"] == len(failed) / 4
    model = tiny_model()
    tokens = sum(part["completion_mask"].sum() for part in parts)
    loss = coefficient * mean_demonstration_loss(model, failed, everyone)
    assert run.state.log_history[0]["gac/sft_loss"] == pytest.approx(loss.item() / coefficient, rel=1e-5)
    for part in parts:
        logprobs, _ = logprobs_and_entropy(model, part)
        gated = torch.tensor([prompt in failed for prompt in group_texts(part)])
        assert (part["advantages"][gated] == 0).all()
        assert (part["advantages"][~gated].abs() > 0.8).all()
        loss = loss - (logprobs * part["advantages"][:, None] * part["completion_mask"]).sum() / tokens
    assert_gradient(kept, model, loss)


def test_hpt_counts_prompts_without_a_demonstration_as_prompts(trainer):
    """Half of the prompts have one, none is solved: half of the weight is supervised."""
    prompts = [row | {"demonstration": row["answer"] if int(row["prompt"][0]) % 2 else None} for row in PROMPTS]
    nothing = lambda completions, **_: [0.0] * len(completions)
    _, kept, parts = one_step(trainer, "hpt", reward=nothing, prompts=prompts)
    everyone = [prompt for part in parts for prompt in dict.fromkeys(group_texts(part))]
    chosen = [prompt for prompt in everyone if int(prompt[0]) % 2]
    assert 0 < len(chosen) < 4
    model = tiny_model()
    assert_gradient(kept, model, mean_demonstration_loss(model, chosen, chosen) * len(chosen) / 4)


@pytest.mark.parametrize("reward", [0.0, 1.0], ids=["none correct", "all correct"])
def test_superrl_at_its_extremes(trainer, reward):
    """None correct: supervised learning alone. All correct: no gradient at all, and no NaN."""
    run, kept, parts = one_step(trainer, "superrl", reward=lambda completions, **_: [reward] * len(completions))
    if reward:
        assert all(gradient.abs().max() == 0 for gradient in kept.values())
        assert run.state.log_history[0]["gac/demonstrated"] == 0
        assert run.state.log_history[0]["gac/sft_loss"] == 0
    else:
        everyone = [prompt for part in parts for prompt in dict.fromkeys(group_texts(part))]
        model = tiny_model()
        assert_gradient(kept, model, mean_demonstration_loss(model, everyone, everyone))


def joined_rewards(completions, answer, **_):
    """Right answers are right; besides these, every third rollout is."""
    return [float(text == right or i % 3 == 1) for i, (text, right) in enumerate(zip(completions, answer, strict=True))]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_luffy_trains_on_the_demonstration_as_a_rollout(trainer, loss_type):
    run, kept, parts = one_step(trainer, "luffy", reward=joined_rewards, loss_type=loss_type)
    model = tiny_model()
    tokens = sum(part["completion_mask"].sum() for part in parts)
    loss = torch.zeros(())
    for part in parts:
        logprobs, _ = logprobs_and_entropy(model, part)
        mask, off = part["completion_mask"], part["gac_joined"]
        assert off.view(-1, 4).tolist() == [[True, False, False, False]] * 2
        texts = TOKENIZER.batch_decode(part["completion_ids"], skip_special_tokens=True)
        answers = [next(row["answer"] for row in PROMPTS if row["prompt"] == p) for p in group_texts(part)]
        assert [text for text, o in zip(texts, off, strict=True) if o] == answers[::4]
        advantages = part["gac_off_policy"] + part["advantages"]
        groups = advantages.view(-1, 4)
        torch.testing.assert_close(groups.sum(1), torch.zeros(2))  # centered, and
        assert all(len(set((4 * (g - g.min())).round().tolist())) == 2 for g in groups)
        torch.testing.assert_close(groups.amax(1) - groups.amin(1), torch.ones(2))  # not scaled
        p = logprobs.exp()
        tokenwise = -advantages[:, None] * torch.where(off[:, None], p / (p + 0.1), logprobs)
        if loss_type == "dapo":
            loss = loss + (tokenwise * mask).sum() / tokens
        else:
            loss = loss + ((tokenwise * mask).sum(1) / mask.sum(1)).mean() / 2
    assert_gradient(kept, model, loss)
    entry = run.state.log_history[0]
    assert entry["gac/mu"] == 0
    assert "gac/sft_loss" not in entry


def test_srft_adds_four_losses(trainer):
    _, kept, parts = one_step(trainer, "srft", reward=joined_rewards)
    everyone = [prompt for part in parts for prompt in dict.fromkeys(group_texts(part))]
    model = tiny_model()
    tokens = sum(part["completion_mask"].sum() for part in parts)
    loss = mean_demonstration_loss(model, everyone, everyone, weigh=lambda entropy: 0.5 * math.exp(-entropy))
    for part in parts:
        logprobs, entropies = logprobs_and_entropy(model, part)
        mask = part["completion_mask"]
        entropy = ((entropies * mask).sum(1) / mask.sum(1)).detach()
        sign, off = part["gac_on_policy"], part["gac_off_policy"]
        assert part["gac_joined"].sum() == 2
        assert {1.0, -1.0} <= set(sign.tolist())
        assert (off[~part["gac_joined"]] == 0).all()
        weight = torch.where(sign > 0, 0.1 * entropy.exp(), sign)
        p = logprobs.exp()
        tokenwise = -weight[:, None] * logprobs - off[:, None] * p / (p + 0.1)
        loss = loss + (tokenwise * mask).sum() / tokens
    assert_gradient(kept, model, loss)


def test_relift_makes_a_full_queue_one_supervised_step(trainer):
    """Four unsolved prompts a step and a queue of six: RL, RL, supervised, RL, supervised, and six wait each time."""
    kept = Gradients()
    nothing = lambda completions, **_: [0.0] * len(completions)
    run = trainer(
        law="relift", law_options={"queue": 6}, reward=nothing, prompts=ALL, sft_dataset=None, max_steps=5,
        per_device_train_batch_size=8, sft_batch_size=2, learning_rate=0.0, callbacks=[kept],
    )  # fmt: skip
    run.train()
    entries = run.state.log_history[:5]
    assert [entry["gac/mu"] for entry in entries] == [0, 1, 0, 1, 0]  # of the step to come
    assert [entry.get("gac/queue") for entry in entries] == [4, 8, None, 6, None]
    assert ["gac/sft_loss" in entry for entry in entries] == [False, False, True, False, True]
    assert ["entropy" in entry for entry in entries] == [True, True, False, True, False]
    assert [entry["gac/n_s"] for entry in entries] == [0, 0, 4, 0, 4]  # two pieces of two in each micro-step
    assert run.mixer.statistics is not None
    norms = [max(gradient.abs().max() for gradient in step.values()) for step in kept.steps]
    assert [norm > 0 for norm in norms] == [False, False, True, False, True]


def test_relift_learns_from_the_oldest_demonstrations(trainer):
    kept, order = Gradients(), []

    def nothing(prompts, completions, **_):
        order.extend(dict.fromkeys(prompts))
        return [0.0] * len(completions)

    run = trainer(
        law="relift", law_options={"queue": 6}, reward=nothing, prompts=ALL, sft_dataset=None, max_steps=3,
        per_device_train_batch_size=8, sft_batch_size=2, callbacks=[kept],
    )  # fmt: skip
    run.train()
    model = tiny_model()
    loss = mean_demonstration_loss(model, order[:6], order[:6])
    assert run.state.log_history[2]["gac/sft_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert_gradient(kept.steps[2], model, loss)
    assert len(run._rule.queue) == 2


def test_chord_phi_is_a_constant_mu_with_phi(trainer):
    runs = []
    for options in ({"law": "chord-phi"}, {"law": "fixed", "law_options": {"mu": 0.1}, "sft_loss": "phi"}):
        runs.append(trainer(**options))
        runs[-1].train()
    left, right = runs
    assert json.dumps(histories(left)[:2]) == json.dumps(histories(right)[:2])
    assert_same(left.model.state_dict(), right.model.state_dict())


@pytest.mark.parametrize(
    ("law", "options"),
    [
        ("hpt", {"steps_per_generation": 4}),
        ("srft", {"num_iterations": 2}),
        ("relift", {"law_options": {"queue": 3}}),
    ],
)
def test_resume_continues_bit_for_bit(trainer, tmp_path, law, options):
    common = {
        "law": law, "max_steps": 7, "save_strategy": "steps", "save_steps": 5, "reward": first_digit_reward,
        "prompts": with_demonstrations(), "sft_dataset": None, **options,
    }  # fmt: skip
    whole = trainer(output_dir=str(tmp_path / "whole"), **common)
    whole.train()
    checkpoint = complete_checkpoints(str(tmp_path / "whole"))[0]
    resumed = trainer(output_dir=str(tmp_path / "resumed"), model=tiny_model(seed=9), **common)
    torch.manual_seed(123)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert json.dumps(histories(whole)[5:7]) == json.dumps(histories(resumed)[5:7])
    assert_same(whole.model.state_dict(), resumed.model.state_dict())


def test_missing_demonstrations_and_superfluous_ones(trainer, caplog):
    with pytest.raises(ValueError, match=r"law='hpt' .* column 'demonstration'.*it has \['answer', 'prompt'\]"):
        trainer(law="hpt", sft_dataset=None)
    with pytest.raises(ValueError, match="gate=4 with num_generations=4"):
        trainer(law="hpt", law_options={"gate": 4}, prompts=ALL, sft_dataset=None)
    with pytest.raises(ValueError, match="sft_dataset is missing"):
        trainer(law="chord-phi", sft_dataset=None)
    with pytest.raises(ValueError, match="remove_unused_columns=True takes that column away"):
        trainer(law="hpt", prompts=ALL, sft_dataset=None, remove_unused_columns=True)
    trainer(law="hpt", prompts=ALL, sft_dataset=DEMONSTRATIONS)
    assert "sft_dataset is not used" in caplog.text


def test_conversational_demonstrations(config):
    """Message lists: the completion is what the chat template adds to the prompt."""
    from gac.trainers import HybridGRPOTrainer

    tokenizer = build_character_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}{{ m['content'] + eos_token }}"
        "{% endif %}{% endfor %}"
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "answer": row["answer"],
            "demonstration": [{"role": "assistant", "content": row["answer"]}],
        }
        for row in PROMPTS
    ]
    seen = []

    def reward(completions, answer, **_):
        seen.extend(zip([c[0]["content"] for c in completions], answer, strict=True))
        return [float(i % 2) for i in range(len(completions))]

    arguments = config(law="luffy", max_steps=1)
    run = HybridGRPOTrainer(tiny_model(), reward, arguments, Dataset.from_list(rows), processing_class=tokenizer)
    run.train()
    assert all(text == answer for text, answer in seen[::4])
    part = run._buffered_inputs[0]
    (row,) = part["gac_joined"].nonzero().flatten().tolist()
    ids = part["completion_ids"][row][part["completion_mask"][row].bool()].tolist()
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) in {row["answer"] for row in PROMPTS}
