"""Records of runs that never happened, with effects that a test sets."""

import math
import random
from typing import Any

DEVELOPMENT = {"chain_sum": "math", "rotate": "code", "legs": "science", "syllogism": "logic"}
CONFIRMATION = {"products": "math", "ciphers": "code", "angles": "science", "knights": "logic"}
CONSTANTS = tuple(f"mu={mu}" for mu in (0.1, 0.3, 0.5, 0.7, 0.9))
SPLITS = tuple(f"split={split}" for split in (0, 30, 60, 90, 120))
RULES = ("paper", "chord-mu", "chord-phi", "hpt", "srft", "luffy", "relift", "kl-ctrl", "entropy-ctrl")
FORMS = (
    "exact",
    "sketch",
    "temporal",
    "coefficient",
    "no-average",
    "with-prior",
    "no-cap",
    "no-disagreement",
    "no-noise",
)
PER_PROMPT = ("hpt", "srft", "luffy", "relift")


def record(phase="comparison", task="chain_sum", method="gac", setting="", seed=1, **changes: Any) -> dict[str, Any]:
    """One record; `level` is the gain in accuracy from the warm start to the end, `size` and `lr` as in a row."""
    level, size, lr = changes.pop("level", 0.2), changes.pop("size", "small"), changes.pop("lr", 0.001)
    name = f"{method}:{setting}" if setting else method
    shared = random.Random(f"{task}/{size}/{seed}")
    own = random.Random(f"{phase}/{task}/{size}/{name}/{lr}/{seed}")
    warm = round(0.3 + 0.1 * shared.random(), 4)
    level += shared.gauss(0, 0.02) + own.gauss(0, 0.015)
    steps = range(0, 121, 20)
    rise = [warm + level * (1 - math.exp(-step / 40)) + (own.gauss(0, 0.01) if step else 0) for step in steps]
    mu = [_mu(method, setting, step, own) for step in range(120)]
    default = {"fixed": "mu=0.5", "sequential": "split=60"}.get(method)
    drift = (0.3 if method == "gac" else 0.5) * math.exp(own.gauss(0, 0.1))
    every = range(5, 121, 5)
    made = {
        "key": f"{phase}/{task}/{size}/{name}/lr{lr:g}/seed{seed}",
        "phase": phase,
        "task": task,
        "domain": (DEVELOPMENT | CONFIRMATION).get(task, "math"),
        "role": "confirmation" if task in CONFIRMATION else "development",
        "size": size,
        "method": method,
        "setting": setting,
        "lr": lr,
        "seed": seed,
        "law": name if setting or default is None else f"{method}:{default}",
        "estimator": "exact",
        "metric": "gradient",
        "parameters": {"small": 303_000, "medium": 1_300_000, "large": 4_900_000}[size],
        "steps": 120,
        "accuracy": [[step, round(min(max(value, 0.0), 1.0), 4)] for step, value in zip(steps, rise, strict=True)],
        "kl": [[step, drift * step / 120] for step in steps],
        "mu": mu,
        "reward": [[step, 0.3] for step in range(10, 121, 10)],
        "statistics": {
            "step": list(every),
            "sigma_s2": [2.0 * math.exp(-step / 80 + own.gauss(0, 0.2)) for step in every],
            "sigma_r2": [1.0 * math.exp(own.gauss(0, 0.2)) for step in every],
            "delta_g2": [0.3 + own.gauss(0, 0.3) for _ in every],
        },
        "seconds": 20.0,
        "seconds_per_step": 0.15 * math.exp(own.gauss(0, 0.02)),
        "gac_share": 0.03,
        "rollouts": 7680,
        "tokens": 123456,
        "versions": {"torch": "2.13.0", "cpu": "A processor", "cores": 2, "threads": 1},
        "command": "python -m benchmarks.study row KEY",
    }
    return made | changes


def _mu(method: str, setting: str, step: int, noise: random.Random) -> float | None:
    if method in PER_PROMPT:
        return None
    if method == "fixed":
        return float((setting or "mu=0.5").partition(";")[0][3:])
    if method == "sequential":
        return float(step < int((setting or "split=60")[6:]))
    return round(min(max(0.4 + 0.3 * step / 120 + noise.gauss(0, 0.01), 0.05), 0.95), 4)


def constant_level(setting: str, task: str) -> float:
    """A hill over mu whose top is at another mu in every task."""
    best = {"chain_sum": 0.3, "rotate": 0.5, "legs": 0.7, "syllogism": 0.9}.get(task, 0.5)
    return 0.2 - 0.3 * (float(setting[3:]) - best) ** 2


def comparison(phase="comparison", tasks=DEVELOPMENT, seeds=range(1, 6), gac=0.2, rule=0.15, **more: Any) -> list[dict]:
    """A whole half: ``gac`` gains `gac`, rules gain `rule`, constants a hill, splits 0.17 at best."""
    found = []
    for seed in seeds:
        for task in tasks:
            cell = {"phase": phase, "task": task, "seed": seed} | more
            found.append(record(level=gac, **cell))
            found.append(record(setting="momentum=0", level=gac - 0.01, **cell))
            found += [record(method="fixed", setting=s, level=constant_level(s, task), **cell) for s in CONSTANTS]
            found += [
                record(method="sequential", setting=s, level=0.17 - abs(int(s[6:]) - 60) / 600, **cell) for s in SPLITS
            ]
            found += [record(method=name, level=rule + 0.005 * i, **cell) for i, name in enumerate(RULES)]
    return found


def tuning() -> list[dict]:
    """Three learning rates at each method's default, four settings more at the best of them."""
    found = []
    for task in DEVELOPMENT:
        for method in ("gac", "fixed", "sequential", *RULES):
            for lr, level in ((3e-4, 0.1), (1e-3, 0.2), (3e-3, 0.15)):
                found.append(record("tuning", task, method, "", 100, lr=lr, level=level))
        for setting in CONSTANTS:
            if setting != "mu=0.5":
                found.append(record("tuning", task, "fixed", setting, 100, level=constant_level(setting, task)))
        for setting in ("split=30", "split=90"):
            found.append(record("tuning", task, "sequential", setting, 100, level=0.12))
    return found


def everything(gac=0.2, coefficient=0.12, confirmation_gac=None) -> list[dict]:
    """All phases."""
    found = tuning() + comparison(gac=gac)
    found += comparison("confirmation", CONFIRMATION, gac=gac if confirmation_gac is None else confirmation_gac)
    for seed in range(1, 6):
        for task in DEVELOPMENT:
            for form in FORMS:
                level = {"coefficient": coefficient, "no-average": gac - 0.01}.get(form, gac)
                found.append(record("ablation", task, "gac", form, seed, level=level))
            for i, name in enumerate(RULES):
                if name in PER_PROMPT:
                    cell = {"phase": "exposure", "task": task, "method": name, "setting": "every-prompt", "seed": seed}
                    found.append(record(level=0.19 + 0.005 * i, law=name, **cell))
            first = ("gac", "momentum=0;", gac - 0.03)
            for name, setting, level in (("gac", "", gac), first, ("fixed", "mu=0.5;", constant_level("mu=0.5", task))):
                law = f"{name}:{setting}".strip(":;")
                cell = {"phase": "exposure", "task": task, "method": name, "setting": f"{setting}every-prompt"}
                found.append(record(level=level, seed=seed, law=law, **cell))
            for size in ("medium", "large"):
                cell = {"phase": "size", "task": task, "seed": seed, "size": size}
                if seed == 1:
                    found.append(record("rates", task, seed=100, size=size))
                found.append(record(level=gac + 0.02 * (size == "large"), **cell))
                found.append(record(method="paper", level=0.15, **cell))
                found.append(record(method="sequential", setting="split=60", level=0.17, **cell))
                found += [
                    record(method="fixed", setting=s, level=constant_level(s, task), **cell) for s in CONSTANTS[::2]
                ]
        for task in CONFIRMATION:
            for name, setting, level in (
                ("gac", "", gac),
                ("gac", "momentum=0;", gac - 0.03),
                ("fixed", "mu=0.5;", 0.2),
            ):
                cell = {"phase": "exposure", "task": task, "method": name, "setting": f"{setting}every-prompt"}
                law = f"{name}:{setting}".strip(":;")
                found.append(record(level=level, seed=seed, law=law, **cell))
    return found
