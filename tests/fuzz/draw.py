"""A draw: everything that one fuzzed run is made of, as data that prints as the Python that makes it again."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

SPREAD = {
    "ddp": ("mlp", "norm", "conv", "tied", "frozen", "adapter", "reused", "mixed", "experts"),
    "fsdp2": ("mlp", "norm", "conv", "tied", "frozen", "adapter", "reused"),
}
"""Models that engines take: FSDP2 wants one dtype, no scalars, and gradients for the same parameters on every rank."""

MODELS = ("mlp", "norm", "conv", "tied", "frozen", "adapter", "experts", "reused", "sparse", "odd", "mixed", "autocast")
DTYPES = ("float32", "bfloat16", "float16", "float64")
LAWS = (
    ("fixed", {"mu": 0.3}),
    ("fixed", {"mu": 0.0}),
    ("fixed", {"mu": 1.0}),
    ("gac", {}),
    ("gac", {"prior": 0.25, "prior_weight": 0.5, "cap": 0.3}),
    ("gac", {"momentum": 0.9, "half_life": 3.0}),
    ("paper", {}),
    ("chord-mu", {"decay": 5}),
    ("sequential", {"split": 1}),
    ("kl-ctrl", {}),
    ("entropy-ctrl", {}),
)
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
        how: ``mixer`` (``mixer.backward``), ``weight`` (``(mixer.weight * loss).backward()``) or ``unweighted``.
        fresh: it gets a ``with`` of its own though the last pass had the same branch.
        tokens: what it counts for. size: factor of its loss.
        checkpoint: ``reentrant`` or ``plain`` activation checkpointing of the middle.
        fails: an error of somebody else in the backward pass, ``caught`` inside the branch, or one that ``leaves`` it.
        style: of a plain backward pass: ``graph`` (``create_graph=True``), ``twice`` over a graph that is kept,
            ``parts`` (two losses in one pass) or ``inputs`` (for every second parameter alone).
        before: what happens before it, inside the branch: ``clip`` or ``clear`` the gradients so far, or ``probe`` by
            ``torch.autograd.grad``.
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
    """

    passes: tuple[Pass, ...]
    before: tuple[str, ...] = ()
    clip: bool = False
    update: bool = True
    clear: str = "none"
    early: bool = False


@dataclass(frozen=True)
class Draw:
    """A model, how it is patched, and the steps of a run.

    Attributes:
        named: how the mixer gets to know the optimizer: as an ``argument`` of ``gac.patch`` (whose steps then end the
            mixer's), by ``follow``, or not (``found`` at its first step).
        warm: steps that the optimizer has taken before the patch.
        engine: ``one`` process, or two ranks under ``ddp`` or ``fsdp2``.
        scale: of the losses, by a scaler; None: there is none.
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

    @property
    def running(self) -> bool:
        """Whether gradients are read as running sums: shards, buffers, and the sketch in one process."""
        return self.engine == "fsdp2" or (self.engine == "one" and (not self.hooks or self.estimator == "sketch"))

    def with_steps(self, steps: tuple[Step, ...]) -> Draw:
        return replace(self, steps=steps)


def ingredients(draw: Draw) -> set[str]:
    """Hazards: what a user must not do, or what may end a step without statistics. Without any, nothing may raise."""
    found = set()
    for number, step in enumerate(draw.steps):
        again = number + 1 < len(draw.steps)
        if step.clear == "missing" and again and draw.running:
            found.add("uncleared")
        if "thaw" in step.before:
            found.add("thaw")
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
    return frozen and ends and told and adam and dense and single and half and passes


def drawn(seed: int, number: int, *, engine: str = "one") -> Draw:
    """The draw of a number: the same for the same ``seed``, whatever was drawn before."""
    r = random.Random(f"{seed}/{number}")
    rare = lambda share: r.random() < share
    model = "large" if rare(0.02) and engine == "one" else r.choice(SPREAD.get(engine, MODELS))
    dtype = r.choices(DTYPES, (5, 2, 1, 2))[0]
    if model in ("sparse", "mixed", "autocast"):
        dtype = "float32"
    law, options = r.choices(LAWS, [5 if not options and law == "gac" else 1 for law, options in LAWS])[0]
    hooks = not rare(0.1) or engine != "one"
    optimizer = "sgd" if dtype == "float16" or model == "sparse" else r.choice(("sgd", "momentum", "adam", "adam"))
    metric = "optimizer" if optimizer == "adam" and rare(0.3) and engine == "one" else "gradient"
    named = r.choice(("argument", "follow", "found", "found"))
    if law in TOLD and named == "argument":
        named = "follow"
    hazard = r.random()
    count = r.choice((1, 1, 2, 2, 3))
    if engine != "one":
        hazard, named = 1.0, "found"
    steps = tuple(_step(r, hazard, model=model, hooks=hooks, named=named, engine=engine) for _ in range(count))
    return Draw(
        steps=steps,
        seed=r.randrange(8),
        model=model,
        dtype=dtype,
        law=law,
        options=dict(options),
        estimator=r.choice(("exact", "sketch", "auto")),
        metric=metric,
        interval=r.choice((1, 1, 1, 2, 3)),
        report_interval=r.choice((1, 2, 10, None)),
        hooks=hooks,
        scale=2.0 ** r.randint(-2, 10) if rare(0.15) else None,
        optimizer=optimizer,
        named=named,
        warm=r.choice((0, 9, 12)) if metric == "optimizer" else 0,
        engine=engine,
    )


def _step(r: random.Random, hazard: float, *, model: str, hooks: bool, named: str, engine: str) -> Step:
    rare = lambda share: r.random() < share
    counts = {branch: r.choice((0, 1, 2, 2, 3, 3)) for branch in ("sft", "rl")}
    if not any(counts.values()):
        counts["sft"] = 2
    order = [branch for branch, count in counts.items() for _ in range(count)]
    if rare(0.5):
        r.shuffle(order)
    told = {branch: rare(0.2) for branch in counts}
    passes = []
    for branch in order:
        fails = before = None
        how = r.choice(("mixer", "weight")) if hooks else "weight"
        if hazard < 0.05 and rare(0.3):
            fails = r.choice(("caught", "leaves"))
        elif 0.05 <= hazard < 0.08:
            how = "unweighted"
        elif 0.08 <= hazard < 0.12 and rare(0.5):
            before = "clear" if model == "sparse" else r.choice(("clip", "clear"))
        elif rare(0.05) and hooks and engine == "one":
            before = "probe"
        checkpoint = r.choice((None,) * 6 + ("plain", "reentrant")) if not fails and engine == "one" else None
        plain = how == "weight" and checkpoint != "reentrant" and hooks and engine == "one" and not fails
        passes.append(
            Pass(
                branch=branch,
                seed=r.randrange(10**6),
                how=how,
                fresh=rare(0.2),
                tokens=float(r.choice((1, 2, 7, 100))) if told[branch] else None,
                size=r.choice((1.0, 1.0, 1.0, 2.0**-6, 64.0, 0.0)),
                checkpoint=checkpoint,
                fails=fails if hooks else None,
                before=before,
                style=r.choice(("graph", "twice", "parts", "inputs")) if plain and rare(0.1) else None,
            )
        )
    kinds = ("repatch", "save", "aside", "watch", *MISUSES, "empty", "loose") if engine == "one" else ()
    events = [kind for kind in kinds if rare(0.04)]
    if kinds and model in ("frozen", "adapter") and rare(0.35):
        events.insert(0, r.choice(("unfreeze", "thaw")))  # before a branch is entered
    clear = r.choice(("none", "none", "zero"))
    if 0.12 <= hazard < 0.15:
        clear = "missing"
    return Step(
        passes=tuple(passes),
        before=tuple(events),
        clip=rare(0.3) and model != "sparse",
        update=named == "argument" or rare(0.8),
        clear=clear,
        early=named != "argument" and rare(0.3),
    )
