import json
import math
import re
from io import StringIO
from itertools import pairwise

import pytest
import torch

import gac
from gac.report import HISTORY, BranchSignal, Mix, ModuleSummary, Report, append_record, read_history
from gac.report.estimates import FEWEST, Estimate, estimate
from gac.report.sentences import Findings, places, sentences
from gac.statistics import ModuleStatistics, Statistics
from tests.gac.statistics.sources import FAMILIES, Source, family
from tests.gac.truth import contribution_statistics, noise_from_contributions

NAN = math.nan


def measured(step, x_s, x_r, numels, labels):
    """The statistics by module of a step with the contributions ``[n, P]``; None stands for an absent branch."""
    empty = torch.zeros(0, sum(numels), dtype=torch.float64)
    x_s, x_r = (empty if x is None else x.double() for x in (x_s, x_r))
    owner = torch.arange(len(numels)).repeat_interleave(torch.tensor(numels))
    by_module = lambda elements: torch.zeros(len(numels), dtype=torch.float64).index_add(0, owner, elements)
    g_s, g_r = x_s.sum(0), x_r.sum(0)
    n_s, n_r = (torch.tensor(float(len(x)), dtype=torch.float64) for x in (x_s, x_r))
    power_s, power_r = by_module(x_s.square().sum(0)), by_module(x_r.square().sum(0))
    norm_s2, norm_r2, dot = by_module(g_s * g_s), by_module(g_r * g_r), by_module(g_s * g_r)
    sigma_s2 = noise_from_contributions(power_s, norm_s2, n_s)
    sigma_r2 = noise_from_contributions(power_r, norm_r2, n_r)
    norm_s2, norm_r2 = (torch.where(n >= 1, norm2, NAN) for n, norm2 in ((n_s, norm_s2), (n_r, norm_r2)))
    dot = dot + 0 * norm_s2 * norm_r2  # NaN without both
    distance2 = norm_s2 + norm_r2 - 2 * dot
    columns = [sigma_s2, sigma_r2, distance2 - sigma_s2 - sigma_r2, distance2, norm_s2, norm_r2, dot]
    whole = contribution_statistics(
        sigma_s2=sigma_s2.sum(),
        sigma_r2=sigma_r2.sum(),
        norm_s2=norm_s2.sum(),
        norm_r2=norm_r2.sum(),
        dot=dot.sum(),
        n_s=n_s,
        n_r=n_r,
        nonfinite=torch.zeros(()),
    )
    return ModuleStatistics(step, labels, torch.stack(columns, 1), whole)


def history(steps, sources, counts, numels, *, labels=None, seed=0, every=1):
    """``steps`` measured steps of ``counts`` micro-batches drawn from ``sources``; the loss is their mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = labels or [f"layers.{k}" for k in range(len(numels))]
    draw = lambda source, n: source.draw(n, generator=generator) / n if n else None
    pairs = list(zip(sources, counts, strict=True))
    return [
        measured(every * (step + 1), *(draw(source, n) for source, n in pairs), numels, labels) for step in range(steps)
    ]


def isotropic(means, scale=1.0):
    mean = torch.tensor(means, dtype=torch.float64)
    return Source(mean, torch.full_like(mean, scale), torch.zeros_like(mean))


def truth(s, n_s, r, n_r, part=slice(None)):
    """What a report must say of the elements ``part``."""
    trace = lambda source: float(source.scale[part].square().sum() + source.direction[part].square().sum())
    g_s, g_r = s.mean[part], r.mean[part]
    signal_s, signal_r = float(g_s @ g_s), float(g_r @ g_r)
    return {
        "sft.signal": signal_s,
        "rl.signal": signal_r,
        "sft.noise": trace(s) / n_s,
        "rl.noise": trace(r) / n_r,
        "sft.snr": signal_s * n_s / trace(s),
        "rl.snr": signal_r * n_r / trace(r),
        "sft.noise_scale": trace(s) / signal_s,  # tr(C) / |g|^2 of a micro-batch: the published definition
        "rl.noise_scale": trace(r) / signal_r,
        "cosine": float(g_s @ g_r) / math.sqrt(signal_s * signal_r),
        "disagreement": float((g_s - g_r).square().sum()),
    }


def numbers(row):
    branches = {f"{b}.{k}": getattr(getattr(row, b), k) for b in ("sft", "rl") for k in ("signal", "noise", "snr")}
    scales = {f"{b}.noise_scale": getattr(row, b).noise_scale for b in ("sft", "rl")}
    return branches | scales | {"cosine": row.cosine, "disagreement": row.disagreement}


@pytest.mark.parametrize("name", FAMILIES)
def test_synthetic_gradients_of_known_mean_and_covariance(name):
    """Every number of every module lies within its standard error of the truth: 400 steps, unequal counts."""
    numels, counts = (96, 40, 200), (3, 5)
    s, r = family(name, numels, 16, seed=1), family(name, numels, 16, seed=2)
    report = Report(history(400, (s, r), counts, numels), half_life=math.inf)
    edges = torch.tensor([0, *numels]).cumsum(0).tolist()
    parts = [slice(None), *(slice(a, b) for a, b in pairwise(edges))]
    distances = []
    for row, part in zip((report.whole, *report.modules), parts, strict=True):
        expected = truth(s, counts[0], r, counts[1], part)
        for key, found in numbers(row).items():
            assert not found.bound, (row.label, key)
            distances.append((found.value - expected[key]) / found.se)
            assert abs(distances[-1]) < 4, (row.label, key, found, expected[key])
    spread = math.sqrt(sum(d * d for d in distances) / len(distances))
    print(f"{name}: {len(distances)} numbers, root mean square distance {spread:.2f} standard errors")
    whole = truth(s, counts[0], r, counts[1])
    for row, part in zip(report.modules, parts[1:], strict=True):
        of_module = truth(s, counts[0], r, counts[1], part)
        share = row.disagreement_share
        assert share.known == report.whole.disagreement.measurable
        if share.known:
            assert abs(share.value - of_module["disagreement"] / whole["disagreement"]) < 4 * share.se
        share = row.sft.noise_share
        assert abs(share.value - of_module["sft.noise"] / whole["sft.noise"]) < 4 * share.se
    if report.whole.disagreement.measurable:  # not in "layer", whose loud tensor has the same mean in both branches
        assert sum(row.disagreement_share.value for row in report.modules) == pytest.approx(1)
    assert sum(row.rl.noise_share.value for row in report.modules) == pytest.approx(1)


def test_means_and_standard_errors_over_many_draws():
    """1,500 modules that are alike, each a draw of its own over 60 steps.

    Signals and noises are unbiased. A ratio of averages has a bias of second order, at most the squared coefficients
    of variation of what it is made of; beyond that its mean must lie within 4 standard errors too. Two standard errors
    cover the truth at the nominal rate of Student's t with 59 degrees of freedom, within 3 points.
    """
    copies, numel, steps, counts = 1500, 12, 60, (2, 3)
    base = torch.randn(2, numel, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    s, r = isotropic(base[0].repeat(copies).tolist()), isotropic((base.sum(0)).repeat(copies).tolist(), scale=2.0)
    report = Report(history(steps, (s, r), counts, [numel] * copies), half_life=math.inf)
    expected = truth(s, counts[0], r, counts[1], slice(0, numel))
    rows = [numbers(row) for row in report.modules]
    for key, true in expected.items():
        found = [row[key] for row in rows if row[key].known and not row[key].bound]
        assert len(found) > 0.99 * copies, key
        values = torch.tensor([x.value for x in found], dtype=torch.float64)
        error = float(values.std()) / math.sqrt(len(found))
        linear = key.endswith(("signal", "noise", "disagreement"))
        relative = [torch.tensor([row[f"{b}.signal"].value for row in rows]).double() for b in ("sft", "rl")]
        second_order = 0.0 if linear else sum(float(v.var() / v.mean() ** 2) for v in relative) * abs(true)
        away = abs(float(values.mean()) - true)
        covered = sum(abs(x.value - true) < 2 * x.se for x in found) / len(found)
        print(f"{key}: {float(values.mean()):.4g} of {true:.4g}, off {away / error:.1f} errors, covered {covered:.1%}")
        assert away < 4 * error + second_order, key
        assert covered == pytest.approx(0.950, abs=0.03), key


def test_noise_scale_is_the_published_one():
    """One step of one-sample contributions: the two-batch-size estimators of McCandlish et al. 2018, appendix A.1."""
    x = torch.randn(16, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    row = Report([measured(1, x / 16, x / 16, [30], ["all"])]).whole
    small, big = x.square().sum(1).mean(), x.mean(0).square().sum()
    signal = (16 * big - small) / 15
    noise = (small - big) / (1 - 1 / 16)
    assert row.sft.signal.value == pytest.approx(float(signal), rel=1e-12)
    assert row.sft.noise_scale.value == pytest.approx(float(noise / signal), rel=1e-12)
    assert row.sft.snr.value == pytest.approx(float(16 * signal / noise), rel=1e-12)


def test_noise_scale_does_not_depend_on_the_batch():
    """Steps of 2 and of 6 micro-batches mixed: the noise of a step changes, the scale does not."""
    source = isotropic([1.0, -2.0, 0.5, 1.5])
    mixed = []
    for n, seed in ((2, 1), (6, 2)):
        mixed += history(600, (source, source), (n, n), [4], seed=seed)
    found = Report(mixed, half_life=math.inf).whole.sft.noise_scale
    assert abs(found.value - 4 / 7.5) < 4 * found.se
    assert found.se < 0.02


def test_other_units():
    source = isotropic([1.0, 2.0])
    steps = history(20, (source, source), (2, 4), [2])
    plain = Report(steps)
    tokens = Report(steps, sizes={"sft": 100, "rl": 512}, unit="tokens")
    assert (plain.unit, plain.batch) == ("contributions", {"sft": 2.0, "rl": 4.0})
    assert (tokens.unit, tokens.batch) == ("tokens", {"sft": 200.0, "rl": 2048.0})
    assert tokens.whole.rl.noise_scale.value == pytest.approx(512 * plain.whole.rl.noise_scale.value)
    assert tokens.whole.rl.snr == plain.whole.rl.snr
    assert "2048 tokens" in str(tokens)
    unknown = Report([ModuleStatistics(s.step, s.labels, s.values) for s in steps])
    assert (unknown.unit, unknown.batch) == ("batches of a step", {"sft": 1.0, "rl": 1.0})
    assert unknown.whole.sft.noise_scale.value == pytest.approx(plain.whole.sft.noise_scale.value / 2)


def test_averages_are_bias_corrected_moving_averages():
    x = torch.randn(9, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half_life, mean, mass = 3.0, 0.0, 0.0
    keep = 2 ** (-1 / half_life)
    for value in x[:, 0].tolist():
        mean, mass = keep * mean + (1 - keep) * value, keep * mass + (1 - keep)
    weights = torch.exp2(-torch.arange(8, -1, -1, dtype=torch.float64) / half_life)
    found, _ = estimate(lambda v: v, [x], weights)
    assert float(found) == pytest.approx(mean / mass, rel=1e-12)
    equal, error = estimate(lambda v: 3 * v, [x], torch.ones(9, dtype=torch.float64))
    assert float(equal) == pytest.approx(3 * float(x.mean()))
    assert float(error) == pytest.approx(3 * float(x.std()) / 3)
    x[4] = NAN
    skipped, _ = estimate(lambda v: v, [x], weights)
    kept = x.isfinite()[:, 0]
    assert float(skipped) == pytest.approx(float((weights[kept] * x[kept, 0]).sum() / weights[kept].sum()))
    with torch.inference_mode():
        assert torch.equal(estimate(lambda v: v, [x], weights)[0], skipped)


def test_weighted_standard_errors_cover():
    """Half-life 10 over 100 steps of Gaussian numbers, 4,000 draws: within 3 points of the nominal rate."""
    x = torch.randn(100, 4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.exp2(-torch.arange(99, -1, -1, dtype=torch.float64) / 10)
    value, error = estimate(lambda v: v, [x], weights)
    covered = float((value.abs() < 2 * error).double().mean())
    print(f"covered {covered:.1%}")
    assert covered == pytest.approx(0.945, abs=0.03)  # Student's t with about 28 degrees of freedom


def test_what_cannot_be_measured_is_a_bound_or_missing():
    """Noise without signal: 0 lies inside the bounds, and no cosine is made up of noise."""
    silent, loud = isotropic([0.0] * 50), isotropic([3.0] * 50)
    report = Report(history(40, (silent, loud), (4, 4), [25, 25]), half_life=math.inf)
    assert report.whole.sft.snr.bound == "<"
    assert report.whole.sft.noise_scale.bound == ">"
    assert report.whole.sft.noise_scale.value == pytest.approx(4 / report.whole.sft.snr.value)
    assert not report.whole.cosine.known
    assert report.whole.disagreement_share.value == pytest.approx(1)
    text = str(report)
    assert "SFT: the signal cannot be told from the noise" in text
    assert "a larger batch would bring little" in text  # RL: signal 450, noise 12.5
    few = Report(history(2, (silent, silent), (4, 4), [25, 25], seed=3))
    assert math.isnan(few.whole.sft.signal.se)
    assert "no standard errors" in Report(few.history[:1]).headline()
    assert "too few" in few.headline()


def test_a_bound_covers_the_truth():
    """A signal of a twentieth of the noise, 300 modules alike, 10 steps: bounds and intervals hold for nearly all."""
    s = isotropic([0.1, 0.2] * 300)
    report = Report(history(10, (s, s), (2, 2), [2] * 300), half_life=math.inf)
    rows = [row.sft for row in report.modules]
    low = [row for row in rows if row.snr.bound]
    assert len(low) > 150
    held = sum(row.snr.value > 0.05 and row.noise_scale.value < 40 for row in low) / len(low)
    assert held > 0.93


def test_same_gradient_in_both_branches():
    source = isotropic([1.0] * 20, scale=0.5)
    report = Report(history(60, (source, source), (4, 4), [10, 10]), half_life=math.inf)
    assert abs(report.whole.cosine.value - 1) < 4 * report.whole.cosine.se
    assert abs(report.whole.disagreement.value) < 4 * report.whole.disagreement.se
    assert not report.whole.disagreement_share.known
    assert "No disagreement of the branches stands out from the noise: |g_s - g_r|^2 is below" in str(report)


def test_opposed_gradients_are_named():
    s, r = isotropic([1.0] * 10 + [1.0] * 10, 0.3), isotropic([1.0] * 10 + [-1.0] * 10, 0.3)
    report = Report(history(30, (s, r), (4, 4), [10, 10], labels=["a", "b"]))
    text = " ".join(report.reading())
    assert "Demonstrations pull against rewards in b: " in text
    assert "oppose each other in 1 of 2 modules, most in b (cosine -1.0" in text
    assert text.index("disagree most in b (") > 0
    assert report.module("a").cosine.value == pytest.approx(1, abs=0.01)
    with pytest.raises(KeyError, match="known: a, b"):
        report.module("c")


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        ([f"layers.{k}.{part}" for k in range(8, 12) for part in ("attention", "mlp")], "layers 8 to 11"),
        (["layers.3.mlp"], "layer 3"),
        (["layers.2", "layers.9", "layers.10", "head"], "layers 2 and 9 to 10, head"),
        (["encoder.layers.0.mlp", "decoder.layers.1.mlp", "b"], "encoder layer 0, decoder layer 1, b"),
        (list("abcdef"), "a, b, c, d and 2 more"),
    ],
)
def test_places_in_a_few_words(labels, text):
    assert places(labels) == text


def test_the_batch_above_which_more_brings_little():
    """Twice the batch makes a step 2 (1 + SNR) / (1 + 2 SNR) = 1.1 times as good at SNR = B / B_simple = 4.5."""
    source, quiet = isotropic([1.0] * 20, scale=2.0), isotropic([1.0] * 20, scale=0.1)
    report = Report(history(60, (source, quiet), (4, 4), [10, 10]), half_life=math.inf)
    sft, *rest = [line for line in report.reading() if line.startswith(("SFT", "RL"))]
    batch = float(re.search(r"batches above about ([\d.]+) contributions bring little", sft)[1])
    assert batch == pytest.approx(4.5 * report.whole.sft.noise_scale.value, rel=0.05)  # two digits
    snr = batch / report.whole.sft.noise_scale.value
    assert 2 * (1 + snr) / (1 + 2 * snr) == pytest.approx(1.1, abs=0.01)
    assert not any("batches above" in line for line in rest)  # a larger batch brings little already


@pytest.mark.parametrize(("errors", "named"), [(2.9, False), (3.1, True)])
def test_a_cosine_is_called_negative_from_three_standard_errors_on(errors, named):
    """Among dozens of modules two standard errors are chance."""
    value = Estimate(1.0, 0.01)
    signal = BranchSignal(value, value, value, value, value, value)
    row = lambda label, cosine: ModuleSummary(label, signal, signal, cosine, value, value)
    modules = [row("a", Estimate(0.5, 0.1)), row("b", Estimate(-0.1 * errors, 0.1))]
    text = " ".join(sentences(Findings(row("whole model", value), modules, {"sft": 4.0, "rl": 4.0}, "contributions")))
    assert ("oppose each other in 1 of 2 modules, most in b" in text) is named


@pytest.mark.parametrize("absent", ["sft", "rl"])
def test_one_branch_alone(absent, tmp_path):
    source = isotropic([1.0, 2.0, 3.0])
    counts = (0, 4) if absent == "sft" else (4, 0)
    report = Report(history(12, (source, source), counts, [1, 2]))
    present = "rl" if absent == "sft" else "sft"
    assert getattr(report.whole, present).snr.measurable
    assert not getattr(report.whole, absent).norm.known
    assert math.isnan(report.batch[absent])
    text = str(report)
    assert f"{absent.upper()}: no gradient was measured." in text
    assert f"{absent.upper()} SNR" not in text
    assert "cosine" not in text
    json.dumps(report.as_json(), allow_nan=False)
    report.plot(tmp_path / "one.png")


def test_a_branch_that_comes_and_goes_is_averaged_where_it_was():
    source = isotropic([1.0, 2.0, 3.0])
    both = history(30, (source, source), (4, 4), [3])
    alone = history(30, (source, source), (0, 4), [3], seed=9)
    mixed = Report([step for pair in zip(both, alone, strict=True) for step in pair], half_life=math.inf)
    expected = Report(both, half_life=math.inf).whole
    for key in ("norm", "signal", "noise", "snr", "noise_scale"):
        found, alone = (getattr(row.sft, key) for row in (mixed.whole, expected))
        assert (found.value, found.se) == pytest.approx((alone.value, alone.se))
    assert mixed.batch["sft"] == 4
    assert mixed.whole.rl.noise.se < expected.rl.noise.se


def test_zero_gradients(tmp_path):
    zero = torch.zeros(4, 6)
    report = Report([measured(k, zero, zero + 1, [2, 4], ["a", "b"]) for k in range(6)])
    assert not report.whole.sft.snr.known
    assert not report.whole.cosine.known
    text = str(report)
    assert "SFT: the gradient is zero." in text
    assert "RL: no noise was seen" in text
    assert report.whole.rl.snr.value == math.inf
    assert report.whole.rl.noise_scale.value == 0
    json.dumps(report.as_json(), allow_nan=False)
    report.plot(tmp_path / "zero.png")


def test_one_contribution_has_no_noise():
    x = torch.ones(1, 4)
    report = Report([measured(k, x, -x, [2, 2], ["a", "b"]) for k in range(5)])
    text = str(report)
    assert "SFT: the noise is not known" in text
    assert "disagreement of the branches was not measured" in text
    assert not report.module("a").sft.noise_scale.known


@pytest.mark.parametrize(("told", "share"), [([0.25, None, 0.45], 0.35), ([0.6, 0.4], None), ([None, None], None)])
def test_groups_that_say_nothing_are_said_where_they_are_most(told, share, tmp_path):
    source = isotropic([1.0, 2.0])
    steps = history(len(told), (source, source), (4, 4), [2])
    for step, value in zip(steps, told, strict=True):
        step.informative_groups = value
        append_record(tmp_path, step)
    for report in (Report(steps, half_life=math.inf), Report.from_run(tmp_path, half_life=math.inf)):
        known = [value for value in told if value is not None]
        mean = sum(known) / len(known) if known else math.nan
        assert report.informative_groups == pytest.approx(mean, nan_ok=True)
        assert report.as_json()["informative_groups"] == (pytest.approx(mean) if known else None)
        said = [sentence for sentence in report.reading() if "groups of rollouts say nothing" in sentence]
        assert len(said) == (share is not None)
        if share is not None:
            assert "in 65% of them all rewards are the same" in said[0]


def test_steps_without_numbers(tmp_path):
    source = isotropic([1.0, 2.0])
    good = history(8, (source, source), (3, 3), [1, 1])
    nothing = ModuleStatistics(3, good[0].labels, torch.full((2, 7), NAN))
    spoilt = ModuleStatistics(4, good[0].labels, torch.full((2, 7), NAN), Statistics(nonfinite=2.0))
    expected = Report(good)
    assert Report([*good, spoilt]).whole == expected.whole
    only = Report([nothing] * 5)
    assert not only.whole.sft.norm.known
    assert "SFT: no gradient was measured." in str(only)
    with pytest.raises(ValueError, match="nothing was measurable"):
        only.plot(tmp_path / "x.png")
    with pytest.raises(ValueError, match="non-finite gradients"):
        Report([spoilt])


def test_impossible_options_are_refused():
    source = isotropic([1.0, 2.0])
    steps = history(3, (source, source), (2, 2), [1, 1])
    for options, message in (
        ({"half_life": 0.0}, "half_life"),
        ({"half_life": NAN}, "half_life"),
        ({"sizes": {"sft": 1.0}, "unit": "tokens"}, "'sft' and 'rl'"),
        ({"sizes": {"sft": 1.0, "rl": 0.0}, "unit": "tokens"}, "positive"),
        ({"sizes": {"sft": 1.0, "rl": 2.0}}, "belong together"),
        ({"unit": "tokens"}, "belong together"),
    ):
        with pytest.raises(ValueError, match=message):
            Report(steps, **options)
    with pytest.raises(ValueError, match="history: it is empty"):
        Report([])
    with pytest.raises(ValueError, match="steps 1 and 1 have different modules"):
        Report([*steps, *history(1, (source, source), (2, 2), [1, 1], labels=["x", "y"])])


@pytest.fixture(scope="module")
def deep():
    """38 modules, whose later half comes to disagree."""
    labels = ["embedding", *(f"layers.{k}.{b}" for k in range(18) for b in ("attention", "mlp")), "norm"]
    numels = [8] * len(labels)
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(sum(numels), generator=generator, dtype=torch.float64)
    late = (torch.arange(sum(numels)) > sum(numels) // 2).double()
    steps = []
    for k in range(24):
        s, r = isotropic(g.tolist()), isotropic((g * (1 - 2 * late * k / 24)).tolist(), 1.5)
        steps += history(1, (s, r), (4, 4), numels, labels=labels, seed=k, every=10 * (k + 1))
    return Report(steps)


def test_text_has_a_line_for_every_module(deep):
    lines = str(deep).splitlines()
    assert sum(line.startswith("layers.") for line in lines) == 36
    assert max(map(len, lines)) < 125
    assert "24 measured steps from 10 to 240" in lines[0]


def test_rich_shows_the_same_numbers(deep):
    console = pytest.importorskip("rich.console").Console(width=150, record=True, file=StringIO())
    console.print(deep)
    text = console.export_text()
    assert deep.headline() in text
    for cells in deep.tables()[1][1]:
        assert all(cell in text for cell in cells)


@pytest.mark.slow  # matplotlib
def test_maps_and_picture(deep, tmp_path):
    maps = deep.maps()
    assert maps["labels"] == [row.label for row in deep.modules]
    assert maps["steps"] == [10.0 * k for k in range(1, 25)]
    share, part = maps["disagreement"]
    assert (len(share), len(share[0]), len(part)) == (38, 24, 24)
    late = [sum(share[m][-1] for m in rows) for rows in (range(19), range(19, 38))]
    assert sum(late) == pytest.approx(1)
    assert late[1] > 0.9  # the later half, at the end
    cosine = maps["cosine"][0]
    known = lambda rows: [x for row in rows for x in row[-3:] if math.isfinite(x)]
    assert sum(known(cosine[:19])) / len(known(cosine[:19])) > 0.5
    assert sum(known(cosine[20:])) / len(known(cosine[20:])) < 0
    assert all(0 <= x <= 1 for x in maps["noise_rl"][1])
    folded = deep.maps(columns=5)
    assert len(folded["steps"]) == 5
    assert folded["steps"][0] == pytest.approx(30, abs=5)
    deep.plot(tmp_path / "deep.png", title="deep")
    data = (tmp_path / "deep.png").read_bytes()
    assert data[:4] == b"\x89PNG"
    assert len(data) > 20_000
    Report(deep.history[:1]).plot(tmp_path / "one.svg")
    assert (tmp_path / "one.svg").read_text().startswith("<?xml")


def test_save_and_load(deep, tmp_path):
    deep.save(tmp_path / "a" / "report.json")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["report.json"]
    back = Report.load(tmp_path / "a" / "report.json")
    assert str(back) == str(deep)
    sized = Report(deep.history, half_life=math.inf, sizes={"sft": 2, "rl": 3}, unit="sequences")
    sized.save(tmp_path / "sized.json")
    assert str(Report.load(tmp_path / "sized.json")) == str(sized)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="not a saved report"):
        Report.load(tmp_path / "other.json")


def test_where_the_mix_stands(deep, tmp_path):
    told = {"mu": 0.25, "mu_raw": 0.3, "mu_se": 0.04, "alpha": 0.4, "alpha_se": 0.1, "share": 0.5, "estimator": "exact"}
    report = Report(deep.history, mix=Mix.of(told))
    first = report.reading()[0]
    assert first == (
        "The SFT branch has the weight mu = 0.250; the law's estimate is 0.30±0.04, its aim alpha = 0.4±0.1 of the SFT "
        "gradient, at lengths that make 50% of a step SFT's."
    )
    assert report.as_json()["mix"]["alpha_se"] == 0.1
    report.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json").mix == report.mix
    fixed = Mix.of({"gac/mu": 0.5, "gac/mu_raw": math.nan, "gac/alpha": None}, "gac/")
    assert fixed.sentence() == "The SFT branch has the weight mu = 0.500."
    judged = Mix.of({"gac/mu": 0.5, "gac/sft_weight": 0.4, "gac/sft_weight_se": 0.05}, "gac/")
    assert judged.sentence().endswith("mu = 0.500; demonstrations weigh 0.40±0.05.")
    assert Mix.from_json(fixed.as_json()).sentence() == fixed.sentence()
    assert Mix.of({"mu": math.nan}) is None
    assert Mix.of({}) is None


@pytest.mark.parametrize(("law", "reason"), [("gac", None), ("paper", "law 'paper' is written in torch alone")])
def test_why_steps_end_in_torch_is_said(law, reason, tmp_path):
    model = torch.nn.Linear(3, 2)
    with gac.patch(model, law=law, interval=1, report_interval=1) as mixer:
        for branch in (mixer.sft, mixer.rl):
            with branch():
                for _ in range(2):
                    mixer.backward(model(torch.randn(4, 3)).square().mean())
        mixer.step()
        report = mixer.report()
    report.save(tmp_path / "report.json")
    for told in (report, Report.load(tmp_path / "report.json")):
        assert told.in_torch == told.as_json()["in_torch"] == reason
        assert ("Steps end in torch" in str(told)) == (reason is not None)
        assert reason is None or told.reading()[-1] == f"Steps end in torch, not in one piece: {reason}."


def test_history_file(deep, tmp_path):
    for statistics in deep.history[:5]:
        append_record(tmp_path / "run", statistics)
    path = tmp_path / "run" / HISTORY
    assert [s.step for s in read_history(tmp_path / "run")] == [10, 20, 30, 40, 50]
    assert [s.step for s in read_history(path)] == [10, 20, 30, 40, 50]
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 100)  # a kill in the middle of a line
    assert [s.step for s in read_history(path)] == [10, 20, 30, 40]
    for statistics in deep.history[2:4]:  # resumed from a checkpoint of step 25
        append_record(path, statistics)
    assert [s.step for s in read_history(path)] == [10, 20, 30, 40]
    assert path.read_text().count("\n") == 7
    assert [s.step for s in Report.from_run(tmp_path / "run", last=2).history] == [30, 40]
    with pytest.raises(ValueError, match="last must be"):
        Report.from_run(path, last=0)


def test_missing_histories_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such run"):
        read_history(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"holds no gac_modules.jsonl.*report_interval"):
        read_history(tmp_path)
    (tmp_path / HISTORY).write_text('{"step": 1, "colu')
    with pytest.raises(ValueError, match="no measured step but 1 line"):
        read_history(tmp_path)
    (tmp_path / HISTORY).write_text("17\n")
    with pytest.raises(ValueError, match="is not a history"):
        read_history(tmp_path)


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.3149, 0.0412), "0.31±0.04"),
        (Estimate(1234.5, 96.0), "1234±96"),
        (Estimate(-0.0001, 0.2), "0.0±0.2"),
        (Estimate(0.08, 0.2), "0.1±0.2"),
        (Estimate(3.14159e-7, 2e-9), "(3.14±0.02)e-07"),
        (Estimate(2.0), "2.00"),
        (Estimate(2.0, 0.0), "2.00"),
        (Estimate(0.0), "0"),
        (Estimate(math.inf), "inf"),
        (Estimate(123.4, bound=">"), ">123"),
        (Estimate(), "-"),
    ],
)
def test_numbers_as_text(estimate, text):
    assert estimate.text() == text


def test_few_values_have_no_error():
    x = torch.arange(float(FEWEST), dtype=torch.float64)[:, None]
    ones = torch.ones(FEWEST, dtype=torch.float64)
    assert math.isnan(float(estimate(lambda v: v, [x[1:]], ones[1:])[1]))
    assert float(estimate(lambda v: v, [x], ones)[1]) == pytest.approx(float(x.std()) / 2)
