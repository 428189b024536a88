"""Bytes, calls, launches and messages against the code that they predict."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import gac
import gac.ending
import gac.observe.ledger
from gac import plan
from gac.observe.observer import Observer
from gac.observe.optimizer_space import WARM_UP
from gac.plan import DEVICES, Parameters, Setup, make_plan
from gac.plan.shapes import MODELS
from gac.statistics import Branch
from gac_kernels.layout import LANES, SketchLayout, sketch_chunk_rows
from tests.gac.models import sft_loss, tiny_model, tokens
from tests.gac.plan.models import Listed, a_step, parameters_of

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
H100 = DEVICES["h100"]


@pytest.mark.parametrize(
    ("estimator", "dtype", "ranks"),
    [("sketch", "fp32", 1), ("exact", "fp32", 1), ("sketch", "bf16", 4), ("exact", "bf16", 4)],
    indirect=["ranks"],
)
def test_bytes_and_calls_of_a_backward_pass(estimator, dtype, ranks, recorded):
    model = Listed(MODELS["10M"].shapes(), plan.DTYPES[dtype])
    with gac.patch(model, estimator=estimator) as mixer:
        with mixer.sft():
            mixer.backward(model())
        first = list(recorded)
        recorded.clear()
        with mixer.sft():
            mixer.backward(model())
        assert recorded == first
    setup = Setup(Parameters.of("10M"), H100, ranks=ranks, estimator=estimator, dtype=dtype)
    found = make_plan(setup)
    reading = "accumulate_" if estimator == "exact" else "absorb_sketch_" if ranks == 1 else "sketch"
    reads = [size for operation, size in first if operation == reading]
    absorbed = [size for operation, size in first if operation == "absorb_"]
    assert sum(reads) == found.read_bytes_per_backward
    assert len(reads) == found.calls_per_backward
    launched = plan.SKETCH_LAUNCHES * len(reads) + plan.ABSORB_LAUNCHES * len(absorbed)
    assert launched == found.launches_per_backward
    if estimator == "sketch" and ranks > 1:
        assert absorbed == [4 * found.sketch_size * 2]
    else:  # in the same launches
        assert absorbed == []


def test_second_moments_are_read_too(recorded):
    model = Listed([(3000, 700), (500,)], torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(WARM_UP):
        optimizer.step()
    for state in optimizer.state.values():
        state["exp_avg_sq"] = state["exp_avg_sq"].float()
    optimizer.zero_grad()
    with gac.patch(model, estimator="sketch", metric="optimizer") as mixer:
        mixer.follow(optimizer)
        with mixer.sft():
            mixer.backward(model())
    setup = Setup(parameters_of(model), H100, estimator="sketch", metric="optimizer")
    assert (
        sum(s for operation, s in recorded if operation == "absorb_sketch_") == make_plan(setup).read_bytes_per_backward
    )


@pytest.mark.parametrize("name", ["1B", "8B"])
def test_calls_of_a_real_model_in_the_order_of_its_backward_pass(name, recorded):
    model = MODELS[name].model(dtype=torch.bfloat16, device="meta", max_length=64)
    observer = Observer(list(model.named_parameters()), lossless=False, running=True, seed=0)
    observer.enter(Branch.SFT, torch.ones((), device="meta"))
    mask = torch.zeros(1, 1, 8, 8, device="meta", dtype=torch.bfloat16)
    model(input_ids=torch.zeros(1, 8, dtype=torch.long, device="meta"), attention_mask=mask).logits.mean().backward()
    observer.finish()
    observer.remove()
    found = make_plan(Setup(Parameters.of(name), H100))
    reads = [size for operation, size in recorded if operation == "absorb_sketch_"]
    assert (len(reads), sum(reads)) == (found.calls_per_backward, found.read_bytes_per_backward)


@pytest.mark.parametrize("estimator", ["sketch", "exact"])
def test_launches_are_those_of_the_triton_kernels(estimator, monkeypatch):
    """Every kernel starts in one place, where it is counted instead of run."""
    triton = pytest.importorskip("gac_kernels.triton")
    from gac_kernels.triton import launch as starting

    launched = []
    monkeypatch.setattr(starting, "launch", lambda kernel, grid, device, *args, **constants: launched.append(kernel))
    monkeypatch.setattr(starting, "check_device", lambda device: None)
    for operation in ("sketch", "accumulate_", "absorb_sketch_", "absorb_"):
        monkeypatch.setattr(gac.observe.ledger, operation, getattr(triton, operation))
    model = Listed([(40, 30), (7,), (2000, 100)])
    with gac.patch(model, estimator=estimator) as mixer, mixer.sft():
        mixer.backward(model())
    count = len(launched)
    found = make_plan(Setup(parameters_of(model), H100, estimator=estimator, dtype="fp32"))
    assert count == found.launches_per_backward


@pytest.mark.parametrize("numels", [[5000], [4096 * LANES * 3 + 17, 1, 70_000], [30_000_000, 2_000_000]])
def test_workspace_is_that_of_the_chunk_tables(numels):
    pytest.importorskip("triton")
    from gac_kernels.triton import tables

    layout = SketchLayout.per_tensor(numels, size=100_000)
    rows = sum(-(-n // LANES) for n in numels)
    count = len(numels)
    chunks = tables.sketch_chunks(
        tuple(numels), (count,), layout, tuple(range(count)), (0,) * count,
        sketch_chunk_rows(rows, LANES, layout.rows_per_slab),
        False, 0,
    )  # fmt: skip
    assert plan.workspace_bytes(numels, layout) == 2 * 4 * LANES * chunks.count


@pytest.mark.parametrize("ranks", [2, 1024], indirect=True)
@pytest.mark.parametrize("estimator", ["sketch", "exact"])
def test_bytes_all_reduced(ranks, estimator, monkeypatch):
    sent = []
    real = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda t, *a, **k: (sent.append(t.nbytes), real(t, *a, **k))[1])
    model = tiny_model()
    batch = tokens(1, 0)[0]
    with gac.patch(model, estimator=estimator, interval=1, report_interval=None) as mixer:
        a_step(mixer, lambda: sft_loss(model, batch), 2)
        mixer.step()
    setup = Setup(parameters_of(model), H100, ranks=ranks, estimator=estimator, micro_batches=2)
    assert sent == [make_plan(setup).all_reduce_bytes]


def test_all_reduced_bytes_do_not_grow_with_ranks():
    found = {make_plan(Setup(Parameters.of("8B"), H100, ranks=n)).all_reduce_bytes for n in (2, 8, 64, 1024)}
    assert len(found) == 1
    assert make_plan(Setup(Parameters.of("8B"), H100)).all_reduce_bytes == 0


class Counter(TorchDispatchMode):
    """Counts operations that start something on a GPU: views and allocations do not."""

    FREE = (
        "view",
        "slice",
        "select",
        "detach",
        "expand",
        "unbind",
        "split",
        "alias",
        "transpose",
        "unsqueeze",
        "empty",
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count += not name.startswith(self.FREE)
        return function(*args, **(kwargs or {}))


def test_operations_of_a_step(monkeypatch):
    """As a step ends on the GPUs that are planned for: in torch."""
    monkeypatch.setattr(gac.ending, "why_in_torch", lambda *_: "as on a GPU")
    model = tiny_model()
    with gac.patch(model, estimator="sketch", interval=1, report_interval=None) as mixer:
        for _ in range(3):
            batch = tokens(1, 0)[0]
            a_step(mixer, lambda batch=batch: sft_loss(model, batch), 2)
            with Counter() as counted:
                mixer.step()
    assert counted.count == pytest.approx(plan.STEP_OPERATIONS, rel=0.2)


def test_host_times_are_the_measured_ones():
    hook = json.loads((RESULTS / "cpu.json").read_text())["host"]["hook"]["hook"]
    assert pytest.approx(hook, rel=0.25) == plan.HOOK_SECONDS
