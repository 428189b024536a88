"""The two signals of a hybrid step, by name."""

from __future__ import annotations

from enum import Enum


class Branch(str, Enum):
    """The two signals of a hybrid step."""

    SFT = "sft"
    RL = "rl"

    __hash__ = str.__hash__  # in C: Enum's own costs more than the rest of a look into a dictionary
