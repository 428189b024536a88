"""The example of verl over stand-ins with the signatures of verl 0.9.1; its options where verl is installed.

From verl/experimental/agent_loop/single_turn_agent_loop.py and agent_loop.py (what hydra makes of ``agents.yaml``),
verl/workers/rollout/replica.py (``TokenOutput``), and as tests/gac/trainers/adapters/test_verl.py.
"""

from __future__ import annotations

import asyncio
import importlib.util
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset

from gac.tasks.characters import build_character_tokenizer
from tests.examples.scripts import EXAMPLES, ROOT, launched, load, run
from tests.gac.trainers.adapters import test_verl as verl_tests
from tests.gac.trainers.adapters.conftest import package  # noqa: F401 - a fixture
from tests.gac.trainers.adapters.samples import losses_by_hand, samples, token_mean

AGENTS = yaml.safe_load((EXAMPLES / "verl" / "agents.yaml").read_text())
INSTALLED = importlib.util.find_spec("verl") is not None


class SingleTurnAgentLoop:
    """As much of verl's as the example touches."""

    def __init__(
        self, trainer_config, server_manager, tokenizer, processor, dataset_cls, data_config, hf_model_type=None, **_
    ):
        self.server_manager, self.tokenizer, self.response_length = server_manager, tokenizer, 8

    async def run(self, sampling_params, priority=0, **kwargs):
        output = await self.server_manager.generate(
            request_id="1", prompt_ids=[1], sampling_params=sampling_params, image_data=None, priority=priority
        )
        return SimpleNamespace(
            response_ids=output.token_ids[: self.response_length],
            response_logprobs=output.log_probs,
            extra_fields=output.extra_fields | {"turn_scores": [], "tool_rewards": []},
        )


class Server:
    async def generate(self, **_):
        return SimpleNamespace(token_ids=[5, 6], log_probs=[-1.0, -2.0], extra_fields={"min_global_steps": 3})


@pytest.fixture
def answer(package, monkeypatch):  # noqa: F811
    """An answer of the loop that agents.yaml describes: ``answer(drawn, **row)``."""
    package(
        {
            "verl.experimental.agent_loop.agent_loop": {"AgentLoopOutput": SimpleNamespace},
            "verl.experimental.agent_loop.single_turn_agent_loop": {"SingleTurnAgentLoop": SingleTurnAgentLoop},
            "verl.workers.rollout.replica": {"TokenOutput": SimpleNamespace},
        }
    )
    (agent,) = AGENTS
    module, _, name = agent["_target_"].rpartition(".")
    made = load(f"verl/{module}.py")[name]

    def answered(drawn, sampling_params=None, **row):
        monkeypatch.setattr(random, "random", lambda: drawn)
        options = {key: value for key, value in agent.items() if key != "_target_"}
        parts = dict.fromkeys(("trainer_config", "processor", "dataset_cls", "data_config"))
        loop = made(**options, **parts, server_manager=Server(), tokenizer=build_character_tokenizer(), tools=None)
        return asyncio.run(loop.run(sampling_params or {}, **row))

    return answered


def test_one_answer_in_eight_is_the_demonstration(answer):
    row = {"extra_info": {"demonstration": "12"}, "global_steps": 4}
    tokenizer = build_character_tokenizer()
    demonstration = answer(0.124, {"logprobs": True}, **row)
    assert tokenizer.decode(demonstration.response_ids) == "12" + tokenizer.eos_token
    assert demonstration.response_logprobs == [0.0] * 3
    assert demonstration.extra_fields["is_expert"] is True
    assert demonstration.extra_fields["min_global_steps"] == demonstration.extra_fields["max_global_steps"] == 3
    rollout = answer(0.126, **row)
    assert rollout.response_ids == [5, 6]
    assert rollout.extra_fields["is_expert"] is False


@pytest.mark.parametrize("row", [{}, {"extra_info": None}, {"extra_info": {"demonstration": None}}])
def test_rows_without_a_demonstration_have_rollouts(answer, row):
    assert answer(0.0, **row).extra_fields["is_expert"] is False


def test_answers_of_the_loop_are_trained_on(answer, package):  # noqa: F811
    verl = verl_tests.StandIn(package)
    load("verl/gac_verl.py")
    made = verl.actor_cls.actor_worker_cls()
    verl.actor_cls.actor_worker_cls = verl.worker_cls
    made.set_loss_fn(verl.loss)
    row, s = {"extra_info": {"demonstration": "12"}}, samples()
    labels = [answer(drawn, **row).extra_fields for drawn in (0.9, 0.1, 0.9, 0.1)]
    data = verl.batch(s)
    del data["is_expert"]
    data["extra_fields"] = labels
    made.train_batch(data)
    loss, metrics = made.loss_fn(model_output=verl.output(s), data=made.seen, dp_group=None)
    s.is_expert = torch.tensor([False, True, False, True])
    sft, rl = losses_by_hand(s)
    torch.testing.assert_close(loss, metrics["gac/mu"] * token_mean(sft) + (1 - metrics["gac/mu"]) * token_mean(rl))
    made._mixed.close()


def test_the_task(monkeypatch, tmp_path):
    names = run(monkeypatch, "verl/task.py", "--out", tmp_path, "--rows", 5)
    train, val = (Dataset.from_parquet(str(tmp_path / f"{name}.parquet")) for name in ("train", "val"))
    assert (len(train), len(val)) == (5, 200)
    for row in train:
        shown, truth = row["extra_info"]["demonstration"], row["reward_model"]["ground_truth"]
        assert names["compute_score"](row["data_source"], shown, truth, row["extra_info"]) == 1.0
        assert names["compute_score"](row["data_source"], "<answer>no</answer>", truth) == 0.0
        assert row["prompt"][-1]["role"] == "user"
    assert {row["extra_info"]["demonstration"] for row in val} == {None}


def test_the_launch_script_names_what_is_there(tmp_path):
    command, environment = launched("verl/run.sh", tmp_path, "trainer.total_epochs=1")
    assert command[:2] == ["-m", "verl.trainer.main_ppo"]
    assert command[-1] == "trainer.total_epochs=1"
    options = dict(option.split("=", 1) for option in command[2:])
    folder = Path(environment["PYTHONPATH"].split(":")[0])
    assert (folder / f"{environment['VERL_USE_EXTERNAL_MODULES']}.py").samefile(EXAMPLES / "verl" / "gac_verl.py")
    assert "VERL_USE_EXTERNAL_MODULES" in (ROOT / "docs" / "trainers" / "verl.md").read_text()
    rollout = "actor_rollout_ref.rollout"
    assert yaml.safe_load(Path(options[f"{rollout}.agent.agent_loop_config_path"]).read_text()) == AGENTS
    assert [options[f"{rollout}.agent.default_agent_loop"]] == [agent["name"] for agent in AGENTS]
    reward = Path(options["reward.custom_reward_function.path"]).read_text()
    assert re.search(rf"^def {options['reward.custom_reward_function.name']}\(", reward, flags=re.MULTILINE)
    micro, n = "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", f"{rollout}.n"
    assert int(options[micro]) % int(options[n]) == 0, "whole groups"


if INSTALLED:

    def test_verl_has_the_options(tmp_path):
        command, _ = launched("verl/run.sh", tmp_path)
        folder = Path(importlib.util.find_spec("verl").submodule_search_locations[0])
        config = yaml.safe_load((folder / "trainer" / "config" / "_generated_ppo_trainer.yaml").read_text())
        for option in command[2:]:
            at = config
            for part in option.split("=", 1)[0].split("."):
                assert part in at, option
                at = at[part]
