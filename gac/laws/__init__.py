"""How mu follows from statistics: one module a law, registered by name."""

from gac.laws.base import Law, available, create, register
from gac.laws.fixed import FixedLaw
from gac.laws.gac import GacLaw
from gac.laws.paper import PaperLaw
from gac.laws.scheduled import ChordMuLaw

__all__ = ["ChordMuLaw", "FixedLaw", "GacLaw", "Law", "PaperLaw", "available", "create", "register"]
