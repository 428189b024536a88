"""Which prompts, rollouts and demonstrations each rule chooses, by hand-computed values."""

import math

import pytest
import torch

import gac
from gac.laws.controller import Controller
from gac.trainers.groups import GroupLayout
from gac.trainers.rules import Rule, ScoredBatch, rule_of

NAN = float("nan")


def rule(name, **options):
    return rule_of(Controller(name, **options).law)


def scored(rewards, *, size=4, rank=0, ranks=1, demonstrated=None, joined=False):
    """A rank's batch, with advantages 1, 2, 3, ..."""
    rewards = torch.tensor(rewards)
    rows = len(rewards) // ranks
    layout = GroupLayout(rows, size, offset=rank * rows)
    has = torch.ones(rows, dtype=torch.bool) if demonstrated is None else torch.tensor(demonstrated)
    return ScoredBatch(
        layout, rewards, torch.arange(1.0, rows + 1), has, layout.heads() & has if joined else torch.zeros_like(has)
    )


# one group with 0, 1, 2, 3, 4 correct rollouts each
LADDER = [0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1]
LADDER = [float(reward) for reward in LADDER]


@pytest.mark.parametrize(("gate", "gated"), [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_hpt_gates_a_prompt_with_at_most_gate_correct(gate, gated):
    chosen = rule("hpt", gate=gate).select(scored(LADDER))
    assert chosen.demonstrate.tolist() == [True] * 4 * gated + [False] * 4 * (5 - gated)
    assert chosen.advantages.tolist() == [0.0] * 4 * gated + [float(i) for i in range(4 * gated + 1, 21)]


def test_superrl_is_hpt_with_gate_0():
    left, right = rule("superrl").select(scored(LADDER)), rule("hpt").select(scored(LADDER))
    assert torch.equal(left.demonstrate, right.demonstrate)
    assert torch.equal(left.advantages, right.advantages)


def test_a_prompt_without_demonstration_is_left_to_rl():
    chosen = rule("hpt").select(scored([0.0] * 8, demonstrated=[True] * 4 + [False] * 4))
    assert chosen.demonstrate.tolist() == [True] * 4 + [False] * 4
    assert chosen.advantages.tolist() == [0.0] * 4 + [5.0, 6.0, 7.0, 8.0]
    chosen = rule("relift").select(scored([0.0] * 8, demonstrated=[True] * 4 + [False] * 4))
    assert chosen.demonstrate.tolist() == [True] * 4 + [False] * 4


def test_correct_is_a_threshold_and_an_unscored_rollout_is_not():
    batch = scored([0.5, 0.4, NAN, 0.5, 0.9, 0.9, 0.9, NAN])
    assert batch.correct_in_group(0.5).tolist() == [2] * 4 + [3] * 4
    assert rule("hpt", gate=2, correct=0.5).select(batch).demonstrate.tolist() == [True] * 4 + [False] * 4
    assert rule("hpt", gate=2).select(batch).demonstrate.all()


def test_a_group_over_two_ranks_is_judged_as_a_whole():
    # ranks of 6 rows: the second group has its only correct rollout on the second rank
    rewards = [0.0] * 4 + [0.0, 0.0] + [1.0, 0.0] + [0.0] * 4
    first, second = (rule("hpt").select(scored(rewards, rank=rank, ranks=2)) for rank in range(2))
    assert first.demonstrate.tolist() == [True] * 4 + [False] * 2
    assert second.demonstrate.tolist() == [False] * 2 + [True] * 4


def test_luffy_centers_rewards_in_the_joint_group_without_a_standard_deviation():
    # the first of each group is the demonstration; groups: mixed, all correct, none correct but the demonstration
    rewards = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    chosen = rule("luffy").select(scored(rewards, joined=True))
    assert chosen.demonstrate is None
    assert chosen.extra["gac_off_policy"].tolist() == [0.5, 0, 0, 0, 0, 0, 0, 0, 0.75, 0, 0, 0]
    assert chosen.advantages.tolist() == [0, -0.5, 0.5, -0.5, 0, 0, 0, 0, 0, -0.25, -0.25, -0.25]


def test_luffy_without_a_demonstration_keeps_all_rollouts():
    chosen = rule("luffy").select(scored([1.0, 0.0, 0.0, 0.0], demonstrated=[False] * 4, joined=True))
    assert chosen.extra["gac_off_policy"].tolist() == [0.0] * 4
    assert chosen.advantages.tolist() == [0.75, -0.25, -0.25, -0.25]


def test_srft_takes_rollouts_out_of_trls_loss_and_marks_them():
    rewards = [1.0, 0.0, 1.0, NAN, 0.0, 0.0, 0.0, 0.0]
    chosen = rule("srft").select(scored(rewards, joined=True))
    assert chosen.advantages.tolist() == [0.0] * 8
    assert chosen.extra["gac_on_policy"].tolist() == [0.0, -1.0, 1.0, 0.0, 0.0, -1.0, -1.0, -1.0]
    assert chosen.extra["gac_off_policy"].tolist() == pytest.approx([1 / 3, 0, 0, 0, 0, 0, 0, 0])
    assert chosen.demonstrate.all()


def test_relift_queues_prompts_without_a_correct_rollout_until_the_queue_is_full():
    relift = rule("relift", queue=3)
    chosen = relift.select(scored(LADDER))
    assert chosen.demonstrate.tolist() == [True] * 4 + [False] * 16
    assert chosen.advantages.tolist() == [float(i) for i in range(1, 21)]  # RL goes on with all of them
    rows = [([i], [i]) for i in range(5)]
    assert relift.explores
    assert not relift.supervises
    for count, full in ((2, False), (5, True)):
        relift.enqueue(rows[len(relift.queue) : count])
        relift.end_step()
        assert (relift.supervises, relift.explores, relift.law.supervise_next) == (full, not full, full)
        assert float(relift.law.update(None, None)) == float(full)
    assert relift.dequeue() == rows[:3]  # the oldest first
    relift.end_step()
    assert relift.explores
    assert relift.queue == rows[3:]
    assert float(relift.law.update(None, None)) == 0.0

    other = rule("relift", queue=2)
    other.load_state_dict(relift.state_dict())
    other.end_step()
    assert other.supervises
    again = rule("relift", queue=2)
    again.load_state_dict(other.state_dict())
    assert again.supervises
    law = Controller("relift", queue=2).law
    again.attach(law)  # a second training goes on where the first was
    assert law.supervise_next


def test_weights_of_the_branches():
    """mu * scale is the weight of the supervised loss, (1 - mu) * scale that of the reinforcement loss."""
    weights = {}
    for name, options in {
        "chord-phi": {},
        "hpt": {"sft_coefficient": 0.3},
        "superrl": {},
        "srft": {},
        "luffy": {},
        "relift": {},
        "fixed": {"mu": 0.25},
    }.items():
        made = rule(name, **options)
        mu = float(made.law.mu)
        weights[name] = (made.scale * mu, made.scale * (1 - mu))
    assert weights == {
        "chord-phi": pytest.approx((0.1, 0.9)),
        "hpt": pytest.approx((0.3, 1.0)),
        "superrl": pytest.approx((1.0, 1.0)),
        "srft": pytest.approx((1.0, 1.0)),
        "luffy": (0.0, 1.0),
        "relift": (0.0, 1.0),
        "fixed": (0.25, 0.75),
    }


def test_a_law_that_sets_mu_has_a_rule_that_changes_nothing():
    plain = rule("gac")
    assert type(plain) is Rule
    batch = scored([1.0, 0.0, 0.0, 1.0])
    assert plain.select(batch).advantages is batch.advantages
    assert plain.select(batch).demonstrate is None
    assert (plain.explores, plain.supervises, plain.from_prompts, plain.phi) == (True, True, False, False)
    assert rule("chord-phi").phi


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hpt", {"gate": -1}, "gate must be a whole number from 0 on"),
        ("hpt", {"gate": 0.5}, "gate must be a whole number"),
        ("hpt", {"sft_coefficient": -1.0}, "sft_coefficient must be in"),
        ("hpt", {"correct": math.inf}, "correct must be in"),
        ("relift", {"queue": 0}, "queue must be a whole number from 1 on"),
        ("luffy", {"shaping": 0.0}, "shaping must be in"),
        ("srft", {"sft_weight": -0.5}, "sft_weight must be in"),
        ("srft", {"rl_weight": NAN}, "rl_weight must be in"),
        ("chord-phi", {"mu": 1.5}, r"mu must be in \[0, 1\]"),
    ],
)
def test_impossible_options_are_refused_by_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        rule(name, **options)


def test_options_of_other_rules_are_refused():
    with pytest.raises(TypeError, match="'superrl' has no option gate"):
        rule("superrl", gate=1)


def test_a_gate_that_no_prompt_passes_is_refused():
    rule("hpt", gate=7).check(8)
    with pytest.raises(ValueError, match=r"gate=8 with num_generations=8 .* \[0, 7\]"):
        rule("hpt", gate=8).check(8)


@pytest.mark.parametrize("name", ["chord-phi", "hpt", "superrl", "srft", "luffy", "relift"])
def test_a_rule_without_its_trainer_is_refused(name):
    assert name in gac.laws.available()
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match=f"law '{name}' acts per prompt or token: it needs .*HybridGRPOTrainer"):
        gac.patch(model, law=name)
    model(torch.ones(1, 2)).sum().backward()  # nothing is left on the model
    gac.patch(model).unpatch()


@pytest.mark.parametrize("name", ["chord-phi", "hpt", "superrl", "srft", "luffy", "relift"])
def test_a_trainer_that_carries_a_rule_out_may_patch_with_it(name):
    with gac.patch(torch.nn.Linear(2, 1), law=name, carries_out_rules=True) as mixer:
        assert mixer.controller.law.needs_trainer
        assert float(mixer.mu) == pytest.approx(float(gac.laws.create(name).mu))
