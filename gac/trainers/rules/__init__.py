"""What a rule does to prompts, rollouts and demonstrations: one module a rule, all with the interface of `Rule`.

Names, options and constants are in `gac.laws.rules`; formulas and sources in ``docs/rules.md``.
"""

from gac.laws import ChordPhiLaw, HptLaw, Law, LuffyLaw, ReliftLaw, SrftLaw
from gac.trainers.rules.base import LossTerms, Rule, ScoredBatch, Selection
from gac.trainers.rules.chord import ChordPhi
from gac.trainers.rules.hpt import Hpt
from gac.trainers.rules.luffy import Luffy
from gac.trainers.rules.relift import Relift
from gac.trainers.rules.srft import Srft

__all__ = ["LossTerms", "Rule", "ScoredBatch", "Selection", "rule_of"]

_RULES: dict[type[Law], type[Rule]] = {
    ChordPhiLaw: ChordPhi,
    HptLaw: Hpt,  # superrl too: its law is hpt's with another gate
    LuffyLaw: Luffy,
    ReliftLaw: Relift,
    SrftLaw: Srft,
}


def rule_of(law: Law) -> Rule:
    """The trainer's side of a law; for laws that only set mu, a `Rule` that changes nothing."""
    for kind, rule in _RULES.items():
        if isinstance(law, kind):
            return rule(law)
    return Rule(law)
