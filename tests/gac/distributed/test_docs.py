"""The snippets of docs/engines/, each as it stands, on two gloo processes."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import socket
import traceback
import warnings
from pathlib import Path

import pytest
import torch

from tests.gac.distributed.processes import on_ranks

PAGES = Path(__file__).parents[3] / "docs" / "engines"

CONTRIBUTIONS = {
    "single-process": 2,
    "ddp": 4,
    "fsdp2": 2,
    "tensor-parallel": 2,
    "amp": 2,
    "main-grad": 4,
    "deepspeed": 4,
    "accelerate": 4,
}
"""Pages, in the order of running, and how many contributions a branch has in a step of their snippets."""

SEPARATE = {"single-process", "amp"}
"""Pages for one process: two run side by side, each for itself."""


def snippet(page: str) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```$", (PAGES / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 1, f"{page}: one complete snippet, found {len(blocks)}"
    return blocks[0]


def execute(rank: int, world: int, ports: dict[str, int]) -> dict:
    """Runs every snippet; each begins and ends a process group of its own."""
    torch.distributed.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": "cpu"}
    found = {}
    for page, port in ports.items():
        os.environ["MASTER_PORT"] = str(port)
        if page == "deepspeed":
            import deepspeed

            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or a compiler is needed
        names, printed = {"__name__": "__main__"}, io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exec(compile(snippet(page), f"{page}.md", "exec"), names)
            statistics = names["mixer"].statistics
            found[page] = {
                "printed": printed.getvalue(),
                "n": (float(statistics.n_s), float(statistics.n_r)),
                "finite": bool(statistics.stacked().isfinite()[:7].all()),
            }
        except Exception:
            found[page] = {"error": traceback.format_exc()}
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    pages = [page for page in CONTRIBUTIONS if page != "deepspeed" or importlib.util.find_spec("deepspeed")]
    with contextlib.ExitStack() as stack:  # all at once, so that they differ
        probes = [stack.enter_context(socket.socket()) for _ in pages]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = {page: probe.getsockname()[1] for page, probe in zip(pages, probes, strict=True)}
    folder = tmp_path_factory.mktemp("pages")
    return on_ranks(2, folder, execute, ports, preload="tests.gac.distributed.test_docs", seconds=200)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", CONTRIBUTIONS)
def test_snippet(results, page):
    if page not in results[0]:
        compile(snippet(page), f"{page}.md", "exec")
        pytest.skip(f"{page} is not installed: docs/engines/{page}.md says how to run this")
    for rank, found in enumerate(results):
        assert "error" not in found[page], found[page]["error"]
        assert found[page]["n"] == (CONTRIBUTIONS[page], CONTRIBUTIONS[page])
        assert found[page]["finite"]
        if page not in SEPARATE:
            assert f"rank {rank}: mu" in found[page]["printed"]
    mus = [re.findall(r"mu ([\d.]+)", found[page]["printed"])[-1] for found in results]
    assert 0.0 < float(mus[0]) < 1.0
    if page not in SEPARATE:
        assert mus[0] == mus[1]


def test_every_page_is_run_and_listed():
    assert {path.stem for path in PAGES.glob("*.md")} == {*CONTRIBUTIONS, "README"}
    index = (PAGES / "README.md").read_text()
    assert all(f"({page}.md)" in index for page in CONTRIBUTIONS)
