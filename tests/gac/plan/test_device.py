"""Devices and their links."""

from __future__ import annotations

import pytest

from gac import plan


def test_time_of_an_all_reduce():
    device = plan.Device("d", 1.0, 1.0, link=100e9, network=10e9, link_efficiency=0.5)
    assert device.all_reduce_seconds(10**9, 1) == 0
    assert device.all_reduce_seconds(10**9, 8) == pytest.approx(2 * 7 / 8 * 1e9 / 50e9 + 6 * plan.LATENCY)
    assert device.all_reduce_seconds(10**9, 16) == pytest.approx(2 * 15 / 16 * 1e9 / 5e9 + 8 * plan.LATENCY)
