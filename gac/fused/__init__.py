"""The end of a step in one piece: what the statistics and law ``gac`` say in torch, on the numbers themselves.

Written in torch, the end of a step is some 200 operations on single numbers, and each costs the host several
microseconds whatever it computes. :mod:`gac.statistics` and :mod:`gac.laws.gac` stay the reference: tests hold this
package against them, and what it does not serve (:func:`gac.ending.why_in_torch`) is done by them.
"""
