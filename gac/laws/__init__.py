"""How mu follows from statistics: one module a law, registered by name."""

from gac.laws.aim import AimLaw
from gac.laws.base import Law, Step, available, create, register
from gac.laws.controller import Controller
from gac.laws.feedback import EntropyLaw, KlLaw
from gac.laws.fixed import FixedLaw
from gac.laws.gac import GacLaw
from gac.laws.paper import PaperLaw
from gac.laws.rules import ChordPhiLaw, HptLaw, LuffyLaw, ReliftLaw, RuleLaw, SrftLaw, SuperRlLaw
from gac.laws.scheduled import ChordMuLaw, SequentialLaw

__all__ = [
    "AimLaw",
    "ChordMuLaw",
    "ChordPhiLaw",
    "Controller",
    "EntropyLaw",
    "FixedLaw",
    "GacLaw",
    "HptLaw",
    "KlLaw",
    "Law",
    "LuffyLaw",
    "PaperLaw",
    "ReliftLaw",
    "RuleLaw",
    "SequentialLaw",
    "SrftLaw",
    "Step",
    "SuperRlLaw",
    "available",
    "create",
    "register",
]
