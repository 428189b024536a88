"""Small models of every kind, and the losses of their passes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TOKENS, WIDTH = 7, 4
CHOICES = 3
"""Experts, of which a pass uses one."""


class Planted(Exception):
    """Somebody else's error in a backward pass."""


class Net(nn.Module):
    """Stages in a row; each takes the hidden numbers and a choice.

    Args:
        stages: in order. ids: whether the input is tokens.
    """

    def __init__(self, *stages: nn.Module, ids: bool = False) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.ids = ids
        self.autocast = False

    def forward(self, seed: int, kind: str | None = None, fails_at: int | None = None) -> Tensor:
        """The outputs of a pass; ``kind`` of checkpointing for all stages but the first, an error at the output of a
        stage when its gradient arrives."""
        generator = torch.Generator().manual_seed(seed)
        if self.ids:
            hidden = torch.randint(0, TOKENS, (3, 2), generator=generator)
        else:
            hidden = torch.randn(3, WIDTH, generator=generator, dtype=torch.float64).to(self.dtype)
        hidden = self.stages[0](hidden, _told(self.stages[0], seed))
        rest = lambda inner: _through(self.stages[1:], inner, seed)
        if kind is not None:
            if not hidden.requires_grad and kind == "reentrant":
                hidden.requires_grad_()
            return checkpoint(rest, hidden, use_reentrant=kind == "reentrant", preserve_rng_state=False)
        for number, stage in enumerate(self.stages):
            hidden = hidden if number == 0 else stage(hidden, _told(stage, seed))
            if number == fails_at and hidden.requires_grad:
                hidden.register_hook(_explode)
        return hidden

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters())


def _through(stages: nn.ModuleList, hidden: Tensor, seed: int) -> Tensor:
    for stage in stages:
        hidden = stage(hidden, _told(stage, seed))
    return hidden


def _told(stage: nn.Module, seed: int) -> int:
    """What a stage is told of the seed: a compiler makes its code anew for every number."""
    return seed % CHOICES if getattr(stage, "chooses", False) else 0


def _explode(gradient: Tensor) -> Tensor:
    raise Planted


class Plain(nn.Module):
    """A module as a stage, with an activation behind it."""

    def __init__(self, inner: nn.Module, activation: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.inner, self.activation = inner, activation

    def forward(self, hidden: Tensor, choice: int) -> Tensor:
        return self.activation(self.inner(hidden))


class Head(nn.Module):
    """Logits by an embedding's own weight."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight

    def forward(self, hidden: Tensor, choice: int) -> Tensor:
        return hidden @ self.weight.T


class Adapter(nn.Module):
    """A frozen layer with a trainable detour of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, hidden: Tensor, choice: int) -> Tensor:
        return torch.tanh(self.base(hidden) + self.b(self.a(hidden)))


class Experts(nn.Module):
    """Layers, of which a pass uses one: the others get no gradient."""

    chooses = True

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(CHOICES))

    def forward(self, hidden: Tensor, choice: int) -> Tensor:
        return torch.tanh(self.experts[choice](hidden))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, hidden: Tensor, choice: int) -> Tensor:
        return self.inner(hidden.view(-1, 1, 2, 2)).flatten(1)[:, :WIDTH]


class Odd(nn.Module):
    """Parameters of no elements, of no dimensions, with odd strides, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.turned = nn.Parameter(torch.randn(WIDTH, WIDTH).t())
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, hidden: Tensor, choice: int) -> Tensor:
        return torch.tanh(hidden @ self.turned) * self.scalar + self.empty.sum()


class Cast(nn.Module):
    """A layer of another dtype than its neighbours."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = inner.to(dtype)

    def forward(self, hidden: Tensor, choice: int) -> Tensor:
        return self.inner(hidden.to(self.inner.weight.dtype)).to(hidden.dtype)


def build(kind: str, dtype: str, seed: int) -> Net:
    """A model of one of ``drawing.MODELS``, or ``large``, whose sketch is lossy; the same for the same seed."""
    return copy.deepcopy(_built(kind, dtype, seed))


@functools.lru_cache(maxsize=1024)
def _built(kind: str, dtype: str, seed: int) -> Net:
    torch.manual_seed(seed)
    linear = lambda: Plain(nn.Linear(WIDTH, WIDTH))
    embedding = nn.Embedding(TOKENS, WIDTH, sparse=kind == "sparse")
    look_up = lambda e: Plain(e, lambda found: found.flatten(0, 1))
    stages: list[nn.Module]
    if kind in ("tied", "sparse"):
        stages = [look_up(embedding), linear(), Head(embedding) if kind == "tied" else linear()]
    elif kind == "large":
        stages = [linear(), Plain(nn.Linear(WIDTH, 14_000)), Plain(nn.Linear(14_000, 1), lambda x: x)]
    elif kind == "frozen":
        stages = [linear().requires_grad_(False), linear(), linear()]
    elif kind == "reused":
        stages = [layer := linear(), linear(), layer]
    else:
        middle = {
            "mlp": linear,
            "norm": lambda: Plain(nn.LayerNorm(WIDTH)),
            "conv": Convolution,
            "adapter": Adapter,
            "experts": Experts,
            "odd": Odd,
            "autocast": linear,
            "mixed": lambda: Cast(nn.Linear(WIDTH, WIDTH), torch.bfloat16),
        }[kind]
        stages = [linear(), middle(), Plain(nn.Linear(WIDTH, 2), lambda x: x)]
    net = Net(*stages, ids=kind in ("tied", "sparse"))
    net.autocast = kind == "autocast"
    return net if kind == "mixed" else net.to(getattr(torch, dtype))


def compile_stages(net: Net, backend: str | None) -> None:
    """Puts every stage into ``torch.compile``; None: none of them. Code that was made before is forgotten."""
    if backend is None:
        return
    torch._dynamo.reset()
    compiled = {stage: torch.compile(stage, backend=backend) for stage in net.stages}
    for number, stage in enumerate(net.stages):
        net.stages[number] = compiled[stage]


def run_backward(losses: list[Tensor], one, parameters: list[nn.Parameter]) -> None:
    """The backward pass, or both, of weighted losses in the style of a pass."""
    if one.style == "twice":
        losses[0].backward(retain_graph=True)
    torch.autograd.backward(
        losses,
        create_graph=one.style == "graph",
        inputs=parameters[::2] if one.style == "inputs" else None,
    )


def losses_of(net: Net, one, *, plain: bool = False) -> list[Tensor]:
    """The loss of a pass, or its two parts."""
    found = [loss_of(net, one, plain=plain)]
    if one.style == "parts":
        found.append(loss_of(net, replace(one, seed=one.seed + 3), plain=plain))
    return found


def mixed_losses(net: Net, one, *, plain: bool = False) -> dict[str, Tensor]:
    """The losses of both branches in a pass over a mixed batch, unweighted."""
    own = {branch: replace(one, branch=branch, seed=one.seed + k) for k, branch in enumerate(("sft", "rl"))}
    return {
        branch: torch.zeros(()) if one.lacks == branch else loss_of(net, own[branch], plain=plain) for branch in own
    }


def loss_of(net: Net, one, *, plain: bool = False) -> Tensor:
    """The loss of a pass, unweighted; ``plain`` leaves out checkpoints and errors."""
    fails_at = one.seed % len(net.stages) if one.fails and not plain else None
    with torch.autocast("cpu", torch.bfloat16, enabled=getattr(net, "autocast", False)):
        outputs = net(one.seed, None if plain else one.checkpoint, fails_at)
    wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return (wide - (1.0 if one.branch == "sft" else -1.0)).square().mean() * one.size


def make_optimizer(kind: str, net: Net) -> torch.optim.Optimizer:
    trainable = [p for p in net.parameters() if p.requires_grad]
    if kind == "adam":
        return torch.optim.Adam(trainable, lr=1e-3, eps=1e-4, betas=(0.9, 0.95))
    return torch.optim.SGD(trainable, lr=1e-2, momentum=0.8 if kind == "momentum" else 0.0)


def warm_up(net: Net, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """So many steps of an optimizer, before anything is patched."""
    for number in range(steps):
        loss_of(net, _WarmUp(number)).backward()
        optimizer.step()
        optimizer.zero_grad()


class _WarmUp:
    branch, size, checkpoint, fails, style = "sft", 1.0, None, None, None

    def __init__(self, seed: int) -> None:
        self.seed = seed
