"""The draw of a number, from random numbers that follow from it and the seed."""

from __future__ import annotations

import random
from dataclasses import replace

from tests.fuzz.draw import MISUSES, TOLD, Draw, Pass, Step, is_valid

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
    draw = Draw(
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
    return extended(draw, random.Random(f"{seed}/{number}/further"))


def extended(draw: Draw, r: random.Random) -> Draw:
    """The draw with parts that are drawn from numbers of their own, so that the rest of it is as it was."""
    rare = lambda share: r.random() < share
    for share, change in ((0.015, _compiled), (0.08, _mixed), (0.08, _threaded), (0.08, _inferring), (0.5, _unsynced)):
        if rare(share):
            changed = change(draw, r)
            draw = changed if is_valid(changed) else draw
    return draw


def _compiled(draw: Draw, r: random.Random) -> Draw:
    return replace(draw, compiled=r.choice(("eager", "aot_eager"))) if draw.engine == "one" else draw


def _mixed(draw: Draw, r: random.Random) -> Draw:
    """Some passes over mixed batches, or all, and tokens told with some."""
    if draw.engine == "fsdp2":
        return draw
    whole, fed = r.choice((0.0, 0.5, 1.0, 1.0)), r.choice((0.0, 0.7, 0.7, 1.0))

    def change(one: Pass) -> Pass:
        rows = r.choice((0, 1, 3, 6)) if r.random() < fed else None
        if r.random() >= whole:
            return replace(one, rows=rows)
        lacks = r.choice((None, None, None, "sft", "rl"))
        return replace(one, how="mixed", rows=rows, lacks=lacks, tokens=None, fails=None, style=None)

    changed = draw.with_passes(change)
    estimators = (draw.estimator, "auto", "auto", "coefficient")
    return replace(changed, estimator=r.choice(estimators), hooks=True, metric="gradient", warm=0)


def _threaded(draw: Draw, r: random.Random) -> Draw:
    if draw.engine != "one":
        return draw
    kind = r.choice(("turns", "together"))

    def together(one: Pass) -> Pass:
        how = chosen or r.choice(("mixer", "weight"))
        tokens = one.tokens if chosen == "mixer" else None
        return replace(one, fails=None, before=None, style=None, fresh=False, how=how, tokens=tokens)

    chosen = r.choice(("mixer", "mixer", "mixer", "weight", None))
    changed = draw.with_passes(together if kind == "together" else lambda one: replace(one, fails=None))
    order = (lambda one: one.branch) if kind == "together" else (lambda one: 0)  # a branch at a time
    steps = (replace(s, threads=kind, passes=tuple(sorted(s.passes, key=order))) for s in changed.steps)
    return changed.with_steps(tuple(steps))


def _inferring(draw: Draw, r: random.Random) -> Draw:
    return draw.with_steps(tuple(replace(step, inference=r.random() < 0.7) for step in draw.steps))


def _unsynced(draw: Draw, r: random.Random) -> Draw:
    """Gradients stay on the ranks in all passes of a step but the last, or in some."""
    if draw.engine != "ddp":
        return draw
    share = r.choice((0.5, 1.0))
    steps = []
    for step in draw.steps:
        *first, last = step.passes
        steps.append(replace(step, passes=(*(replace(p, sync=r.random() >= share) for p in first), last)))
    return draw.with_steps(tuple(steps))


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
