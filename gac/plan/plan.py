"""What GAC costs, and how sure its mu is, for a model and machines that need not be at hand. See docs/scaling.md.

Sizes come from the objects that a training run would use, built of fake tensors; times from published peaks of the
device with a stated efficiency; the standard error of mu from the delta method.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gac.bench.shapes import MODELS
from gac.laws.base import noise_left
from gac.laws.gac import LONG
from gac.measurement import EXACT_BYTES, EXACT_BYTES_REDUCED, EXACT_SHARE
from gac.observe.ledger import Ledger
from gac.observe.pending import bucket_bytes
from gac.statistics import Branch
from gac_kernels.layout import LANES, SketchLayout

SHARDINGS = ("ddp", "fsdp")
ESTIMATORS = ("auto", "sketch", "exact")
METRICS = ("gradient", "optimizer")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

HOOK_SECONDS = 2.5e-6
"""Host time of the hook of one parameter in one backward pass; measured, benchmarks/results/cpu.json, host/hook."""

TENSOR_SECONDS = 1.4e-6
"""Host time of one tensor of a kernel call's list; measured, docs/kernels.md."""

LAUNCH_SECONDS = 10e-6
"""Host time of one kernel launch; the range seen for Triton is 6 to 30 us."""

STEP_OPERATIONS = 180
"""Small tensor operations of one ``mixer.step()``; counted by the tests."""

OPERATION_SECONDS = 7e-6
"""Host time of one of them; measured, 1.3 ms a step on the CPU of cpu.json."""

REPLICA_NUMBERS, SHARD_NUMBERS = 10, 7
"""Numbers in the message of replicas, beside both branches' sketches, and of shards, beside two a contribution."""

SKETCH_LAUNCHES, ABSORB_LAUNCHES = 2, 1
"""Kernels of one call of ``sketch`` (for gradients of one dtype) and of ``absorb_``."""

LATENCY = 5e-6
"""Seconds of one hop of a collective."""

NODE = 8
"""Ranks that share the fast links of one machine."""


@dataclass(frozen=True)
class Device:
    """Published peaks of one rank's device, and the share of them that is counted on.

    Attributes:
        bandwidth: of the memory, bytes a second. flops: dense, in the gradients' 16-bit type, operations a second.
        link, network: bytes a second, one direction, to ranks of the same machine and of others.
        memory: bytes; None: unknown.
        gap: device seconds between dependent kernels.
        synchronous: whether the host does the work itself, so that its time adds to the device's.
    """

    name: str
    bandwidth: float
    flops: float
    link: float
    network: float
    memory: float | None = None
    read_efficiency: float = 0.9
    compute_efficiency: float = 0.4
    link_efficiency: float = 0.7
    gap: float = 3e-6
    synchronous: bool = False

    @property
    def read(self) -> float:
        """Bytes a second that kernels read."""
        return self.bandwidth * self.read_efficiency

    @property
    def compute(self) -> float:
        """Operations a second of a training step."""
        return self.flops * self.compute_efficiency

    def all_reduce_seconds(self, size: int, ranks: int) -> float:
        """Seconds of one all-reduce of ``size`` bytes: a ring's transfers and a tree's hops."""
        if ranks < 2:
            return 0.0
        link = self.link if ranks <= NODE else self.network
        moved = 2 * (ranks - 1) / ranks * size
        return moved / (link * self.link_efficiency) + 2 * math.ceil(math.log2(ranks)) * LATENCY


DEVICES = {
    device.name: device
    for device in (
        Device("h100", 3.35e12, 989e12, 450e9, 50e9, 80e9),
        Device("h200", 4.8e12, 989e12, 450e9, 50e9, 141e9),
        Device("a100", 2.039e12, 312e12, 300e9, 25e9, 80e9),
        Device("b200", 8.0e12, 2250e12, 900e9, 50e9, 180e9),
        Device(
            "cpu", 2.7e10, 8.4e10, 1.25e9, 1.25e9, read_efficiency=1.0, compute_efficiency=1.0, gap=0.0,
            synchronous=True,
        ),
    )
}  # fmt: skip
"""SXM boards, and two cores of the CPU of benchmarks/results/cpu.json as measured; sources in docs/scaling.md."""


@dataclass(frozen=True)
class Parameters:
    """The parameter list of a model.

    Attributes:
        name: what the user called it.
        numels: elements of each parameter, in the order of ``model.parameters()``.
        rows: first dimension of each: what FSDP cuts.
        exact: False where the list is another model's, scaled.
    """

    name: str
    numels: tuple[int, ...]
    rows: tuple[int, ...]
    exact: bool = True

    @classmethod
    def of_shapes(cls, name: str, shapes: Sequence[Sequence[int]]) -> Parameters:
        """The list of tensors of these shapes."""
        return cls(name, tuple(math.prod(s) for s in shapes), tuple(s[0] if len(s) else 1 for s in shapes))

    @classmethod
    def of(cls, model: str) -> Parameters:
        """From a name of :data:`MODELS` (``"8B"``), a number (``"70e9"``) or a transformers configuration's path.

        A number takes the list of the named model of the nearest size, every tensor scaled alike.
        Raises ValueError for anything else.
        """
        if model in MODELS:
            return cls.of_shapes(model, MODELS[model].shapes())
        try:
            count = float(model)
        except ValueError:
            return cls.of_shapes(model, _shapes_of_config(Path(model)))
        if not 1 <= count <= 1e15:
            raise ValueError(f"params must be at least 1 and at most 1e15, got {model}")
        near = min(MODELS.values(), key=lambda shape: abs(math.log(shape.numel() / count)))
        return cls.of_shapes(near.name, near.shapes()).scaled(model, round(count))

    def scaled(self, name: str, total: int) -> Parameters:
        """The same list with ``total`` elements in all."""
        ends, done, whole = [0], 0, sum(self.numels)
        for numel in self.numels:
            done += numel
            ends.append(round(total * done / whole))
        numels = tuple(b - a for a, b in itertools.pairwise(ends))
        kept = [(n, min(n, r)) for n, r in zip(numels, self.rows, strict=True) if n]
        return Parameters(name, tuple(n for n, _ in kept), tuple(r for _, r in kept), exact=False)

    def adapters(self, total: int) -> Parameters:
        """LoRA adapters with ``total`` elements: two for each matrix except the embedding and what is as tall."""
        pairs = [
            (rows, numel // rows)
            for rows, numel in zip(self.rows, self.numels, strict=True)
            if numel > rows and rows != self.rows[0]
        ]
        shapes = [(1, n) for pair in pairs for n in pair] or [(1, total)]
        return Parameters.of_shapes(self.name, shapes).scaled(self.name, total)

    def shard(self, ranks: int) -> Parameters:
        """What the first of ``ranks`` ranks holds when the rows of every tensor are dealt out."""
        share = [-(-r // ranks) for r in self.rows]
        numels = tuple(-(-n * s // r) for n, r, s in zip(self.numels, self.rows, share, strict=True))
        return Parameters(self.name, numels, tuple(share), self.exact)

    @property
    def total(self) -> int:
        """Elements in all."""
        return sum(self.numels)


def _shapes_of_config(path: Path) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a causal language model, from its configuration alone."""
    if not path.exists():
        raise ValueError(
            f"params must be a number (70e9), one of {', '.join(MODELS)}, or the path of a transformers configuration; "
            f"got {str(path)!r}, which is none of them"
        )
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ValueError("a configuration's path as params needs transformers: pip install transformers") from error
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{str(path)!r} is no configuration of a causal language model: {reason}") from error
    return [tuple(p.shape) for p in model.parameters()]


# -- reading ----------------------------------------------------------------------------------------------------------


def sketch_chunk_rows(rows: int) -> int:
    """Rows that one program of the sketch adds up, as :mod:`gac_kernels.triton.config` (which needs Triton) has it."""
    chunk = 64
    while chunk * 2 <= 256 and rows // (chunk * 2) >= 4096:
        chunk *= 2
    return chunk


def buckets(numels: Sequence[int], itemsize: int, *, sharded: bool, running: bool) -> list[list[int]]:
    """Parameters (by index) of each kernel call of a backward pass, which reaches the last parameter first."""
    full = bucket_bytes(sharded=sharded, running=running)
    found: list[list[int]] = [[]]
    pending = 0
    for index in reversed(range(len(numels))):
        found[-1].append(index)
        pending += numels[index] * itemsize
        if pending >= full:
            found.append([])
            pending = 0
    return [bucket for bucket in found if bucket]


def workspace_bytes(numels: Sequence[int], layout: SketchLayout) -> int:
    """Bytes that the two stages of one sketch call on a GPU write and read between them."""
    rows = [-(-n // LANES) for n in numels]
    chunk = sketch_chunk_rows(sum(rows))
    slab = layout.rows_per_slab
    chunks = sum(r // slab * -(-slab // chunk) + -(-(r % slab) // chunk) for r in rows)
    return 2 * 4 * LANES * chunks


@dataclass(frozen=True)
class Noise:
    """What is assumed of the gradients; docs/scaling.md has the measurements behind the defaults.

    Attributes:
        rank: directions that carry a contribution's noise, ``(tr C)^2 / tr(C^2)``.
        excess: variance of a contribution's squared noise, relative, beyond the Gaussian ``2/rank``: heavy tails.
        disagreement: ``delta_g2 / (sigma_s2 + sigma_r2)`` for one micro-batch of one rank in each branch.
        ratio: ``sigma_s2 / sigma_r2``.
    """

    rank: float = 30.0
    excess: float = 1.0
    disagreement: float = 0.2
    ratio: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("rank", 1.0), ("excess", 0.0), ("disagreement", 0.0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be at least {least:g}, got {getattr(self, name)}")
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"ratio must be positive, got {self.ratio}")


@dataclass(frozen=True)
class MuError:
    """mu, and the parts of its standard error.

    Attributes:
        mu: the best mu for the assumed gradients.
        one_step: standard error of the closed form of a single measured step.
        smoothed: what is left of it after the law's averaging.
        sketch: the sketch's own error, which averaging does not touch.
    """

    mu: float
    one_step: float
    smoothed: float
    sketch: float

    @property
    def total(self) -> float:
        """Standard error of the law's estimate."""
        return math.hypot(self.smoothed, self.sketch)


def mu_error(
    noise: Noise,
    n: int,
    *,
    averaged: int = 1,
    size: int | None,
    alpha: float = 0.5,
    half_life: float | None = None,
    interval: int = 1,
    momentum: float = 0.0,
) -> MuError:
    """Standard error of mu from ``n`` contributions of each branch, by the delta method.

    ``mu = (alpha delta_g2 + k sigma_r2) / (delta_g2 + k (sigma_s2 + sigma_r2))`` with ``k = (1-momentum)/(1+momentum)``
    and ``delta_g2 = distance2 - sigma_s2 - sigma_r2``. Gaussian noise of rank ``r`` gives
    ``Var sigma2 = 2 sigma2^2 / ((n-1) r)`` and ``Var distance2 = 2 Q (Q + 2 delta_g2) / r`` with
    ``Q = sigma_s2 + sigma_r2`` (both branches' noise and their disagreement in the same directions, the worst case);
    heavy tails move ``sigma2`` and ``distance2`` together, with the variance ``excess / n`` of ``sigma2^2``.

    Args:
        n: contributions of a branch and step; 1 stands for the comparison with earlier steps, counted as two.
        averaged: micro-batches that each of them is the mean of (FSDP: the ranks).
        size: buckets of the sketch over all ranks; None: exact.
        half_life: of the law's average, in steps; default: the long one's, which is in charge while statistics stand.
        interval: steps between measurements.
        momentum: of the optimizer, as the law counts it.
    """
    half_life = LONG if half_life is None else half_life
    sigma_s, sigma_r = (x / (1 + noise.ratio) / (n * averaged) for x in (noise.ratio, 1.0))
    both, delta = sigma_s + sigma_r, noise.disagreement
    left = noise_left(momentum)
    divisor = delta + left * both
    mu = (alpha * delta + left * sigma_r) / divisor
    freedom = max(n - 1, 1) * noise.rank
    sigmas = ((left - alpha + (1 - left) * mu) * sigma_r) ** 2 + ((alpha - (1 - left) * mu) * sigma_s) ** 2
    gaussian = sigmas * 2 / freedom + (mu - alpha) ** 2 * 2 * both * (both + 2 * delta) / noise.rank
    tails = noise.excess / (n * averaged) * left**2 * (((1 - mu) * sigma_r) ** 2 + (mu * sigma_s) ** 2)
    one_step = math.sqrt(gaussian + tails) / divisor
    keep = 2.0 ** (-interval / half_life)
    sketch = 0.0
    if size is not None:
        sketch = math.sqrt(2 / size * (sigmas + ((mu - alpha) * (delta + both)) ** 2)) / divisor
    return MuError(mu, one_step, one_step * math.sqrt((1 - keep) / (1 + keep)), sketch)


# -- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What is asked for.

    Attributes:
        parameters: of the model.
        trainable: trainable ones; None: all. Fewer are taken for LoRA adapters.
        tokens: per micro-batch and rank. micro_batches: per branch, rank and step.
        interval: steps between measurements.
        dtype: of the gradients; a key of :data:`DTYPES`.
        metric: ``optimizer`` also reads Adam's second moments.
        alpha, half_life, momentum: of law ``gac``; the momentum is that of the optimizer.
    """

    parameters: Parameters
    device: Device
    trainable: int | None = None
    ranks: int = 1
    sharding: str = "ddp"
    tokens: int = 8192
    micro_batches: int = 4
    interval: int = 1
    dtype: str = "bf16"
    estimator: str = "auto"
    metric: str = "gradient"
    alpha: float = 0.5
    half_life: float | None = None
    momentum: float = 0.9
    noise: Noise = Noise()

    def __post_init__(self) -> None:
        known = {"sharding": SHARDINGS, "dtype": tuple(DTYPES), "estimator": ESTIMATORS, "metric": METRICS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; known: {', '.join(values)}")
        for name in ("ranks", "tokens", "micro_batches", "interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {self.alpha}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if self.half_life is not None and not self.half_life > 0:
            raise ValueError(f"half_life must be positive, got {self.half_life}")
        if self.trainable is not None and not 1 <= self.trainable <= self.parameters.total:
            raise ValueError(
                f"trainable must be from 1 to the model's {self.parameters.total:,} parameters, got {self.trainable}"
            )

    @property
    def observed(self) -> Parameters:
        """The trainable parameters, whole."""
        if self.trainable in (None, self.parameters.total):
            return self.parameters
        return self.parameters.adapters(self.trainable)

    @property
    def itemsize(self) -> int:
        """Bytes of a gradient element."""
        return DTYPES[self.dtype].itemsize

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a piece of every contribution."""
        return self.sharding == "fsdp" and self.ranks > 1

    def on_this_rank(self, parameters: Parameters) -> Parameters:
        """What the rank that holds most has of them."""
        return parameters.shard(self.ranks) if self.sharded else parameters

    def chosen_estimator(self) -> str:
        """What ``auto`` stands for, by the rule of :func:`gac.patch`."""
        if self.estimator != "auto":
            return self.estimator
        buffers = 8 * self.on_this_rank(self.observed).total
        if self.ranks > 1 and not self.sharded:
            return "exact" if buffers <= EXACT_BYTES_REDUCED else "sketch"
        whole = self.on_this_rank(self.parameters).total * self.itemsize
        return "exact" if buffers <= max(EXACT_BYTES, EXACT_SHARE * whole) else "sketch"


@dataclass(frozen=True)
class Plan:
    """What one rank pays, and what it gets. Bytes and seconds; *per step* is a measured step.

    Attributes:
        parameters, trainable: of the whole model. tensors: trainable tensors.
        estimator: ``sketch`` or ``exact``.
        contributions: of each branch in a step, over all ranks.
        gradient_bytes: what one backward pass leaves on this rank.
        read_bytes_per_backward: gradients, and second moments for ``metric="optimizer"``.
        moved_bytes_per_backward: with everything that the kernels read and write besides.
        read_bytes_per_step, moved_bytes_per_step: of all backward passes and the step's end.
        calls_per_backward: of the sketch kernel, one for each bucket of gradients.
        launches_per_backward: kernels started.
        host_seconds_per_step: in hooks, calls and launches; beside the device's work on a GPU.
        sketch_size: buckets. sketch_bytes: device memory of sketches and sums. sketch_share: of the gradient bytes.
        all_reduce_bytes: one message per step. all_reduce_share: of the bytes of the whole gradient.
        all_reduce_seconds: of that message alone.
        read_seconds: in the kernels that read gradients and add up sketches.
        finish_seconds: in ``mixer.step()``, without the message.
        gac_seconds: all of it. step_seconds: of the model. share: GAC's of a step, over the interval.
        host_share: host time over the model's step, likewise.
        mu, mu_se, mu_se_one_step, mu_se_smoothed, mu_se_sketch: see :class:`MuError`.
        notes: what to know before relying on it.
    """

    parameters: int
    trainable: int
    tensors: int
    estimator: str
    contributions: int
    gradient_bytes: int
    read_bytes_per_backward: int
    moved_bytes_per_backward: int
    read_bytes_per_step: int
    moved_bytes_per_step: int
    calls_per_backward: int
    launches_per_backward: int
    host_seconds_per_step: float
    sketch_size: int
    sketch_bytes: int
    sketch_share: float
    all_reduce_bytes: int
    all_reduce_share: float
    all_reduce_seconds: float
    read_seconds: float
    finish_seconds: float
    gac_seconds: float
    step_seconds: float
    share: float
    host_share: float
    mu: float
    mu_se: float
    mu_se_one_step: float
    mu_se_smoothed: float
    mu_se_sketch: float
    notes: tuple[str, ...]


def make_plan(setup: Setup) -> Plan:
    """Predicts; allocates nothing of a model's size."""
    device, backwards = setup.device, 2 * setup.micro_batches
    whole, sharded = setup.observed, setup.sharded
    local = setup.on_this_rank(whole)
    estimator = setup.chosen_estimator()
    lossless = estimator == "exact"
    running = sharded or (not lossless and setup.ranks == 1)
    ledger = ledger_after(local.numels, lossless=lossless, running=running, contributions=backwards)
    size = ledger.layout.size
    vectors = 2 if ledger.direct else 3 + running

    gradient_bytes = setup.itemsize * local.total
    read = gradient_bytes + (4 * local.total if setup.metric == "optimizer" else 0)
    calls = buckets(local.numels, setup.itemsize, sharded=sharded, running=running)
    moved = read + _kernel_bytes(local, calls, ledger, device)
    launches = SKETCH_LAUNCHES * len(calls) + (0 if ledger.direct else ABSORB_LAUNCHES)
    # the end of a step: inner products of the totals, zeros over everything, and the message with its way back
    reduced = setup.ranks > 1 and not sharded
    finish = 4 * size * (2 + vectors + (8 if reduced else 0))
    message = 0
    if setup.ranks > 1:
        message = 4 * (SHARD_NUMBERS + 2 * backwards if sharded else REPLICA_NUMBERS + 2 * size)

    host = backwards * (len(local.numels) * (HOOK_SECONDS + TENSOR_SECONDS) + launches * LAUNCH_SECONDS)
    host += STEP_OPERATIONS * OPERATION_SECONDS
    read_seconds = backwards * (moved / device.read + launches * device.gap)
    finish_seconds = finish / device.read + STEP_OPERATIONS * device.gap
    sending = device.all_reduce_seconds(message, setup.ranks)
    gac = read_seconds + finish_seconds + sending + (host if device.synchronous else 0.0)
    operations = 4 * setup.parameters.total + 2 * whole.total
    step = backwards * operations * setup.tokens / device.compute

    n = setup.micro_batches * (1 if sharded else setup.ranks)
    buckets_in_all = None if lossless or ledger.layout.lossless else size * (setup.ranks if sharded else 1)
    error = mu_error(
        setup.noise,
        n,
        averaged=setup.ranks if sharded else 1,
        size=buckets_in_all,
        alpha=setup.alpha,
        half_life=setup.half_life,
        interval=setup.interval,
        momentum=setup.momentum,
    )
    sketches = ledger.nbytes + (2 * 4 * size if n == 1 else 0)  # moving means of both branches serve as replicates
    return Plan(
        parameters=setup.parameters.total,
        trainable=whole.total,
        tensors=len(whole.numels),
        estimator=estimator,
        contributions=n,
        gradient_bytes=gradient_bytes,
        read_bytes_per_backward=read,
        moved_bytes_per_backward=moved,
        read_bytes_per_step=backwards * read,
        moved_bytes_per_step=backwards * moved + finish,
        calls_per_backward=len(calls),
        launches_per_backward=launches,
        host_seconds_per_step=host,
        sketch_size=size,
        sketch_bytes=sketches,
        sketch_share=sketches / gradient_bytes,
        all_reduce_bytes=message,
        all_reduce_share=message / (setup.itemsize * whole.total),
        all_reduce_seconds=sending,
        read_seconds=read_seconds,
        finish_seconds=finish_seconds,
        gac_seconds=gac,
        step_seconds=step,
        share=gac / setup.interval / step,
        host_share=host / setup.interval / step,
        mu=error.mu,
        mu_se=error.total,
        mu_se_one_step=error.one_step,
        mu_se_smoothed=error.smoothed,
        mu_se_sketch=error.sketch,
        notes=_notes(setup, n, sharded),
    )


def ledger_after(numels: Sequence[int], *, lossless: bool, running: bool, contributions: int) -> Ledger:
    """A ledger of fake tensors, without memory, that has seen so many contributions: its sums grow with them."""
    with FakeTensorMode(), torch.device("cpu"):
        ledger = Ledger(numels, torch.device("cpu"), lossless=lossless, running=running)
        scale = torch.ones(())
        for _ in range(contributions):
            ledger.begin()
            ledger.end(Branch.SFT, scale)
    return ledger


def _kernel_bytes(local: Parameters, calls: list[list[int]], ledger: Ledger, device: Device) -> int:
    """What one backward pass's kernels move besides the gradients that they read."""
    between = 0
    if not device.synchronous:  # the CPU library adds up in cache
        between = sum(workspace_bytes([local.numels[k] for k in bucket], ledger.layout) for bucket in calls)
    size = ledger.layout.size
    if ledger.direct:
        return between + 2 * 4 * size  # added to the branch's total
    absorbed = 5 if ledger.running else 3
    return between + 4 * size + absorbed * 4 * size


def _notes(setup: Setup, n: int, sharded: bool) -> tuple[str, ...]:
    notes = []
    if not setup.parameters.exact:
        notes.append("the parameter list is that of the published model nearest in size, scaled")
    if n == 1:
        notes.append("one contribution a step: noise comes from earlier steps, which counts drift of the mean as noise")
    if sharded:
        notes.append("gradients are averaged over ranks before they are seen, so contributions are micro-batches alone")
    held = setup.itemsize * (setup.parameters.total + setup.observed.total) + 8 * setup.observed.total
    held /= setup.ranks if sharded else 1
    if setup.device.memory is not None and held > setup.device.memory:
        advice = "use more ranks" if sharded else "use --sharding fsdp"
        notes.append(
            f"weights, gradients and Adam's moments take {held / 1e9:,.0f} GB a rank, the device has "
            f"{setup.device.memory / 1e9:.0f}: {advice}"
        )
    return tuple(notes)
