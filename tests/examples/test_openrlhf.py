"""The example of OpenRLHF over stand-ins with the signatures of 0.11.2; its options where OpenRLHF is installed.

From openrlhf/utils/agent.py (``SingleTurnAgentExecutor``), openrlhf/trainer/ppo_utils/samples_generator.py (what
becomes of an executor's output), openrlhf/trainer/ray/ppo_actor.py (``PolicyModelActor``), and as
tests/gac/trainers/adapters/test_openrlhf.py.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gac.tasks.characters import build_character_tokenizer
from tests.examples.scripts import EXAMPLES, launched, load, run
from tests.gac.trainers.adapters import test_openrlhf as openrlhf_tests
from tests.gac.trainers.adapters.conftest import package  # noqa: F401 - a fixture
from tests.gac.trainers.adapters.samples import samples

TOKENIZER = build_character_tokenizer()
LABEL = json.dumps({"answer": "12", "demonstration": "<answer>12</answer>"})
INSTALLED = importlib.util.find_spec("openrlhf") is not None


class SingleTurnAgentExecutor:
    """Answers "<answer>7"; no reward."""

    def __init__(self, remote_rm_url=None):
        assert remote_rm_url is None, "OpenRLHF makes an agent without arguments"

    async def execute(self, prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
        begin, reply = (hf_tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, "<answer>7"))
        return {
            "prompt": prompt,
            "label": label,
            "images": images,
            "mm_train_inputs": None,
            "observation_tokens": begin + reply,
            "action_ranges": [(len(begin), len(begin) + len(reply))],
            "rollout_log_probs": None,
            "truncated": False,
            "reward": None,
            "scores": None,
            "extra_logs": {},
        }


@pytest.fixture
def answer(package, monkeypatch):  # noqa: F811
    """An answer of the executor: ``answer(drawn, label)``."""
    package({"openrlhf.utils.agent": {"SingleTurnAgentExecutor": SingleTurnAgentExecutor}})
    executor = load("openrlhf/agent.py")["AgentExecutor"]()

    def answered(drawn, label=LABEL, *, logprobs=None, max_length=99):
        monkeypatch.setattr(random, "random", lambda: drawn)
        asked = executor.execute(
            prompt="gcd?",
            label=label,
            sampling_params=SimpleNamespace(logprobs=logprobs),
            max_length=max_length,
            hf_tokenizer=TOKENIZER,
            llm_engine=None,
            images=None,
        )
        return asyncio.run(asked)

    return answered


def test_one_answer_in_eight_is_the_demonstration(answer):
    demonstration, rollout = answer(0.124, logprobs=1), answer(0.126)
    assert TOKENIZER.decode(demonstration["observation_tokens"]) == "gcd?<answer>12</answer>" + TOKENIZER.eos_token
    assert demonstration["action_ranges"] == [(4, len(demonstration["observation_tokens"]))]
    assert demonstration["rollout_log_probs"] == [0.0] * len(demonstration["observation_tokens"])
    assert (demonstration["reward"], demonstration["scores"]) == (1.0, 1.0)
    assert demonstration["extra_logs"] == {"is_expert": 1.0}
    assert (rollout["reward"], rollout["extra_logs"]) == (0.0, {"is_expert": 0.0})
    assert set(demonstration) == set(rollout)
    assert answer(0.0, json.dumps({"answer": "7"}))["extra_logs"] == {"is_expert": 0.0}, "no demonstration"
    assert answer(0.0, json.dumps({"answer": "7"}))["reward"] == 1.0
    assert len(answer(0.0, max_length=9)["observation_tokens"]) == 9


class PolicyModelActor:
    """As much of the class behind OpenRLHF's actor as the example touches; its trainer has the experiences `parts`."""

    def __init__(self, parts):
        self.parts = parts

    def init_model_from_pretrained(self, strategy, pretrain, max_steps=None, vllm_engines=None):
        self.checkpoint_states = dict(strategy.states)
        experiences = [openrlhf_tests.experience(part) for part in self.parts]
        self.trainer = openrlhf_tests.Trainer(openrlhf_tests.PolicyLoss(), experiences, accumulation=1)

    def save_checkpoint(self, tag, client_states=None, metric_value=None, metric_key=None):
        self.saved = tag, client_states, metric_key


def remote(num_gpus):
    """Ray's decorator: what it gives has the class beside it, and is none that could be inherited from."""
    return lambda cls: SimpleNamespace(__ray_metadata__=SimpleNamespace(modified_class=cls), num_gpus=num_gpus)


def test_the_actor_mixes_and_its_checkpoint_goes_on(answer, package, monkeypatch):  # noqa: F811
    module = "openrlhf.trainer.ray.ppo_actor"
    package({"ray": {"remote": remote}, module: {"PolicyModelActor": remote(1)(PolicyModelActor)}})
    from openrlhf.trainer.ray import ppo_actor

    started = []
    monkeypatch.setattr(
        runpy, "run_module", lambda name, run_name: started.append((name, run_name, ppo_actor.PolicyModelActor))
    )
    run(monkeypatch, "openrlhf/train.py")
    ((name, run_name, actor_class),) = started
    assert (name, run_name, actor_class.num_gpus) == ("openrlhf.cli.train_ppo_ray", "__main__", 1)

    def actor(states):
        parts = [samples(seed=0), samples(seed=1)]
        for part in parts:  # labels as OpenRLHF takes them over from an executor's output
            logs = [answer(drawn)["extra_logs"] for drawn in (0.9, 0.1, 0.9, 0.1)]
            part.is_expert = torch.tensor([each["is_expert"] for each in logs]).bool()
        made = actor_class.__ray_metadata__.modified_class(parts)
        made.init_model_from_pretrained(SimpleNamespace(states=states), "a model", max_steps=1, vllm_engines=None)
        return made

    first = actor({"episode": 0})
    statuses = first.trainer.ppo_train(0.0)
    assert 0.0 < statuses[0]["metrics"]["gac/mu"] < 1.0
    assert statuses[0]["metrics"]["gac/mu"] != statuses[1]["metrics"]["gac/mu"], "mu follows"
    first.save_checkpoint(tag="global_step2", client_states={"episode": 1}, metric_key="score")
    tag, states, key = first.saved
    assert (tag, states["episode"], key) == ("global_step2", 1, "score")
    second = actor(states)
    assert second.checkpoint_states == {"episode": 1}, "the rest is OpenRLHF's"
    second.trainer.ppo_train(0.0)
    first.trainer.ppo_train(0.0)
    assert second.mixed.mixer.controller.steps == first.mixed.mixer.controller.steps == 4
    assert torch.equal(second.mixed.mu, first.mixed.mu)
    for each in (first, second):
        each.mixed.close()


def test_the_task(monkeypatch, tmp_path):
    run(monkeypatch, "openrlhf/task.py", "--out", tmp_path, "--rows", 5)
    train, held_out = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval")
    )
    assert (len(train), len(held_out)) == (5, 200)
    for row in train:
        label = json.loads(row["label"])
        assert label["demonstration"] == f"<answer>{label['answer']}</answer>"
        assert row["prompt"][-1]["role"] == "user"
    assert all(set(json.loads(row["label"])) == {"answer"} for row in held_out)


def parsed(words: list[str]) -> dict[str, str]:
    """Options and their values, "" where there is none."""
    return {
        word.removeprefix("--"): "" if after.startswith("--") else after
        for word, after in zip(words, [*words[1:], "--"], strict=True)
        if word.startswith("--")
    }


def test_the_launch_script_names_what_is_there(tmp_path):
    command, _ = launched("openrlhf/run.sh", tmp_path, "--train.seed", "1")
    options = parsed(command[1:])
    assert Path(command[0]).samefile(EXAMPLES / "openrlhf" / "train.py")
    assert Path(options["train.agent_func_path"]).samefile(EXAMPLES / "openrlhf" / "agent.py")
    assert options["train.seed"] == "1"
    assert {options["data.input_key"], options["data.label_key"]} == {"prompt", "label"}
    assert "n_samples_per_prompt 8" in load_text("agent.py")
    assert options["rollout.n_samples_per_prompt"] == "8"
    answers = int(options["rollout.batch_size"]) * int(options["rollout.n_samples_per_prompt"])
    assert int(options["train.batch_size"]) == answers, "one optimizer step a rollout batch"


def load_text(name: str) -> str:
    return (EXAMPLES / "openrlhf" / name).read_text()


if INSTALLED:

    def test_openrlhf_has_the_options(tmp_path):
        command, _ = launched("openrlhf/run.sh", tmp_path)
        folder = Path(importlib.util.find_spec("openrlhf").submodule_search_locations[0])
        known = set(re.findall(r'"--([\w.]+)"', (folder / "cli" / "train_ppo_ray.py").read_text()))
        assert set(parsed(command[1:])) - known == set()
