"""Groups of rollouts stay together: the order, and the micro-batches that the trainer really uses."""

import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import GRPOTrainer

from gac.runs.config import TrainConfig
from gac.trainers.groups import GroupLayout, take_rows


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 24), size=st.integers(2, 8), rank=st.integers(0, 2), seed=st.integers(0, 99))
def test_an_order_is_a_permutation_that_keeps_groups_together(rows, size, rank, seed):
    layout = GroupLayout(rows, size, offset=rank * rows)
    torch.manual_seed(seed)
    order = layout.shuffled()
    assert sorted(order.tolist()) == list(range(rows))
    runs = layout.ids()[order].unique_consecutive()
    assert len(runs) == len(set(runs.tolist()))
    for run in runs:  # inside a group the order stays
        members = order[layout.ids()[order] == run].tolist()
        assert members == sorted(members)


def test_groups_and_heads_over_ranks():
    ranks = [GroupLayout(6, 4, offset=6 * rank) for rank in range(2)]
    assert [rank.ids().tolist() for rank in ranks] == [[0, 0, 0, 0, 1, 1], [1, 1, 2, 2, 2, 2]]
    assert [rank.heads().tolist() for rank in ranks] == [
        [True, False, False, False, True, False],
        [False, False, True, False, False, False],
    ]


def test_groups_come_in_every_order():
    layout = GroupLayout(6, 2)
    torch.manual_seed(0)
    assert len({tuple(layout.ids()[layout.shuffled()].tolist()) for _ in range(100)}) == 6


def test_rows_are_taken_from_tensors_and_lists_alike():
    batch = {"a": torch.arange(6).view(3, 2), "b": ["x", "y", "z"], "c": None, "d": torch.tensor(7)}
    taken = take_rows(batch, torch.tensor([2, 0, 1]))
    assert taken["a"].tolist() == [[4, 5], [0, 1], [2, 3]]
    assert (taken["b"], taken["c"], int(taken["d"])) == (["z", "x", "y"], None, 7)


def prompts_of_micro_batches(trainer, monkeypatch, **options):
    """How many rollouts of each prompt every micro-batch of a run holds."""
    seen = []
    compute_loss = GRPOTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        prompts = [tuple(row) for row in inputs["prompt_ids"].tolist()]
        seen.append([prompts.count(prompt) for prompt in dict.fromkeys(prompts)])
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "compute_loss", spy)
    trainer(max_steps=3, num_generations=4, **options).train()
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 4},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_iterations": 2},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
    ],
    ids=["one group", "two steps a generation", "two iterations", "two generations a step"],
)
def test_every_micro_batch_holds_whole_groups(trainer, monkeypatch, options):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no multiple of num_generations")
        seen = prompts_of_micro_batches(trainer, monkeypatch, **options)
    assert len(seen) == 3 * options["gradient_accumulation_steps"]
    groups = options["per_device_train_batch_size"] // 4
    assert seen == [[4] * groups] * len(seen)


def test_groups_that_must_be_cut_are_cut_as_little_as_possible_and_a_warning_says_so(trainer, monkeypatch):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    with pytest.warns(UserWarning, match=r"=2 is no multiple of num_generations=4: .*sigma_r2 reads low") as warned:
        seen = prompts_of_micro_batches(trainer, monkeypatch, **options)
    (warning,) = [w for w in warned if "is no multiple" in str(w.message)]
    assert Path(warning.filename).name == "conftest.py", "the line that makes the trainer"
    assert seen == [[2]] * 12  # two neighbours hold a group, and no micro-batch mixes two


def test_the_default_run_of_the_command_line_keeps_groups_whole():
    config = TrainConfig()
    assert config.batch_size % config.generations == 0
