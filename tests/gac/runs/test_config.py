"""The options of a run: their syntax, what is refused, what a stored run may differ in."""

import pytest

from gac.runs.config import RESUME_MAY_CHANGE, TrainConfig, changed_flags, check, parse_law, parse_prior
from gac.runs.errors import UsageError


def test_law_and_prior_syntax():
    assert parse_law("fixed:0.1") == ("fixed", {"mu": 0.1})
    assert parse_law("gac:half_life=20,cap=0.05") == ("gac", {"half_life": 20, "cap": 0.05})
    assert parse_law("chord") == ("chord", {})
    assert parse_prior("0.3") == 0.3
    assert parse_prior("20,200,.85,.15") == {"warmup": 20, "decay": 200, "peak": 0.85, "valley": 0.15}
    assert TrainConfig(mu=0.2).law_and_options() == ("fixed", {"mu": 0.2})
    assert TrainConfig(prior="0.3", law_option=["cap=0.1"]).law_and_options() == ("gac", {"prior": 0.3, "cap": 0.1})


@pytest.mark.parametrize("text", ["gac:half_life", "gac:half_life=", "gac:half_life=2 3", "chord:0.1"])
def test_laws_of_another_form_are_refused(text):
    with pytest.raises(UsageError, match="law"):
        parse_law(text)


@pytest.mark.parametrize("text", ["", "word", "1,2", "1,2,3,4,5"])
def test_priors_of_another_form_are_refused(text):
    with pytest.raises(UsageError, match="warmup,decay,peak,valley"):
        parse_prior(text)


def test_defaults_follow_the_kind_of_model():
    small, named = TrainConfig().with_model_defaults(), TrainConfig(model="name").with_model_defaults()
    assert (small.lr, small.warm_start_steps, small.warm_start_lr, small.threads) == (4e-4, 300, 1e-3, 1)
    assert (named.lr, named.warm_start_steps, named.warm_start_lr, named.threads) == (1e-5, 0, 1e-5, 0)
    assert TrainConfig(lr=0.5, threads=0).with_model_defaults().lr == 0.5
    assert TrainConfig(lr=0.5, threads=0).with_model_defaults().threads == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"law": "nonsense"}, "unknown law 'nonsense'"),
        ({"estimator": "nonsense"}, "unknown estimator 'nonsense'"),
        ({"task": ["nonsense"]}, "unknown task 'nonsense'"),
        ({"generations": 1}, "at least 2"),
        ({"generations": 7}, "not a multiple of --generations 7"),
        ({"prompts": 8}, "--prompts 8 is too few for one step; it needs 16"),
        ({"law": "kl-ctrl"}, "--law kl-ctrl follows"),
        ({"mu": 0.5, "law": "chord"}, "cannot be combined"),
        ({"sft_weights": "reward", "law": "hpt"}, "--sft-weights reward with --law hpt"),
        ({"sft_weights": "reward", "estimator": "coefficient"}, "--estimator coefficient.*leave one of them out"),
    ],
)
def test_what_would_fail_later_is_refused(options, message):
    check(TrainConfig())
    with pytest.raises(UsageError, match=message):
        check(TrainConfig(**options))


def test_flags_of_what_differs_from_a_stored_run():
    stored = vars(TrainConfig(steps=9, lr=0.5, warm_start_lr=0.5))
    assert changed_flags(TrainConfig(**stored), stored, may_change=()) == ""
    wanted = TrainConfig(steps=10, lr=0.5, warm_start_lr=0.1)
    assert changed_flags(wanted, stored, may_change=()) == "--steps, --warm-start-lr"
    assert changed_flags(wanted, stored, may_change=RESUME_MAY_CHANGE) == "--warm-start-lr"
    assert changed_flags(TrainConfig(), {}, may_change=("task",)).startswith("--demonstrations, --prompts")
