"""Tokens of demonstrations, from the columns that data sets for SFT have. Needs a tokenizer, not TRL.

``**template`` of every function goes to the tokenizer's ``apply_chat_template``: ``tools``, ``chat_template``, and what
the template itself knows, such as ``enable_thinking``.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gac.losses import IGNORE_INDEX


def encode_pair(
    tokenizer: Any, prompt: Any, completion: Any, where: str, **template: Any
) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of its completion.

    Plain text: both are tokenised apart, as generation does, and EOS closes the completion. Message lists: the chat
    template renders both; the completion is what it adds to the rendered prompt, up to the EOS token where nothing but
    blanks and special tokens come after that.

    Args:
        tokenizer: of the model.
        prompt, completion: both text, or both message lists.
        where: names the row in errors.

    Raises:
        ValueError: mixed formats, no EOS token, no chat template, or one that rewrites the prompt.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        return list(tokenizer(prompt)["input_ids"]), encode_text(tokenizer, completion, begins=False)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError(
            f"{where}: prompt is {type(prompt).__name__} and completion {type(completion).__name__}; both must be "
            "text, or both message lists"
        )
    render = _renderer(tokenizer, where, template)
    head = render(list(prompt), add_generation_prompt=True)
    reply = _added(head, render([*prompt, *completion]), where)
    return _tokens(tokenizer, head), _tokens(tokenizer, _to_the_end(tokenizer, reply))


def encode_text(tokenizer: Any, text: str, *, begins: bool = True) -> list[int]:
    """Tokens of plain text, closed by EOS.

    Args:
        begins: whether the text begins a sequence, so that the tokenizer may put a special token before it.

    Raises:
        ValueError: the tokenizer has no EOS token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so plain text would have no end")
    ids = list(tokenizer(text.removesuffix(tokenizer.eos_token), add_special_tokens=begins)["input_ids"])
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def encode_conversation(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], where: str, *, replies_only: bool = True, **template: Any
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation as the chat template renders it, up to the EOS of the last reply.

    Args:
        tokenizer: of the model.
        messages: with ``role`` and ``content``.
        where: names the row in errors.
        replies_only: labels on what the assistant says, in every turn, with the EOS that ends it; what comes after the
            last reply is left out. Otherwise on every token.

    Raises:
        ValueError: no message of the assistant, no chat template, or one that rewrites what came before.
    """
    render = _renderer(tokenizer, where, template)
    messages = list(messages)
    ids: list[int] = []
    if not replies_only:
        ids = _tokens(tokenizer, _to_the_end(tokenizer, render(messages)))
        return ids, list(ids)
    labels: list[int] = []
    done = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or not place:
            continue
        head = render(messages[:place], add_generation_prompt=True)
        asked = _tokens(tokenizer, _added(done, head, where))
        reply = _to_the_end(tokenizer, _added(head, render(messages[: place + 1]), where))
        said = _tokens(tokenizer, reply)
        ids += asked + said
        labels += [IGNORE_INDEX] * len(asked) + said
        done = head + reply
    if not ids:
        raise ValueError(f"{where}: no message of role 'assistant' answers another, so there is nothing to learn from")
    return ids, labels


def split_conversation(
    messages: Sequence[Mapping[str, Any]], where: str
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The conversation up to the assistant's last words, and these: a prompt and what a policy would have to say.

    Raises:
        ValueError: no message of the assistant answers another.
    """
    end = len(messages)
    while end and messages[end - 1]["role"] != "assistant":
        end -= 1  # what comes after the last reply
    begin = end
    while begin and messages[begin - 1]["role"] == "assistant":
        begin -= 1
    if not begin or begin == end:
        raise ValueError(f"{where}: no message of role 'assistant' answers another, so there is nothing to score")
    return list(messages[:begin]), list(messages[begin:end])


def template_of(row: Mapping[str, Any], template: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the chat template for a row: its columns ``tools`` and ``chat_template_kwargs`` before `template`."""
    tools = row.get("tools")
    own = {} if tools is None else {"tools": json.loads(tools) if isinstance(tools, str) else tools}
    return {**template, **own, **(row.get("chat_template_kwargs") or {})}


def _renderer(tokenizer: Any, where: str, template: Mapping[str, Any]) -> Callable[..., str]:
    if not (template.get("chat_template") or getattr(tokenizer, "chat_template", None)):
        raise ValueError(
            f"{where} holds message lists but the tokenizer has no chat template; set tokenizer.chat_template or pass "
            "plain text"
        )
    return lambda messages, **options: tokenizer.apply_chat_template(messages, tokenize=False, **template, **options)


def _added(before: str, whole: str, where: str) -> str:
    if not whole.startswith(before):
        raise ValueError(
            f"{where}: the chat template does not keep the prompt as a prefix of the conversation, so the completion "
            "cannot be located; pass 'input_ids' and 'labels' instead"
        )
    return whole[len(before) :]


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _to_the_end(tokenizer: Any, text: str) -> str:
    """Rendered text up to its last end token: what a template puts after it, no rollout will ever have."""
    end = tokenizer.eos_token
    reply, found, rest = text.rpartition(end) if end else ("", "", text)
    for token in tokenizer.all_special_tokens:
        rest = rest.replace(token, "")
    return reply + found if found and not rest.strip() else text
