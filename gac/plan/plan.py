"""What GAC costs, and how sure its mu is, for a model and machines that need not be at hand. See docs/scaling.md.

Sizes come from the objects that a training run would use, built of fake tensors; times from published peaks of the
device with a stated efficiency; the standard error of mu from the delta method.
"""

from __future__ import annotations

from dataclasses import dataclass

from gac.laws.gac import LONG
from gac.observe.choice import reads_running_sums
from gac.plan.error import mu_error
from gac.plan.sequences import MESSAGE_NUMBERS, buckets_of, sequences_of
from gac.plan.setup import Setup
from gac.plan.traffic import (
    ABSORB_LAUNCHES,
    HOOK_SECONDS,
    LAUNCH_SECONDS,
    OPERATION_SECONDS,
    REPLICA_NUMBERS,
    SHARD_NUMBERS,
    SKETCH_LAUNCHES,
    STEP_OPERATIONS,
    TENSOR_SECONDS,
    buckets,
    kernel_bytes,
    ledger_after,
)


@dataclass(frozen=True)
class Plan:
    """What one rank pays, and what it gets. Bytes and seconds; *per step* is a measured step.

    Attributes:
        parameters, trainable: of the whole model. tensors: trainable tensors.
        estimator: ``sketch``, ``exact`` or ``sequence``.
        contributions: of each branch in a step, over all ranks.
        gradient_bytes: what one backward pass leaves on this rank.
        read_bytes_per_backward: gradients, and second moments for ``metric="optimizer"``; for ``sequence`` inputs of
            layers and gradients of their outputs.
        moved_bytes_per_backward: with everything that the kernels read and write besides.
        read_bytes_per_step, moved_bytes_per_step: of all backward passes and the step's end.
        calls_per_backward: of the sketch kernel, one for each bucket of gradients; for ``sequence`` for each layer.
        launches_per_backward: kernels started.
        host_seconds_per_step: in hooks, calls and launches; beside the device's work on a GPU.
        sketch_size: buckets; for ``sequence`` numbers of a sequence. sketch_bytes: device memory of sketches and sums.
            sketch_share: of the gradient bytes.
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
    if estimator == "sequence":
        return _of_sequences(setup)
    lossless = estimator == "exact"
    running = reads_running_sums(exact=lossless, ranks=setup.ranks, sharded=sharded, managed=False, in_place=True)
    ledger = ledger_after(local.numels, lossless=lossless, running=running, contributions=backwards)
    size = ledger.layout.size

    gradient_bytes = setup.itemsize * local.total
    read = gradient_bytes + (4 * local.total if setup.metric == "optimizer" else 0)
    calls = buckets(local.numels, setup.itemsize, sharded=sharded, running=running)
    moved = read + kernel_bytes(local, calls, ledger, device)
    launches = SKETCH_LAUNCHES * len(calls) + (0 if ledger.lossless or running else ABSORB_LAUNCHES)
    # the end of a step: inner products of the totals, zeros over everything, and the message with its way back
    reduced = setup.ranks > 1 and not sharded
    finish = 4 * size * (2 + ledger.vectors + (8 if reduced else 0))
    message = 0
    if setup.ranks > 1:
        message = 4 * (SHARD_NUMBERS + 2 * backwards if sharded else REPLICA_NUMBERS + 2 * size)

    host = backwards * (len(local.numels) * (HOOK_SECONDS + TENSOR_SECONDS) + launches * LAUNCH_SECONDS)
    host += STEP_OPERATIONS * OPERATION_SECONDS
    read_seconds = backwards * (moved / device.read + launches * device.gap)
    finish_seconds = finish / device.read + STEP_OPERATIONS * device.gap
    sending = device.all_reduce_seconds(message, setup.ranks)
    gac = read_seconds + finish_seconds + sending + (host if device.synchronous else 0.0)
    step = _model_seconds(setup)

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


def _model_seconds(setup: Setup) -> float:
    """The model's step: forward, gradients of activations, gradients of trainable weights."""
    operations = 4 * setup.parameters.total + 2 * setup.observed.total
    return 2 * setup.micro_batches * operations * setup.tokens / setup.device.compute


def _of_sequences(setup: Setup) -> Plan:
    """Of ``estimator="sequence"``: layers see activations, so every rank's sequences count, sharded or not."""
    device, backwards, rows = setup.device, 2 * setup.micro_batches, setup.sequences
    found = sequences_of(
        setup.parameters, size=setup.sketch_size, rows=rows, tokens=setup.tokens, itemsize=setup.itemsize
    )
    read, work = found.moved / device.read + found.launches * device.gap, found.operations / device.compute
    kernels = backwards * (read + work if device.synchronous else max(read, work))
    host = backwards * found.host_seconds + STEP_OPERATIONS * OPERATION_SECONDS
    finish = 4 * found.width * (4 * backwards + 2 + (8 if setup.ranks > 1 else 0))  # sums take a batch's sketches in
    finish_seconds = finish / device.read + STEP_OPERATIONS * device.gap
    message = 4 * (MESSAGE_NUMBERS + 2 * found.width) if setup.ranks > 1 else 0
    sending = device.all_reduce_seconds(message, setup.ranks)
    gac = kernels + finish_seconds + sending + (host if device.synchronous else 0.0)
    step = _model_seconds(setup)
    sketches = 4 * found.width * (2 + rows)
    gradients, n = setup.itemsize * setup.on_this_rank(setup.parameters).total, setup.micro_batches * rows * setup.ranks
    keep = 2.0 ** (-setup.interval / (LONG if setup.half_life is None else setup.half_life))
    error = mu_error(
        setup.noise,
        n,
        averaged=1 / rows,
        # new signs in every step: their error is averaged as the sampling error is
        size=buckets_of(setup.sketch_size, found.matrices) * (1 + keep) / (1 - keep),
        alpha=setup.alpha,
        half_life=setup.half_life,
        interval=setup.interval,
        momentum=setup.momentum,
    )
    return Plan(
        parameters=setup.parameters.total,
        trainable=setup.parameters.total,
        tensors=len(setup.parameters.numels),
        estimator="sequence",
        contributions=n,
        gradient_bytes=gradients,
        read_bytes_per_backward=found.read,
        moved_bytes_per_backward=found.moved,
        read_bytes_per_step=backwards * found.read,
        moved_bytes_per_step=backwards * found.moved + finish,
        calls_per_backward=found.calls,
        launches_per_backward=found.launches,
        host_seconds_per_step=host,
        sketch_size=found.width,
        sketch_bytes=sketches,
        sketch_share=sketches / gradients,
        all_reduce_bytes=message,
        all_reduce_share=message / (setup.itemsize * setup.parameters.total),
        all_reduce_seconds=sending,
        read_seconds=kernels,
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
        notes=(
            "contributions are sequences; rollouts of one prompt that are told as a group are one",
            *_notes(setup, n, sharded=False),
        ),
    )


def _notes(setup: Setup, n: int, sharded: bool) -> tuple[str, ...]:
    notes = []
    if not setup.parameters.exact:
        notes.append("the parameter list is that of the published model nearest in size, scaled")
    if n == 1:
        notes.append("one contribution a step: noise comes from earlier steps, which counts drift of the mean as noise")
    if sharded:
        notes.append("gradients are averaged over ranks before they are seen, so contributions are micro-batches alone")
    shards = setup.ranks if setup.sharded else 1
    whole = setup.itemsize * (setup.parameters.total + setup.observed.total) + 8 * setup.observed.total
    held = whole / shards
    if setup.device.memory is not None and held > setup.device.memory:
        advice = "use more ranks" if setup.sharded else "use --sharding fsdp"
        notes.append(
            f"weights, gradients and Adam's moments take {held / 1e9:,.0f} GB a rank, the device has "
            f"{setup.device.memory / 1e9:.0f}: {advice}"
        )
    return tuple(notes)
