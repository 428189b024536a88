"""TRL's options under the hybrid trainer: with mu = 0 each gives the very run that TRL's own trainer gives."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import EarlyStoppingCallback

from tests.gac.trainers.conftest import PROMPTS, last_digit_reward, tiny_model
from tests.gac.trainers.pairs import history, same, trained, weights, whole_groups


def length_reward(completions, **_):
    return [float(len(text)) for text in completions]


def sometimes_none(completions, **_):
    return [None if i % 3 == 0 else float(text > "5") for i, text in enumerate(completions)]


async def slow_reward(completions, **_):
    return [float(len(set(text))) for text in completions]


LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": "gaussian"}
SHORT = {"gradient_accumulation_steps": 1, "max_steps": 3}
TWICE = SHORT | {"num_iterations": 2}
UNEQUAL = {"max_completion_length": 40, "num_iterations": 2, "max_steps": 3}  # some end before
TWO = {"reward_funcs": [last_digit_reward, length_reward]}
REFERENCE = {"model": "saved", "beta": 0.1, "max_steps": 3}
EVALUATED = {
    "eval_dataset": Dataset.from_list(PROMPTS[:4]),
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 8,
}
KEPT = {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "reward"}

CASES = [
    *((UNEQUAL, {"loss_type": name}) for name in ("grpo", "dr_grpo", "bnpo", "cispo", "sapo", "vespo", "luspo")),
    (UNEQUAL, {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
    (SHORT, {"num_iterations": 2}),
    {"steps_per_generation": 4},
    (SHORT, {"steps_per_generation": 3, "loss_type": "cispo"}),
    {"generation_batch_size": 32},
    *({"scale_rewards": value} for value in ("batch", "none", False)),
    (TWO, {"reward_weights": [1.0, 0.25]}),
    (TWO, {"multi_objective_aggregation": "normalize_then_sum"}),
    {"reward_funcs": [sometimes_none, slow_reward]},
    {"top_entropy_quantile": 0.4},
    {"entropy_coef": 0.1},
    {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.1},
    ({"model": "saved"}, {"beta": 0.1}),
    (REFERENCE, {"sync_ref_model": True, "ref_model_sync_steps": 1}),
    (REFERENCE, {"use_bias_correction_kl": False}),
    ({"max_completion_length": 12}, {"mask_truncated_completions": True}),
    (TWICE, {"importance_sampling_level": "sequence"}),
    (TWICE, {"delta": 1.001, "epsilon": 0.0005, "epsilon_high": 0.01}),
    (TWICE, {"off_policy_mask_threshold": 1e-5}),
    {"temperature": 0.7, "top_k": 5, "generation_kwargs": {"min_new_tokens": 3}},
    {"peft_config": lambda: LoraConfig(**LORA), "beta": 0.1},
    {"peft_config": lambda: LoraConfig(use_dora=True, **LORA)},
    EVALUATED,
    (EVALUATED | {"max_steps": 4}, KEPT | {"callbacks": lambda: [EarlyStoppingCallback(1)]}),
]
"""Options, each beside the ones that it is compared with: it has to change what they give."""


def label(case):
    return ",".join(f"{k}={v}" if isinstance(v, (str, int, float)) else k for k, v in case[-1].items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("options")


@pytest.fixture(autouse=True)
def _groups(monkeypatch):
    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", whole_groups)


@pytest.fixture(scope="module")
def saved(folder):
    """A model's folder: TRL loads the reference model from where the model came from."""
    tiny_model().save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.fixture(scope="module")
def neutral():
    """Weights without an option, by what else is set."""
    return {}


@pytest.mark.parametrize("case", [c if isinstance(c, tuple) else ({}, c) for c in CASES], ids=label)
def test_the_run_is_trls_own(folder, saved, neutral, case):
    common, option = ({k: saved if v == "saved" else v for k, v in part.items()} for part in case)
    if label((common,)) not in neutral:
        neutral[label((common,))] = weights(trained("trl", folder, **common))
    plain, hybrid = (trained(kind, folder, **common, **option) for kind in ("trl", "mu=0"))
    assert same(weights(plain), weights(hybrid))
    assert history(plain) == history(hybrid)
    assert not same(weights(plain), neutral[label((common,))]), "an option without effect shows nothing"
