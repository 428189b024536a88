import pytest

from gac.tasks.problems import (
    Task,
    as_records,
    available_tasks,
    build_splits,
    exact_match,
    exact_match_reward,
    parse_task,
)

ADDITION = "chain_sum:num_terms=2,num_digits=2"


def test_names_and_parameters():
    assert "chain_sum" in available_tasks()
    assert parse_task("gcd") == Task("gcd")
    expected = (("max_digits", 2), ("max_terms", 2), ("min_digits", 2), ("min_terms", 2))
    assert parse_task(ADDITION).parameters == expected
    assert parse_task("chain_sum:terms=2,max_digits=3").parameters == (
        ("max_digits", 3),
        ("max_terms", 2),
        ("min_terms", 2),
    )
    options = dict(parse_task("basic_arithmetic:operators=['+','-'],allow_parentheses=false").parameters)
    assert options == {"operators": ["+", "-"], "allow_parentheses": False}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "unknown task 'nonsense'; known tasks: .*chain_sum"),
        ("chain_sum:nonsense=1", "no parameter 'nonsense'; its parameters: .*max_digits"),
        ("chain_sum:max_digits", "key=value"),
        ("chain_sum:seed=3", "no parameter 'seed'"),
    ],
)
def test_wrong_tasks_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_task(text)


def test_splits_share_no_question_and_follow_the_seed():
    sizes = {"heldout": 40, "demonstrations": 50, "prompts": 60}
    first, again, other = (build_splits([parse_task(ADDITION)], seed=seed, **sizes) for seed in (0, 0, 1))
    parts = [first.heldout, first.demonstrations, first.prompts]
    assert [len(part) for part in parts] == [40, 50, 60]
    assert len({problem.question for part in parts for problem in part}) == 150
    assert first == again
    assert {p.question for p in first.prompts} != {p.question for p in other.prompts}
    for problem in first.heldout:
        assert problem.prompt.endswith("=")
        assert str(eval(problem.prompt[:-1])) == problem.answer
        assert " " not in problem.prompt


def test_several_tasks_get_equal_shares_and_a_tag():
    tasks = [parse_task(ADDITION), parse_task("spell_backward:max_word_len=5")]
    splits = build_splits(tasks, heldout=10, demonstrations=11, prompts=4, seed=0)
    names = [problem.task for problem in splits.demonstrations]
    assert (names.count("chain_sum"), names.count("spell_backward")) == (6, 5)
    assert {problem.prompt[:2] for problem in splits.heldout} == {"A:", "B:"}


def test_too_few_questions_and_bad_parameters():
    with pytest.raises(ValueError, match=r"gave \d+ distinct questions .* 300 are needed"):
        build_splits([parse_task("chain_sum:terms=2,digits=1")], heldout=100, demonstrations=100, prompts=100, seed=0)
    with pytest.raises(ValueError, match=r"max_terms must be >= min_terms"):
        build_splits([parse_task("chain_sum:min_terms=9")], heldout=1, demonstrations=1, prompts=1, seed=0)
    with pytest.raises(ValueError, match="at least one task"):
        build_splits([], heldout=1, demonstrations=1, prompts=1, seed=0)


def test_common_text_is_cut_at_whole_words_only():
    splits = build_splits([parse_task("gcd:max_value=30")], heldout=20, demonstrations=20, prompts=20, seed=0)
    for problem in [*splits.heldout, *splits.demonstrations]:
        left, right = (int(part) for part in problem.prompt.rstrip(".=").split(","))
        assert f"{left}, {right}" in problem.question


def test_exact_match():
    assert exact_match(" 42\n", "42") == 1.0
    assert exact_match("42.0", "42") == 0.0
    assert exact_match("so <answer>1</answer>, no <answer> 42 </answer>", "42") == 1.0
    conversation = [[{"role": "assistant", "content": "7"}]]
    assert exact_match_reward(conversation, answer=["7"], other=1) == [1.0]
    assert exact_match_reward(["7", "8"], answer=["7", "9"]) == [1.0, 0.0]


def test_records_are_plain_or_conversational():
    problem = build_splits([parse_task(ADDITION)], heldout=1, demonstrations=1, prompts=1, seed=0).heldout
    (plain,) = as_records(problem)
    assert (plain["prompt"], plain["completion"]) == (problem[0].prompt, problem[0].answer)

    class Chat:
        chat_template = "x"

    (chat,) = as_records(problem, Chat())
    assert problem[0].question in chat["prompt"][0]["content"]
    assert exact_match(chat["completion"][0]["content"], problem[0].answer) == 1.0
