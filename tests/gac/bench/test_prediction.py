"""The prediction follows from sizes."""

import pytest

from gac.bench import prediction


def test_byte_counts():
    rows = {row["operation"]: row for row in prediction.operations("1B")}
    assert rows["moments"]["bytes"] == 2 * 1_235_814_400
    assert rows["mix_"]["bytes"] == 3 * rows["moments"]["bytes"]
    assert rows["moments"]["bytes"] < rows["sketch"]["bytes"] < 1.03 * rows["moments"]["bytes"]


def test_step_share_is_bytes_over_operations():
    found = prediction.step("1B", 8192)
    plain = (2 / prediction.READ) / (6 * 8192 / prediction.COMPUTE)
    assert found["share_interval_1"] == pytest.approx(plain, rel=0.4)
    assert found["share_interval_1"] > plain
    assert found["sketch_bytes_share"] < 0.005
