"""One loss over a batch of demonstrations and rollouts, for trainers that run one backward pass over both.

Such a pass adds both branches into one gradient. By default mu comes from the coefficient estimator, which reads
log-probabilities and advantages and no gradient: it works under any engine, sharded parameters or not. With
``estimator="sequence"`` it comes from the gradients of the single sequences, taken at the layers of a model that
:meth:`MixedBatch.watch` was told. Data parallelism costs one exchange per optimizer step, and every rank takes part in
it whatever its batches held.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import gac
from gac.laws.controller import Controller
from gac.observe.topology import fsdp2_modules
from gac.saved import MixerState, read_state
from gac.sequences.options import SequenceOptions
from gac.state import Maybe
from gac.trainers.mixed_losses import at_least_one, check_shapes, nll, rollout_loss

METRICS = ("mu", "mu_raw", "mu_se", "sigma_s2", "sigma_r2", "delta_g2", "n_s", "n_r", "skipped")
"""What :meth:`MixedBatch.metrics` holds, each under ``gac/``."""


ESTIMATORS = ("coefficient", "sequence")
"""Those that can tell the branches of a mixed batch apart."""


class StepCounts(NamedTuple):
    """What an optimizer step holds of each branch over all its micro-batches and ranks: 0-dim int64 tensors."""

    sft_tokens: Tensor
    rl_tokens: Tensor
    sft_rows: Tensor
    rl_rows: Tensor


class MixedLoss(NamedTuple):
    """Three scalars: what to call ``backward`` on, and its two unweighted parts."""

    loss: Tensor
    sft_loss: Tensor
    rl_loss: Tensor


def count_step(
    masks: Iterable[Tensor],
    is_expert: Iterable[Tensor],
    group: dist.ProcessGroup | None = None,
    *,
    device: torch.device | str | None = None,
) -> StepCounts:
    """Tokens and rows of both branches, summed over micro-batches and ranks: the divisors of their losses.

    With several ranks it is one all-reduce of four numbers, so every rank calls it in every step.

    Args:
        masks: ``[B, T]`` of each micro-batch, non-zero where a token counts. is_expert: ``[B]`` of each.
        group: the data-parallel ranks; the default group when several processes run.
        device: where the counts are, as the group's backend needs it; the masks' own when None.
    """
    counts = [torch.zeros(4, dtype=torch.int64, device=device)]
    for mask, expert in zip(masks, is_expert, strict=True):
        tokens = (mask != 0).sum(1)
        if device is None:
            counts[0] = counts[0].to(mask.device)
        expert = expert.to(device=tokens.device, dtype=torch.bool)
        rows = (tokens > 0).long()
        of_batch = torch.stack([x[e].sum() for x in (tokens, rows) for e in (expert, ~expert)])
        counts.append(of_batch.to(counts[0].device))
    total = torch.stack(counts).sum(0)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(total, group=group)
    return StepCounts(*total)


def coefficient_mixer(device: torch.device | str, **options: Any) -> gac.Mixer:
    """A mixer with ``estimator="coefficient"`` that needs no model: it reads no gradients.

    Args:
        device: where the losses are computed.
        **options: of :func:`gac.patch`, except ``estimator``.
    """
    anchor = nn.Module()
    anchor.register_parameter("anchor", nn.Parameter(torch.zeros(1, device=device)))
    return gac.patch(anchor, estimator="coefficient", **options)


class MixedBatch:
    """Mixes the losses of both branches of a batch and follows mu; one for each training process.

    It can be pickled before its first loss (Ray sends loss functions to workers that way). The mixer is made at the
    first loss, on that loss's device. After each optimizer step mu is updated, by a hook on whichever optimizer of this
    process steps first once losses were seen: trainers hand a loss function neither the model nor the optimizer.

    Args:
        law: how mu follows from the statistics; a name of :func:`gac.laws.available`, except those that follow KL or
            entropy.
        phi: weight each demonstration token's loss with its detached ``p * (1 - p)``.
        estimator: ``"coefficient"``, or ``"sequence"`` for the gradients of the model given to :meth:`watch`.
        interval, coefficient, sketch_size, sequences: as for :func:`gac.patch`; the last two belong to ``"sequence"``.
        follow_optimizer: False where the trainer calls :meth:`step` itself.
        **law_options: options of the law.

    Raises:
        TypeError, ValueError: unknown law or options; a law that follows a number which a batch does not give.
    """

    def __init__(
        self,
        *,
        law: str = "gac",
        phi: bool = False,
        estimator: str = "coefficient",
        interval: int = 1,
        coefficient: Mapping | None = None,
        sketch_size: int = 32,
        sequences: Mapping | None = None,
        follow_optimizer: bool = True,
        **law_options: Any,
    ) -> None:
        controller = Controller(law, **law_options)
        if controller.law.needs:
            raise ValueError(
                f"law={law!r} follows {' and '.join(controller.law.needs)}, which a mixed batch does not give; "
                "use 'gac', 'paper', 'fixed' or a schedule"
            )
        if estimator not in ESTIMATORS:
            raise ValueError(f"estimator of a mixed batch must be {' or '.join(ESTIMATORS)}, got {estimator!r}")
        SequenceOptions(sketch_size=sketch_size, **(sequences or {}))
        self.phi, self.estimator = phi, estimator
        self._start = float(controller.mu)
        self._law_options = law_options
        self._options = dict(law=law, interval=interval, coefficient=coefficient, report_interval=None, **law_options)
        if estimator == "sequence":
            self._options |= {"sketch_size": sketch_size, "sequences": sequences}
        self._follow = follow_optimizer
        self._model: nn.Module | None = None
        self._rows = contextlib.ExitStack()  # the batch whose backward pass may be under way
        self._mixer: gac.Mixer | None = None
        self._hook = None
        self._pending = False
        self._restored: dict | None = None
        self._metrics: dict[str, float] = {}

    @property
    def mixer(self) -> gac.Mixer:
        """The mixer. Raises RuntimeError before the first loss."""
        if self._mixer is None:
            raise RuntimeError("the mixer is made at the first loss: it needs to know the device")
        return self._mixer

    @property
    def mu(self) -> float | Tensor:
        """The SFT weight of this step: a 0-dim tensor on the device, a number before the first loss."""
        return self._start if self._mixer is None else self._mixer.mu

    def watch(self, model: nn.Module, group: dist.ProcessGroup | None = None) -> MixedBatch:
        """Patches the model that the losses are of, for ``estimator="sequence"``: as it is trained, in DDP, FSDP or an
        engine, before its first forward pass. Nothing happens with another estimator. Returns itself.

        Args:
            group: see :meth:`open`.

        Raises:
            RuntimeError: another model is watched already. ValueError: what :func:`gac.patch` does not serve.
        """
        if self.estimator == "sequence":
            if self._mixer is not None and model is not self._model:
                raise RuntimeError("MixedBatch.watch: another model is watched already; call close() first")
            self._model = model
            self.open(next(model.parameters()).device, group)
        return self

    def open(self, device: torch.device, group: dist.ProcessGroup | None = None) -> gac.Mixer:
        """Makes the mixer unless it exists, and returns it.

        Args:
            device: of the losses.
            group: ranks whose batches are parts of one step: the data-parallel ones. Default group when None.
        """
        if self._mixer is None:
            self._mixer = self._make(device, group)
            if self._restored is not None:
                self._mixer.load_state_dict(self._restored)
            if self._follow:
                reference = weakref.ref(self)
                self._hook = register_optimizer_step_post_hook(lambda optimizer, *_: _step(reference, optimizer))
        return self._mixer

    def _make(self, device: torch.device, group: dist.ProcessGroup | None) -> gac.Mixer:
        if self.estimator == "coefficient":
            return coefficient_mixer(device, process_group=group, **self._options)
        if self._model is None:
            raise RuntimeError(
                'estimator="sequence" reads the gradients at the layers of a model: call watch(model) before the first '
                'loss, where the model is; where it cannot be reached, use estimator="coefficient"'
            )
        sharded = bool(fsdp2_modules(self._model))  # whose device mesh says which ranks take part
        return gac.patch(self._model, estimator="sequence", process_group=None if sharded else group, **self._options)

    def loss(
        self,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        is_expert: Tensor,
        policy_loss: Callable[..., Tensor],
        sft_tokens: float | Tensor,
        ranks: int = 1,
        group: dist.ProcessGroup | None = None,
        groups: Tensor | Sequence[int] | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        tokens: Tensor | None = None,
        sources: Sequence[Any] | None = None,
        index: Sequence[int] | None = None,
    ) -> MixedLoss:
        """``mu * sft_loss + (1 - mu) * rl_loss`` of one micro-batch, and feeds the estimator.

        No collective, nothing read on the host. Without gradients (evaluation) it feeds nothing. A batch without
        demonstrations, without rollouts or without rows gives zeros with a graph, never NaN.

        Args:
            logprobs: ``[B, T]`` of the taken tokens, with a graph.
            old_logprobs: ``[B, T]``; demonstrations may hold anything.
            advantages: ``[B, T]`` or ``[B]``; demonstrations may hold anything.
            mask: ``[B, T]``, non-zero where a token counts.
            is_expert: ``[B]``, True for demonstrations.
            policy_loss: the trainer's own: called with ``logprobs, old_logprobs, advantages, mask`` by name, all
                ``[B, T]`` with zeros outside the rollouts' tokens; returns the scalar loss of the rollouts. It must
                divide by what the whole *step* has of rollouts (:func:`count_step`), or micro-batches count unequally.
                Where the batch has none, one token with a zero advantage stands in and the result is dropped.
            sft_tokens: what the demonstrations' summed NLL is divided by: demonstration tokens of the whole step, over
                all micro-batches and ranks. At least 1 is used.
            ranks: factor against the average that data parallelism takes of gradients (its size), given that
                ``sft_tokens`` counts all ranks.
            group: see :meth:`open`; used at the first loss only.
            groups, lengths, sources, index: of the rows, for ``estimator="sequence"``, as for :meth:`gac.Mixer.batch`:
                which rollouts share a prompt, tokens of packed sequences as the model got them, labels, numbers. The
                backward pass has to run before the next loss and the optimizer's step.
            tokens: likewise, what each row counts for; None: demonstrations by their tokens, rollouts alike.

        Raises:
            ValueError: shapes that do not belong together.
        """
        check_shapes(logprobs, old_logprobs, advantages, mask, is_expert)
        mixer = self.open(logprobs.device, group)
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand_as(logprobs)
        is_expert = is_expert.to(device=logprobs.device, dtype=torch.bool)
        kept = mask != 0
        expert, rollout = kept & is_expert[:, None], kept & ~is_expert[:, None]
        sft_loss = nll(logprobs, expert, self.phi) / at_least_one(sft_tokens) * ranks
        rl_loss = rollout_loss(logprobs, old_logprobs, advantages, mask, rollout, policy_loss)
        if self.estimator == "sequence":
            self._rows.close()  # its backward pass is over
            if not torch.is_grad_enabled() or not len(is_expert):
                return MixedLoss(mixer.mu * sft_loss + (1 - mixer.mu) * rl_loss, sft_loss, rl_loss)
            if tokens is None:
                tokens = torch.where(is_expert, kept.sum(1), 1)
            told = {"groups": groups, "lengths": lengths, "tokens": tokens, "sources": sources, "index": index}
            self._rows.enter_context(mixer.batch(is_expert=is_expert, **told))
            self._pending = True
        elif torch.is_grad_enabled():
            self.observe(logprobs, advantages, mask, is_expert)
        return MixedLoss(mixer.mixed_loss(sft_loss=sft_loss, rl_loss=rl_loss), sft_loss, rl_loss)

    def observe(self, logprobs: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor) -> None:
        """Feeds the estimator with a micro-batch whose loss the trainer weights itself; arguments as for :meth:`loss`.

        Every rank calls it at least once in every step, if need be with no rows. Raises RuntimeError with
        ``estimator="sequence"``, which has to know when the rows' loss is made.
        """
        if self.estimator == "sequence":
            raise RuntimeError('MixedBatch.observe feeds estimator="coefficient"; "sequence" goes with MixedBatch.loss')
        mixer = self.open(logprobs.device)
        expert = is_expert.to(device=logprobs.device, dtype=torch.bool)
        per_row = expert if advantages.dim() == 1 else expert[:, None]
        advantages = torch.where(per_row, 0.0, advantages)
        mixer.observe_tokens(logprobs.detach(), advantages.detach(), mask, expert)
        self._pending = True

    def step(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Ends the optimizer step, if losses were seen since the last: a collective over the group.

        Args:
            optimizer: which took it; the law learns its momentum.
        """
        if self._pending:
            self._pending = False
            self._rows.close()
            if optimizer is not None:
                self.mixer.follow(optimizer)
            self.mixer.step()
            if self.estimator == "sequence" and self._options["interval"] > 1:
                _ = self.mixer.mu  # hooks are there, or not, before the next forward pass
            self._metrics = self.mixer.metrics()

    def metrics(self) -> dict[str, float]:
        """Numbers of the newest step that has reached the host, under ``gac/``; the same keys always, NaN for unknown.

        They change only with the optimizer step. ``gac/mu`` is the weight of the step to come.
        """
        known = self._metrics or {"mu": self._start}
        return {f"gac/{name}": float(known.get(name, float("nan"))) for name in METRICS}

    def state_dict(self) -> dict | None:
        """What continues a run, to be saved between optimizer steps; None before the first loss."""
        return copy.deepcopy(self._restored) if self._mixer is None else self._mixer.state_dict()

    def entry(self) -> Maybe:
        """What a saved state may hold."""
        return Maybe(MixerState(Controller(self._options["law"], **self._law_options), torch.device("cpu")))

    def load_state_dict(self, state: dict | None) -> None:
        """Continues where :meth:`state_dict` left off, before or after the first loss; an unfinished step is forgotten.

        A state of None, from before the first loss, begins anew.

        Raises:
            TypeError, ValueError: it cannot be a state of these options; nothing of it is taken. As for
                :meth:`gac.Mixer.load_state_dict`.
        """
        taken = read_state(state, self.entry())
        if state is None:
            self.close()
            self._metrics = {}
        elif self._mixer is not None:
            with contextlib.suppress(RuntimeError):  # of a step that is forgotten
                self._rows.close()
            self._mixer.load_state_dict(state)
        self._restored, self._pending = taken, False

    def close(self) -> None:
        """Stops following the optimizer."""
        if self._hook is not None:
            self._hook.remove()
        with contextlib.suppress(RuntimeError):  # a loss without its backward pass
            self._rows.close()
        if self._mixer is not None:
            self._mixer.unpatch()
        self._hook = self._mixer = None
        self._pending = False


def _step(reference: weakref.ref, optimizer: torch.optim.Optimizer) -> None:
    batch = reference()
    if batch is not None:
        batch.step(optimizer)
