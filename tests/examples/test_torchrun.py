"""The torchrun example, as its first lines say to start it."""

from __future__ import annotations

import re

import pytest

from tests.examples.scripts import EXAMPLES, output_of

SECONDS = 120


@pytest.mark.timeout(SECONDS + 30)
def test_hybrid_grpo_on_two_processes(tmp_path):
    options = ["--standalone", "--nproc-per-node", 2, EXAMPLES / "hybrid_grpo_torchrun.py"]
    output = output_of("torch.distributed.run", *options, folder=tmp_path, seconds=SECONDS)
    found = {}
    for rank, step, mu in re.findall(r"rank (\d) of 2: step (\d+), mu ([\d.]+)", output):
        found.setdefault(int(step), {})[int(rank)] = mu
    assert sorted(found) == [1, 2, 3, 4]
    assert all(set(mus) == {0, 1} and mus[0] == mus[1] for mus in found.values()), found
    assert len({mus[0] for mus in found.values()}) > 1, "mu moves"
    assert "gac/mu" in output, "the trainer logs it"
