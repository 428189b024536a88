"""Sources and single demonstrations: numbers against definitions, errors against repetition."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

import gac
from gac.report import Report
from gac.report.by_source import norm_of, source_sentence, source_table
from gac.report.estimates import Estimate
from gac.sequences.alignment import Alignments
from gac.sequences.sources import SourceRow, SourceTable, StepOfSources, table_of
from gac.statistics.branch import Branch
from tests.gac.models import tiny_model
from tests.gac.sequences.truth import Batch, losses, mixed, row_gradients

LABELS = ["good", "policy", "bad", "good", "policy", "bad", "good", "policy", "bad", "policy"]


def labelled() -> Batch:
    batch = mixed(10)
    is_expert = torch.tensor([label != "policy" for label in LABELS])
    return Batch(batch.ids, is_expert, torch.linspace(-1.0, 1.0, 10) + 0.05)


def test_one_step_against_definitions():
    model, batch = tiny_model(width=16), labelled()
    gradients = torch.stack(row_gradients(model, batch))
    mixer = gac.patch(model, estimator="sequence", sketch_size=64, law="fixed", mu=0.3)
    with mixer.batch(is_expert=batch.is_expert, sources=LABELS, index=range(100, 110)):
        mixer.mixed_loss(**losses(model, batch)).backward()
    mixer.step()
    table = mixer.sources()
    of = lambda label: gradients[[k for k, other in enumerate(LABELS) if other == label]]
    unbiased = lambda x: float(x.mean(0).square().sum() - x.var(0).sum() / len(x))
    for label in ("good", "bad"):
        own, rl = of(label), of("policy")
        row = table[label]
        assert (row.branch, row.steps, row.n) == (Branch.SFT, 1, 3)
        assert row.noise == pytest.approx(float(own.var(0).sum()), rel=1e-3)
        assert row.signal == pytest.approx(unbiased(own), rel=1e-2, abs=1e-3 * row.noise)
        square = unbiased(own) * unbiased(rl)
        if unbiased(own) > 0 and unbiased(rl) > 0:
            assert row.cosine == pytest.approx(float(own.mean(0) @ rl.mean(0)) / math.sqrt(square), rel=1e-2)
        else:
            assert math.isnan(row.cosine)
        assert math.isnan(row.cosine_se)
    assert "cosine with RL" in str(table)
    assert math.isnan(table["policy"].cosine), "there are no other rollouts"
    found = mixer.alignment()
    assert found.index == tuple(100 + k for k, label in enumerate(LABELS) if label != "policy")
    total = of("policy").sum(0)
    for k, cosine, error, steps in zip(found.index, found.cosine, found.standard_error, found.steps, strict=True):
        own = gradients[k - 100]
        assert float(cosine) == pytest.approx(float(own @ total / own.norm() / total.norm()), abs=1e-4)
        assert math.isnan(float(error))
        assert int(steps) == 1
    assert mixer.alignment([100, 7]).steps.tolist() == [1, 0]


class Mean(nn.Module):
    """Its rows' gradients are its rows: a linear function of each."""

    def __init__(self, width: int):
        super().__init__()
        self.layer = nn.Linear(width, 1, bias=False)

    def forward(self, x):
        return self.layer(x)


def simulated(steps: int, seed: int, *, width: int = 40, rows: int = 4, report_interval=None):
    """Sources with the cosines .5 and 0 with the policy, in noise of 1.5 times their size; the sketch loses nothing."""
    mixer = sourced(width, report_interval=report_interval)
    go_on(mixer, steps, torch.Generator().manual_seed(seed), rows)
    return mixer


def sourced(width: int = 40, **options):
    return gac.patch(Mean(width), estimator="sequence", sketch_size=64, law="fixed", mu=0.5, **options)


def go_on(mixer, steps: int, generator, rows: int = 4):
    model = mixer._model
    width = model.layer.in_features
    e = torch.eye(width)
    means = {"near": 0.5 * e[0] + math.sqrt(0.75) * e[1], "far": e[2], "policy": e[0]}
    for _ in range(steps):
        data, labels = [], []
        for label, mean in means.items():
            data.append(mean + torch.randn(rows, width, generator=generator) * 1.5 / math.sqrt(width))
            labels += [label] * rows
        x, is_expert = torch.cat(data), torch.tensor([label != "policy" for label in labels])
        with mixer.batch(is_expert=is_expert, sources=labels, index=range(len(labels))):
            y = model(x)[:, 0]
            mixer.mixed_loss(sft_loss=y[is_expert].mean(), rl_loss=y[~is_expert].mean()).backward()
        mixer.step()
        model.zero_grad()


def of(mixer):
    """All that it tells, to the bit."""
    table, alignment = mixer.sources(), mixer.alignment()
    numbers = [alignment.cosine, alignment.standard_error, alignment.steps, table.cosines, table.cosine_errors]
    return str(table.rows), alignment.index, [x.numpy().tobytes() for x in numbers]


def test_a_state_goes_on_where_it_ended():
    """Through a file: what is told at the end is that of a run without a break, to the bit."""
    generator = torch.Generator().manual_seed(5)
    whole = sourced()
    go_on(whole, 4, generator)
    file = io.BytesIO()
    torch.save(whole.state_dict(), file)
    between = generator.get_state()
    go_on(whole, 3, generator)
    file.seek(0)
    again = sourced()
    go_on(again, 2, generator)  # which is forgotten
    again.load_state_dict(torch.load(file, weights_only=True))
    generator.set_state(between)
    go_on(again, 3, generator)
    assert of(again) == of(whole)
    assert len(again._sequences("the test").history.sources) == 7


def test_states_of_other_versions_and_estimators():
    mixer = sourced()
    go_on(mixer, 2, torch.Generator().manual_seed(0))
    state = mixer.state_dict()
    older = {name: value for name, value in state.items() if name != "sequences"} | {"version": 2}
    mixer.load_state_dict(older)
    assert mixer.alignment().index == ()
    with pytest.raises(RuntimeError, match="sources= to"):
        mixer.sources()
    with pytest.raises(ValueError, match="has no place for sequences"):
        mixer.load_state_dict(state | {"version": 2})
    other = gac.patch(Mean(40), estimator="exact", law="fixed", mu=0.5)
    with pytest.raises(TypeError, match='"labels"'):
        other.load_state_dict(older | {"version": 3, "sequences": broken(state, "labels", "near")})
    del older["means"], state["means"]
    other.load_state_dict(state | {"means": other.state_dict()["means"]})
    assert "sequences" not in other.state_dict()


def broken(state, place, value):
    """The state's part with one thing of its first block, or of its demonstrations, replaced."""
    part = copy.deepcopy(state["sequences"])
    owner = part if place in part else part["demonstrations"] if place in part["demonstrations"] else part["sources"][0]
    owner[place] = value
    return part


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("rank", -1, "rank.*from 0"),
        ("shared", 1, "shared.*True or False"),
        ("labels", [["a"], "b", "c"], "label, which can be hashed"),
        ("labels", ["near"] * 6, "a branch for each of the 6 labels, no pair twice"),
        ("branches", [0, 1, 2, 0, 1, 0], "branches.*from 0 to 1"),
        ("gram", torch.ones(2, 3, 3, dtype=torch.float64), "gram.*must have the shape .any, 8, 8."),
        ("numbers", torch.ones(1, 2, 8, dtype=torch.float64), "as many steps, got 2 and 1"),
        ("index", [1, 1], "each number once"),
        ("sums", torch.full((8, 3), math.nan), "sums.*finite"),
    ],
)
def test_states_of_nonsense_are_refused(place, value, message):
    mixer = sourced()
    go_on(mixer, 2, torch.Generator().manual_seed(0))
    before, state = of(mixer), mixer.state_dict()
    with pytest.raises((TypeError, ValueError), match=message):
        mixer.load_state_dict(state | {"sequences": broken(state, place, value)})
    assert of(mixer) == before, "part of a refused state was taken"


def test_labels_that_were_named_beforehand():
    mixer = sourced(sequences={"sources": ["near", "policy"]})
    with pytest.raises(ValueError, match=r"sources has 'far', .* names: 'near', 'policy'"):
        go_on(mixer, 1, torch.Generator().manual_seed(0))
    for error, wrong in ((TypeError, "near"), (TypeError, []), (ValueError, ["a", "a"])):
        with pytest.raises(error, match="sources of sequences must"):
            sourced(sequences={"sources": wrong})


def test_errors_hold_the_truth():
    """Over 40 runs of 25 steps: cosines are right on average, and their errors are those of repetition."""
    found = {"near": [], "far": [], "between": []}
    alone = {"noise": [], "signal": []}
    for seed in range(40):
        table = simulated(25, seed).sources()
        for label in ("near", "far"):
            found[label].append((table[label].cosine, table[label].cosine_se))
        for name, values in alone.items():
            values.append((getattr(table["near"], name), getattr(table["near"], f"{name}_se")))
        found["between"].append((float(table.cosines[0, 1]), float(table.cosine_errors[0, 1])))
    for label, truth in (("near", 0.5), ("far", 0.0), ("between", 0.0)):
        values = torch.tensor(found[label], dtype=torch.float64)
        z = (values[:, 0] - truth) / values[:, 1]
        inside = int((z.abs() < 1).sum())
        print(f"{label}: {float(values[:, 0].mean()):.3f} +- {float(values[:, 0].std()):.3f}, error told "
              f"{float(values[:, 1].mean()):.3f}, truth within it {inside} of 40")  # fmt: skip
        assert abs(float(z.mean())) < 4 / math.sqrt(40)
        assert 0.6 < float(values[:, 1].mean() / values[:, 0].std()) < 1.6, "4 standard errors of a deviation of 40"
        assert 15 <= inside <= 39, "27.3 of 40 expected, 4 standard deviations of a binomial below"
    # each row is a fourth of its mean plus noise of 1.5^2, in a mean over 8 demonstrations
    for name, truth in (("noise", 1.5**2 / 64), ("signal", 1 / 64)):
        values = torch.tensor(alone[name], dtype=torch.float64)
        z = (values[:, 0] - truth) / values[:, 1]
        assert abs(float(z.mean())) < 4 / math.sqrt(40), name
        assert 0.6 < float(values[:, 1].mean() / values[:, 0].std()) < 1.6, name


def test_a_report_tells_of_sources(tmp_path):
    mixer = simulated(25, 0, report_interval=1)
    table, report = mixer.sources(), mixer.report()
    columns, rows = report.tables()[2]
    assert [row[:2] for row in rows] == [["near", "sft"], ["far", "sft"], ["policy", "rl"]]
    assert columns[4:8] == ["noise of one", "signal |g|^2", "norm |g|", "cosine with RL"]
    near = rows[0]
    assert near[4] == Estimate(table["near"].noise, table["near"].noise_se).text()
    assert near[7] == Estimate(table["near"].cosine, table["near"].cosine_se).text()
    assert (
        near[columns.index("with far")]
        == Estimate(*(float(x[0, 1]) for x in (table.cosines, table.cosine_errors))).text()
    )
    assert "near point the way of the RL gradient; far are not told apart" in str(report).replace("\n", " ")
    report.save(tmp_path / "report.json")
    loaded = Report.load(tmp_path / "report.json")
    assert loaded.tables()[2] == report.tables()[2]
    assert loaded.as_json()["sources"] == report.as_json()["sources"]
    norm = report.as_json()["sources"]["rows"][0]["norm"]
    assert norm["value"] == pytest.approx(math.sqrt(table["near"].signal))
    assert norm["se"] == pytest.approx(table["near"].signal_se / 2 / norm["value"])


def test_many_sources_are_cut_short_and_opposite_ones_named():
    """As groups or lengths are labels: no cosines with each other, and those of the most contributions."""
    rows = [SourceRow(k, Branch.SFT, 5, 100 - k, 1.0, 0.5, -0.5, 0.1) for k in range(25)]
    nothing = torch.full((25, 25), math.nan, dtype=torch.float64)
    table = SourceTable((*rows, SourceRow(3, Branch.RL, 5, 9, 1.0, -0.5, 0.5, math.nan)), nothing, nothing)
    columns, lines = source_table(table)
    assert len(columns) == 8
    assert [line[0] for line in lines] == [*("3 (sft)" if k == 3 else str(k) for k in range(20)), "and 6 more"]
    assert source_sentence(table).endswith("0, 1, 2, 3 (sft), 4 and 20 more point against the RL gradient.")
    assert norm_of(table.rows[-1]).text() == "-"


def test_single_demonstrations_have_errors_over_steps():
    mixer = simulated(30, 0)
    found = mixer.alignment()
    assert found.steps.tolist() == [30] * 8
    assert (found.cosine[:4] > 3 * found.standard_error[:4]).all()
    assert (found.cosine[4:].abs() < 4 * found.standard_error[4:]).all()


def test_unknown_and_missing():
    model = Mean(8)
    mixer = gac.patch(model, estimator="sequence", law="fixed", mu=0.5)
    with pytest.raises(RuntimeError, match="sources= to"):
        mixer.sources()
    assert mixer.alignment().index == ()
    with pytest.raises(RuntimeError, match='estimator="sequence"'):
        gac.patch(Mean(8)).sources()
    step = StepOfSources((("a", Branch.SFT),), torch.eye(3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64))
    table = table_of([step])
    assert table["a"].steps == 0
    assert math.isnan(table["a"].noise)
    with pytest.raises(KeyError, match="no source 'b'; known: 'a'"):
        table["b"]


def test_alignments_drop_what_is_not_finite():
    kept = Alignments()
    for value in (1.0, float("nan"), 3.0):
        kept.take([5], torch.full((1, 2), value), torch.tensor([1.0, 0.0]))
    found = kept.of(None)
    assert found.steps.tolist() == [2]
    assert float(found.cosine[0]) == pytest.approx(math.sqrt(0.5))
    assert float(found.standard_error[0]) == pytest.approx(0.0, abs=1e-7)
