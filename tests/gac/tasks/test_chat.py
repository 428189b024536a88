"""Problems as conversations: where the answer is found, and what ends a reply."""

import pytest

from gac.tasks.chat import chat_answer, chat_match, closing_token, end_replies
from gac.tasks.models import load_model
from gac.trainers.demonstrations import encode_pair
from tests.gac.tasks.tiny import END, TEMPLATE, save_chat_model

PROMPT, REPLY = [{"role": "user", "content": "1+1"}], [{"role": "assistant", "content": "<answer>2</answer>"}]


@pytest.fixture
def loaded(tmp_path):
    return load_model(str(save_chat_model(tmp_path)))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>12</answer>", "12"),
        ("so <answer>1</answer>, no: <answer>\n12\n</answer> it is", "12"),
        ("<answer>12", "12"),  # cut by the length
        ("<think>is <answer>3</answer> right?</think>\n<answer>12.</answer>", "12"),
        ("<think>is <answer>3</answer> right", ""),
        (r"It is \boxed{12}.", "12"),
        ("The answer is 12.", "12"),
        ("Answer: **12**\nI hope that helps", "12"),
        ("Adding up.\n12\n", "12"),
        ('"cat, dog"', "cat, dog"),
        ("45 + 27 = 72", "45 + 27 = 72"),
        ("", ""),
        (".", "."),
    ],
)
def test_the_answer_is_where_a_reader_finds_it(text, answer):
    assert chat_answer(text) == answer
    assert chat_match(text, "12") == float(answer == "12")


def test_an_expected_answer_may_end_as_sentences_do():
    assert chat_match("<answer>All men are mortal.</answer>", "All men are mortal.") == 1.0
    assert chat_match("<answer>All men are mortal</answer>", "All men are mortal.") == 1.0


def test_a_reply_ends_with_the_token_of_the_template(loaded):
    model, tokenizer = loaded
    assert (tokenizer.eos_token, closing_token(tokenizer)) == ("<eos>", END)
    end_replies(model, tokenizer)
    assert tokenizer.eos_token == END
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    prompt, completion = encode_pair(tokenizer, PROMPT, REPLY, "row")
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(completion) == f"<answer>2</answer>{END}"  # without the line break after it


def test_what_follows_the_end_stays_where_it_says_something(loaded):
    _, tokenizer = loaded
    tokenizer.chat_template = TEMPLATE.replace("<|im_end|>\n'", "<|im_end|>\n' + '#'")
    tokenizer.eos_token = END
    assert tokenizer.decode(encode_pair(tokenizer, PROMPT, REPLY, "row")[1]).endswith(f"{END}\n#")
    tokenizer.chat_template = TEMPLATE.replace("<|im_end|>\n'", "<|im_end|>\n<unk>'")
    assert tokenizer.decode(encode_pair(tokenizer, PROMPT, REPLY, "row")[1]).endswith(END)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ nonsense.nonsense.nonsense }}", "cannot render a question and a reply"),
        ("{% for m in messages %}{{ messages|length|string + m['content'] }}{% endfor %}", "prefix"),
        (TEMPLATE.replace("<|im_end|>", "."), "no special token"),
    ],
)
def test_templates_without_an_end_are_refused(loaded, template, message):
    model, tokenizer = loaded
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message):
        end_replies(model, tokenizer)
