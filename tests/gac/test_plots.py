import math
from itertools import pairwise

import pytest

from gac.plots import COLOURS, draw_comparison, draw_run
from gac.plots.run import _asinh_ticks

plt = pytest.importorskip("matplotlib.pyplot")
to_rgb = pytest.importorskip("matplotlib.colors").to_rgb


def records(steps=12, **constants):
    rows = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "reward": 0.3 + 0.1 * math.sin(step),
            "gac/mu": 0.5,
            "gac/mu_raw": 0.4,
            "gac/mu_se": 0.2,
            "gac/sigma_s2": 1.0 / step,
            "gac/sigma_r2": 2.0,
            "gac/sigma_s2_se": 0.1 / step,
            "gac/sigma_r2_se": 0.3,
            "gac/delta_g2": math.cos(step),  # unbiased, so it may be negative
            "gac/delta_g2_se": 0.5,
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


@pytest.fixture
def figure(monkeypatch):
    """The figure that was drawn last, with its layout as it was saved."""
    close = plt.close
    monkeypatch.setattr(plt, "close", lambda figure: None)
    yield plt.gcf
    close("all")


def test_legends_lie_outside_the_panels(tmp_path, figure):
    draw_run(records(**{"gac/prior": 0.6}), {"warm_start_accuracy": 0.1}, tmp_path / "run.png")
    renderer = figure().canvas.get_renderer()
    panels = [axis.get_window_extent(renderer) for axis in figure().axes]
    legends = [axis.get_legend() for axis in figure().axes if axis.get_legend() is not None]
    assert len(legends) == 4
    boxes = [legend.get_window_extent(renderer) for legend in legends]
    assert not any(box.overlaps(panel) for box in boxes for panel in panels)
    whole = figure().get_window_extent(renderer)
    assert all(whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 for box in boxes)

    summary = {"warm_start_accuracy": 0.1, "last_four_accuracy": 0.5}
    draw_comparison({"gac": [{"records": records(), "summary": summary}]}, tmp_path / "compare.png")
    renderer = figure().canvas.get_renderer()
    (legend,) = figure().legends
    box = legend.get_window_extent(renderer)
    assert not any(box.overlaps(axis.get_window_extent(renderer)) for axis in figure().axes)


def test_estimates_have_their_standard_errors(tmp_path, figure):
    """One step, so that averages are the numbers themselves: bands go from one standard error below to one above."""
    draw_run(records(1), {"warm_start_accuracy": 0.1}, tmp_path / "run.png")
    _, mu, statistics, _ = figure().axes[:4]
    ends = lambda band: (band.get_paths()[0].vertices[:, 1].min(), band.get_paths()[0].vertices[:, 1].max())
    assert ends(mu.collections[0]) == pytest.approx((0.2, 0.6))
    expected = [(0.9, 1.1), (1.7, 2.3), (math.cos(1) - 0.5, math.cos(1) + 0.5)]
    assert [ends(band) for band in statistics.collections] == [pytest.approx(pair) for pair in expected]
    assert [line.get_color() for line in statistics.lines[:3]] == list(COLOURS[:3])
    assert len({line.get_linestyle() for line in statistics.lines[:3]}) == 3


def test_a_measured_aim_is_drawn_with_its_error(tmp_path, figure):
    told = {"gac/alpha": 0.3, "gac/alpha_se": 0.2, "gac/prior": 0.6}
    draw_run(records(3, **told), {"warm_start_accuracy": 0.1}, tmp_path / "run.png")
    mu = figure().axes[1]
    assert mu.get_legend().get_window_extent().x1 < figure().bbox.x1, "all four entries fit"
    (aim,) = [line for line in mu.lines if "alpha" in str(line.get_label())]
    assert list(aim.get_ydata()) == [0.3] * 3
    (band,) = [band for band in mu.collections if band.get_facecolor()[0, :3] == pytest.approx(to_rgb(aim.get_color()))]
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.1, 0.5))


def test_weights_of_demonstrations_are_drawn_smoothed_with_their_error(tmp_path, figure):
    told = {"gac/sft_weight": 0.4, "gac/sft_weight_se": 0.1}
    draw_run(records(2, **told), {"warm_start_accuracy": 0.1}, tmp_path / "run.png")
    mu = figure().axes[1]
    (line,) = [line for line in mu.lines if line.get_label() == "weight of demonstrations"]
    assert list(line.get_ydata()) == pytest.approx([0.4] * 2)
    (band,) = [
        band for band in mu.collections if band.get_facecolor()[0, :3] == pytest.approx(to_rgb(line.get_color()))
    ]
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(0.5)
    second = 0.1 * math.sqrt(0.9**2 + 1) / 1.9  # of a mean of two with the weights .9 and 1
    assert min(h for h in heights if h > 0.4) == pytest.approx(0.4 + second)


def test_zero_is_no_cliff(tmp_path, figure):
    """Around 0 the scale is straight as far as the disagreement's standard error, which takes a visible height.

    The slope of asinh falls from 1 at 0 to 1 / sqrt(2) at its linear width.
    """
    draw_run(records(40), {"warm_start_accuracy": 0.1}, tmp_path / "run.png")
    axis = figure().axes[2]
    height = lambda value: axis.transAxes.inverted().transform(axis.transData.transform((1, value)))[1]
    error = axis.yaxis.get_transform().linear_width
    assert 0.05 < error < 0.5  # that of an average over about 20 steps
    steps = [height(error * (k + 1) / 4) - height(error * k / 4) for k in range(-4, 4)]
    assert max(steps) < math.sqrt(2) * min(steps)
    assert height(error) - height(-error) > 0.1


@pytest.mark.parametrize(
    ("width", "low", "high"), [(0.5, -3, 30), (1e-7, -4e-7, 0.2), (20.0, 1.0, 25.0), (2.0, -900, -1)]
)
def test_ticks_have_room(width, low, high):
    ticks = _asinh_ticks(width, low, high)
    assert all(low <= tick <= high for tick in ticks)
    assert 1 <= len(ticks) <= 15
    assert (0.0 in ticks) is (low <= 0 <= high)
    places = [math.asinh(tick / width) for tick in ticks]
    room = 0.07 * (math.asinh(high / width) - math.asinh(low / width))
    assert all(b - a >= room * (1 - 1e-9) for a, b in pairwise(places))


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


def test_regret_is_what_was_lost_to_the_best(tmp_path, figure):
    """Mean over the last four evaluations, pair by pair of seeds; the best loses nothing to itself."""
    run = lambda values: {
        "summary": {"warm_start_accuracy": 0.0, "last_four_accuracy": 0.5},
        "records": [{"step": k, "accuracy": value} for k, value in enumerate(values, 1)],
    }
    runs = {"gac": [run([0.1, 0.2, 0.3, 0.4]), run([0.0] * 4)], "fixed:0.5": [run([0.5] * 4), run([0.2] * 4)]}
    draw_comparison(runs, tmp_path / "compare.png", best="fixed:0.5")
    axis = next(axis for axis in figure().axes if "lost to fixed:0.5" in axis.get_title(loc="left"))
    first, second = ([0, 0.4, 0.3, 0.2, 0.1], [0, 0.2, 0.2, 0.2, 0.2])
    late = lambda values: [sum(values[max(k - 3, 0) : k + 1]) / min(k + 1, 4) for k in range(5)]
    expected = [(a + b) / 2 for a, b in zip(late(first), late(second), strict=True)]
    lines = {line.get_label(): list(line.get_ydata()) for line in axis.lines}
    assert lines["gac"] == pytest.approx(expected)
    assert lines["fixed:0.5"] == [0.0] * 5


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        draw_run([], {"warm_start_accuracy": 0.0}, tmp_path / "x.png")
    with pytest.raises(ValueError, match="at least one run"):
        draw_comparison({"gac": []}, tmp_path / "x.png")
