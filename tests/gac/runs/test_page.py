"""The page of a run: one file that holds everything, and says what the run directory says."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from gac.report import Report, append_record
from gac.report.page import Fact, page
from gac.runs.folder import CONFIG, METRICS, SUMMARY, write_json
from gac.runs.page import MOST, facts, folded, write_page
from gac.runs.watching import STATE, WatchedRun
from gac.statistics import ModuleStatistics, Statistics

pytest.importorskip("matplotlib")
LABELS = ("layers.0.mlp", "<script>alert(1)</script>", "head & tail")
_VOID = {"meta", "image", "path", "use", "rect", "br"}


class Checked(HTMLParser):
    """Tags that do not close, ids that are there twice, and what is fetched from elsewhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.fetched, self.uses, self.words, self.tags = [], [], [], [], [], set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs, closed=False):
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href") and not value.startswith("data:"):
                (self.uses if value.startswith("#") else self.fetched).append(value)
            self.uses += re.findall(r"url\((#[^)]+)\)", value or "")
            self.fetched += re.findall(r"url\(([^#)][^)]*)\)", value or "")
        if tag not in _VOID and not closed:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs, closed=True)

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style",):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def run(folder, steps=12, *, modules=True):
    options = {"steps": steps, "task": ["gcd<i>"], "law": "gac", "seed": 1, "interval": None, "overhead": None}
    options |= {"sft_batch_size": 16, "batch_size": 32}
    write_json(folder / CONFIG, {"options": options, "command": ["gac", "train"], "versions": {"torch": "<2>"}})
    write_json(folder / SUMMARY, {"warm_start_accuracy": 0.125, "gac_share": 0.0123, "seconds": 75.0, "device": "cpu"})
    lines = []
    for step in range(1, steps + 1):
        numbers = {
            "gac/sigma_s2": 1.0,
            "gac/sigma_r2": 2.0,
            "gac/delta_g2": 0.5,
            "gac/norm_s2": 3.0,
            "gac/norm_r2": 4.0,
        }
        numbers |= {"gac/mu": step / 16, "gac/mu_raw": 0.5, "gac/mu_se": 0.25, "gac/cosine": 0.1, "reward": 0.75}
        lines.append({"step": step, **numbers, **({"accuracy": step / 16} if step % 4 == 0 else {})})
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1) if modules else ():
        noise = torch.rand(len(LABELS), 2, generator=generator) + 0.5
        norm = noise + 6
        dot = -(norm - noise).prod(1).sqrt()
        distance2 = norm.sum(1) - 2 * dot
        values = torch.stack([*noise.T, distance2 - noise.sum(1), distance2, *norm.T, dot], 1)
        total = dict(zip(("sigma_s2", "sigma_r2", "delta_g2", "distance2"), values.sum(0).tolist(), strict=False))
        whole = Statistics(**total, norm_s2=norm[:, 0].sum(), norm_r2=norm[:, 1].sum(), dot=dot.sum(), n_s=4, n_r=2)
        append_record(folder, ModuleStatistics(step, LABELS, values, whole))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page and the report it was made from."""
    folder = run(tmp_path_factory.mktemp("run & co"))
    report = Report.from_run(folder, sizes={"sft": 16.0, "rl": 32.0}, unit="sequences")
    write_page(folder, report, folder / "pages" / "page.html")
    return folder, report, (folder / "pages" / "page.html").read_text()


def test_one_file_that_fetches_nothing(written):
    _, _, text = written
    found = Checked(text)
    assert found.fetched == []
    assert len(found.ids) == len(set(found.ids)) > 0
    assert {use[1:] for use in found.uses} <= set(found.ids)
    assert text.count("<svg") == 8  # four panels of the run, four maps
    assert "default-src 'none'" in text


def test_names_are_text_and_no_tags(written):
    folder, _, text = written
    found = Checked(text)
    assert "script" not in found.tags
    assert "i" not in found.tags
    assert found.text.count("<script>alert(1)</script>") >= 2  # the table, and labels of the maps
    for name in (str(folder), "gcd<i> · law gac · seed 1", "head & tail", "torch <2>"):
        assert name in found.text, name


def test_the_page_says_what_the_report_says(written):
    _, report, text = written
    words = Checked(text).text
    plain = lambda line: line.replace("^2", "²")
    assert all(plain(line) in words for line in report.reading())
    assert any("Demonstrations pull against rewards in layer 0" in line for line in report.reading())
    for columns, rows in report.tables():
        assert all(plain(cell) in words for cell in [*columns, *(cell for row in rows for cell in row)])
    assert report.headline() in words


def test_facts(written):
    folder, report, _ = written
    told = {fact.name: fact for fact in facts(WatchedRun(folder), json.loads((folder / SUMMARY).read_text()), report)}
    assert told["steps"].value == "12"
    assert told["held-out accuracy"] == Fact(
        "held-out accuracy", "0.125 → 0.750", "mean of the last four evaluations 0.500"
    )
    assert told["reward"].value == "0.750"
    assert told["mu, weight of SFT"].value == "0.750"
    assert told["mu, weight of SFT"].note == "mean over the run 0.406, standard error 0.25"
    assert (told["time in GAC"].value, told["time in GAC"].note) == ("1.23%", "of a budget of 1%")
    assert told["noise scale, SFT"].value.endswith(" sequences")
    assert told["noise scale, RL"].note == "a step has 64"
    assert told["total time"].value == "1 min 15 s"


def test_a_run_without_modules_and_one_of_another_trainer(tmp_path):
    write_page(run(tmp_path / "run", modules=False), None, tmp_path / "a.html", missing="nothing <measured> by module")
    text = (tmp_path / "a.html").read_text()
    assert text.count("<svg") == 4
    assert "nothing <measured> by module" in Checked(text).text
    logged = [{"step": 1, "loss": 0.5, "gac/mu": 0.5}]
    write_json(tmp_path / "out" / "checkpoint-1" / STATE, {"log_history": logged, "max_steps": 4})
    write_page(tmp_path / "out", None, tmp_path / "b.html")
    assert "steps 1 of 4" in Checked((tmp_path / "b.html").read_text()).text


def test_long_runs_are_folded():
    records = [{"step": step, "a": float(step), **({"b": 1.0} if step == 2 else {})} for step in range(1, 6)]
    assert folded(records, 5) == records
    assert folded(records, 3) == [{"step": 2, "a": 1.5, "b": 1.0}, {"step": 4, "a": 3.5}, {"step": 5, "a": 5.0}]
    assert len(folded([{"step": k} for k in range(10 * MOST + 1)], MOST)) <= MOST


def test_a_page_of_nothing_is_a_page():
    assert Checked(page("a < b")).text == "a < b a < b"
