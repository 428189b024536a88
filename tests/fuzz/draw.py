"""A draw: everything that one fuzzed run is made of, as data that prints as the Python that makes it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

TOLD = {"kl-ctrl": {"kl": 0.03}, "entropy-ctrl": {"entropy": 1.5}}
"""What a law has to be told in every step."""

MISUSES = (
    "step_again",
    "nested",
    "step_inside",
    "backward_outside",
    "weight_outside",
    "patch_twice",
    "no_tensor",
    "observe",
    "state",
)
"""Calls that must raise and change nothing."""


@dataclass(frozen=True)
class Pass:
    """One backward pass.

    Attributes:
        branch: ``sft`` or ``rl``. seed: of its data.
        how: ``mixer`` (``mixer.backward``), ``weight`` (``(mixer.weight * loss).backward()``), ``unweighted``, or
            ``mixed``: ``mixer.mixed_loss`` of the losses of both branches, outside of them.
        fresh: it gets a ``with`` of its own though the last pass had the same branch.
        tokens: what it counts for. size: factor of its loss.
        checkpoint: ``reentrant`` or ``plain`` activation checkpointing of the middle.
        fails: an error of somebody else in the backward pass, ``caught`` inside the branch, or one that ``leaves`` it.
        style: of a plain backward pass: ``graph`` (``create_graph=True``), ``twice`` over a graph that is kept,
            ``parts`` (two losses in one pass) or ``inputs`` (for every second parameter alone).
        before: what happens before it, inside the branch: ``clip`` or ``clear`` the gradients so far, or ``probe`` by
            ``torch.autograd.grad``.
        rows: sequences that ``mixer.observe_tokens`` is fed with after it; None: it is not called.
        lacks: of a mixed pass, the branch without data, whose loss is a zero without a graph.
        sync: False: under DDP's ``no_sync``.
    """

    branch: str
    seed: int
    how: str = "mixer"
    fresh: bool = False
    tokens: float | None = None
    size: float = 1.0
    checkpoint: str | None = None
    fails: str | None = None
    before: str | None = None
    style: str | None = None
    rows: int | None = None
    lacks: str | None = None
    sync: bool = True


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        passes: in order.
        before: what happens before it: ``repatch``, ``save`` (state to a new mixer), ``aside``, an ``empty`` branch, a
            ``loose`` error in a branch without a pass, ``watch`` (``mixer.repatch()``), ``unfreeze`` (all parameters
            train from now on, and ``mixer.repatch()``), ``thaw`` (the same without a word to gac), or a misuse.
        clip: the gradient's norm at the end. update: the optimizer steps.
        clear: ``none``, ``zero`` (``set_to_none=False``) or ``missing``. early: cleared before ``mixer.step()``.
        threads: passes run in threads of their own: one after another (``turns``), or those of a branch at the same
            time (``together``). inference: ``mixer.step()`` under ``torch.inference_mode()``.
    """

    passes: tuple[Pass, ...]
    before: tuple[str, ...] = ()
    clip: bool = False
    update: bool = True
    clear: str = "none"
    early: bool = False
    threads: str | None = None
    inference: bool = False


@dataclass(frozen=True)
class Draw:
    """A model, how it is patched, and the steps of a run.

    Attributes:
        named: how the mixer gets to know the optimizer: as an ``argument`` of ``gac.patch`` (whose steps then end the
            mixer's), by ``follow``, or not (``found`` at its first step).
        warm: steps that the optimizer has taken before the patch.
        engine: ``one`` process, or two ranks under ``ddp`` or ``fsdp2``.
        scale: of the losses, by a scaler; None: there is none.
        compiled: backend of ``torch.compile`` for every stage of the model; None: it is not compiled.
    """

    steps: tuple[Step, ...]
    seed: int = 0
    model: str = "mlp"
    dtype: str = "float32"
    law: str = "fixed"
    options: dict = field(default_factory=lambda: {"mu": 0.3})
    estimator: str = "exact"
    metric: str = "gradient"
    interval: int = 1
    report_interval: int | None = 10
    hooks: bool = True
    scale: float | None = None
    optimizer: str = "sgd"
    named: str = "found"
    warm: int = 0
    engine: str = "one"
    compiled: str | None = None

    def from_tokens(self, step: Step) -> bool:
        """Whether the coefficient estimator gives the statistics of a step."""
        mixed = any(one.how == "mixed" for one in step.passes)
        return self.estimator == "coefficient" or (self.estimator == "auto" and mixed)

    @property
    def running(self) -> bool:
        """Whether gradients are read as running sums: shards, buffers, and the sketch in one process."""
        return self.engine == "fsdp2" or (self.engine == "one" and (not self.hooks or self.estimator == "sketch"))

    def with_steps(self, steps: tuple[Step, ...]) -> Draw:
        return replace(self, steps=steps)

    def with_passes(self, change: Callable[[Pass], Pass]) -> Draw:
        """The draw with every pass changed."""
        return self.with_steps(tuple(replace(s, passes=tuple(map(change, s.passes))) for s in self.steps))


def ingredients(draw: Draw) -> set[str]:
    """Hazards: what a user must not do, or what may end a step without statistics. Without any, nothing may raise."""
    found = set()
    for number, step in enumerate(draw.steps):
        again = number + 1 < len(draw.steps)
        if step.clear == "missing" and again and draw.running:
            found.add("uncleared")
        if "thaw" in step.before:
            found.add("thaw")
        if draw.estimator == "coefficient" and all(one.rows is None for one in step.passes):
            found.add("no tokens")
        if step.threads == "together" and any(one.how != "mixer" for one in step.passes):
            found.add("plain passes at once")
        for one in step.passes:
            if one.how == "unweighted":
                found.add("unweighted")
            if one.before in ("clip", "clear") and draw.running:
                found.add("changed between passes")
            if one.fails == "caught" and one.how != "mixer":
                found.add("caught error")
            if one.fails:
                found.add("error")
    return found


def is_valid(draw: Draw) -> bool:
    """Whether a draw makes sense: what ends the mixer's steps steps, and every part can do what it is asked for."""
    ends = draw.named != "argument" or all(step.update and not step.early for step in draw.steps)
    told = draw.law not in TOLD or draw.named != "argument"
    adam = draw.optimizer == "adam" or draw.metric == "gradient"
    dense = draw.model != "sparse" or (draw.optimizer == "sgd" and not any(step.clip for step in draw.steps))
    single = draw.model not in ("sparse", "mixed", "autocast") or draw.dtype == "float32"
    half = draw.dtype != "float16" or draw.optimizer == "sgd"
    passes = all(step.passes for step in draw.steps) and all(
        one.style is None or (one.how == "weight" and draw.hooks and one.checkpoint != "reentrant")
        for step in draw.steps
        for one in step.passes
    )
    frozen = draw.model in ("frozen", "adapter") or not any({"thaw", "unfreeze"} & {*s.before} for s in draw.steps)
    return frozen and ends and told and adam and dense and single and half and passes and _further_parts_fit(draw)


def _further_parts_fit(draw: Draw) -> bool:
    every = [one for step in draw.steps for one in step.passes]
    mixes = draw.estimator == "coefficient" or any(one.how == "mixed" or one.rows is not None for one in every)
    mixed = not mixes or (
        draw.hooks
        and draw.metric == "gradient"
        and not any("thaw" in step.before for step in draw.steps)
        and all(one.how != "mixed" or (one.fails, one.style, one.tokens) == (None, None, None) for one in every)
    )
    # DDP that looks for unused parameters takes one forward pass before each backward pass
    mixed = mixed and not (draw.engine == "ddp" and draw.model == "experts" and any(p.how == "mixed" for p in every))
    threads = all(
        step.threads is None
        or (
            (draw.hooks and all(p.fails is None and p.how != "mixed" for p in step.passes))
            and (step.threads == "turns" or all(_fits_together(p) for p in step.passes))
        )
        for step in draw.steps
    )
    inference = draw.named != "argument" or not any(step.inference for step in draw.steps)
    kept = ("graph", "twice")  # torch.compile's own limits
    told = all(
        len({p.tokens is None for p in step.passes if p.branch == branch and p.how != "mixed"}) < 2
        for step in draw.steps
        for branch in ("sft", "rl")
    )
    compiled = draw.compiled is None or all(one.style not in kept for one in every)
    return mixed and threads and told and inference and compiled


def _fits_together(one: Pass) -> bool:
    plain = (one.before, one.style) == (None, None) and (one.tokens is None or one.how == "mixer")
    return plain and one.how in ("mixer", "weight")
