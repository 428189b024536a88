"""Problems from reasoning-gym: task names with parameters, disjoint splits, compact prompts, exact-match reward."""

import ast
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from gac.tasks.chat import chat_match, chat_rows

_DRAWS_PER_PROBLEM = 20
"""How many draws from the generator are made per wanted distinct question before giving up."""
_SEED_STRIDE = 100_000_007
"""Generators use seed + index for an item, so consecutive run seeds must lie further apart than any index."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A reasoning-gym dataset name with the parameters of its configuration."""

    name: str
    parameters: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.parameters)
        return f"{self.name}:{options}" if options else self.name


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question: the text given to the model, the expected answer, and where it came from."""

    prompt: str
    answer: str
    question: str
    task: str


@dataclasses.dataclass(frozen=True)
class Splits:
    """Three sets without a common question."""

    heldout: list[Problem]
    demonstrations: list[Problem]
    prompts: list[Problem]


def available_tasks() -> list[str]:
    """Names of all registered reasoning-gym datasets, sorted."""
    return sorted(_registry())


def parse_task(text: str) -> Task:
    """`Task` from ``name`` or ``name:key=value,key=value``.

    A key may be any field of the dataset's configuration. Where the configuration has a pair ``min_x``, ``max_x``,
    ``x=3`` and ``num_x=3`` set both.

    Raises:
        ValueError: unknown name, malformed option or unknown parameter; the message lists the known ones.
    """
    name, _, options = text.partition(":")
    name = name.strip()
    if name not in _registry():
        raise ValueError(f"unknown task {name!r}; known tasks: {', '.join(available_tasks())}")
    fields = {field.name for field in dataclasses.fields(_registry()[name][1])} - {"seed", "size"}
    parameters: dict[str, Any] = {}
    for option in filter(None, (part.strip() for part in _split_options(options))):
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"task {name!r}: option {option!r} is not of the form key=value")
        for field in _expand(key.strip(), fields, name):
            parameters[field] = _literal(value.strip())
    return Task(name, tuple(sorted(parameters.items())))


def build_splits(tasks: Sequence[Task], *, heldout: int, demonstrations: int, prompts: int, seed: int) -> Splits:
    """Draws distinct questions from `tasks` in equal shares and cuts them into three disjoint splits.

    Args:
        tasks: at least one task.
        heldout, demonstrations, prompts: number of problems in each split, over all tasks.
        seed: picks the questions; the same arguments give the same splits on every machine.

    Raises:
        ValueError: no task given, or a task cannot supply that many distinct questions.
    """
    if not tasks:
        raise ValueError("build_splits: at least one task is needed")
    sizes = (heldout, demonstrations, prompts)
    parts: list[list[Problem]] = [[], [], []]
    for position, task in enumerate(tasks):
        shares = [size // len(tasks) + (position < size % len(tasks)) for size in sizes]
        items = _distinct_items(task, sum(shares), seed)
        tag = f"{chr(ord('A') + position % 26)}:" if len(tasks) > 1 else ""
        render = _compact_renderer([item["question"] for item in items])
        rows = [Problem(tag + render(item["question"]), item["answer"], item["question"], task.name) for item in items]
        for part, share in zip(parts, shares, strict=True):
            part.extend(rows[:share])
            rows = rows[share:]
    return Splits(*parts)


def extract_answer(completion: str) -> str:
    """The text inside the last ``<answer>...</answer>`` if there is one, else the whole completion; stripped."""
    tagged = re.findall(r"<answer>(.*?)</answer>", completion, flags=re.DOTALL)
    return (tagged[-1] if tagged else completion).strip()


def exact_match(completion: str, answer: str) -> float:
    """1.0 if the extracted answer is the expected one, character for character, else 0.0."""
    return float(extract_answer(completion) == answer.strip())


def exact_match_reward(completions: Sequence[Any], answer: Sequence[str], **_: Any) -> list[float]:
    """A TRL reward function: `exact_match` of strings, `chat_match` of message lists; `answer` is a data column."""
    return [
        exact_match(row, expected) if isinstance(row, str) else chat_match(row[-1]["content"], expected)
        for row, expected in zip(completions, answer, strict=True)
    ]


def _registry() -> dict[str, tuple[type, type]]:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ImportError("tasks come from reasoning-gym: pip install 'gac-kernels[train]'") from error
    return DATASETS


def _expand(key: str, fields: set[str], task: str) -> list[str]:
    if key in fields:
        return [key]
    stem = key.removeprefix("num_")
    if {f"min_{stem}", f"max_{stem}"} <= fields:
        return [f"min_{stem}", f"max_{stem}"]
    raise ValueError(f"task {task!r} has no parameter {key!r}; its parameters: {', '.join(sorted(fields))}")


def _split_options(text: str) -> list[str]:
    """Splits at commas that are not inside brackets, so that ``operators=['+','-']`` stays whole."""
    return re.split(r",(?![^\[(]*[\])])", text)


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _distinct_items(task: Task, count: int, seed: int) -> list[dict[str, str]]:
    import reasoning_gym

    draws = max(1, _DRAWS_PER_PROBLEM * count)
    parameters = dict(task.parameters)
    # reasoning-gym validates with assert statements, which carry their own message
    try:
        dataset = reasoning_gym.create_dataset(task.name, seed=seed * _SEED_STRIDE, size=draws, **parameters)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"task {str(task)!r}: {error or 'invalid parameters'}") from error
    items: dict[str, str] = {}
    for index in range(draws):
        if len(items) == count:
            break
        entry = dataset[index]
        items.setdefault(entry["question"], str(entry["answer"]))
    if len(items) < count:
        raise ValueError(
            f"task {str(task)!r} gave {len(items)} distinct questions in {draws} draws, {count} are needed for "
            "held-out problems, demonstrations and prompts together; ask for fewer, or set parameters that allow more"
        )
    return [{"question": question, "answer": answer} for question, answer in items.items()]


def _compact_renderer(questions: Sequence[str]) -> Any:
    """A function that strips what all questions share at both ends and blanks around signs, and ends them with '='.

    "State the final answer to the following arithmetic problem: 45 + 27 =" becomes "45+27=".
    """
    prefix = _cut_to_boundary(_common_prefix(questions)) if len(questions) > 1 else ""
    rest = [question[len(prefix) :] for question in questions]
    suffix = _cut_to_boundary(_common_prefix([text[::-1] for text in rest])) if len(questions) > 1 else ""

    def render(question: str) -> str:
        text = question[len(prefix) : len(question) - len(suffix)].strip().rstrip(" .?=")
        return re.sub(r" *([-+*/=<>,:;()]) *", r"\1", text) + "="

    return render


def _common_prefix(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # what these two share, all share
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]


def _cut_to_boundary(text: str) -> str:
    """Drops a trailing piece of a word or number, which the questions share by chance."""
    return re.sub(r"[-\w.]+$", "", text)


def as_records(problems: Iterable[Problem], tokenizer: Any | None = None) -> list[dict[str, Any]]:
    """Rows with ``prompt``, ``completion`` and ``answer`` for the trainer.

    With a tokenizer that has a chat template the rows are conversational and ask the full question; otherwise they
    hold the compact text.
    """
    if tokenizer is not None and getattr(tokenizer, "chat_template", None):
        return chat_rows(problems)
    return [{"prompt": p.prompt, "completion": p.answer, "answer": p.answer} for p in problems]
