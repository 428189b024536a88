"""What an audit can follow, and how it writes its data."""

import json

import pytest

from gac.audit.run import AuditedLaw, audited_law, compact_json
from gac.runs.config import TrainConfig
from gac.runs.errors import UsageError


def test_the_law_in_charge():
    assert audited_law(TrainConfig()) == AuditedLaw("gac", {}, 0.5)
    assert audited_law(TrainConfig(law="gac:alpha=0.3")) == AuditedLaw("gac", {"alpha": 0.3}, 0.3)
    assert audited_law(TrainConfig(mu=0.2)) == AuditedLaw("fixed", {"mu": 0.2}, 0.5)


@pytest.mark.parametrize(
    ("law", "message"),
    [("hpt", "acts per prompt or token"), ("gac:alpha=kl", "moves its target"), ("nonsense", "unknown law")],
)
def test_laws_that_an_audit_cannot_follow(law, message):
    with pytest.raises(UsageError, match=message):
        audited_law(TrainConfig(law=law))


def test_json_keeps_lists_of_numbers_on_a_line():
    value = {"a": [1.5, float("nan"), [2, 3]], "b": {"c": [{"d": 1}, {"d": 2}]}, "e": {}}
    text = compact_json(value)
    assert '"a": [1.5, null, [2, 3]]' in text
    assert json.loads(text) == {"a": [1.5, None, [2, 3]], "b": {"c": [{"d": 1}, {"d": 2}]}, "e": {}}
