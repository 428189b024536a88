"""Problems as conversations: what is asked, how the answer is found, and the token that ends a turn of a chat template.

Rows are TRL's conversational format: ``prompt`` and ``completion`` are message lists, to which the trainer and the
warm start apply the tokenizer's own template.
"""

import re
from collections.abc import Iterable
from typing import Any

INSTRUCTION = "Answer with the final result only, inside <answer></answer>."
PLAIN = "none"
"""In place of a chat template: ask in plain text."""

_PROBE = "answer"  # any word will do: what follows it in a rendered conversation closes the turn


def chat_rows(problems: Iterable[Any]) -> list[dict[str, Any]]:
    """Rows ``prompt``, ``completion`` (message lists) and ``answer`` (text) of `gac.tasks.problems.Problem` objects."""
    return [
        {
            "prompt": [{"role": "user", "content": f"{problem.question}\n{INSTRUCTION}"}],
            "completion": [{"role": "assistant", "content": f"<answer>{problem.answer}</answer>"}],
            "answer": problem.answer,
        }
        for problem in problems
    ]


def chat_answer(text: str) -> str:
    r"""The answer that a reader finds in a reply.

    What is inside the last ``<answer></answer>`` (which a cut reply may not have closed), else inside the last
    ``\boxed{}``, else what follows the last "answer is" or "answer:" on its line, else the last line that is not empty.
    Thoughts inside ``<think></think>`` are left out, and so are blanks, quotes, emphasis and a full stop around it.
    """
    text = re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL)
    for pattern in (r"<answer>(.*?)(?:</answer>|\Z)", r"\\boxed\{([^{}]*)\}", r"(?i:answer(?: is)?:|answer is)(.*)"):
        if found := re.findall(pattern, text, flags=re.DOTALL if "<" in pattern else 0):
            return _bare(found[-1])
    lines = text.strip().splitlines()
    return _bare(lines[-1]) if lines else ""


def chat_match(text: str, answer: str) -> float:
    """1.0 if :func:`chat_answer` finds the expected answer, else 0.0."""
    return float(chat_answer(text) == _bare(answer))


def closing_token(tokenizer: Any) -> str | None:
    """The special token by which the tokenizer's chat template ends a reply; None where it has none.

    Raises:
        ValueError: the template cannot render a question and its reply, or does not begin with what it renders of the
            question alone.
    """
    question, reply = {"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}
    try:
        head = tokenizer.apply_chat_template([question], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template([question, reply], tokenize=False)
    except Exception as error:  # of the template itself, whatever it raises
        raise ValueError(f"its chat template cannot render a question and a reply: {error}") from error
    if not whole.startswith(head) or _PROBE not in whole[len(head) :]:
        raise ValueError("its chat template does not keep the prompt as a prefix of the conversation")
    ids = tokenizer(whole[len(head) :].partition(_PROBE)[2], add_special_tokens=False)["input_ids"]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return next((tokenizer.convert_ids_to_tokens(index) for index in ids if index in special), None)


def end_replies(model: Any, tokenizer: Any) -> None:
    """Makes the template's closing token the one that ends a completion, of demonstrations and of rollouts.

    Raises:
        ValueError: see :func:`closing_token`; or the template closes a reply with no special token.
    """
    token = closing_token(tokenizer)
    if token is None:
        raise ValueError("its chat template ends a reply with no special token, so that a completion would have no end")
    if tokenizer.eos_token != token:
        tokenizer.eos_token = token
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    if tokenizer.eos_token_id not in known:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *known]


def _bare(text: str) -> str:
    stripped = text.strip().strip("*`\"'").strip()
    return stripped.removesuffix(".").strip() if len(stripped) > 1 else stripped
