import math

import pytest

from gac.plots import draw_comparison, draw_run


def records(steps=12, **constants):
    rows = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "reward": 0.3 + 0.1 * math.sin(step),
            "gac/mu": 0.5,
            "gac/mu_raw": 0.4,
            "gac/sigma_s2": 1.0 / step,
            "gac/sigma_r2": 2.0,
            "gac/delta_g2": math.cos(step),  # unbiased, so it may be negative
            "gac/norm_s2": 3.0,
            "gac/norm_r2": 4.0,
            "gac/cosine": 0.1,
        } | constants
        rows.append(row | ({"accuracy": step / 20} if step % 4 == 0 else {}))
    return rows


def png(path):
    """Width and height of a PNG that is not one flat colour."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(data) > 10_000
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_run_picture(tmp_path):
    draw_run(records(**{"gac/prior": 0.6}), {"warm_start_accuracy": 0.1}, tmp_path / "run.png", title="a run")
    width, height = png(tmp_path / "run.png")
    assert width > height > 500


def test_run_picture_without_measurements_or_evaluations(tmp_path):
    bare = [{"step": 1, "reward": 0.0, "gac/mu": 0.1, "gac/sigma_r2": None}]
    draw_run(bare, {"warm_start_accuracy": 0.0}, tmp_path / "run.png")
    png(tmp_path / "run.png")


def test_comparison_picture(tmp_path):
    summary = {"warm_start_accuracy": 0.1, "last_four_accuracy": 0.5}
    laws = [f"law {index}" for index in range(10)]  # more than there are colours
    runs = {law: [{"records": records(8 + 4 * seed), "summary": summary} for seed in range(2)] for law in laws}
    draw_comparison(runs, tmp_path / "compare.png", title="laws")
    png(tmp_path / "compare.png")


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        draw_run([], {"warm_start_accuracy": 0.0}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one run"):
        draw_comparison({"gac": []}, tmp_path / "x.png")
