"""The plan against the code that it predicts: the same bytes, calls and launches; times and errors as measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import gac
import gac.observe.ledger
import gac_kernels
from gac import plan
from gac.observe.ledger import Ledger
from gac.observe.observer import Observer
from gac.observe.optimizer_space import WARM_UP
from gac.plan import DEVICES, Noise, Parameters, Setup, make_plan, mu_error
from gac.plan.shapes import MODELS
from gac.statistics import Branch
from gac_kernels.layout import LANES, SketchLayout, sketch_chunk_rows
from tests.gac.models import sft_loss, tiny_model, tokens

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
H100 = DEVICES["h100"]


class Listed(torch.nn.Module):
    """Parameters of given shapes, and a loss that reaches all of them."""

    def __init__(self, shapes, dtype=torch.float32, *, frozen=0):
        super().__init__()
        self.parts = torch.nn.ParameterList(torch.zeros(shape, dtype=dtype) for shape in shapes)
        self.frozen = torch.nn.Parameter(torch.zeros(frozen, dtype=dtype), requires_grad=False)

    def forward(self):
        return torch.stack([part.sum() for part in self.parts]).sum()


def parameters_of(model) -> Parameters:
    return Parameters.of_shapes("model", [p.shape for p in model.parameters() if p.requires_grad])


def a_step(mixer, loss, micro_batches):
    for branch in (mixer.sft, mixer.rl):
        with branch():
            for _ in range(micro_batches):
                mixer.backward(loss())


@pytest.fixture
def recorded(monkeypatch):
    """Calls of the kernels by the ledgers: ``(operation, bytes of the gradients or of the vectors)``; nothing runs."""
    calls = []

    def sketch(tensors, out, **options):
        read = [*tensors, *(options.get("second_moments") or ())]
        calls.append(("sketch", sum(t.numel() * t.element_size() for t in read)))

    def absorb_(current, previous, total, scale, **options):
        calls.append(("absorb_", sum(t.nbytes for t in (current, previous, total) if t is not None)))

    monkeypatch.setattr(gac.observe.ledger, "sketch", sketch)
    monkeypatch.setattr(gac.observe.ledger, "absorb_", absorb_)
    return calls


@pytest.fixture
def ranks(request):
    """A process group that sends nothing, with this process as its first rank."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["sketch", "exact"])
@pytest.mark.parametrize("micro_batches", [1, 9])
def test_sketch_memory_of_a_step(estimator, micro_batches):
    model = tiny_model()
    with gac.patch(model, estimator=estimator, report_interval=None) as mixer:
        batch = tokens(1, 0)[0]
        a_step(mixer, lambda: sft_loss(model, batch), micro_batches)
        mixer.step()
        held = sum(ledger.nbytes for ledger in mixer._observer.ledgers)
        held += sum(v.nbytes for means in mixer._measurement._means for v in means.state.values() if v.dim())
    found = make_plan(Setup(parameters_of(model), H100, estimator=estimator, micro_batches=micro_batches, dtype="fp32"))
    assert found.sketch_bytes == held


@pytest.mark.parametrize("name", ["10M", "0.1B", "1B", "8B", "405B"])
def test_sketch_memory_of_large_models(name):
    numels = [math.prod(shape) for shape in MODELS[name].shapes()]
    for ranks, running in ((1, True), (64, False)):
        held = Ledger(numels, torch.device("meta"), lossless=False, running=running).nbytes
        found = make_plan(Setup(Parameters.of(name), H100, ranks=ranks, estimator="sketch"))
        assert found.sketch_bytes == held
        assert found.sketch_share == held / (2 * sum(numels))


@pytest.mark.parametrize(
    ("shapes", "frozen"),
    [([(2000, 1000)], 0), ([(2200, 2000)], 0), ([(4200, 1000)], 0), ([(8, 300_000)] * 2, 60_000_000)],
)
def test_auto_chooses_as_patch_does(shapes, frozen):
    model = Listed(shapes, frozen=frozen)
    trainable = parameters_of(model).total
    whole = Parameters("model", (trainable + frozen,), (1000,))
    with gac.patch(model) as mixer:
        setup = Setup(whole, H100, trainable=trainable, dtype="fp32")
        assert setup.observed.total == trainable
        assert setup.chosen_estimator() == mixer.estimator


# -- reading ----------------------------------------------------------------------------------------------------------


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
    reads = [size for operation, size in first if operation == "sketch"]
    absorbed = [size for operation, size in first if operation == "absorb_"]
    assert sum(reads) == found.read_bytes_per_backward
    assert len(reads) == found.calls_per_backward
    launched = plan.SKETCH_LAUNCHES * len(reads) + plan.ABSORB_LAUNCHES * len(absorbed)
    assert launched == found.launches_per_backward
    if estimator == "sketch":  # each vector is read; the totals, and previous where there is one, are written too
        assert absorbed == [4 * found.sketch_size * (3 if ranks == 1 else 2)]
    else:
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
    with gac.patch(model, estimator="sketch", metric="optimizer") as mixer:
        mixer.follow(optimizer)
        with mixer.sft():
            mixer.backward(model())
    setup = Setup(parameters_of(model), H100, estimator="sketch", metric="optimizer")
    assert sum(s for operation, s in recorded if operation == "sketch") == make_plan(setup).read_bytes_per_backward


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
    reads = [size for operation, size in recorded if operation == "sketch"]
    assert (len(reads), sum(reads)) == (found.calls_per_backward, found.read_bytes_per_backward)


@pytest.mark.parametrize("estimator", ["sketch", "exact"])
def test_launches_are_those_of_the_triton_kernels(estimator, monkeypatch):
    """Every kernel starts in one place, where it is counted instead of run."""
    triton = pytest.importorskip("gac_kernels.triton")
    from gac_kernels.triton import operations

    launched = []
    monkeypatch.setattr(operations, "launch", lambda kernel, grid, device, *args, **constants: launched.append(kernel))
    monkeypatch.setattr(operations, "check_device", lambda device: None)
    monkeypatch.setattr(gac.observe.ledger, "sketch", triton.sketch)
    monkeypatch.setattr(gac.observe.ledger, "absorb_", triton.absorb_)
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
        tuple(numels), (count,), layout, tuple(range(count)), (0,) * count, sketch_chunk_rows(rows, LANES),
        False, 0,
    )  # fmt: skip
    assert plan.workspace_bytes(numels, layout) == 2 * 4 * LANES * chunks.count


# -- communication ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 1024], indirect=True)
@pytest.mark.parametrize("estimator", ["sketch", "exact"])
def test_bytes_all_reduced(ranks, estimator, monkeypatch):
    sent = []
    real = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda t, *a, **k: (sent.append(t.nbytes), real(t, *a, **k))[1])
    model = tiny_model()
    batch = tokens(1, 0)[0]
    with gac.patch(model, estimator=estimator, report_interval=None) as mixer:
        a_step(mixer, lambda: sft_loss(model, batch), 2)
        mixer.step()
    setup = Setup(parameters_of(model), H100, ranks=ranks, estimator=estimator, micro_batches=2)
    assert sent == [make_plan(setup).all_reduce_bytes]


@pytest.mark.parametrize("ranks", [4, 64], indirect=True)
@pytest.mark.parametrize("estimator", ["sketch", "exact"])
def test_a_step_of_fsdp2(ranks, estimator, recorded, monkeypatch):
    """Memory, bytes read and sent, launches: of the real engine's first rank."""
    model = tiny_model()
    whole = parameters_of(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    batch, sent = tokens(1, 0)[0], []
    real = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda t, *a, **k: (sent.append(t.nbytes), real(t, *a, **k))[1])
    with gac.patch(model, estimator=estimator, report_interval=None) as mixer:
        a_step(mixer, lambda: sft_loss(model, batch), 2)
        mixer.step()
        held = sum(ledger.nbytes for ledger in mixer._observer.ledgers)
    calls = list(recorded)
    setup = Setup(whole, H100, ranks=ranks, sharding="fsdp", estimator=estimator, micro_batches=2, dtype="fp32")
    found = make_plan(setup)
    assert found.sketch_bytes == held
    assert sent == [found.all_reduce_bytes]
    reads = [size for operation, size in calls if operation == "sketch"]
    assert reads == [found.read_bytes_per_backward] * 4
    assert len(calls) == 8
    assert found.launches_per_backward == plan.SKETCH_LAUNCHES + plan.ABSORB_LAUNCHES


def test_all_reduced_bytes_do_not_grow_with_ranks():
    found = {make_plan(Setup(Parameters.of("8B"), H100, ranks=n)).all_reduce_bytes for n in (2, 8, 64, 1024)}
    assert len(found) == 1
    assert make_plan(Setup(Parameters.of("8B"), H100)).all_reduce_bytes == 0


def test_time_of_an_all_reduce():
    device = plan.Device("d", 1.0, 1.0, link=100e9, network=10e9, link_efficiency=0.5)
    assert device.all_reduce_seconds(10**9, 1) == 0
    assert device.all_reduce_seconds(10**9, 8) == pytest.approx(2 * 7 / 8 * 1e9 / 50e9 + 6 * plan.LATENCY)
    assert device.all_reduce_seconds(10**9, 16) == pytest.approx(2 * 15 / 16 * 1e9 / 5e9 + 8 * plan.LATENCY)


# -- time -------------------------------------------------------------------------------------------------------------


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


def test_operations_of_a_step():
    model = tiny_model()
    with gac.patch(model, estimator="sketch", report_interval=None) as mixer:
        for _ in range(3):
            batch = tokens(1, 0)[0]
            a_step(mixer, lambda batch=batch: sft_loss(model, batch), 2)
            with Counter() as counted:
                mixer.step()
    assert counted.count == pytest.approx(plan.STEP_OPERATIONS, rel=0.2)


def test_cpu_overhead_is_the_measured_one_within_a_factor_of_two():
    results = json.loads((RESULTS / "cpu.json").read_text())
    for row in results["step"]:
        setup = Setup(
            Parameters.of(row["model"]),
            DEVICES["cpu"],
            tokens=row["tokens"],
            micro_batches=row["micro_batches_per_branch"],
            dtype={"float32": "fp32", "bfloat16": "bf16"}[row["dtype"]],
        )
        found = make_plan(setup)
        assert found.parameters == row["parameters"]
        assert found.estimator == row["estimator"]
        assert found.gradient_bytes == row["gradient_bytes"]
        measured = row["intervals"]["1"]
        assert 0.5 < found.gac_seconds / measured["seconds_in_gac"] < 2.0
        assert 0.5 < found.share / measured["share_in_gac"] < 2.0
        said = (
            f"the plan says {1e3 * found.gac_seconds:.1f} ms a step in GAC and {found.share:.2%} of it; measured were "
            f"{1e3 * measured['seconds_in_gac']:.1f} ms and {measured['share_in_gac']:.2%}"
        )
        assert said in (RESULTS.parents[1] / "docs" / "scaling.md").read_text()


def test_host_times_are_the_measured_ones():
    hook = json.loads((RESULTS / "cpu.json").read_text())["host"]["hook"]["hook"]
    assert pytest.approx(hook, rel=0.25) == plan.HOOK_SECONDS


def test_interval_divides_the_overhead_and_lora_shrinks_it():
    whole = make_plan(Setup(Parameters.of("8B"), H100))
    every_tenth = make_plan(Setup(Parameters.of("8B"), H100, interval=10))
    assert every_tenth.share == pytest.approx(whole.share / 10)
    lora = make_plan(Setup(Parameters.of("8B"), H100, trainable=40_000_000))
    assert lora.trainable == 40_000_000
    assert lora.estimator == "exact"
    assert lora.step_seconds == pytest.approx(whole.step_seconds * 4 / 6, rel=0.01)
    assert lora.read_bytes_per_backward == 2 * 40_000_000
    assert lora.read_seconds < whole.read_seconds / 20
    assert lora.share < whole.share / 10


# -- the error of mu --------------------------------------------------------------------------------------------------


def simulated_steps(noise, n, steps, generator):
    """``[3, steps]``: sigma_s2, sigma_r2 and distance2 of draws with the noise that the plan assumes."""
    rank = int(noise.rank)

    def branch(variance, mean):
        x = torch.randn(steps, n, rank, generator=generator, dtype=torch.float64)
        if noise.excess:  # a contribution's own variance: gamma distributed, mean 1
            gamma = torch.distributions.Gamma(1 / noise.excess, 1 / noise.excess)
            x = x * gamma.sample((steps, n, 1)).double().sqrt()
        x = (x * math.sqrt(variance / n / rank) + mean / n).to(torch.float64)
        total = x.sum(1)
        return n / (n - 1) * (x.square().sum((1, 2)) - total.square().sum(1) / n), total

    torch.manual_seed(0)
    sigma_s, sigma_r = (q / (1 + noise.ratio) / n for q in (noise.ratio, 1.0))
    direction = torch.randn(rank, generator=generator, dtype=torch.float64)
    direction *= math.sqrt(noise.disagreement) / direction.norm()
    power_s, total_s = branch(sigma_s, direction)
    power_r, total_r = branch(sigma_r, 0 * direction)
    return torch.stack([power_s, power_r, (total_s - total_r).square().sum(1)])


@pytest.mark.parametrize(
    ("noise", "n", "alpha", "interval", "momentum"),
    [
        (Noise(rank=20, excess=0.0, disagreement=0.2, ratio=1.0), 4, 0.5, 1, 0.0),
        (Noise(rank=20, excess=0.0, disagreement=0.05, ratio=4.0), 8, 0.2, 1, 0.0),
        (Noise(rank=20, excess=1.0, disagreement=0.2, ratio=0.5), 4, 0.5, 1, 0.0),
        (Noise(rank=20, excess=1.0, disagreement=0.1, ratio=3.0), 6, 0.8, 3, 0.0),
        (Noise(rank=200, excess=0.0, disagreement=0.5, ratio=4.0), 8, 0.2, 1, 0.9),
        (Noise(rank=200, excess=1.0, disagreement=0.5, ratio=3.0), 6, 0.8, 3, 0.5),
    ],
)
def test_standard_error_is_that_of_simulated_steps(noise, n, alpha, interval, momentum):
    chains, length, half_life = 600, 40, 12.0
    values = simulated_steps(noise, n, chains * length, torch.Generator().manual_seed(1)).view(3, chains, length)
    keep = 2.0 ** (-interval / half_life)
    weights = keep ** torch.arange(length, dtype=torch.float64).flip(0)
    sigma_s, sigma_r, distance = (values * weights / weights.sum()).sum(2)
    left, delta = (1 - momentum) / (1 + momentum), distance - sigma_s - sigma_r
    mus = (alpha * delta + left * sigma_r) / (delta + left * (sigma_s + sigma_r))
    found = mu_error(noise, n, size=None, alpha=alpha, half_life=half_life, interval=interval, momentum=momentum)
    # the chain is cut off: its weights leave a little more variance than an endless one's
    cut = math.sqrt((1 + keep**length) / (1 - keep**length))
    sure = 1 / math.sqrt(2 * chains)
    assert float(mus.std()) == pytest.approx(found.smoothed * cut, rel=4 * sure)
    assert float(mus.mean()) == pytest.approx(found.mu, abs=0.25 * found.one_step)
    assert found.sketch == 0


def test_the_law_averages_as_the_plan_says():
    noise, n, steps = Noise(rank=20, excess=0.5), 8, 1000
    values = simulated_steps(noise, n, steps, torch.Generator().manual_seed(2)).tolist()
    controller, found = gac.Controller("gac", half_life=3.0), []
    for sigma_s, sigma_r, distance in zip(*values, strict=True):
        delta = distance - sigma_s - sigma_r
        statistics = gac.Statistics(sigma_s2=sigma_s, sigma_r2=sigma_r, delta_g2=delta, distance2=distance)
        controller.update(statistics)
        found.append(float(controller.law.state["raw"]))
    settled = torch.tensor(found[20:], dtype=torch.float64)
    independent = len(settled) * math.tanh(math.log(2) / 3.0 / 2)  # (1-k)/(1+k) of autocorrelated values
    expected = mu_error(noise, n, size=None, half_life=3.0).smoothed
    assert float(settled.std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * independent))


def test_sketch_error_is_that_of_the_sketch():
    """Over seeds, with a gradient so long that its sketch is a good deal shorter."""
    size, numel, seeds = 1024, 64 * 1024, 200
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(numel, generator=generator)
    found = []
    for seed in range(seeds):
        layout = SketchLayout.per_tensor([numel], size=size, seed=seed)
        out = torch.zeros(layout.size)
        gac_kernels.sketch([x], out, layout=layout)
        found.append(float(out.double().square().sum() / x.double().square().sum()))
    spread = float(torch.tensor(found).std())
    noise = Noise(rank=1e9, excess=0.0, disagreement=0.0, ratio=1e-6)  # mu = 1 - |x|^2 / |x|^2 of the same vector
    predicted = mu_error(noise, 10**6, size=size, alpha=0.0).sketch
    assert predicted / math.sqrt(2) == pytest.approx(spread, rel=4 / math.sqrt(2 * seeds))


# -- parameter lists --------------------------------------------------------------------------------------------------


def test_a_number_takes_the_nearest_list():
    found = Parameters.of("70e9")
    assert found.total == 70_000_000_000
    assert len(found.numels) == len(MODELS["70B"].shapes())
    assert not found.exact
    exact = Parameters.of("70B")
    assert (exact.total, exact.exact) == (70_553_706_496, True)
    assert Parameters.of("405B").total == 405_853_388_800
    assert Parameters.of("1").total == 1


def test_a_configuration_gives_its_own_list(tmp_path):
    model = tiny_model("llama", tied=False)
    model.config.save_pretrained(tmp_path)
    assert Parameters.of(str(tmp_path)).numels == tuple(p.numel() for p in model.parameters())
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ValueError, match="no configuration of a causal language model"):
        Parameters.of(str(tmp_path))


@pytest.mark.parametrize("ranks", [3, 8, 64])
def test_shards_are_torch_chunks(ranks):
    shapes = [(100, 30), (7,), (64, 2, 5)]
    first = [torch.empty(shape).chunk(ranks)[0].numel() for shape in shapes]
    assert list(Parameters.of_shapes("m", shapes).shard(ranks).numels) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sharding": "zero"}, "unknown sharding 'zero'; known: ddp, fsdp"),
        ({"ranks": 0}, "ranks must be at least 1, got 0"),
        ({"alpha": 2.0}, r"alpha must be in \[0, 1\], got 2.0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
        ({"half_life": 0.0}, "half_life must be positive"),
        ({"trainable": 10**12}, "trainable must be from 1"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Setup(Parameters.of("1B"), H100, **change)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        Noise(rank=0.5)
    with pytest.raises(ValueError, match="ratio must be positive"):
        Noise(ratio=0.0)


def test_the_plan_follows_the_mixers_own_rules(monkeypatch):
    """Which estimator and how it reads is decided in one place; the plan asks there."""
    model = Listed([(300, 70), (500,)], torch.float32)
    setup = Setup(parameters_of(model), H100, dtype="fp32")
    chosen = []
    for limit in (32 * 2**20, 0):
        monkeypatch.setattr("gac.observe.choice.EXACT_BYTES", limit)
        monkeypatch.setattr("gac.observe.choice.EXACT_SHARE", 0.0)
        with gac.patch(model) as mixer:
            chosen.append((mixer.estimator, setup.chosen_estimator(), make_plan(setup).estimator))
    assert chosen == [("exact",) * 3, ("sketch",) * 3]
