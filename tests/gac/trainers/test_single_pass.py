"""Both branches in one pass: the losses and gradients of two passes, rows as contributions, sources, checkpoints."""

import json
import math
import warnings

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from gac.tasks.characters import build_character_tokenizer
from gac.trainers.demonstrations import DemonstrationCollator, EpochSampler
from gac.trainers.hybrid_grpo import complete_checkpoints
from gac.trainers.joint_batch import SelectedHead, scores
from tests.gac.trainers.conftest import DEMONSTRATIONS, PROMPTS, tiny_model
from tests.gac.trainers.test_hybrid_grpo import Gradients, assert_same, histories

SEQUENCE = {"estimator": "sequence", "gac_interval": 1, "gac_sequences": {"sketch_size": 64}}
LABELLED = [row | {"teacher": "even" if i % 2 == 0 else "odd"} for i, row in enumerate(DEMONSTRATIONS)]


class Passes(TrainerCallback):
    """Counts the forward passes in training, and keeps what is seen of the model."""

    def __init__(self):
        self.forwards, self.coverage = [], None

    def attach(self, trainer):
        model = trainer.model

        def on_call(module, args, kwargs, output):
            if torch.is_grad_enabled() and model.training:
                self.forwards.append(tuple(output.logits.shape))

        model.register_forward_hook(on_call, with_kwargs=True)
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        self.coverage = self.trainer.mixer.coverage


@pytest.mark.parametrize(("loss_type", "weights"), [("dapo", (0.0, 0.3, 1.0)), ("grpo", (0.3,)), ("bnpo", (0.3,))])
def test_one_pass_has_the_losses_and_gradients_of_two(trainer, loss_type, weights):
    # at another temperature than 1, which is the rollouts' alone
    common = {"max_steps": 1, "loss_type": loss_type, "temperature": 0.7, "sft_batch_size": 3}
    for mu in weights:
        found = {}
        for estimator in ("exact", "sequence"):
            kept = Gradients()
            run = trainer(mu=mu, estimator=estimator, callbacks=[kept], **common)
            run.train()
            entry = run.state.log_history[0]
            found[estimator] = kept.steps[0], {k: entry[k] for k in ("loss", "gac/sft_loss", "entropy", "grad_norm")}
        (two, numbers_of_two), (one, numbers_of_one) = found["exact"], found["sequence"]
        assert numbers_of_one == pytest.approx(numbers_of_two, rel=2e-6, abs=1e-6)
        for name, gradient in two.items():
            # sums over tokens in another order: 30 roundings of float32 of the largest element
            assert (one[name] - gradient).abs().max() <= 2e-6 * gradient.abs().max() + 1e-9, (mu, name)
        assert any(gradient.abs().max() > 0 for gradient in two.values())


def test_phi_weights_demonstrations_as_two_passes_do(trainer):
    found = []
    for estimator in ("exact", "sequence"):
        kept = Gradients()
        trainer(mu=0.5, estimator=estimator, max_steps=1, sft_loss="phi", callbacks=[kept]).train()
        found.append(kept.steps[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_a_micro_step_is_one_pass_that_sees_the_whole_model_and_scores_labelled_tokens(trainer):
    kept = Passes()
    run = trainer(max_steps=1, law="gac", sft_dataset=LABELLED, callbacks=[kept], **SEQUENCE)
    kept.attach(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no layer, the head among them, goes unseen
        run.train()
    assert len(kept.forwards) == 2
    window = DemonstrationCollator(build_character_tokenizer(), DEMONSTRATIONS)(EpochSampler(50, 42).take(0, 8))
    labelled = sum(shape[1] for shape in kept.forwards) - run.state.log_history[0]["completions/mean_length"] * 8
    assert labelled == window.count_tokens()
    assert kept.coverage.share == 1
    entry = run.state.log_history[0]
    assert (entry["gac/n_s"], entry["gac/n_r"]) == (8, 2), "demonstrations, and prompts of 4 rollouts"
    assert not run.model.get_output_embeddings()._forward_pre_hooks


def test_rows_and_groups_give_the_noise_that_whole_passes_do(trainer):
    """Where a micro-batch is one prompt's rollouts and one demonstration, they are what backward passes were before."""
    found = {}
    long = [{"prompt": "1+1=", "completion": str(10**6 + 7919 * k)} for k in range(20)]
    common = {"mu": 0.5, "max_steps": 1, "gradient_accumulation_steps": 6, "sft_batch_size": 1, "sft_dataset": long}
    for estimator in ("exact", "sequence"):
        options = SEQUENCE if estimator == "sequence" else {"estimator": "exact", "gac_interval": 1}
        run = trainer(**common, **options)
        run.train()
        found[estimator] = run.state.log_history[0]
    for name in ("sigma_s2", "sigma_r2", "norm_s2", "norm_r2"):
        # sketches of 64 x 64 take all but the tied embedding as it is
        assert found["sequence"][f"gac/{name}"] == pytest.approx(found["exact"][f"gac/{name}"], rel=0.1), name
    assert (found["sequence"]["gac/n_s"], found["exact"]["gac/n_s"]) == (6, 6)


def test_sources_and_demonstrations_are_told_apart(trainer):
    prompts = [row | {"teacher": "sums"} for row in PROMPTS]
    run = trainer(
        law="gac",
        max_steps=2,
        sft_dataset=LABELLED,
        sft_batch_size=8,
        prompts=prompts,
        gac_source_column="teacher",
        **SEQUENCE,
    )
    run.train()
    table = run.mixer.sources()
    assert {(row.label, row.branch.value) for row in table.rows} == {("even", "sft"), ("odd", "sft"), ("sums", "rl")}
    taken = EpochSampler(50, 42).take(0, 32)
    even = sum(i % 2 == 0 for i in taken)
    assert (table["even"].n, table["odd"].n, table["sums"].n) == (even, 32 - even, 4)
    assert list(run.mixer.alignment().index) == sorted(set(taken))


def test_resume_continues_bit_for_bit(trainer, tmp_path):
    common = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "steps_per_generation": 4, **SEQUENCE}
    whole = trainer(output_dir=str(tmp_path / "whole"), **common)
    whole.train()
    checkpoint = complete_checkpoints(str(tmp_path / "whole"))[0]
    resumed = trainer(output_dir=str(tmp_path / "resumed"), model=tiny_model(seed=9), **common)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert json.dumps(histories(whole)[3:5]) == json.dumps(histories(resumed)[3:5])
    assert_same(whole.model.state_dict(), resumed.model.state_dict())


def test_tokens_are_observed_beside_it(trainer):
    found = {}
    for estimator in ("exact", "sequence"):
        run = trainer(mu=0.5, max_steps=1, estimator=estimator, observe_tokens=True)
        run.train()
        found[estimator] = run.mixer.coefficient
    for name in ("sigma_s2", "sigma_r2", "delta_g2", "n_s", "n_r"):
        two, one = (float(getattr(found[estimator], name)) for estimator in ("exact", "sequence"))
        assert one == pytest.approx(two, rel=1e-4)


def test_lora_adapters_are_seen(trainer):
    from peft import LoraConfig

    kept = Passes()
    peft_config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    run = trainer(law="gac", max_steps=2, peft_config=peft_config, callbacks=[kept], **SEQUENCE)
    kept.trainer = run
    run.train()
    assert kept.coverage.share == 1
    assert math.isfinite(run.state.log_history[1]["gac/sigma_s2"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"law": "hpt", "law_options": {"gate": 0}}, "law='hpt'.*estimator='auto'"),
        ({"gac_source_column": "nothing"}, "gac_source_column='nothing'.*'completion'"),
        ({"gac_sequences": {"sketch_size": 7}}, "sketch_size"),
        ({"gac_sequences": {"nonsense": 7}}, "nonsense"),
        ({"gac_metric": "optimizer"}, "gac_metric='optimizer'"),
        ({"estimator": "sketch"}, "gac_sequences belongs to estimator='sequence'"),
    ],
)
def test_what_does_not_go_together_is_refused(trainer, options, message):
    prompts = [row | {"demonstration": row["answer"]} for row in PROMPTS]
    with pytest.raises(ValueError, match=message):
        trainer(prompts=prompts, **{**SEQUENCE, **options})


def test_one_prompt_a_step_is_warned_of(trainer):
    with pytest.warns(UserWarning, match="rollouts of one prompt"):
        trainer(gradient_accumulation_steps=1, **SEQUENCE)


def test_scores_are_those_of_a_softmax():
    torch.manual_seed(0)
    logits = torch.randn(7, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (7,))
    logprobs, entropies = scores(logits, targets, 0.5)
    distribution = torch.distributions.Categorical(logits=logits / 0.5)
    torch.testing.assert_close(logprobs, distribution.log_prob(targets))
    torch.testing.assert_close(entropies, distribution.entropy())
    weights = torch.randn(7, dtype=torch.float64)
    (found,) = torch.autograd.grad((weights * (logprobs + entropies)).sum(), logits)
    (wanted,) = torch.autograd.grad((weights * (distribution.log_prob(targets) + distribution.entropy())).sum(), logits)
    torch.testing.assert_close(found, wanted)


def test_a_head_of_another_shape_is_refused():
    linear = nn.Linear(2, 3)
    head = SelectedHead(linear)
    with head.only(torch.ones(4, 5, dtype=torch.bool)), pytest.raises(ValueError, match=r"\(20, 2\)"):
        linear(torch.zeros(20, 2))
    head.remove()
    assert linear(torch.zeros(20, 2)).shape == (20, 3)
