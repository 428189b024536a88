"""CHORD-phi: constant mu, token weights ``p * (1 - p)`` on the demonstrations."""

from gac.trainers.rules.base import Rule


class ChordPhi(Rule):
    """Only the supervised token loss differs from a constant mu."""

    phi = True
