"""Microbenchmarks: rows, gates that turn red, limits of memory and time, the timer and the input sets."""

import dataclasses

import pytest
import torch

import gac_kernels
from gac.bench import kernels, peers
from gac.bench.case import Case, dtype_of, size_label
from gac.bench.cases import LIST_OPERATIONS, OPERATIONS, applies, drop_failing, model_case, prepare
from gac.bench.inputs import Pools, fill
from gac.bench.kernels import Options
from gac.bench.kronecker import TOKENS, by_einsum, by_gradients, by_matmul, layers
from gac.bench.timing import CpuTimer, Samples, cache_bytes, quantile, ratio
from gac.plan.shapes import LlamaShape

CPU = torch.device("cpu")
TINY = LlamaShape("tiny", 300, 32, 48, 3, 2, 1, 16, tied=True)
QUICK = {"dtypes": ("fp32",), "sizes": (4096,), "models": (), "peers": ("eager", "foreach"), "seconds": 0.01}


def test_rows_say_everything():
    seen = []
    rows = kernels.run(Options(CPU, **QUICK), seen.append)
    assert rows == list({row["operation"]: row for row in seen}.values())  # some may be measured again
    assert [row["operation"] for row in rows] == list(OPERATIONS)
    for row in rows:
        assert row["gate"]["ok"], row
        assert row["bytes"] >= row["read_bytes"] > 0
        assert row["percent_of_read"] > 0
        assert row["read"] == "torch.sum"
        assert {name.split(":")[0] for name in row["variants"]} - {"eager", "foreach"} == {"gac", "read"}
        for found in row["variants"].values():
            assert 0 < found["p20"] <= found["p50"] <= found["p80"]
            assert found["rounds"] >= 5
        peers_run = {name for name in row["variants"] if name != "gac" and not name.startswith("read")}
        assert set(row["speedup"]) == peers_run
        assert peers_run | set(row["omitted"])


def test_what_reads_as_slower_is_measured_again(monkeypatch):
    """A burst of other programs' work slows a first look down; a slow kernel is slow in both."""

    class Timer:
        looks = 0

        def measure(self, variants, sets, *, seconds):
            Timer.looks += 1
            times = {"gac": [1.0] * 30 if always or Timer.looks == 1 else [0.1] * 31}
            # a peer that is dropped after a few rounds is compared in those
            return {name: Samples(times.get(name, [0.5] * (3 if "foreach" in name else 40))) for name in variants}

    monkeypatch.setattr(kernels, "timer_for", lambda device: Timer())
    for always in (False, True):
        Timer.looks, seen = 0, []
        (row,) = kernels.run(Options(CPU, operations=("moments",), **QUICK), seen.append)
        assert Timer.looks == 2
        assert len(seen) == 2
        assert row is seen[1]
        assert row["variants"]["gac"]["rounds"] == (60 if always else 61)
        slower = [name for name, (_, high) in row["speedup_interval"].items() if high < 1]
        assert slower == (list(row["speedup"]) if always else [])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_wrong_kernel_gets_no_speedup(operation, monkeypatch):
    operation_called = operation.removeprefix("weighted_")
    right = getattr(gac_kernels, operation_called)

    def wrong(*args, **options):
        result = right(*args, **options)
        target = result if result is not None else args[0][0] if isinstance(args[0], list) else args[0]
        target.mul_(1.01)
        return result

    monkeypatch.setattr(gac_kernels, operation_called, wrong)
    (row,) = kernels.run(Options(CPU, operations=(operation,), **QUICK))
    assert not row["gate"]["ok"]
    assert list(row["variants"]) == ["gac"]
    assert not {"speedup", "percent_of_read", "times_read", "gbps"} & set(row)


def test_parameter_lists(monkeypatch):
    monkeypatch.setitem(kernels.MODELS, "tiny", TINY)
    rows = kernels.run(Options(CPU, **QUICK | {"models": ("tiny",), "sizes": (), "dtypes": ("bf16",)}))
    *rows, block = rows
    assert [row["operation"] for row in rows] == list(LIST_OPERATIONS[:-1])
    assert all(row["gate"]["ok"] and row["tensors"] == 29 and row["elements"] == TINY.numel() for row in rows)
    assert block["operation"] == "kronecker_sketch"
    assert block["gate"]["ok"]
    assert (block["tensors"], block["elements"]) == (14, TOKENS["cpu"] * (4 * 32 + 2 * (16 + 32) + 3 * (32 + 48)))
    assert "512 tokens" in block["note"]


def test_lack_of_memory_takes_layers_away_and_says_so():
    whole = model_case("moments", "fp32", TINY, 4 * TINY.numel())
    assert whole.note == ""
    cut = model_case("pair_moments", "fp32", TINY, 7 * TINY.numel())
    assert cut.note == "2 of 3 layers: inputs are held to 0.0 GiB"
    assert cut.memory() <= 7 * TINY.numel()
    assert model_case("moments", "fp32", TINY, 1000) is None


def test_cases_that_do_not_fit_are_named(monkeypatch):
    monkeypatch.setattr(kernels, "free_bytes", lambda device: 1000)
    rows = kernels.run(Options(CPU, operations=("moments",), **QUICK | {"models": ("1B",)}))
    assert len(rows) == 2
    assert all("too little" in row["note"] and "variants" not in row for row in rows)


def test_a_case_that_runs_out_of_memory_is_left_out(monkeypatch):
    def fail(*args):
        raise MemoryError("no more")

    monkeypatch.setattr(kernels, "prepare", fail)
    (row,) = kernels.run(Options(CPU, operations=("moments",), **QUICK))
    assert row["note"] == "left out, out of memory: no more"


def test_the_time_limit_is_kept():
    rows = kernels.run(Options(CPU, limit=0.0, **QUICK))
    assert all("time limit" in row["note"] for row in rows)


def test_a_peer_that_fails_is_omitted_with_the_reason(monkeypatch):
    def fail(*args):
        raise RuntimeError("no such instruction\nmore")

    monkeypatch.setattr(torch, "_foreach_norm", fail)
    prepared = prepare(Case("moments", "fp32", 64), Pools(CPU, cold=False), ("foreach",))
    drop_failing(prepared)
    assert prepared.omitted == {"foreach: norm": "RuntimeError: no such instruction"}


def test_compile_is_omitted_where_there_is_no_compiler(monkeypatch):
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    prepared = prepare(Case("moments", "fp32", 64), Pools(CPU, cold=False), ("compile",))
    assert not prepared.peers
    assert "C++ compiler" in prepared.omitted["compile: same"]


def test_expressions_compute_what_the_operations_do():
    x, y = torch.randn(4096), torch.randn(4096)
    assert torch.allclose(peers.moments_expression(x).double(), gac_kernels.reference.moments(x), rtol=1e-5)
    assert torch.allclose(peers.pair_expression(x, y).double(), gac_kernels.reference.pair_moments(x, y), rtol=1e-4)
    layout = gac_kernels.SketchLayout((4096,), 2, seed=3)
    expected, got = torch.zeros(layout.size), torch.zeros(layout.size)
    gac_kernels.reference.sketch(x, expected, layout=layout)
    peers.sketch_expression(x, got, gac_kernels.layout.sign_key(3, 0), 2, 1024)
    assert torch.allclose(got, expected, atol=1e-6)
    gac_kernels.reference.sketch(x, expected, layout=layout, second_moments=y.abs())
    peers.sketch_expression(x, got, gac_kernels.layout.sign_key(3, 0), 2, 1024, y.abs())
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-4)
    sums = [torch.ones(4096), torch.ones(4096)]
    expected = gac_kernels.reference.accumulate_(x, sums[0], scale=0.3)
    assert torch.allclose(peers.accumulate_expression(sums[1], x, torch.tensor(0.3)).double(), expected, rtol=1e-5)
    assert torch.allclose(*sums, atol=1e-6)
    vectors = torch.ones(4, layout.size)
    cells = gac_kernels.reference.absorb_sketch_(x, *vectors[:2], 0.3, layout=layout)
    scale = torch.tensor(0.3)
    moments, found = peers.absorb_sketch_expression(x, *vectors[2:], scale, gac_kernels.layout.sign_key(3, 0), 2, 1024)
    assert torch.allclose(vectors[:2], vectors[2:], atol=1e-6)
    assert torch.allclose(moments.double(), cells[:2], rtol=1e-5)
    assert torch.allclose(found.double(), cells[2:].view(-1, 8).sum(1), rtol=1e-5)
    inputs = (-torch.rand(3, 40), torch.randn(3, 40), torch.rand(3, 40) < 0.5, torch.tensor([True, False, False]))
    expected = gac_kernels.reference.token_moments(*inputs)
    assert torch.allclose(peers.token_expression(*inputs).double(), expected, atol=1e-4)


def test_ways_to_sketch_a_layer_agree():
    """With the kernel and with each other, where a side is larger than its sketch and where it is not."""
    left, right = torch.randn(40, 48), torch.randn(40, 20)
    (layer,) = layers([left, right])
    own, weight = layer.signs(torch.float32), torch.zeros(48, 20)
    layer.sketch(gac_kernels.kronecker_sketch)
    expected = layer.out.clone()
    assert expected.shape == (4, 32, 20)
    for way in (by_matmul, by_einsum, lambda *call: by_gradients(*call, weight)):
        layer.out.zero_()
        assert torch.allclose(way(layer, *own), expected, rtol=1e-4, atol=1e-4)


def test_input_sets_exceed_the_cache():
    pools = Pools(CPU, cold=True)
    bytes_per_set = 4 * 65536
    sets = pools.sets(bytes_per_set)
    assert sets * bytes_per_set > 3.9 * cache_bytes(CPU)
    lists = Pools(CPU, cold=False).lists("a", [(100, 3), (7,)], torch.bfloat16, 3)
    assert [t.shape for t in lists.tensors[2]] == [(100, 3), (7,)]
    addresses = [t.data_ptr() for tensors in lists.tensors for t in tensors]
    assert len(set(addresses)) == 6
    assert all((a - addresses[0]) % 256 == 0 for a in addresses)


def test_pools_reuse_their_memory_with_fresh_values():
    pools = Pools(CPU, cold=False)
    first = pools.lists("a", [(50,)], torch.float32, 1).flat[0]
    before = first.clone()
    first.zero_()
    again = pools.lists("a", [(50,)], torch.float32, 1).flat[0]
    assert again.data_ptr() == first.data_ptr()
    assert torch.equal(again, before)


def test_fill_reaches_every_element():
    flat = torch.full(((1 << 20) + 77,), float("nan"))
    fill(flat, seed=1)
    assert torch.isfinite(flat).all()
    assert abs(float(flat.std()) - 1) < 0.01


def test_the_timer_takes_turns_through_all_sets():
    seen = []
    CpuTimer().measure({"a": seen.append, "b": seen.append}, 7, seconds=0.001)
    assert seen[:14] == [0, 1, 2, 3, 4, 5, *seen[6:14]]
    assert set(seen) == set(range(7))


def test_quantiles_and_ratios():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.2) == 2.0
    assert ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0


def test_labels():
    assert [size_label(n) for n in (1000, 1024, 65536, 1 << 26)] == ["1000", "1K", "64K", "64M"]
    with pytest.raises(ValueError, match="int4"):
        dtype_of("int4")
    assert not applies("absorb_", "bf16", 4096)
    assert dataclasses.replace(Case("moments", "fp32", 5), model=TINY).label == "tiny"
