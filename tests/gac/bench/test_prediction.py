"""The prediction follows from sizes."""

import pytest

from gac.bench import prediction


def test_byte_counts():
    rows = {row["operation"]: row for row in prediction.operations("1B")}
    assert rows["moments"]["bytes"] == 2 * 1_235_814_400
    assert rows["mix_"]["bytes"] == 3 * rows["moments"]["bytes"]
    assert rows["moments"]["bytes"] < rows["sketch"]["bytes"] < 1.03 * rows["moments"]["bytes"]


def test_sequences():
    found = prediction.predict_sequences()["h100"]
    block = next(row for row in found["kronecker_sketch"] if row["model"] == "1B")
    assert block["bytes"] == 2 * 8192 * (2 * 4096 + 2 * 2560 + 3 * 10240)
    assert 0.8 < block["of_the_read_limit"] < 1
    step = next(row for row in found["steps"] if row["model"] == "1B")
    head, embedding = 2 * 8192 * (128256 + 2048), 2 * 8192 * 2048 + 8 * 8192
    assert step["read_bytes_per_backward"] == 16 * block["bytes"] + head + embedding
    assert step["norm_bytes_per_backward"] == prediction.NORM_BYTES * 8192 * 33 * 2048
    assert step["interval_of_the_default_budget"] == 1 + int(100 * step["share_interval_1"])


def test_step_share_is_bytes_over_operations():
    found = prediction.step("1B", 8192)
    plain = (2 / prediction.READ) / (6 * 8192 / prediction.COMPUTE)
    assert found["share_interval_1"] == pytest.approx(plain, rel=0.4)
    assert found["share_interval_1"] > plain
    assert found["sketch_bytes_share"] < 0.005
