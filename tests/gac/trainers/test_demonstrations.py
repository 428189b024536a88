import pytest
import torch
from datasets import Dataset

from gac.tasks.characters import build_character_tokenizer
from gac.trainers.demonstrations import DemonstrationCollator, EpochSampler

ROWS = [{"prompt": "1+2=", "completion": "3"}, {"prompt": "20+30=", "completion": "50"}]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer():
    return build_character_tokenizer()


def labelled_text(tokenizer, batch, row):
    labels = batch.labels[row]
    return tokenizer.decode(labels[labels != -100])


def test_plain_text_puts_the_loss_on_completion_and_eos(tokenizer):
    batch = DemonstrationCollator(tokenizer, ROWS)([0, 1])
    assert [labelled_text(tokenizer, batch, row) for row in (0, 1)] == ["3<eos>", "50<eos>"]
    assert tokenizer.decode(batch.input_ids[1]) == "20+30=50<eos>"
    assert batch.attention_mask.sum(1).tolist() == [6, 9]
    assert (batch.input_ids[0, 6:] == tokenizer.pad_token_id).all()
    assert batch.count_tokens() == 5


def test_loss_on_the_prompt_too(tokenizer):
    batch = DemonstrationCollator(tokenizer, ROWS, completion_only=False)([0])
    assert labelled_text(tokenizer, batch, 0) == "1+2=3<eos>"


def test_messages_follow_the_chat_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    rows = [
        {"prompt": [{"role": "user", "content": "1+2"}], "completion": [{"role": "assistant", "content": "3"}]},
    ]
    batch = DemonstrationCollator(tokenizer, Dataset.from_list(rows))([0])
    assert tokenizer.decode(batch.input_ids[0]) == "[user]1+2[assistant]3<eos>"
    assert labelled_text(tokenizer, batch, 0) == "3<eos>"


def test_pretokenized_rows_are_taken_as_they_are_and_cut(tokenizer):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}]
    batch = DemonstrationCollator(tokenizer, rows, max_length=3)([0, 0])
    assert batch.input_ids.tolist() == [[5, 6, 7]] * 2
    assert batch.labels.tolist() == [[-100, -100, 7]] * 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([{"question": "1", "answer": "2"}], r"'prompt' and 'completion'.*'answer', 'question'"),
        (["1+2=3"], "mappings"),
        (({"prompt": "1", "completion": "2"} for _ in range(2)), "generator"),
        ({"train": ROWS}, "one data set"),
        ([{"prompt": "1", "completion": [{"role": "assistant", "content": "2"}]}], "both must be text"),
        ([{"prompt": [{"role": "user", "content": "1"}], "completion": [{"role": "a", "content": "2"}]}], "template"),
        ([{"input_ids": [1, 2], "labels": [1]}], "2 input_ids but 1 labels"),
    ],
)
def test_wrong_data_is_named(tokenizer, rows, message):
    with pytest.raises(ValueError, match=message):
        DemonstrationCollator(tokenizer, rows)


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    rows = [{"prompt": [{"role": "user", "content": "1"}], "completion": [{"role": "assistant", "content": "2"}]}]
    with pytest.raises(ValueError, match="prefix"):
        DemonstrationCollator(tokenizer, rows)


def test_sampler_visits_each_index_once_per_epoch_in_a_new_order():
    sampler = EpochSampler(10, seed=3)
    epochs = [sampler.take(10 * epoch, 10) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_sampler_continues_from_any_position_at_any_number_of_ranks():
    expected = EpochSampler(7, seed=1).take(0, 40)
    assert EpochSampler(7, seed=1).take(13, 20) == expected[13:33]
    ranks = [EpochSampler(7, seed=1).take(rank * 4, 4) for rank in range(2)]
    assert ranks[0] + ranks[1] == expected[:8]
    assert EpochSampler(7, seed=2).take(0, 40) != expected


def test_sampler_draws_nothing_from_the_global_generator():
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    EpochSampler(5, seed=0).take(0, 12)
    assert torch.equal(state, torch.random.get_rng_state())
