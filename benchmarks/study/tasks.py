"""The eight data sets of the study: difficulty, compact prompts, disjoint splits.

Four domains, each with a task that the methods were developed and tuned on ("development") and one that is kept for
the final comparison ("confirmation"). All come from reasoning-gym. It has no set of physics or chemistry: "science"
here means facts about the world, or of geometry, that must be known before anything is computed (how many legs a
lobster has, what the angles of a quadrangle add up to). "code" means procedures on strings and representations.

A prompt is a question in its shortest exact form, because the models of the study are small and read characters. Each
ends with ``=`` or ``:``; the completion is the answer. `task_data` stops with an error if it ever draws one prompt
with two answers. In `mini_sudoku` the puzzles of the splits differ, but there are only 288 solved grids, so a grid may
occur in several puzzles.
`benchmarks.study.calibration` measures their warm starts.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

HELDOUT = 512
DEMONSTRATION_POOL = 400
PROMPTS = 1200
"""Problems of each split; the first `DEMONSTRATION_POOL` of the prompts are the demonstrations' problems."""

_SEED_STRIDE = 100_000_007
"""Generators use seed + index for an item, so consecutive seeds must lie further apart than any index."""
_DRAWS_PER_PROBLEM = 20
"""Draws for a wanted distinct problem before giving up."""


@dataclasses.dataclass(frozen=True)
class StudyTask:
    """One data set.

    Attributes:
        name: its name in the study.
        domain: "math", "code", "science" or "logic".
        role: "development" or "confirmation".
        source: the name of the reasoning-gym data set.
        parameters: the fields of its configuration that set the difficulty.
        render: ``(prompt, answer)`` of an entry.
        warm_start_steps: optimizer steps of the warm start of each model size.
    """

    name: str
    domain: str
    role: str
    source: str
    parameters: dict[str, Any]
    render: Callable[[dict[str, Any]], tuple[str, str]]
    warm_start_steps: dict[str, int]


@dataclasses.dataclass(frozen=True)
class TaskData:
    """Rows with ``prompt``, ``completion`` and ``answer`` (the last two are equal); prompts also say ``demonstrated``.

    `demonstrations` are the problems of the first rows of `prompts`; `heldout` shares no prompt with either.
    """

    heldout: list[dict[str, Any]]
    demonstrations: list[dict[str, Any]]
    prompts: list[dict[str, Any]]


def task_data(name: str, seed: int) -> TaskData:
    """The splits of a task; the same seed gives the same rows on every machine.

    Raises:
        ValueError: `name` is no task of the study.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r} of the study; known tasks: {', '.join(TASKS)}")
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    rows = [
        {"prompt": prompt, "completion": answer, "answer": answer}
        for prompt, answer in distinct_problems(TASKS[name], HELDOUT + PROMPTS, seed)
    ]
    heldout, prompts = rows[:HELDOUT], rows[HELDOUT:]
    return TaskData(
        heldout=heldout,
        demonstrations=[dict(row) for row in prompts[:DEMONSTRATION_POOL]],
        prompts=[row | {"demonstrated": index < DEMONSTRATION_POOL} for index, row in enumerate(prompts)],
    )


def distinct_problems(task: StudyTask, count: int, seed: int) -> list[tuple[str, str]]:
    """`count` pairs ``(prompt, answer)`` of different prompts, in the order of the generator.

    Raises:
        ValueError: a prompt came with two answers, or there are fewer distinct prompts.
    """
    import reasoning_gym

    draws = _DRAWS_PER_PROBLEM * count
    entries = reasoning_gym.create_dataset(task.source, seed=seed * _SEED_STRIDE, size=draws, **task.parameters)
    found: dict[str, str] = {}
    for index in range(draws):
        if len(found) == count:
            break
        prompt, answer = task.render(entries[index])
        if found.setdefault(prompt, answer) != answer:
            raise ValueError(f"task {task.name}: prompt {prompt!r} has two answers, {found[prompt]!r} and {answer!r}")
    if len(found) < count:
        raise ValueError(f"task {task.name}: {len(found)} distinct prompts in {draws} draws, {count} are needed")
    return list(found.items())


def render_expression(entry: dict[str, Any]) -> tuple[str, str]:
    """``4-1+7=`` from ``4 - 1 + 7``."""
    return entry["metadata"]["expression"].replace(" ", "") + "=", entry["answer"]


def render_equation(entry: dict[str, Any]) -> tuple[str, str]:
    """``8*x+5=61:``; the answer is x. The unknown is called x whatever its letter was."""
    facts = entry["metadata"]
    return facts["equation"].replace(" ", "").replace(facts["variable"], "x") + ":", entry["answer"]


def render_word(entry: dict[str, Any]) -> tuple[str, str]:
    """``word=``; the answer ``drow``."""
    return entry["metadata"]["word"] + "=", entry["answer"]


def render_conversion(entry: dict[str, Any]) -> tuple[str, str]:
    """``1a:16>2=`` for 1a of base 16 written in base 2; the answer ``11010``."""
    facts = entry["metadata"]
    return f"{facts['source_repr']}:{facts['source_base']}>{facts['target_base']}=", entry["answer"]


def render_animals(entry: dict[str, Any]) -> tuple[str, str]:
    """``3 spider+1 duck=``; the answer ``26``."""
    return "+".join(f"{count} {animal}" for animal, count in entry["metadata"]["animals"].items()) + "=", entry[
        "answer"
    ]


def render_angles(entry: dict[str, Any]) -> tuple[str, str]:
    """``90,85,92=`` for the known angles of a polygon, all but one; the answer is the missing one."""
    return ",".join(f"{angle:g}" for angle in entry["metadata"]["known_angles"]) + "=", entry["answer"]


def render_sudoku(entry: dict[str, Any]) -> tuple[str, str]:
    """The 16 cells row by row, ``_`` for an empty one; the answer is the empty cells' numbers in the same order."""
    puzzle, solution = ([cell for row in entry["metadata"][part] for cell in row] for part in ("puzzle", "solution"))
    prompt = "".join(str(cell) if cell else "_" for cell in puzzle)
    return prompt + "=", "".join(str(right) for cell, right in zip(puzzle, solution, strict=True) if not cell)


def render_statements(entry: dict[str, Any]) -> tuple[str, str]:
    """What A, B, C say, in this order, as ``-B;A>C;A&B=``; the answer ``TFT`` says who tells the truth.

    ``A``: A tells the truth, ``-A``: A lies; ``!`` not, ``&`` and, ``|`` or, ``>`` implies, ``~`` if and only if.
    """
    statements = ";".join(_formula(statement) for statement in entry["metadata"]["statements"])
    return statements + "=", "".join("T" if truthful else "F" for truthful in entry["metadata"]["solution"])


_SIGNS = {"and": "&", "or": "|", "->": ">", "<=>": "~"}


def _formula(statement: tuple[Any, ...]) -> str:
    kind, *parts = statement
    if kind in ("telling-truth", "lying"):
        return ("-" if kind == "lying" else "") + chr(ord("A") + parts[0])
    inner = [_formula(part) for part in parts]
    inner = [text if len(text) <= 2 else f"({text})" for text in inner]  # "-A" and "!A" need no brackets
    return "!" + inner[0] if kind == "not" else _SIGNS[kind].join(inner)


def _steps(small: int, medium: int, large: int) -> dict[str, int]:
    return {"small": small, "medium": medium, "large": large}


TASKS: dict[str, StudyTask] = {
    task.name: task
    for task in (
        StudyTask(
            "chain_sum", "math", "development", "chain_sum",
            {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1},
            render_expression, _steps(250, 200, 150),
        ),
        StudyTask(
            "simple_equations", "math", "confirmation", "simple_equations",
            {
                "min_terms": 2, "max_terms": 2, "min_value": 1, "max_value": 10,
                "operators": ("+", "-", "*"), "operators_weights": [0.5, 0.5, 0.0],  # "*" only for the factor of x
            },
            render_equation, _steps(220, 220, 170),
        ),
        StudyTask(
            "spell_backward", "code", "development", "spell_backward",
            {"min_word_len": 3, "max_word_len": 6},
            render_word, _steps(200, 150, 90),
        ),
        StudyTask(
            "base_conversion", "code", "confirmation", "base_conversion",
            {"min_base": 2, "max_base": 16, "min_value": 1, "max_value": 15},  # 0 would be written as nothing
            render_conversion, _steps(130, 90, 60),
        ),
        StudyTask(
            "leg_counting", "science", "development", "leg_counting",
            {"min_animals": 2, "max_animals": 2, "min_instances": 1, "max_instances": 3},
            render_animals, _steps(200, 100, 90),
        ),
        StudyTask(
            "simple_geometry", "science", "confirmation", "simple_geometry",
            {"min_sides": 4, "max_sides": 4, "min_angle": 84, "max_angle": 96},
            render_angles, _steps(180, 140, 120),
        ),
        StudyTask(
            "mini_sudoku", "logic", "development", "mini_sudoku",
            {"min_empty": 3, "max_empty": 5},
            render_sudoku, _steps(160, 80, 50),
        ),
        StudyTask(
            "knights_knaves", "logic", "confirmation", "knights_knaves",
            {"n_people": 3, "depth_constraint": 2, "width_constraint": 2},
            render_statements, _steps(180, 100, 80),
        ),
    )
}  # fmt: skip
"""The data sets by their names in the study, development before confirmation in each domain."""
