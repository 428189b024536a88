"""Four ranks: what they log, and their checkpoints on 2 and on 1, with the same global batch and with another."""

import itertools
import logging
import math
import os
import shutil

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from trl import GRPOTrainer

from gac.sequences.source_trust import FEWEST
from gac.trainers.demonstrations import EpochSampler
from gac.trainers.resume import Batching, Position, redistribute
from tests.gac.trainers.conftest import DEMONSTRATIONS, PROMPTS, last_digit_reward, with_demonstrations
from tests.gac.trainers.ranks import launch, train

pytestmark = pytest.mark.timeout(300)

# 4 prompts a step, 8 a generation, 2 generations (4 steps) an epoch: step 3 ends within a generation, step 5 is of
# the second epoch
FEW = PROMPTS[:20]
ON_FOUR = {"prompts": FEW, "max_steps": 6, "steps_per_generation": 2, "save_strategy": "steps", "save_steps": 1}
SHARDED = {"prompts": FEW, "max_steps": 2, "steps_per_generation": 2, "sharded": True}
SAME = {"generation_batch_size": 32, "prompts": FEW, "max_steps": 6}

CONFIGURATION = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: false
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_transformer_layer_cls_to_wrap: Qwen2DecoderLayer
  fsdp_reshard_after_forward: true
  fsdp_offload_params: false
  fsdp_cpu_ram_efficient_loading: false
  fsdp_state_dict_type: SHARDED_STATE_DICT
"""
"""As ``accelerate config`` writes it."""

OF_TWO = {
    "max_steps": FEWEST + 2, "gradient_accumulation_steps": 2, "sft_weights": "source", "gac_source_column": "teacher",
    "estimator": "sequence", "gac_interval": 1, "gac_sequences": {"sources": ["a", "b", "rollouts"]},
    "demonstrations": [row | {"teacher": "ab"[k % 2]} for k, row in enumerate(DEMONSTRATIONS)],
}  # fmt: skip
"""Demonstrations of two sources, followed until both are judged."""

OTHERS = ("gac/seconds", "gac/informative_groups")
"""Logged numbers that are a rank's own, or the trainer's."""


def checkpoint(folder, step):
    return os.path.join(folder, "whole-4", f"checkpoint-{step}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def results(folder):
    """Runs on 4 ranks, then on 2, which continue from what the 4 have saved."""
    with open(os.path.join(folder, "fsdp2.yaml"), "w") as file:
        file.write(CONFIGURATION)
    saved = lambda run, step: os.path.join(folder, f"{run}-4", f"checkpoint-{step}")
    on_four = {"whole": ON_FOUR, "sharded": {**SHARDED, "save_strategy": "steps", "save_steps": 1}}
    twice = {"generation_batch_size": 32, "steps_per_generation": None, "gradient_accumulation_steps": 2}
    on_two = {
        "within": {**SAME, "gradient_accumulation_steps": 2, "resume": saved("whole", 3)},
        "smaller": {"prompts": FEW, "max_steps": 5, "resume": saved("whole", 2)},
        "impossible": {"prompts": FEW, "max_steps": 5, "resume": saved("whole", 3)},
        "sharded": {**SHARDED, **twice, "resume": saved("sharded", 1)},
        "replicas": {"max_steps": 2, "gradient_accumulation_steps": 2},
        "scored": {"max_steps": 2, "gradient_accumulation_steps": 2, "sft_weights": "reward"},
        "sourced": OF_TWO,
        "shards": {"max_steps": 2, "gradient_accumulation_steps": 2, "sharded": True},
        "configured": {"max_steps": 2, "gradient_accumulation_steps": 2, "sharded": os.path.join(folder, "fsdp2.yaml")},
    }
    return launch(folder, {4: on_four, 2: on_two})


@pytest.fixture(scope="module")
def on_two(results):
    return results[2]


def test_demonstrations_are_scored_by_the_rank_that_has_them_and_known_to_all(on_two):
    first, second = (rank["scored"] for rank in on_two)
    for name in ("gac/sft_weight", "gac/sft_weight_se", "gac/sft_reward", "gac/mu", "gac/norm_s2"):
        logged = [[step[name] for step in run["history"] if name in step] for run in (first, second)]
        assert len(logged[0]) == 2, name
        assert logged[0] == logged[1], name
    rows = len(first["demonstrations"][0])
    drawn = EpochSampler(len(DEMONSTRATIONS), 42).take(0, 8 * rows)
    rewards = [last_digit_reward([DEMONSTRATIONS[k]["completion"]])[0] for k in drawn]
    for step in range(2):
        own = rewards[step * 4 * rows : (step + 1) * 4 * rows]
        assert first["history"][step]["gac/sft_reward"] == pytest.approx(sum(own) / len(own))
    for a, b in zip(first["gradients"], second["gradients"], strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_ranks_weigh_sources_alike(on_two):
    first, second = (rank["sourced"] for rank in on_two)
    assert first["sources"] == second["sources"], "to the bit"
    assert all(trust.steps >= FEWEST and trust.probability != 0.7 for trust in first["sources"].values()), "judged"
    for name in ("gac/source_weight/a", "gac/source_weight/b", "gac/source_trust/a", "gac/source_trust/b"):
        logged = [[step[name] for step in run["history"] if name in step] for run in (first, second)]
        assert len(logged[0]) == FEWEST + 2, name
        assert logged[0] == logged[1], name


@pytest.fixture(scope="module")
def whole(results):
    """The run on 4 ranks, which saves at every step."""
    return [rank["whole"] for rank in results[4]]


def prompts(ranks):
    """Of every generation, in the order of ranks, each as often as it has rollouts."""
    return [list(itertools.chain(*calls)) for calls in zip(*(rank["prompts"] for rank in ranks), strict=True)]


def assert_takes(ranks, first, count):
    """The ranks together took this much of the demonstrations' order, from position ``first`` on, and nothing else."""
    taken = sorted(itertools.chain(*(call for rank in ranks for call in rank["demonstrations"])))
    assert taken == sorted(EpochSampler(len(DEMONSTRATIONS), 42).take(first, count))


def assert_same_gradient(left, right):
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        torch.testing.assert_close(right[name], gradient, rtol=1e-4, atol=1e-6)


def assert_continues(whole, resumed):
    """From step 3 of the run on 4 ranks; step 4 finds its rollouts in the checkpoint."""
    for rank in resumed:
        assert rank["steps"] == 6
        assert_same_gradient(whole[0]["gradients"][3], rank["gradients"][0])
    # generations 0 and 1 are of the first epoch, 2 of the second
    assert prompts(resumed) == prompts(whole)[2:]
    assert_takes(resumed, 3 * 16, 3 * 16)


def test_every_rank_logs_the_mixers_numbers(whole):
    """Standard errors too. Across ranks a step's sums arrive with the next step: entries say which step they are of."""
    histories = [[entry for entry in rank["history"] if "gac/mu" in entry] for rank in whole]
    assert [len(history) for history in histories] == [6] * 4
    for rank, history in zip(whole, histories, strict=True):
        for entry, theirs, metrics in zip(history, histories[0], rank["metrics"], strict=True):
            logged = {name: value for name, value in entry.items() if name.startswith("gac/") and name not in OTHERS}
            assert logged == {name: theirs[name] for name in logged}
            expected = {f"gac/{name}": value for name, value in metrics.items() if isinstance(value, (int, float))}
            expected = {name: value for name, value in expected.items() if not math.isnan(value)}
            expected.pop("gac/seconds")
            sft_loss = logged.pop("gac/sft_loss")
            assert math.isfinite(sft_loss)
            assert logged == pytest.approx(expected)
    last = histories[0][-1]
    assert last["gac/step"] == 4
    for name in ("mu_se", "sigma_s2_se", "sigma_r2_se", "distance2_se", "delta_g2_se"):
        assert 0 < last[f"gac/{name}"] < math.inf


def test_the_mixer_continues_exactly(folder, whole, on_two):
    saved = torch.load(os.path.join(checkpoint(folder, 3), "gac_state.pt"), weights_only=True)["mixer"]
    assert saved["controller"]["steps"] == 3
    for rank in on_two:
        loaded = rank["within"]["loaded"]
        assert loaded["controller"]["steps"] == 3
        law = saved["controller"]["state"], loaded["controller"]["state"]
        for part, found in (law, (saved["uncertainty"], loaded["uncertainty"])):
            assert part.keys() == found.keys()
            for name, value in part.items():
                torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(loaded["skipped"], saved["skipped"])


def test_four_ranks_continue_on_two(whole, on_two):
    resumed = [rank["within"] for rank in on_two]
    assert_continues(whole, resumed)
    # as many micro-batches, with the same rollouts and demonstrations in each: the statistics are those of 4 ranks
    entry = lambda run, step: next(e for e in run["history"] if e.get("gac/step") == step - 1 and "gac/mu" in e)
    theirs, ours = entry(whole[0], 4), entry(resumed[0], 4)
    for name in ("mu", "mu_raw", "mu_se", "sigma_s2", "sigma_r2", "distance2", "sigma_s2_se", "n_s", "n_r"):
        assert ours[f"gac/{name}"] == pytest.approx(theirs[f"gac/{name}"], rel=1e-4), name


@pytest.mark.parametrize(("rows", "accumulation"), [(4, 4), (8, 2)])
def test_four_ranks_continue_on_one(folder, whole, tmp_path, rows, accumulation):
    options = {**SAME, "per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
    resumed = train(str(tmp_path), resume=checkpoint(folder, 3), **options)
    assert_continues(whole, [resumed])


def test_with_a_smaller_global_batch(whole, on_two):
    """2 prompts a step instead of 4: nothing is left out or done twice, and training ends where it should."""
    resumed = [rank["smaller"] for rank in on_two]
    assert [rank["steps"] for rank in resumed] == [5, 5]
    generations = prompts(resumed)
    assert [len(rows) for rows in generations] == [8, 8, 8]
    assert list(itertools.chain(*generations)) == prompts(whole)[1][:24], "of the generation that 4 ranks had next"
    assert_takes(resumed, 2 * 16, 3 * 8)


def test_what_cannot_continue_says_what_to_do(on_two):
    for rank in on_two:
        assert "lies within a generation of 32 rollouts" in rank["impossible"]["error"]
        assert "generation_batch_size=32" in rank["impossible"]["error"]
        assert "ignore_data_skip=True" in rank["impossible"]["error"]


def test_data_begin_anew_where_that_is_asked_for(folder, whole, tmp_path):
    run = train(str(tmp_path), resume=checkpoint(folder, 3), prompts=FEW, max_steps=4, ignore_data_skip=True)
    assert run["steps"] == 4
    assert len(run["prompts"][0]) == 4, "a generation of today's size"
    assert_takes([run], 3 * 16, 4)


@pytest.mark.parametrize("law", ["hpt", "luffy"])
def test_what_a_rule_chose_goes_with_the_rollouts(tmp_path, law):
    """Micro-batches of two groups instead of one, for the second half of a generation."""
    options = {"law": law, "prompts": with_demonstrations(FEW), "generation_batch_size": 32}
    whole = train(
        str(tmp_path / "whole"),
        max_steps=2,
        gradient_accumulation_steps=4,
        save_steps=1,
        save_strategy="steps",
        **options,
    )
    resumed = train(
        str(tmp_path / "out"),
        resume=str(tmp_path / "whole" / "checkpoint-1"),
        max_steps=2,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        **options,
    )
    assert not resumed["prompts"], "nothing was generated"
    assert any(g.abs().max() > 0 for g in resumed["gradients"][0].values())
    assert_same_gradient(whole["gradients"][1], resumed["gradients"][0])


def test_larger_generations_begin_the_next_epoch(tmp_path):
    """16 of 20 prompts are done, 4 at a time; with 16 at a time there is no more to take in this epoch."""
    options = {"prompts": FEW, "per_device_train_batch_size": 16, "save_strategy": "steps", "save_steps": 4}
    train(str(tmp_path / "whole"), max_steps=4, **options)
    resumed = str(tmp_path / "whole" / "checkpoint-4")
    run = train(str(tmp_path / "out"), resume=resumed, max_steps=6, gradient_accumulation_steps=4, **options)
    assert run["steps"] == 6
    generator = torch.Generator().manual_seed(42)  # TRL's order: one permutation after the other
    _, *later = (torch.randperm(20, generator=generator).tolist() for _ in range(3))
    expected = [[FEW[index]["prompt"] for index in order[:16] for _ in range(4)] for order in later]
    assert prompts([run]) == expected


def test_rollouts_that_are_lost_are_generated_anew(folder, whole, tmp_path, caplog):
    copy = str(tmp_path / "checkpoint-3")
    shutil.copytree(checkpoint(folder, 3), copy)
    os.remove(os.path.join(copy, "gac_rollouts_2.pt"))
    with caplog.at_level(logging.WARNING):
        run = train(str(tmp_path / "out"), resume=copy, **{**SAME, "max_steps": 4, "gradient_accumulation_steps": 4})
    assert "get new ones" in caplog.text
    assert prompts([run]) == prompts(whole)[1:2], "the prompts of the generation under way"


def test_shards_train_as_replicas_do(on_two, tmp_path):
    """FSDP2: the same gradients; a backward pass of all ranks is one contribution."""
    for rank in on_two:
        assert_same_gradient(rank["replicas"]["gradients"][0], rank["shards"]["gradients"][0])
        assert rank["shards"]["numbers"] == on_two[0]["shards"]["numbers"], "to the bit"
    replicas, shards = (on_two[0][name]["metrics"][0] for name in ("replicas", "shards"))
    assert replicas["n_s"] == replicas["n_r"] == 4
    assert shards["n_s"] == shards["n_r"] == 2
    for name in ("norm_s2", "norm_r2", "dot", "distance2"):
        assert shards[name] == pytest.approx(replicas[name], rel=1e-5), name
    # one process whose micro-batches of demonstrations hold what those of 2 ranks hold together
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 1}
    alone = train(str(tmp_path), **options)["metrics"][0]
    assert alone["n_s"] == 2
    assert shards["sigma_s2"] == pytest.approx(alone["sigma_s2"], rel=1e-5)


def test_accelerates_configuration_file_says_how_to_shard(on_two):
    """Layers are units of their own; gradients stay those of replicas, and of shards without such units."""
    for rank in on_two:
        assert "model.layers.0" not in rank["shards"]["units"]
        assert "model.layers.0" in rank["configured"]["units"]
        assert_same_gradient(rank["replicas"]["gradients"][0], rank["configured"]["gradients"][0])
        assert_same_gradient(rank["shards"]["gradients"][1], rank["configured"]["gradients"][1])
        assert rank["configured"]["numbers"] == on_two[0]["configured"]["numbers"], "to the bit"


def test_shards_of_four_ranks_continue_on_two(results):
    whole, resumed = ([rank["sharded"] for rank in results[world]] for world in (4, 2))
    for rank in resumed:
        assert rank["steps"] == 2
        assert_same_gradient(whole[0]["gradients"][1], rank["gradients"][0])
    assert_takes(resumed, 16, 16)


def test_fsdp1_is_refused(trainer, monkeypatch):
    def create(self):
        original(self)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
        monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
        self.is_fsdp_enabled = True

    original = GRPOTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(GRPOTrainer, "create_accelerator_and_postprocess", create)
    with pytest.raises(ValueError, match=r"FSDP1.*use FSDP2"):
        trainer()


def test_deepspeed_is_refused(trainer, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.DEEPSPEED))
    with pytest.raises(ValueError, match=r"DeepSpeed takes its optimizer step within.*use DDP.*or FSDP2"):
        trainer()


def rollouts(ranks, micro_steps, rows):
    """Of a generation; completions of rank r have r + 1 tokens, and tokens count rows in the order of training."""
    saved = []
    for rank in range(ranks):
        parts = []
        for micro_step in range(micro_steps):
            first = (micro_step * ranks + rank) * rows
            ids = torch.arange(first, first + rows)[:, None].expand(-1, rank + 1)
            parts.append(
                {
                    "prompt_ids": ids,
                    "prompt_mask": torch.ones_like(ids),
                    "completion_ids": ids,
                    "completion_mask": torch.ones_like(ids),
                    "gac_demo_labels": ids,
                    "old_per_token_logps": ids * -0.5,
                    "advantages": ids[:, 0].float(),
                    "num_items_in_batch": torch.tensor(7),
                    "ref_per_token_logps": None,
                    "names": [str(row) for row in ids[:, 0].tolist()],
                }
            )
        saved.append(parts)
    return saved


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_rollouts_are_dealt_out_in_order(ranks):
    new = Batching(ranks=ranks, rows=2, accumulation=1, steps_per_generation=16 // ranks, iterations=1, group=2)
    shares = [redistribute(rollouts(4, 2, 4), new, rank, pad=99) for rank in range(ranks)]
    row = 0
    for micro_step in range(new.steps_per_generation):
        for share in shares:
            part = share[micro_step]
            assert part["advantages"].tolist() == [row, row + 1]
            assert part["names"] == [str(row), str(row + 1)]
            length = row // 4 % 4 + 1
            assert part["completion_ids"][0].tolist() == [row] * length + [99] * (4 - length)
            assert part["prompt_ids"][0].tolist() == [99] * (4 - length) + [row] * length
            assert part["completion_mask"].sum(1).tolist() == part["prompt_mask"].sum(1).tolist() == [length] * 2
            assert part["gac_demo_labels"][0].tolist() == [row] * length + [-100] * (4 - length)
            assert part["old_per_token_logps"][0].tolist() == [-0.5 * row] * length + [0.0] * (4 - length)
            assert part["num_items_in_batch"] == 7
            assert part["ref_per_token_logps"] is None
            row += 2


def batching(ranks=4, rows=4, accumulation=1, steps_per_generation=2, iterations=1, group=4):
    return Batching(ranks, rows, accumulation, steps_per_generation, iterations, group)


@pytest.mark.parametrize(
    ("position", "new", "expected"),
    [
        (Position(1, 3, 7), batching(ranks=2, accumulation=2, steps_per_generation=4), Position(1, 6, 14)),
        (Position(1, 3, 7), batching(ranks=1, rows=16), Position(1, 3, 7)),
        (Position(0, 4, 4), batching(ranks=2, steps_per_generation=1), Position(0, 8, 2)),
        (Position(0, 4, 4), batching(ranks=8, steps_per_generation=2), Position(0, 2, 4)),
    ],
    ids=["half the ranks", "one rank", "smaller generations", "larger generations"],
)
def test_positions(position, new, expected):
    assert position.moved(batching(), new) == expected


@pytest.mark.parametrize(
    ("position", "new", "message"),
    [
        (Position(0, 3, 3), batching(ranks=2), "within a generation of 32"),
        (Position(0, 3, 3), batching(ranks=1, iterations=2, steps_per_generation=8), "num_iterations=2"),
        (Position(0, 3, 3), batching(ranks=8, rows=4, steps_per_generation=1), "16 rows of a generation are done"),
        (Position(0, 2, 2), batching(ranks=8), "8 prompts of this epoch are done.*16 per generation"),
        (Position(0, 2, 2), batching(ranks=4, accumulation=4), "32 rows of this epoch are done.*64 per"),
    ],
)
def test_positions_where_no_micro_step_begins(position, new, message):
    with pytest.raises(ValueError, match=message):
        position.moved(batching(), new)
