"""A window's demonstrations: each in one place, whatever the ranks and micro-steps, and equal work for all."""

import pytest

from gac.trainers.demonstrations import EpochSampler, pad_demonstrations
from gac.trainers.window import Window

PAD = 0


def row(number):
    """A demonstration of three tokens that can be told from the others; its first carries no loss."""
    return [number] * 3, [-100, number, number]


def batch_of(indices):
    return pad_demonstrations([row(1 + index) for index in indices], PAD)


def numbers(batches):
    """Which demonstrations some batches hold; a batch without labels holds none."""
    rows = ((ids[0].item() - 1, labels) for b in batches for ids, labels in zip(b.input_ids, b.labels, strict=True))
    return [n for n, labels in rows if (labels >= 0).any()]


def windows(micro_steps, rows, ranks):
    return [Window(micro_steps, rows, rank, ranks) for rank in range(ranks)]


@pytest.mark.parametrize(("micro_steps", "rows", "ranks"), [(1, 1, 1), (3, 2, 1), (1, 2, 4), (2, 3, 2)])
def test_ranks_share_a_set_micro_step_by_micro_step(micro_steps, rows, ranks):
    sampler, position = EpochSampler(7, seed=3), 5
    all_of = windows(micro_steps, rows, ranks)
    drawn = [window.from_set(sampler, batch_of, position) for window in all_of]
    assert all(len(steps) == micro_steps and all(len(batches) == 1 for batches in steps) for steps in drawn)
    in_order = [n for step in range(micro_steps) for steps in drawn for n in numbers(steps[step])]
    assert in_order == sampler.take(position, all_of[0].total)


def test_any_cut_of_a_set_takes_the_same_demonstrations():
    sampler = EpochSampler(50, seed=1)
    cuts = [(4, 2, 1), (2, 2, 2), (1, 2, 4), (1, 8, 1)]
    taken = [
        {n for w in windows(*cut) for step in w.from_set(sampler, batch_of, 8) for n in numbers(step)} for cut in cuts
    ]
    assert all(found == set(sampler.take(8, 8)) for found in taken)


@pytest.mark.parametrize(("micro_steps", "rows", "ranks"), [(1, 4, 1), (2, 2, 1), (2, 3, 2), (3, 1, 4)])
@pytest.mark.parametrize("waiting", [1, 2, 5, 12, 13])
def test_a_queue_is_emptied_in_as_many_batches_on_every_rank(waiting, micro_steps, rows, ranks):
    queue = [row(1 + n) for n in range(waiting)]
    drawn = [window.from_queue(queue, PAD) for window in windows(micro_steps, rows, ranks)]
    assert len({tuple(map(len, steps)) for steps in drawn}) == 1
    batches = [batch for steps in drawn for step in steps for batch in step]
    assert all(len(batch.labels) <= rows for batch in batches)
    assert sorted(numbers(batches)) == list(range(waiting))
    assert sum(batch.count_tokens() for batch in batches) == pad_demonstrations(queue, PAD).count_tokens()
