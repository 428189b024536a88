"""Every engine on 2 and 4 gloo processes: one mu on all ranks, equal to one process that saw all the data."""

from __future__ import annotations

import functools
import math
import sys
import types

import pytest
import torch

import gac
from tests.gac.distributed import cases, engines
from tests.gac.distributed.processes import on_ranks
from tests.gac.models import tiny_model

pytestmark = pytest.mark.timeout(300)

WORLD_2 = [
    *(f"{name}, {e}" for name in (*cases.REPLICAS, *cases.SHARDS, *cases.PLANS) for e in cases.ESTIMATORS),
    "fsdp2, bfloat16",
    "fsdp2, sync in the last pass",
    "tensor parallel",
    "compressed",
    "twenty steps",
    "communication",
    "overlap",
    "load",
    *engines.MISTAKES,
]
WORLD_4 = [
    "save",
    *(f"{name}, {estimator}" for name, estimator in cases.ON_FOUR),
    "groups of two",
    "uneven branches, sketch",
    "hsdp",
    "tensor parallel and fsdp2",
    "communication",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, list[dict]]:
    shared = str(tmp_path_factory.mktemp("shared"))  # the 2 load what the 4 saved
    found = {1: [], 2: [], 4: []}
    for world, names in ((4, WORLD_4), (2, WORLD_2)):
        folder = tmp_path_factory.mktemp("ranks")
        found[world] = on_ranks(world, folder, cases.run, shared, names, preload=cases.__name__, seconds=200)
    found[1] = [cases.run(0, 1, shared, ["load"])]
    return found


@functools.cache
def alone(world: int, together: bool, estimator: str, plan: str | None = None, *, tied: bool = True):
    chosen = engines.UNIFORM if plan is None else cases.PLANS[plan]
    return engines.alone(world, together=together, plan=chosen, model=tiny_model(tied=tied), estimator=estimator)


def agreed(found: list[dict], case: str) -> dict:
    """What all ranks found, which must be the same to the bit."""
    for rank in found:
        assert "error" not in rank[case], rank[case]["error"]
    first, *others = (rank[case] for rank in found)
    for other in others:
        assert first["mu"] == other["mu"]
        for ours, theirs in zip(first["statistics"], other["statistics"], strict=True):
            assert [float(x).hex() for x in ours.values()] == [float(x).hex() for x in theirs.values()]
        assert all(torch.equal(a, b) for a, b in zip(first["parameters"], other["parameters"], strict=True))
    return first


def assert_agree(found: dict, expected: dict, *, rel: float = 1e-5) -> None:
    assert found["mu"] == pytest.approx(expected["mu"], rel=rel)
    for ours, theirs in zip(found["statistics"], expected["statistics"], strict=True):
        # differences of large numbers: in units of what they are differences of
        scale = max(theirs["distance2"], theirs["norm_s2"]) if math.isfinite(theirs["distance2"]) else 1.0
        assert (ours["nonfinite"] > 0) == (theirs["nonfinite"] > 0)  # a NaN in a running sum is counted again
        for name in (name for name in theirs if name != "nonfinite"):
            value = theirs[name]
            assert ours[name] == pytest.approx(value, rel=rel, abs=rel * scale, nan_ok=True), name


@pytest.mark.parametrize("estimator", cases.ESTIMATORS)
@pytest.mark.parametrize("engine", [*cases.REPLICAS, *cases.SHARDS])
def test_two_ranks_equal_one_process(results, engine, estimator):
    found = agreed(results[2], f"{engine}, {estimator}")
    assert_agree(found, alone(2, engine in cases.SHARDS, estimator))


@pytest.mark.parametrize(("engine", "estimator"), cases.ON_FOUR)
def test_four_ranks_equal_one_process(results, engine, estimator):
    found = agreed(results[4], f"{engine}, {estimator}")
    assert_agree(found, alone(4, engine in cases.SHARDS, estimator))


def test_a_process_group_of_some_ranks(results):
    """Two groups side by side: each agrees within itself, and with one process that saw the data of its ranks."""
    first, second = results[4][:2], results[4][2:]
    assert_agree(agreed(first, "groups of two"), alone(2, False, "exact"))
    assert agreed(second, "groups of two")["mu"] != first[0]["groups of two"]["mu"], "other data"


def test_compressed_sketches(results, monkeypatch):
    """Sketches of replicas add up to that of one process; those of shards have another map, hence its error."""
    found = {kind: agreed([r["compressed"] for r in results[2]], kind) for kind in ("ddp", "fsdp2")}
    monkeypatch.setattr("gac.observe.ledger.SMALLEST_SKETCH", cases.BUCKETS)
    model = tiny_model(width=cases.WIDTH)
    assert_agree(found["ddp"], engines.alone(2, together=False, estimator="sketch", model=model))
    model = tiny_model(width=cases.WIDTH)
    exact = engines.alone(2, together=True, estimator="exact", model=model)["statistics"][
        0
    ]  # of the first step: later ones follow another mu
    bound = 5 * math.sqrt(2 / cases.BUCKETS) * exact["distance2"]
    for name in ("sigma_s2", "sigma_r2", "distance2", "norm_s2", "norm_r2"):
        assert found["fsdp2"]["statistics"][0][name] == pytest.approx(exact[name], abs=bound), name
        assert found["fsdp2"]["statistics"][0][name] != pytest.approx(exact[name], rel=1e-6), "compressed indeed"


def test_hybrid_sharding_counts_replicas_once(results):
    assert_agree(agreed(results[4], "hsdp"), alone(4, True, "exact"))


def test_mixed_precision(results):
    """bfloat16 gradients differ from those of one process in float32; about 3 significant digits are left."""
    assert_agree(agreed(results[2], "fsdp2, bfloat16"), alone(2, True, "exact"), rel=0.02)


def test_tensor_parallel_alone(results):
    """Both ranks see the same data: one data-parallel rank."""
    found = agreed(results[2], "tensor parallel")
    assert_agree(found, alone(1, False, "exact", tied=False))


def test_tensor_parallel_under_fsdp2(results):
    found = agreed(results[4], "tensor parallel and fsdp2")
    assert_agree(found, alone(2, True, "exact", tied=False))


def test_one_synchronised_pass_in_a_branch(results):
    """Passes without gradient sync add up to one contribution, whose noise is found by comparing steps."""
    found = agreed(results[2], "fsdp2, sync in the last pass")
    expected = alone(2, True, "exact")
    assert [s["n_s"] for s in found["statistics"]] == [1.0] * engines.STEPS
    assert math.isnan(found["statistics"][0]["sigma_s2"])
    assert all(math.isfinite(s["sigma_r2"]) for s in found["statistics"][1:])
    first, theirs = found["statistics"][0], expected["statistics"][0]
    assert first["norm_s2"] == pytest.approx(theirs["norm_s2"], rel=1e-5)
    assert first["distance2"] == pytest.approx(theirs["distance2"], rel=1e-5)


@pytest.mark.parametrize("estimator", cases.ESTIMATORS)
@pytest.mark.parametrize("plan", cases.PLANS)
def test_ranks_with_different_data(results, plan, estimator):
    found = agreed(results[2], f"{plan}, {estimator}")
    assert_agree(found, alone(2, False, estimator, plan))
    counts = [(s["n_s"], s["n_r"]) for s in found["statistics"]]
    assert counts == {"uneven branches": [(3.0, 7.0)] * 3, "a rank without rollouts": [(4.0, 2.0)] * 3}.get(
        plan, counts
    )
    nonfinite = [s["nonfinite"] > 0 for s in found["statistics"]]
    assert nonfinite == [plan == "a rank with NaN" and step == 1 for step in range(engines.STEPS)]
    if plan == "a rank with NaN":
        assert found["mu"][1] == found["mu"][0], "a poisoned step moves nothing"


def test_uneven_branches_on_four_ranks(results):
    assert_agree(agreed(results[4], "uneven branches, sketch"), alone(4, False, "sketch", "uneven branches"))


@pytest.mark.parametrize("mistake", engines.MISTAKES)
def test_mistakes_are_told_in_the_first_step_on_every_rank(results, mistake):
    for rank in results[2]:
        assert "RuntimeError" in rank[mistake]["error"]
        assert engines.MISTAKES[mistake][1] in rank[mistake]["error"]


def test_training_is_that_of_a_loop_by_hand(results):
    """Twenty steps of AdamW under DDP: nothing but the weights differs, to the bit."""
    for rank in results[2]:
        found = rank["twenty steps"]
        assert "error" not in found, found
        assert len({float(w) for w in found["weights"]}) > 10, "mu moved"
        assert all(torch.equal(a, b) for a, b in zip(found["patched"], found["by hand"], strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_communication_of_a_step(results, world):
    found = results[world][0]["communication"]
    for kind in ("ddp", "fsdp2"):
        calls, steps = found[kind]["calls"], found[kind]["steps"]
        assert len(calls) == steps, "one collective a step"
        assert len(set(calls)) == 1, "of the same size in each"
        assert calls[0] == results[2][0]["communication"][kind]["calls"][0], "whatever the number of ranks"
    assert found["fsdp2"]["calls"][0] < 200, "shards send numbers alone"


def test_the_collective_overlaps_with_what_follows(results):
    for rank in results[2]:
        # the first step waits, to confirm that hooks work on every rank
        assert rank["overlap"] == {"returned": [False, True, True], "pending": [False, True, True], "at the end": False}


@pytest.mark.parametrize("world", [2, 1])
def test_checkpoints_resume_on_fewer_ranks(results, world):
    saved = results[4][0]["save"]
    assert "error" not in saved, saved
    for rank in results[world]:
        assert "error" not in rank["load"], rank["load"]
        for way in ("torch.save", "dcp"):
            found = rank["load"][way]
            assert found["mu"] == saved["mu"][-1]
            assert found["steps"] == engines.STEPS
            law, saved_law = found["state"]["controller"]["state"], saved["state"]["controller"]["state"]
            for name, value in saved_law.items():
                torch.testing.assert_close(law[name], value, rtol=0, atol=0, equal_nan=True)
            assert rank["load"]["torch.save"]["next"] == found["next"]
            assert 0.0 < found["next"][0] < 1.0


def test_fsdp1_is_refused(monkeypatch):
    import torch.distributed.fsdp

    monkeypatch.setattr(torch.distributed.fsdp, "FullyShardedDataParallel", torch.nn.Linear)
    with pytest.raises(ValueError, match="fully_shard"):
        gac.patch(tiny_model())


@pytest.mark.parametrize(("tensor", "pipeline", "refused"), [(1, 1, False), (2, 1, True), (1, 2, True)])
def test_pieces_of_a_megatron_model_are_refused(monkeypatch, tensor, pipeline, refused):
    """By the functions of Megatron-Core's parallel_state; other models of the process are none of its business."""
    state = types.ModuleType("megatron.core.parallel_state")
    state.model_parallel_is_initialized = lambda: True
    state.get_tensor_model_parallel_world_size = lambda: tensor
    state.get_pipeline_model_parallel_world_size = lambda: pipeline
    monkeypatch.setitem(sys.modules, state.__name__, state)
    gac.patch(tiny_model())
    model = tiny_model()
    for parameter in model.parameters():
        parameter.tensor_model_parallel = False
    if refused:
        with pytest.raises(ValueError, match=f"over {tensor} tensor-parallel and {pipeline} pipeline-parallel ranks"):
            gac.patch(model)
    else:
        gac.patch(model)
