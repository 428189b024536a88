"""Which ledger a parameter's gradient goes to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gac.observe.ledger import Ledger
from gac.observe.topology import local_numel


def place(
    parameters: Sequence[nn.Parameter],
    modules: Sequence[int],
    module_count: int,
    copies: Sequence[int] | None,
    *,
    lossless: bool,
    running: bool,
    seed: int,
) -> tuple[list[Ledger], list[tuple[int, int]]]:
    """A ledger for the parameters of each device, and of each number of ranks that hold the same elements.

    Args:
        parameters: of the model. modules: the number of each one's module.
        module_count: how many modules there are.
        copies: ranks that hold the same elements, for each parameter; None: one.
        lossless, running: see :class:`gac.observe.observer.Observer`.
        seed: of the first ledger's sketch; each has its own.

    Returns:
        The ledgers, and for each parameter the number of its ledger and of its region there.
    """
    places: list[tuple[int, int]] = []
    groups: dict[tuple[torch.device, int], list[int]] = {}
    for index, parameter in enumerate(parameters):
        key = (parameter.device, 1 if copies is None else copies[index])
        group = groups.setdefault(key, [])
        places.append((list(groups).index(key), len(group)))
        group.append(index)
    ledgers = [
        Ledger(
            [local_numel(parameters[k]) for k in group],
            device,
            lossless=lossless,
            running=running,
            seed=seed + number,
            modules=[modules[k] for k in group],
            module_count=module_count,
            copies=same,
        )
        for number, ((device, same), group) in enumerate(groups.items())
    ]
    return ledgers, places
