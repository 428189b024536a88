"""What the GPU suite trains, on the CPU."""

import math

import torch

from benchmarks import on_device

CPU = torch.device("cpu")


def test_fewer_steps_where_one_is_long():
    assert on_device.how_many(0.4, 7.0) == (14, 1), "the ten that are always measured, and some that show what follows"
    assert on_device.how_many(4.0, 7.0) == (5, 1)
    assert on_device.how_many(0.01, 7.0) == (20, 2)
    assert on_device.how_many(0.4, 7.0, on_device.FEW) == (14, 1)
    assert on_device.how_many(0.7, 1.0, on_device.FEW) == (5, 1)


def test_a_short_run_under_the_budget():
    ((name, found),) = on_device.budget(CPU, 0.0, math.inf)
    assert name == "tiny 16"
    assert found["steps"] == 14
    assert 0 <= found["measured"] <= 1
    assert found["interval"] >= 1
    assert found["host_share"] > 0 < found["seconds_mixed"]
    assert found["costs"]["measured"] > 0 < found["costs"]["rest"]
    assert found["share"] > 0, "also where the eleventh measurement has not come yet"


def test_no_case_begins_that_would_end_too_late():
    ((_, found),) = on_device.budget(CPU, 0.0, 0.0)
    assert set(found) == {"left_out"}


def test_layers_are_compiled_as_one_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ((_, found),) = on_device.compiled(CPU, 0.0, math.inf)
    assert found["graphs"] == 1  # of two layers, in every step
    assert (found["steps"], found["share"]) == (5, None)  # too few to tell
    assert found["host_share"] > 0
