"""Parameter lists: of named models, of a number of parameters, of a configuration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gac.plan.shapes import MODELS


@dataclass(frozen=True)
class Parameters:
    """The parameter list of a model.

    Attributes:
        name: what the user called it.
        numels: elements of each parameter, in the order of ``model.parameters()``.
        rows: first dimension of each: what FSDP cuts.
        exact: False where the list is another model's, scaled.
    """

    name: str
    numels: tuple[int, ...]
    rows: tuple[int, ...]
    exact: bool = True

    @classmethod
    def of_shapes(cls, name: str, shapes: Sequence[Sequence[int]]) -> Parameters:
        """The list of tensors of these shapes."""
        return cls(name, tuple(math.prod(s) for s in shapes), tuple(s[0] if len(s) else 1 for s in shapes))

    @classmethod
    def of(cls, model: str) -> Parameters:
        """From a name of :data:`MODELS` (``"8B"``), a number (``"70e9"``) or a transformers configuration's path.

        A number takes the list of the named model of the nearest size, every tensor scaled alike.
        Raises ValueError for anything else.
        """
        if model in MODELS:
            return cls.of_shapes(model, MODELS[model].shapes())
        try:
            count = float(model)
        except ValueError:
            return cls.of_shapes(model, _shapes_of_config(Path(model)))
        if not 1 <= count <= 1e15:
            raise ValueError(f"params must be at least 1 and at most 1e15, got {model}")
        near = min(MODELS.values(), key=lambda shape: abs(math.log(shape.numel() / count)))
        return cls.of_shapes(near.name, near.shapes()).scaled(model, round(count))

    def scaled(self, name: str, total: int) -> Parameters:
        """The same list with ``total`` elements in all."""
        ends, done, whole = [0], 0, sum(self.numels)
        for numel in self.numels:
            done += numel
            ends.append(round(total * done / whole))
        numels = tuple(b - a for a, b in itertools.pairwise(ends))
        kept = [(n, min(n, r)) for n, r in zip(numels, self.rows, strict=True) if n]
        return Parameters(name, tuple(n for n, _ in kept), tuple(r for _, r in kept), exact=False)

    def adapters(self, total: int) -> Parameters:
        """LoRA adapters with ``total`` elements: two for each matrix except the embedding and what is as tall."""
        pairs = [
            (rows, numel // rows)
            for rows, numel in zip(self.rows, self.numels, strict=True)
            if numel > rows and rows != self.rows[0]
        ]
        shapes = [(1, n) for pair in pairs for n in pair] or [(1, total)]
        return Parameters.of_shapes(self.name, shapes).scaled(self.name, total)

    def shard(self, ranks: int) -> Parameters:
        """What the first of ``ranks`` ranks holds when the rows of every tensor are dealt out."""
        share = [-(-r // ranks) for r in self.rows]
        numels = tuple(-(-n * s // r) for n, r, s in zip(self.numels, self.rows, share, strict=True))
        return Parameters(self.name, numels, tuple(share), self.exact)

    @property
    def total(self) -> int:
        """Elements in all."""
        return sum(self.numels)


def _shapes_of_config(path: Path) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a causal language model, from its configuration alone."""
    if not path.exists():
        raise ValueError(
            f"params must be a number (70e9), one of {', '.join(MODELS)}, or the path of a transformers configuration; "
            f"got {str(path)!r}, which is none of them"
        )
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ValueError("a configuration's path as params needs transformers: pip install transformers") from error
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{str(path)!r} is no configuration of a causal language model: {reason}") from error
    return [tuple(p.shape) for p in model.parameters()]
