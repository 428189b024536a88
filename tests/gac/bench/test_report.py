"""Files, tables, figures and the picture, from results made up here."""

import json

import pytest
from rich.console import Console

from gac.bench import report, roofline, summary
from gac.bench.figures import figures, slowest_against_peers


def kernel(operation="sketch", dtype="fp32", label="64M", *, ok=True, elements=1 << 26, tensors=1, **changes):
    row = {
        "operation": operation, "dtype": dtype, "label": label, "elements": elements, "tensors": tensors, "note": "",
        "bytes": 4 * elements, "read_bytes": 4 * elements,
        "gate": {"ok": ok, "error": 0.1 if ok else 7.0, "checked": "everything"}, "omitted": {},
        "variants": {"gac": {"p20": 0.0090, "p50": 0.0094, "p80": 0.0100, "rounds": 9}},
    }  # fmt: skip
    if ok:
        row |= {
            "gbps": 28.0, "read": "torch.sum", "read_gbps": 30.0, "times_read": 1.05, "percent_of_read": 95.0,
            "speedup": {"eager: norm": 1.5, "eager: other": 1.2, "foreach: norm": 2.0},
            "speedup_interval": {"eager: norm": [1.4, 1.6], "eager: other": [1.1, 1.3], "foreach: norm": [1.9, 2.1]},
        }  # fmt: skip
    return row | changes


def step(**changes):
    share = {"1": 0.004, "10": 0.0008}
    return {
        "model": "10M", "dtype": "float32", "tokens": 1024, "sketch_bytes": 10, "gradient_bytes": 4000,
        "arms": {"plain": {"p20": 1.0, "p50": 1.1, "p80": 1.2}},
        "intervals": {k: {"share_in_gac": v, "whole_step": v, "noise": 0.01} for k, v in share.items()},
    } | changes  # fmt: skip


def results(*rows, **changes):
    facts = {"date": "2026-01-01", "device": "a machine", "threads": 2, "isa": "avx2", "command": "gac bench",
             "versions": {"torch": "2.13"}}  # fmt: skip
    return {"format": 1, "device_type": "cpu", "facts": facts, "read_limit": "torch.sum", "kernels": list(rows),
            "step": [], "host": {}} | changes  # fmt: skip


def test_json_holds_no_nan(tmp_path):
    path = tmp_path / "deep" / "bench.json"
    report.write_json(path, {"a": float("nan"), "b": [1.23456789, {"c": float("inf")}], "d": "text", "e": 3})
    assert json.loads(path.read_text()) == {"a": None, "b": [1.2346, {"c": None}], "d": "text", "e": 3}
    assert list(path.parent.iterdir()) == [path]


def test_table_has_the_columns_and_the_fastest_peer():
    row = report.kernel_row(kernel(), gpu=False)
    assert len(row) == len(report.kernel_columns(False))
    assert row == ["sketch fp32 64M", "9 ms", "9.4 ms", "10 ms", "28", "1.05", "95", "1.20x", "2.00x", "-", ""]


def test_gpu_table_shows_host_and_wall_time():
    row = kernel(speedup_wall={"eager: norm": 3.0})
    row["variants"]["gac"] |= {"host": 4e-5, "wall": 9.5e-3}
    text = report.kernel_row(row, gpu=True)
    assert len(text) == len(report.kernel_columns(True))
    assert text[4:6] == ["40 us", "9.5 ms"]
    assert text[-4] == "3.00x"


def test_red_rows_show_no_speedup():
    text = report.kernel_row(kernel(ok=False), gpu=False)
    assert text[-1] == "GATE RED: error 7 times its bound"
    assert set(text[4:-1]) == {""}
    assert len(text) == len(report.kernel_columns(False))


def test_rows_left_out_say_why():
    text = report.kernel_row({"operation": "mix_", "dtype": "bf16", "label": "8B", "note": "left out: x"}, gpu=False)
    assert text[-1] == "left out: x"
    assert len(text) == len(report.kernel_columns(False))


def test_tables_print_and_are_markdown(capsys):
    found = results(kernel(), kernel(ok=False, label="1K"), step=[step()])
    report.show(found, Console(width=200))
    shown = capsys.readouterr().out
    text = report.markdown(found)
    for part in ("sketch fp32 64M", "GATE RED", "Figures to reach", "Whole steps", "1.05x"):
        assert part in shown
        assert part in text
    assert "gac bench" in text


def test_cpu_figures():
    naive = {"eager: norm, norm, norm(a-b)": 4.0}
    level = {"speedup": {"eager: other": 0.99}, "speedup_interval": {"eager: other": [0.97, 1.01]}}
    rows = [kernel(), kernel(dtype="bf16", times_read=1.7, **level), kernel("pair_moments", speedup=naive)]
    rows[-1]["speedup_interval"] = {name: [3.9, 4.1] for name in naive}
    host = {"hook": {"hook": 2e-6, "hook_and_read": 3e-6}, "import": {"p50": 0.3}}
    found = {f.name: (f.value, f.ok) for f in figures(results(*rows, step=[step()], host=host))}
    assert found == {
        "pair_moments, fp32, 64M elements, over reading both buffers": ("1.05x", True),
        "sketch, fp32, 64M elements, over reading the buffer": ("1.05x", True),
        "sketch, bf16, 64M elements, over reading the buffer": ("1.70x", False),
        "pair_moments over norm, norm, norm(a-b)": ("4.0x", False),
        "least speed-up over any peer (sketch bf16 64M against eager: other)": ("0.99x (0.97 to 1.01)", True),
        "time in GAC over step time, 10M float32, 1024 tokens a micro-batch, interval 1": ("0.400%", True),
        "time in GAC over step time, 10M float32, 1024 tokens a micro-batch, interval 10": ("0.080%", True),
        "host time of a hook, per parameter": ("2.00 us", True),
        "import gac on top of torch": ("0.30 s", False),
    }


def test_a_kernel_is_slower_than_a_peer_when_the_whole_interval_says_so():
    row = kernel(speedup={"eager: other": 0.99}, speedup_interval={"eager: other": [0.95, 0.998]})
    (found,) = [f for f in figures(results(kernel(), row)) if f.name.startswith("least")]
    assert (found.value, found.ok) == ("0.99x (0.95 to 1.00)", False)


def test_gpu_figures():
    row = kernel("moments", "bf16", "1B", speedup_wall={"foreach: norm": 1.4, "eager: norm": 3.0}, percent_of_read=91.0)
    big = step(
        model="1B", tokens=8192, sketch_bytes=8, synchronizations={"plain": "none", "gac": "none"},
        launches={"measured": {"gac_kernel_seconds": 0.0055}},
        arms={"plain": {"p20": 1.0, "p50": 1.0, "p80": 1.0, "device": 1.0}},
    )  # fmt: skip
    found = {f.name: (f.value, f.ok) for f in figures(results(row, step=[big], device_type="cuda"))}
    assert found == {
        "moments, bf16, 1B list, of the read limit": ("91.0%", True),
        "moments, bf16, 1B list, over its fastest peer (foreach: norm)": ("1.40x", False),
        "whole step, 1B float32, 8192 tokens a micro-batch, interval 1": ("0.400%", True),
        "whole step, 1B float32, 8192 tokens a micro-batch, interval 10": ("0.080%", True),
        "GAC's kernels over device time, 1B float32, 8192 tokens a micro-batch, interval 1": ("0.550%", True),
        "host synchronisations, 1B float32, 8192 tokens a micro-batch": ("none", True),
        "sketches over gradient bytes, 1B float32, 8192 tokens a micro-batch": ("0.20%", True),
    }


def test_figures_of_sequences_on_a_gpu():
    row = kernel("kronecker_sketch", "bf16", label="1B", percent_of_read=79.0, speedup={}, speedup_interval={})
    big = step(
        model="1B", tokens=8192, estimator="sequence", synchronizations={"gac": "none"},
        launches={"measured": {"gac_kernel_seconds": 0.05}},
        arms={"plain": {"p20": 1.0, "p50": 1.0, "p80": 1.0, "device": 1.0}},
    )  # fmt: skip
    found = {f.name: (f.value, f.ok) for f in figures(results(row, step=[big], device_type="cuda"))}
    name = "1B float32, 8192 tokens a micro-batch, sequences"
    assert found == {
        "kronecker_sketch, bf16, a block of 1B, of the read limit": ("79.0%", False),
        f"whole step, {name}, interval 10": ("0.080%", True),
        f"GAC's kernels over device time, {name}, interval 10": ("0.500%", True),
        f"host synchronisations, {name}": ("none", True),
    }


def test_red_rows_make_no_figures():
    assert figures(results(kernel(ok=False))) == []
    assert slowest_against_peers([]) is None


def test_the_picture_is_drawn(tmp_path):
    rows = [kernel(op, dtype, elements=1 << k) for op in ("moments", "mix_") for dtype in ("bf16", "fp32")
            for k in (10, 16)]  # fmt: skip
    rows += [kernel(tensors=146, elements=1 << 27), kernel(ok=False)]
    path = tmp_path / "roofline.png"
    roofline.draw(results(*rows, nominal_gbps=50.0), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000
    with pytest.raises(ValueError, match="green gate"):
        roofline.draw(results(kernel(ok=False)), path)


def test_the_summary_takes_what_is_there(tmp_path):
    report.write_json(tmp_path / "kernels.json", results(kernel(), kernel(ok=False, label="1K")))
    (tmp_path / "suite.log").write_text("part env exit 0 after 3 s\npart step exit 124 after 170 s\n")
    (tmp_path / "tests.log").write_text("...\n===== 12 passed, 1 failed, 900 deselected in 61.20s (0:01:01) =====\n")
    assert summary.main([str(tmp_path)]) == 0
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["exit_codes"] == {"env": 0, "step": 124}
    assert found["tests"] == {"passed": 12, "failed": 1, "deselected": 900}
    assert found["parts"] == {
        "kernels": {"found": True, "complete": False},
        **{
            name: {"found": False, "complete": False}
            for name in ("step", "sequence", "ending", "budget", "hybrid", "compiled")
        },
    }
    assert found["red_gates"] == ["sketch fp32 1K"]
    assert found["figures"]
    assert summary.main([]) == 2


def test_the_summary_of_a_suite_that_was_stopped(tmp_path):
    """Tests that had ended are counted; a step that had been timed counts without what was to be looked at after it."""
    step = {"model": "1B", "tokens": 8192, "dtype": "bfloat16", "estimator": "sketch", "sketch_bytes": 1}
    step |= {"gradient_bytes": 1000, "intervals": {k: {"whole_step": 0.001} for k in ("1", "10")}}
    report.write_json(tmp_path / "step.json", {"device_type": "cuda", "step": [step]})
    report.write_json(tmp_path / "budget.json", {"0.1B 8192": {"share": 0.004}})
    (tmp_path / "suite.log").write_text("part tests exit 124 after 85 s\npart budget exit 0 after 90 s\nstopped\n")
    workers = "[gw{}] [ 12%] {} tests/gac/test_gpu.py::test_launches\n"
    (tmp_path / "tests.log").write_text(
        "".join(workers.format(*one) for one in enumerate(["PASSED", "FAILED", "PASSED"]))
    )
    found = summary.summarize(tmp_path)
    assert found["tests"] == {"passed": 2, "failed": 1}
    assert found["budget"] == {"0.1B 8192": {"share": 0.004}}
    assert found["parts"]["budget"] == {"found": True, "complete": True}
    assert found["parts"]["step"] == {"found": True, "complete": False}
    assert [figure["value"] for figure in found["figures"]] == ["0.100%", "0.100%", "0.10%"]
