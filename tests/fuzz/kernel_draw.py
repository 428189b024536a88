"""Draws for the target ``kernels``: lists of tensors of every dtype, stride and size, and the arguments of a call."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16", "float64")
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2")
ONE_LIST = ("moments", "sketch", "accumulate_", "absorb_sketch_")
"""Operations that read 8-bit floats as they are, and scales of their blocks."""

SIZES = (0, 1, 2, 3, 7, 31, 32, 33, 64, 127, 255, 257, 1023, 1024, 1025, 2049, 3000)
VIEWS = ("plain", "plain", "offset", "step", "turned", "columns", "expanded", "scalar", "parameter")
OPERATIONS = (
    "moments",
    "pair_moments",
    "mix_",
    "sketch",
    "sketch",
    "absorb_",
    "accumulate_",
    "absorb_sketch_",
    "token_moments",
)
WRONG = ("integers", "complex", "text", "sparse", "lists", "out", "scale")


@dataclass(frozen=True)
class Tensors:
    """One tensor: ``numel`` elements or about as many, of a dtype, behind a view, around a size; some not finite."""

    numel: int
    dtype: str = "float32"
    view: str = "plain"
    seed: int = 0
    size: float = 1.0
    poison: str | None = None

    def make(self, *, seed: int = 0) -> Tensor:
        """The tensor; other numbers of the same kind for another ``seed``."""
        generator = torch.Generator().manual_seed(1000 * seed + self.seed)
        dtype = getattr(torch, self.dtype)
        draw = lambda *shape: (torch.randn(*shape, generator=generator, dtype=torch.float64) * self.size).to(dtype)
        n = self.numel
        side = max(1, int(n**0.5))
        made = {
            "plain": lambda: draw(n),
            "parameter": lambda: torch.nn.Parameter(draw(n)),
            "offset": lambda: draw(n + 3)[1 + n % 3 : 1 + n % 3 + n],
            "step": lambda: draw(2 * n)[::2],
            "turned": lambda: draw(side, side + 1).t(),
            "columns": lambda: draw(side, side + 7)[:, 2 : 2 + side],
            "expanded": lambda: draw(side, 1).expand(side, 5),
            "scalar": lambda: draw(()),
        }[self.view]()
        if self.poison and made.numel() and self.view != "expanded":
            made = made.detach()
            made[(0,) * made.dim()] = float(self.poison)
        return made

    def scales(self, made: Tensor) -> Tensor | None:
        """Scales of the blocks of what :meth:`make` gave; None where it can have none."""
        whole = made.dim() == 1 or (made.dim() > 1 and made.shape[-1] % 32 == 0)
        if self.dtype not in EIGHT_BITS or not whole:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        shape = (*made.shape[:-1], -(-made.shape[-1] // 32))
        found = torch.randint(117, 138, shape, generator=generator, dtype=torch.uint8)
        if self.poison and self.seed % 3 == 0:
            found[..., -1:] = 255
        return found


@dataclass(frozen=True)
class Call:
    """One call of an operation.

    Attributes:
        tensors: the list. options: of the call, by the operation. wrong: what makes the call one that must be refused.
    """

    operation: str
    tensors: tuple[Tensors, ...]
    options: dict = field(default_factory=dict)
    wrong: str | None = None


def drawn(seed: int, number: int) -> Call:
    """The call of a number: the same for the same ``seed``."""
    r = random.Random(f"kernels/{seed}/{number}")
    rare = lambda share: r.random() < share
    operation = r.choice(OPERATIONS)
    count = r.choice((0, 1, 1, 2, 3, 5, 12))
    dtypes = DTYPES + EIGHT_BITS if operation in ONE_LIST else DTYPES
    same, ill = r.choice(dtypes), rare(0.1)
    tensors = tuple(
        Tensors(
            numel=r.choice(SIZES),
            dtype=same if rare(0.6) else r.choice(dtypes),
            view=r.choice(VIEWS),
            seed=r.randrange(100),
            size=r.choice((1.0, 1.0, 2.0**-6, 64.0)),
            poison=r.choice(("nan", "inf", "-inf")) if ill and rare(0.3) else None,
        )
        for _ in range(count)
    )
    options: dict = {}
    if operation in ("moments", "pair_moments"):
        options = {"per_tensor": rare(0.4)}
    elif operation == "mix_":
        options = {"mu": r.choice((0.0, 1.0, 0.3, r.random())), "tensor": rare(0.5), "moments": rare(0.5)}
    elif operation == "sketch":
        options = {
            "layout": r.choice((None, "own", "own", "pieces")),
            "rows": r.choice((1, 1, 2, 7)),
            "lanes": r.choice((1024, 1024, 32, 96)),
            "seed": r.choice((0, 1, 2**31 + 5)),
            "scale": r.choice((None, None, 0.37, -3.0)),
            "tensor": rare(0.5),
            "accumulate": rare(0.3),
            "per_tensor": rare(0.3),
            "into": rare(0.3),
            "second": rare(0.3),
            "eps": r.choice((1e-8, 0.25, 1e-4)),
            "out": r.choice(("float32", "float32", "float64")),
        }
    elif operation in ("accumulate_", "absorb_sketch_"):
        options = {
            "layout": r.choice((None, "own", "pieces") if operation == "accumulate_" else ("own", "turned")),
            "rows": 1 if operation == "accumulate_" else r.choice((1, 2, 7)),
            "lanes": r.choice((1024, 1024, 32, 96)),
            "seed": r.choice((0, 1, 2**31 + 5)),
            "scale": r.choice((1.0, 0.37, -3.0)),
            "tensor": rare(0.5),
            "previous": rare(0.5),
            "per_tensor": rare(0.3) and operation == "accumulate_",
            "into": rare(0.3),
            "second": rare(0.3),
            "eps": r.choice((1e-8, 0.25, 1e-4)),
        }
    elif operation == "absorb_":
        one = Tensors(r.choice(SIZES), "float32", r.choice(("plain", "offset")), r.randrange(100))
        options = {"scale": r.choice((1.0, -0.3, 7.5)), "tensor": rare(0.5), "previous": rare(0.7), "into": rare(0.3)}
        tensors = (one, replace(one, seed=one.seed + 1), replace(one, seed=one.seed + 2))
    else:
        options = {
            "rows": r.choice((0, 1, 3, 5)),
            "length": r.choice((0, 1, 7, 33, 513)),
            "mask": r.choice(("bool", "int64", "float32", "bfloat16")),
            "advantages": r.choice(("rows", "tokens", "column")),
            "strided": rare(0.3),
        }
        tensors = (Tensors(1, same, seed=r.randrange(100)),)
    if operation in ONE_LIST:
        options["scales"] = rare(0.4) and not options.get("second")
    wrong = r.choice(WRONG) if rare(0.08) and tensors and operation in ("moments", "pair_moments", "sketch") else None
    return Call(operation, tensors, options, wrong)
