import dataclasses
from itertools import permutations

import pytest
import torch
from datasets import Dataset

from gac.audit.figures import figures
from gac.audit.panel import EXACT
from gac.audit.record import RUN, Record
from gac.audit.shadow import Contender, Shadows, default_contenders
from gac.audit.trainer import AuditTrainer, Continuation
from gac.laws.controller import Controller
from gac.statistics.step import pair_statistics
from gac.tasks.characters import build_character_tokenizer
from gac.trainers import HybridGRPOTrainer
from tests.gac.trainers.conftest import DEMONSTRATIONS, PROMPTS, config, last_digit_reward, tiny_model  # noqa: F401

SIZES = {"per_device_train_batch_size": 8, "num_generations": 4, "sft_batch_size": 5, "max_steps": 4}


def run(arguments, cls, **options):
    built = cls(
        tiny_model(),
        last_digit_reward,
        arguments,
        Dataset.from_list(PROMPTS),
        DEMONSTRATIONS,
        processing_class=build_character_tokenizer(),
        **options,
    )
    built.train()
    return built


def audited(arguments, **options):
    record = Record(0.5)
    options = {"contenders": default_contenders({}), "every": 2, "replicates": 4} | options
    return run(arguments, AuditTrainer, record=record, **options), record


@pytest.fixture
def arguments(config):  # noqa: F811
    return config(**SIZES)


def logged(trainer):
    timing = ("time", "seconds", "per_second", "runtime")
    return [{k: v for k, v in x.items() if not k.endswith(timing)} for x in trainer.state.log_history]


def test_training_goes_bit_for_bit_as_without(arguments):
    torch.manual_seed(0)
    plain = run(arguments, HybridGRPOTrainer)
    after_plain = torch.rand(3)
    torch.manual_seed(0)
    watched, record = audited(arguments)
    assert torch.equal(torch.rand(3), after_plain)
    assert record.steps == [1, 3]
    for (name, a), b in zip(plain.model.named_parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert logged(plain) == logged(watched)
    assert dict(plain._metrics) == dict(watched._metrics)
    assert plain._logs == watched._logs
    assert (plain._step, plain._sft_position) == (watched._step, watched._sft_position)
    a, b = plain._mixer_state, watched._mixer_state
    for name, value in a["controller"]["state"].items():
        torch.testing.assert_close(value, b["controller"]["state"][name], rtol=0, atol=0, equal_nan=True)


def test_record_holds_every_step_and_the_law_in_charge_is_its_own_shadow(arguments):
    trainer, record = audited(arguments)
    assert {len(values) for values in record.mu.values()} == {4}
    assert record.mu[RUN] == pytest.approx(record.mu["gac on exact"], abs=1e-7)  # float32 against float64
    assert record.mu["fixed 0.9"] == [0.9] * 4
    assert record.left_out == {"kl-ctrl": ["kl"]}
    assert record.estimates["exact"][-1][0] == pytest.approx(float(trainer.mixer.statistics.sigma_s2), rel=1e-5)
    assert all(
        point.draws["exact"].shape == (4, 3) and point.draws["exact"].isfinite().all() for point in record.points
    )
    found = figures(record)
    assert found.points == 2
    assert found.laws[RUN].ratio.value > 0
    kept = Record.restored(dataclasses.asdict(record))
    assert str(figures(kept).as_json()) == str(found.as_json())


def test_drawn_steps_are_new_whole_and_at_the_same_parameters(arguments, monkeypatch):
    """Each sees other prompts and demonstrations, as many as a step has, and the parameters of its step."""
    seen = []
    original = AuditTrainer._draw_step

    def watch(self, model, items, unseen, *, seed):
        original(self, model, items, unseen, seed=seed)
        observer = self._panel._observers["exact"]
        seen.append(
            {
                "step": self.state.global_step,
                "branches": [c.branch.value for c in observer.seen.contributions],
                "demonstrations": tuple(self._sampler.take(0, 10)),
                "unseen": set(unseen),
                "prompts": tuple(map(tuple, torch.cat([x["prompt_ids"] for x in self._buffered_inputs]).tolist())),
                "groups": [x["prompt_ids"].unique(dim=0).shape[0] for x in self._buffered_inputs],
                "parameters": torch.cat([p.detach().flatten() for p in model.parameters()]),
                "gradient": self._panel.gradients(),
            }
        )

    monkeypatch.setattr(AuditTrainer, "_draw_step", watch)
    audited(arguments)
    assert [x["step"] for x in seen] == [1] * 4 + [3] * 4
    assert all(x["branches"] == ["rl", "sft"] * 2 for x in seen)
    assert all(x["groups"] == [2, 2] for x in seen)  # 8 rollouts are two whole groups of 4
    assert len({x["demonstrations"] for x in seen}) == len({x["prompts"] for x in seen}) == 8
    for first, rest in ((seen[0], seen[1:4]), (seen[4], seen[5:])):
        assert all(torch.equal(first["parameters"], x["parameters"]) for x in rest)
    assert not torch.equal(seen[0]["parameters"], seen[4]["parameters"])
    assert [len(x["unseen"]) for x in seen] == [40] * 4 + [20] * 4  # of 50, 10 in a step
    assert all(set(x["demonstrations"]) <= x["unseen"] for x in seen)


def test_continuation_of_an_epoch():
    order = Continuation([3, 1, 4], 6, seed=7)
    first = order.take(0, 3)
    assert sorted(first) == [1, 3, 4]
    assert sorted(order.take(3, 6)) == sorted(order.take(9, 6)) == list(range(6))
    assert order.take(2, 3) == [first[2], *order.take(3, 2)]
    assert {tuple(Continuation([3, 1, 4], 6, seed=s).take(0, 3)) for s in range(40)} == set(permutations([3, 1, 4]))


def test_what_cannot_be_audited_is_refused(config):  # noqa: F811
    with pytest.raises(ValueError, match="replicates must be at least 3, got 2"):
        audited(config(**SIZES), replicates=2)
    with pytest.raises(ValueError, match="every must be at least 1"):
        audited(config(**SIZES), every=0)
    with pytest.raises(ValueError, match="fresh rollouts in every optimizer step"):
        audited(config(**SIZES, steps_per_generation=4))


def test_contenders_that_measure_some_steps():
    options = {"momentum": 0.0, "cap": 1.0, "half_life": 5}
    every, some = Contender("every", "gac", options=options), Contender("some", "gac", options=options, interval=4)
    assert [step for step in range(24) if some.measures(step)] == [*range(10), 13, 17, 21]
    shadows, alone = Shadows([every, some], frozenset()), Controller("gac", **options)
    for step in range(24):
        noise = torch.tensor(1.0 + step % 5)
        statistics = pair_statistics(
            noise=torch.stack([noise, 2 * noise]),
            norms=torch.tensor([3.0 + step, 4.0, 1.0]),
            n=torch.tensor([4.0, 4.0]),
            nonfinite=torch.zeros(()),
        )
        shadows.update({EXACT: statistics}, {})
        alone.update(statistics if some.measures(step) else None)
        assert shadows.mu()["some"] == float(alone.mu)
        assert (shadows.mu()["every"] == shadows.mu()["some"]) == (step < 10)
    assert torch.equal(shadows.averages()[EXACT], shadows._running[0][1].law.smoothed())


def test_contenders_without_their_signal_are_left_out():
    contenders = [
        Contender("k", "kl-ctrl"),
        Contender("e", "entropy-ctrl"),
        Contender("f", "fixed", options={"mu": 0.3}),
    ]
    assert Shadows(contenders, frozenset({"entropy"})).left_out == {"k": ["kl"]}
    assert Shadows(contenders, frozenset({"entropy", "kl"})).mu() == {"k": 0.5, "e": 0.5, "f": 0.3}


def test_errors_are_those_of_what_the_optimizer_moves_by(config):  # noqa: F811
    """Adam's momentum counts for every law; a law that was told to leave it out is judged without it."""
    told, record = audited(config(**SIZES))
    assert record.momentum == told.mixer.controller.law.momentum == 0.9
    values, _ = record.truths()
    sigma_s2, sigma_r2, delta_g2, cross = values.unbind(-1)
    best = (0.5 * (delta_g2 + cross) + sigma_r2 / 19) / (delta_g2 + 2 * cross + (sigma_s2 + sigma_r2) / 19)
    found = figures(record)
    assert found.oracle.value == pytest.approx(float(best.clamp(0, 1).mean()), rel=1e-6)
    assert found.truth["sigma_s2"].value == pytest.approx(float(sigma_s2.mean())), "as measured"
    assert record.mu[RUN] == pytest.approx(record.mu["gac on exact"], abs=1e-7)

    plain = {"momentum": 0.0}
    _, without = audited(config(**SIZES, law_options=plain), contenders=default_contenders(plain))
    assert without.momentum == 0.0
    assert without.mu[RUN] == pytest.approx(without.mu["gac on exact"], abs=1e-7)
    assert audited(config(**SIZES, law="fixed"))[1].momentum == 0.9
