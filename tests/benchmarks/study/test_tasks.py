import dataclasses
import itertools
import re
import string

import pytest
from reasoning_gym.arithmetic.leg_counting import ANIMALS

from benchmarks.study.tasks import (
    DEMONSTRATION_POOL,
    HELDOUT,
    PROMPTS,
    TASKS,
    distinct_problems,
    render_angles,
    render_animals,
    render_conversion,
    render_equation,
    render_expression,
    render_statements,
    render_sudoku,
    render_word,
    task_data,
)

DOMAINS = ("math", "code", "science", "logic")
SPLITS = ("heldout", "demonstrations", "prompts")


def test_every_domain_has_a_task_of_each_role():
    found = sorted((task.domain, task.role) for task in TASKS.values())
    assert found == sorted((domain, role) for domain in DOMAINS for role in ("development", "confirmation"))
    for name, task in TASKS.items():
        assert name == task.name
        assert set(task.warm_start_steps) == {"small", "medium", "large"}
        assert all(steps > 0 for steps in task.warm_start_steps.values())


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_compact_and_share_nothing_that_they_should_not(name):
    data = task_data(name, seed=3)
    assert [len(getattr(data, split)) for split in SPLITS] == [HELDOUT, DEMONSTRATION_POOL, PROMPTS]
    rows = [*data.heldout, *data.prompts]
    assert len({row["prompt"] for row in rows}) == HELDOUT + PROMPTS
    assert all(row["completion"] == row["answer"] != "" for row in rows)
    assert max(len(row["prompt"]) for row in rows) <= 40
    assert max(len(row["answer"]) for row in rows) <= 16
    assert [row["demonstrated"] for row in data.prompts] == [True] * DEMONSTRATION_POOL + [False] * (
        PROMPTS - DEMONSTRATION_POOL
    )
    assert [row | {"demonstrated": True} for row in data.demonstrations] == data.prompts[:DEMONSTRATION_POOL]
    most_frequent = max(map([row["answer"] for row in rows].count, {row["answer"] for row in rows}))
    assert most_frequent < 0.2 * len(rows)


def test_the_seed_decides_the_data():
    first, again, other = task_data("chain_sum", 0), task_data("chain_sum", 0), task_data("chain_sum", 1)
    assert first == again
    assert all(getattr(first, split) != getattr(other, split) for split in SPLITS)


@pytest.mark.parametrize(
    ("render", "metadata", "prompt"),
    [
        (render_expression, {"expression": "4 - 1 + 7"}, "4-1+7="),
        (render_equation, {"equation": "61 - 8*e = -3", "variable": "e"}, "61-8*x=-3:"),
        (render_word, {"word": "leally"}, "leally="),
        (render_conversion, {"source_repr": "1a", "source_base": 16, "target_base": 2}, "1a:16>2="),
        (render_animals, {"animals": {"spider": 3, "sea slug": 1}}, "3 spider+1 sea slug="),
        (render_angles, {"known_angles": [90.0, 85.0, 92.0]}, "90,85,92="),
    ],
)
def test_prompts_by_hand(render, metadata, prompt):
    assert render({"metadata": metadata, "answer": "42"}) == (prompt, "42")


def test_a_sudoku_asks_for_the_empty_cells_in_reading_order():
    puzzle = [[3, 0, 2, 4], [2, 4, 3, 1], [4, 3, 1, 0], [0, 2, 4, 3]]
    solution = [[3, 1, 2, 4], [2, 4, 3, 1], [4, 3, 1, 2], [1, 2, 4, 3]]
    entry = {"metadata": {"puzzle": puzzle, "solution": solution}, "answer": "3 1 2 4\n..."}
    assert render_sudoku(entry) == ("3_242431431__243=", "121")


def test_statements_by_hand():
    a, not_b, c = ("telling-truth", 0), ("lying", 1), ("telling-truth", 2)
    statements = (("not", not_b), ("and", a, ("or", not_b, c)), ("<=>", c, ("not", ("->", a, c))))
    entry = {"metadata": {"statements": statements, "solution": (True, False, True)}, "answer": ""}
    assert render_statements(entry) == ("!-B;A&(-B|C);C~(!(A>C))=", "TFT")


def test_clear_errors():
    with pytest.raises(ValueError, match="unknown task 'addition' of the study; known tasks: chain_sum, "):
        task_data("addition", 0)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        task_data("chain_sum", -1)
    few = dataclasses.replace(TASKS["chain_sum"], parameters={"max_terms": 2, "max_digits": 1})
    with pytest.raises(ValueError, match="chain_sum: 200 distinct prompts in 6000 draws, 300 are needed"):
        distinct_problems(few, 300, 0)
    lossy = dataclasses.replace(TASKS["chain_sum"], render=lambda entry: ("=", entry["answer"]))
    with pytest.raises(ValueError, match="prompt '=' has two answers"):
        distinct_problems(lossy, 300, 0)


@pytest.mark.parametrize("name", TASKS)
def test_the_prompt_alone_decides_the_answer(name):
    for prompt, answer in distinct_problems(TASKS[name], 150, 7):
        assert SOLVERS[name](prompt[:-1]) == [answer], prompt


def _equation(text):
    return [str(x) for x in range(1, 11) if eval(text.replace("=", "=="), {"x": x})]


def _conversion(text):
    number, _, bases = text.partition(":")
    source, target = map(int, bases.split(">"))
    value, digits = int(number, source), ""
    while value or not digits:
        value, digit = divmod(value, target)
        digits = string.hexdigits[digit] + digits
    return [digits]


def _animals(text):
    pairs = (part.split(" ", 1) for part in text.split("+"))
    return [str(sum(int(count) * ANIMALS[animal] for count, animal in pairs))]


def _sudoku(text):
    found = []
    for numbers in itertools.product("1234", repeat=text.count("_")):
        left = iter(numbers)
        grid = [cell if cell != "_" else next(left) for cell in text]
        lines = [[4 * i + j for j in range(4)] for i in range(4)] + [[4 * j + i for j in range(4)] for i in range(4)]
        boxes = [[corner, corner + 1, corner + 4, corner + 5] for corner in (0, 2, 8, 10)]
        if all(len({grid[cell] for cell in unit}) == 4 for unit in lines + boxes):
            found.append("".join(numbers))
    return found


def _statements(text):
    found = []
    for truth in itertools.product((True, False), repeat=text.count(";") + 1):
        names = dict(zip("ABC", truth, strict=True))
        if all(truth[i] == _holds(part, names) for i, part in enumerate(text.split(";"))):
            found.append("".join("FT"[value] for value in truth))
    return found


def _holds(text, names):
    """Python's comparison ``<=`` of truth values is the implication; its operators bind in another order, hence the
    brackets around every part."""
    python = re.sub(r"-([A-C])", r"(not \1)", text)
    python = re.sub(r"!(\((?:[^()]|\([^()]*\))*\)|[A-C])", r"(not \1)", python)
    for sign, word in (("&", " and "), ("|", " or "), (">", " <= "), ("~", " == ")):
        python = python.replace(sign, word)
    return bool(eval(python, dict(names)))


SOLVERS = {
    "chain_sum": lambda text: [str(eval(text))],
    "simple_equations": _equation,
    "spell_backward": lambda text: [text[::-1]],
    "base_conversion": _conversion,
    "leg_counting": _animals,
    "simple_geometry": lambda text: [str(360 - sum(map(int, text.split(","))))],
    "mini_sudoku": _sudoku,
    "knights_knaves": _statements,
}
"""All answers that fit a prompt without its last character."""
