"""Up to 1,024 ranks in torch's fake process group: whole steps of the real code, counted on one rank.

docs/scaling.md has the table, benchmarks/communication.py the simulation.
"""

from __future__ import annotations

import functools
import gc
import json

import pytest
import torch

from benchmarks import communication

CASES = [(engine, ranks, rank) for engine, places in communication.RANKS.items() for ranks, rank in places]


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _no_garbage():
    """Mixers that other tests have left behind may still follow optimizers."""
    gc.collect()


@functools.cache
def simulated(engine: str, ranks: int, rank: int) -> dict:
    return communication.simulate(engine, ranks, rank)


@functools.cache
def committed() -> dict:
    return json.loads(communication.RESULT.read_text())


@pytest.mark.parametrize(("engine", "ranks", "rank"), CASES)
def test_a_rank_does_and_sends_no_more_among_many(engine, ranks, rank):
    found, few = simulated(engine, ranks, rank), simulated(engine, *communication.RANKS[engine][0])
    print(f"{engine}, rank {rank} of {ranks}: {1e3 * found['seconds']:.1f} ms in GAC's code")
    # a shard that is small enough is kept element by element, whose squares take four operations more
    more = found["measured"]["operations"] - few["measured"]["operations"]
    assert more in (0, 4)
    for kind in ("measured", "by_module"):
        ours, theirs = found[kind], few[kind]
        assert ours["bytes"] == theirs["bytes"]
        assert ours["collectives"] == theirs["collectives"] == (2 if "quarter" in engine else 1)
        assert ours["operations"] <= theirs["operations"] + more
        assert ours["calls"] <= theirs["calls"]
    assert found["sketch_bytes"] <= few["sketch_bytes"]
    if (
        rank == 0 and not more
    ):  # the last rank has parameters without a row, and fewer operations where modules are taken apart
        assert found["by_module"]["operations"] == few["by_module"]["operations"]
    if engine == "ddp":
        assert found["measured"] == few["measured"]
    else:
        assert found["measured"]["bytes"] < 200, "shards send numbers alone"


@pytest.mark.parametrize(("engine", "ranks", "rank"), CASES)
def test_the_committed_table_is_this_code(engine, ranks, rank):
    """Bytes and collectives; operations and calls also depend on torch."""
    row = next(r for r in committed()["simulated"] if (r["engine"], r["ranks"], r["rank"]) == (engine, ranks, rank))
    found = simulated(engine, ranks, rank)
    for key in ("parameters", "gradient_bytes", "sketch_bytes", "estimator"):
        assert found[key] == row[key]
    for kind in ("measured", "by_module"):
        for key in ("bytes", "collectives"):
            assert found[kind][key] == row[kind][key]


def test_measured_bytes_are_those_of_the_simulation():
    """Real processes and simulated ones send the same."""
    for row in committed()["measured"]:
        assert row["collectives"] == 1
        if row["model"] == communication.TINY.name:
            assert row["bytes"] == simulated(row["engine"], 2, 0)["measured"]["bytes"]


def test_tables_of_the_scaling_page():
    page = (communication.RESULT.parents[2] / "docs" / "scaling.md").read_text()
    for table in communication.markdown(committed()).split("\n\n"):
        assert table in page
