"""The time of kernels by events, with events and streams of the test's own."""

import pytest
import torch

import gac
from gac.observe import device_time
from gac.observe.device_time import DeviceTime


class Event:
    """Passes when the test says so; its time is the device's when it was recorded."""

    now, passed = 0.0, True

    def record(self, stream):
        self.at = Event.now

    def query(self):
        return Event.passed

    def elapsed_time(self, other):
        return other.at - self.at  # milliseconds


class FakeLedger:
    launching = ("read", "end")

    def __init__(self, device):
        self.device = torch.device(device)

    def read(self, milliseconds):
        Event.now += milliseconds

    end = read


@pytest.fixture(autouse=True)
def no_stream(monkeypatch):
    monkeypatch.setattr(device_time.torch.cuda, "current_stream", lambda device: None)
    Event.now, Event.passed = 0.0, True


def test_what_the_device_takes_beyond_the_host():
    ledger = FakeLedger("cuda:0")
    time = DeviceTime([ledger], Event)
    ledger.read(2.0)
    Event.now += 50.0  # the model's own kernels
    ledger.end(1.0)
    time.ended(0.001)
    assert time.beyond_host() == pytest.approx(0.002)
    assert time.beyond_host() == 0.0
    ledger.read(2.0)
    time.ended(0.005)
    assert time.beyond_host() == 0.0, "the host took longer"


def test_nothing_is_waited_for():
    ledger = FakeLedger("cuda:0")
    time = DeviceTime([ledger], Event)
    Event.passed = False
    for _ in range(3):
        ledger.read(2.0)
        time.ended(0.0)
        assert time.beyond_host() == 0.0
    Event.passed = True
    assert time.beyond_host() == pytest.approx(0.006)


def test_devices_work_at_the_same_time_and_cpus_are_not_timed():
    ledgers = [FakeLedger("cuda:0"), FakeLedger("cuda:1"), FakeLedger("cpu")]
    time = DeviceTime(ledgers, Event)
    for ledger, milliseconds in zip(ledgers, (2.0, 3.0, 100.0), strict=True):
        ledger.read(milliseconds)
    time.ended(0.0)
    assert time.beyond_host() == pytest.approx(0.003)
    assert "read" not in vars(ledgers[2])


class OnGpu:
    """An observer, said to be on a GPU."""

    device = torch.device("cuda:0")

    def __init__(self, observer):
        vars(self)["observer"] = observer

    def __getattr__(self, name):
        return getattr(self.observer, name)

    def __setattr__(self, name, value):
        setattr(self.observer, name, value)


def test_sequences_are_timed_layer_by_layer():
    """And the end of each pass; what is measured stays the same."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 2))
    found = []
    for timed in (False, True):
        net.zero_grad()
        with gac.patch(net, estimator="sequence", interval=1) as mixer:
            if timed:
                time = DeviceTime([OnGpu(mixer._observer)], Event)
            torch.manual_seed(0)
            for branch in (mixer.sft, mixer.rl):
                with branch():
                    mixer.backward(net(torch.randn(5, 4)).square().mean())
            mixer.step()
            found.append(mixer.statistics.sigma_s2)
    assert found[0] == found[1]
    assert len(time._pairs[OnGpu.device]) == 2 * (3 + 1)


def test_a_step_without_kernels():
    time = DeviceTime([FakeLedger("cuda:0")], Event)
    time.ended(1.0)
    assert time.beyond_host() == 0.0
