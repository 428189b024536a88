import json
import sys

import pytest
import torch

from gac.cli import main
from gac.report import HISTORY, Report, append_record
from gac.statistics import ModuleStatistics, Statistics

LABELS = ("embedding", "layers.0.attention", "layers.0.mlp", "norm")


@pytest.fixture
def run(tmp_path):
    """A run directory with twelve measured steps."""
    generator = torch.Generator().manual_seed(0)
    for step in range(10, 130, 10):
        noise = torch.rand(4, 2, generator=generator) + 0.5
        norm = noise + 2 + torch.rand(4, 2, generator=generator)
        dot = 0.5 * (norm - noise).prod(1).sqrt()
        distance2 = norm.sum(1) - 2 * dot
        values = torch.stack([*noise.T, distance2 - noise.sum(1), distance2, *norm.T, dot], 1)
        total = dict(zip(("sigma_s2", "sigma_r2", "delta_g2", "distance2"), values.sum(0).tolist(), strict=False))
        whole = Statistics(**total, norm_s2=norm[:, 0].sum(), norm_r2=norm[:, 1].sum(), dot=dot.sum(), n_s=4, n_r=2)
        append_record(tmp_path / "run", ModuleStatistics(step, LABELS, values, whole))
    return tmp_path / "run"


def test_prints_the_report(run, capsys):
    assert main(["report", str(run)]) == 0
    text = capsys.readouterr().out
    assert text == f"{Report.from_run(run)}\n"
    assert all(label in text for label in LABELS)
    assert "12 measured steps from 10 to 120" in text
    assert main(["report", str(run / HISTORY), "--last", "5"]) == 0
    assert "5 measured steps from 80 to 120" in capsys.readouterr().out


def test_counts_sequences_where_the_run_tells_them(run, capsys):
    (run / "config.json").write_text(json.dumps({"options": {"sft_batch_size": 16, "batch_size": 32}}))
    assert main(["report", str(run)]) == 0
    text = capsys.readouterr().out
    assert "batch (sequences)" in text
    assert "batch of 64 sequences" in text
    (run / "config.json").write_text('{"options": {}}')
    assert main(["report", str(run)]) == 0
    assert "batch (contributions)" in capsys.readouterr().out


def test_tells_where_the_mix_stands(run, capsys):
    lines = ({"step": step, "gac/mu": step / 10, "gac/alpha": 0.4, "gac/alpha_se": 0.1} for step in (1, 2))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(run)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "The SFT branch has the weight mu = 0.200, its aim alpha = 0.4±0.1 of the SFT gradient." in text


def test_json_and_picture(run, capsys, tmp_path):
    picture = tmp_path / "pictures" / "modules.png"
    assert main(["report", str(run), "--json", "--plot", str(picture)]) == 0
    out = capsys.readouterr()
    content = json.loads(out.out)
    assert list(content["modules"]) == list(LABELS)
    assert content["whole"]["cosine"]["value"] == pytest.approx(Report.from_run(run).whole.cosine.value)
    assert content["steps"] == [10, 120]
    assert str(picture) in out.err
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_the_page_goes_where_it_is_asked_to(run, capsys, tmp_path, monkeypatch):
    elsewhere = tmp_path / "pages" / "run.html"
    assert main(["report", str(run / HISTORY), "--html", str(elsewhere), "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["steps"] == [10, 120]
    assert str(elsewhere) in out.err
    assert elsewhere.read_text().count("<svg") == 4  # modules alone

    (run / "metrics.jsonl").write_text('{"step": 1, "gac/mu": 0.5}\n')
    (run / HISTORY).unlink()  # not measured by module: the page says why, the text has nothing to say
    assert main(["report", str(run), "--html"]) == 0
    assert f"page: {run / 'report.html'}" in capsys.readouterr().out
    assert "report_interval=10" in (run / "report.html").read_text()
    assert main(["report", str(run)]) == 2
    assert main(["report", str(run), "--html", str(run / "metrics.jsonl" / "x.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "absent"), "--html"]) == 2
    assert "no such run" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["report", str(run), "--html"]) == 2
    assert "--html needs matplotlib" in capsys.readouterr().err


def test_tables_on_a_terminal(run, capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "150")
    assert main(["report", str(run)]) == 0
    assert "───" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{Report.from_run(run)}\n"


def test_mistakes_exit_with_2_and_one_line(run, capsys, tmp_path, monkeypatch):
    for arguments, message in (
        ([str(tmp_path / "absent")], "no such run"),
        ([str(tmp_path)], "report_interval"),
        ([str(run), "--last", "0"], "not a whole number from 1 on"),
        ([str(run), "--plot", str(tmp_path / "x.nonsense")], "not supported"),
        ([], "RUN"),
    ):
        assert main(["report", *arguments]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(run), "--plot", str(tmp_path / "x.png")]) == 2
    assert "needs matplotlib" in capsys.readouterr().err
