"""How mu follows from statistics: one module a law, registered by name."""

from gac.laws.base import Law, Step, available, create, register
from gac.laws.feedback import EntropyLaw, KlLaw
from gac.laws.fixed import FixedLaw
from gac.laws.gac import GacLaw
from gac.laws.paper import PaperLaw
from gac.laws.scheduled import ChordMuLaw, SequentialLaw

__all__ = [
    "ChordMuLaw",
    "EntropyLaw",
    "FixedLaw",
    "GacLaw",
    "KlLaw",
    "Law",
    "PaperLaw",
    "SequentialLaw",
    "Step",
    "available",
    "create",
    "register",
]
