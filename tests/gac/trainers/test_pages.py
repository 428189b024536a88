"""The Python in the pages of docs/trainers runs as it stands; other trainers are stood in for."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.gac.models import VOCABULARY, tiny_model
from tests.gac.trainers.adapters import test_openrlhf as openrlhf_tests
from tests.gac.trainers.adapters import test_swift as swift_tests
from tests.gac.trainers.adapters import test_verl as verl_tests
from tests.gac.trainers.adapters.conftest import package  # noqa: F401 - a fixture
from tests.gac.trainers.adapters.samples import Policy, samples

PAGES = Path(__file__).parents[3] / "docs" / "trainers"


def snippets(page, language="python"):
    return re.findall(rf"```{language}\n(.*?)```", (PAGES / f"{page}.md").read_text(), flags=re.DOTALL)


def run(page, names):
    for snippet in snippets(page):
        exec(snippet, names)
    return names


@pytest.mark.parametrize("page", sorted(p.stem for p in PAGES.glob("*.md")))
def test_pages_say_what_was_tested(page):
    assert "\n## Tested\n" in (PAGES / f"{page}.md").read_text()


def test_transformers(tmp_path):
    g = torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(0, VOCABULARY, (6,), generator=g)
    common = {"report_to": [], "use_cpu": True}
    settings = common | {"max_steps": 2, "per_device_train_batch_size": 2, "remove_unused_columns": False}
    settings |= {"gradient_accumulation_steps": 2, "logging_steps": 1, "save_steps": 1}
    names = run(
        "transformers",
        {
            "model": tiny_model(),
            "rows": [
                {"demonstration": draw(), "rollout": draw(), "advantage": torch.randn((), generator=g)}
                for _ in range(8)
            ],
            "out": str(tmp_path / "out"),
            "settings": settings,
            **common,
        },
    )
    assert names["callback"].mixer.controller.steps == 2, "resumed at the first step"
    assert any("gac/mu" in entry for entry in names["trainer"].state.log_history)


def test_mixed_batch():
    s, model, ids = samples(), Policy(), torch.arange(20).view(4, 5)
    batch = {name: getattr(s, name) for name in ("old_logprobs", "advantages", "mask", "is_expert")}
    batch["groups"] = [-1, 0, 1, -1]
    names = {
        "model": model,
        "logprobs_of": lambda model, batch: model(ids),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "ranks": 1,
    }
    by_tokens, by_gradients = snippets("mixed-batch")
    exec(by_tokens, names)
    first, second = names["train_step"]([batch]), names["train_step"]([batch])
    assert first["gac/mu"] != second["gac/mu"]
    names["mixed"].close()
    exec(by_gradients, names)
    names["gradient_step"](batch)
    found = names["gradient_step"](batch)
    assert (found["gac/n_s"], found["gac/n_r"]) == (2, 2)
    names["by_gradients"].close()


def test_verl(package):  # noqa: F811
    verl = verl_tests.StandIn(package)
    run("verl", {})
    assert verl.actor_cls.actor_worker_cls is not verl.worker_cls
    verl.actor_cls.actor_worker_cls = verl.worker_cls


def test_ms_swift(package):  # noqa: F811
    factory = type("TrainerFactory", (), {"TRAINER_MAPPING": {}})
    package(
        {
            "swift.rlhf_trainers": {"GRPOTrainer": swift_tests.GRPOTrainer},
            "swift.trainers": {"TrainerFactory": factory},
        }
    )
    run("ms-swift", {})
    assert factory.TRAINER_MAPPING == {"grpo": "gac.trainers.adapters.swift.GacGRPOTrainer"}


def test_openrlhf():
    trainer = openrlhf_tests.Trainer(
        openrlhf_tests.PolicyLoss(), [openrlhf_tests.experience(samples())], accumulation=1
    )
    names = run("openrlhf", {"actor": SimpleNamespace(trainer=trainer)})
    trainer.ppo_train(0.0)
    assert names["mixed"].mixer.controller.steps == 1
    names["mixed"].close()


@pytest.mark.parametrize("page", ["slime", "trinity"])
def test_paths_in_configurations(page):
    """What slime and Trinity resolve by name is in the module's source; Trinity's needs Trinity to be imported."""
    text = "".join(snippets(page, "bash") + snippets(page, "yaml"))
    paths = re.findall(r"gac\.trainers\.[\w.]+", text)
    assert paths
    for path in paths:
        module, _, name = path.rpartition(".")
        if name == "MixedBatch":
            continue
        source = (PAGES.parents[1] / (module.replace(".", "/") + ".py")).read_text()
        assert re.search(rf"^(def|class) {name}\b", source, flags=re.MULTILINE), path
