"""What steps cost: a clock that leaves pauses out, and the share of measuring in mixers of every size."""

import itertools
import time
from statistics import mean, median

import pytest
import torch

import gac
import gac.branches
import gac.ending
import gac.mixer
import gac.observe.observer
import gac.quiet
import gac.sequences.observer
import gac.spending
import gac_kernels.cpu.arriving
from gac.cadence import FLOOR, RESERVE
from gac.spending import PAUSE, StepClock


def ticked(*rests):
    """Seconds that each of these steps counts for."""
    clock, now, found = StepClock(0.0), 0.0, []
    for rest in rests:
        now += rest + 0.25
        clock.tick(now, 0.25)
        seconds, steps = clock.take()
        assert steps == 1
        found.append(seconds)
    return found


def test_what_gac_takes_is_not_outside():
    clock = StepClock(0.0)
    clock.tick(5.0, 1.0)
    clock.tick(8.0, 1.5)
    assert clock.take() == (4.0 + 2.5, 2)
    clock.tick(10.0, 0.5)
    assert clock.take() == (1.5, 1)
    clock.tick(10.0, 0.5)  # a clock that stands still
    assert clock.take() == (0.0, 1)


def test_a_pause_counts_as_a_step():
    assert ticked(2, 1, 2, 100, 1, 1) == [2, 1, 2, 2, 1, 1]


def test_what_comes_again_counts_in_full():
    """Rollouts that are drawn every few steps are part of what steps take."""
    period = [8.0] + [1.0] * (PAUSE - 1)
    assert ticked(*period * 3) == period * 3


def test_what_comes_seldom_never_counts_in_full():
    period = [8.0] + [1.0] * PAUSE
    assert ticked(*[1.0, *period * 3]) == [1.0] * (1 + 3 * len(period))


def test_steps_that_become_slower_are_believed_the_second_time():
    assert ticked(1, 1, 5, 5, 5) == [1, 1, 1, 5, 5]


# -- in mixers --------------------------------------------------------------------------------------------------------


class Processor:
    """The thread's own time, which a machine that others use does not stretch, and seconds that are waited for.

    Asking for it takes longer than what it stands for, :func:`time.perf_counter`, and does not count.
    """

    def __init__(self):
        self.waited = 0.0
        looks = [time.thread_time() for _ in range(2001)]
        self.asking = (looks[-1] - looks[0]) / 2000

    def __call__(self):
        self.waited -= self.asking
        return time.thread_time() + self.waited


@pytest.fixture
def processor(monkeypatch):
    found = Processor()
    modules = (
        gac.branches,
        gac.ending,
        gac.mixer,
        gac.observe.observer,
        gac.quiet,
        gac.sequences.observer,
        gac.spending,
    )
    for module in modules:
        monkeypatch.setattr(module, "perf_counter", found)
    monkeypatch.setattr(gac_kernels.cpu.arriving, "OWN_TIME", True)
    return found


class Model(torch.nn.Module):
    """So many matrices of so many rows, whose gradients take no longer to come than to be written."""

    def __init__(self, width, layers):
        super().__init__()
        self.layers = torch.nn.ParameterList(torch.randn(width, width) / width for _ in range(layers))

    def loss(self, x):
        return sum((layer.sum(1) @ x).tanh() for layer in self.layers)


def shares(processor, width, layers, seconds, steps, then=None):
    """Of the account, after each step; steps take ``seconds`` in all, from half way on ``then``."""
    model = Model(width, layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    spent, whole = [], []
    with gac.patch(model) as mixer:
        begin = processor()
        for step in range(steps):
            start = processor()
            for branch in (mixer.sft, mixer.rl):
                with branch():
                    for _ in range(2):
                        mixer.backward(model.loss(torch.randn(width)))
            wanted = seconds if then is None or step < steps // 2 else then
            processor.waited += max(wanted - (processor() - start), 0.0)
            optimizer.step()
            mixer.step()
            optimizer.zero_grad(set_to_none=False)
            under_way = mixer._observer.now.seconds  # with steps that are passed by, of which the account hears later
            spent.append(mixer._measurement.spending.account.total + under_way)
            whole.append(processor() - begin)
        measured = mixer._measurement.spending.cadence.measurements
        assert measured > 10
    return spent, whole


def share(found, last=-1, first=9):
    """From the tenth step on, with which the account begins."""
    spent, whole = found
    inside = spent[last] - spent[first]
    return inside / (whole[last] - whole[first] - inside)


@pytest.mark.budget
@pytest.mark.parametrize(
    ("width", "layers", "seconds", "steps"),
    [
        pytest.param(56, 3, 1e-3, 2000, id="10K, 1 ms"),
        pytest.param(56, 3, 2e-3, 1500, id="10K, 2 ms"),
        pytest.param(56, 3, 5e-3, 500, id="10K, 5 ms"),
        pytest.param(56, 3, 2e-2, 400, id="10K, 20 ms"),
        pytest.param(130, 6, 5e-3, 500, id="100K, 5 ms"),
        pytest.param(354, 8, 5e-2, 150, id="1M, 50 ms"),
        pytest.param(1000, 10, 0.3, 90, id="10M, 0.3 s"),
        pytest.param(1732, 10, 2.0, 66, id="30M, 2 s"),
    ],
)
def test_measuring_takes_less_than_its_budget(processor, width, layers, seconds, steps):
    """At every step from the fiftieth on; of 1 or 2 ms, fifty of which earn less than a measurement costs, at the end.

    Steps of 1 ms are too short for it: there it is those that are not measured which use the budget up, and measuring
    takes a tenth of what they cost. Of short steps the least of five looks: their own time has what
    others do to their caches.
    """
    for _ in range(5 if seconds < 0.1 else 1):
        torch.manual_seed(0)
        spent, whole = found = shares(processor, width, layers, seconds, steps)
        costs = [after - before for before, after in itertools.pairwise(spent[9:])]
        unmeasured = mean(cost for cost in costs if cost < 5 * median(costs))
        alone = unmeasured * len(costs) / (whole[-1] - whole[9] - (spent[-1] - spent[9]))
        most = max(0.01, (1 + 2 * FLOOR) * alone) if seconds < 5e-3 else 0.01
        largest = max(share(found, step) for step in range(49 if seconds >= 5e-3 else steps - 1, steps))
        if largest < most:
            break
    assert largest < most


@pytest.mark.budget
@pytest.mark.parametrize(("seconds", "then"), [(5e-2, 5e-3), (5e-3, 5e-2)])
def test_steps_that_become_cheap_or_slow_are_followed(processor, seconds, then):
    """At every step since; of the last ones alone, beside what may have been saved for when statistics move."""
    for _ in range(3):  # the least, as above
        torch.manual_seed(0)
        found = shares(processor, 130, 6, seconds, 800, then)
        largest = max(share(found, step) for step in range(399, 800))
        if largest < 0.01:
            break
    assert largest < 0.01
    spent, whole = found
    steps = sorted(b - a for a, b in itertools.pairwise(spent[10:]))
    measured = median(seconds for seconds in steps if seconds > steps[-1] / 10)
    saved = 2 * RESERVE * measured  # the most that the account keeps
    assert spent[-1] - spent[600] < 0.01 * (whole[-1] - whole[600]) + saved + measured
