"""verl: its own PPO loss on the rollouts of a batch, the NLL of its demonstrations, mixed with mu.

Written against verl 0.9.1. Its policy-loss registry is given no row labels, so this replaces the whole loss function,
as ``set_loss_fn`` allows, in a ``TrainingWorker`` that counts each step's tokens of both branches first.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gac.files import load_state, save_whole
from gac.trainers.mixed_batch import MixedBatch, StepCounts, count_step

EXPERT = "is_expert"
"""Field of the batch, or key of a row's ``extra_fields``, that is true for demonstrations."""

UID = "uid"
"""Field of the batch that rollouts of one prompt share."""

_COUNTS = {name: f"gac_{name}" for name in StepCounts._fields}
STATE_FILE = "gac_state_rank_{rank}.pt"


def install(**options: Any) -> None:
    """Makes verl's actor workers mix both losses: call it in a module named in ``VERL_USE_EXTERNAL_MODULES``.

    verl imports such modules in every process. Idempotent.

    Args:
        **options: of :class:`gac.trainers.mixed_batch.MixedBatch`: ``law``, ``phi``, ...
    """
    from verl.workers.engine_workers import ActorRolloutRefWorker

    base = ActorRolloutRefWorker.actor_worker_cls
    ActorRolloutRefWorker.actor_worker_cls = training_worker(getattr(base, "_gac_base", base), **options)


def training_worker(base: type | None = None, **options: Any) -> type:
    """A subclass of verl's ``TrainingWorker`` whose loss functions are mixed with demonstrations.

    Args:
        base: the class to extend; verl's ``TrainingWorker`` when None.
        **options: of :class:`gac.trainers.mixed_batch.MixedBatch`.
    """
    if base is None:
        from verl.workers.engine_workers import TrainingWorker as base
    MixedBatch(**options)  # wrong options are reported here and not in a worker

    class MixedTrainingWorker(base):
        _gac_base = base

        def set_loss_fn(self, loss_fn: Callable) -> None:
            if getattr(self, "_mixed", None) is None:
                self._mixed = MixedBatch(**options)
            super().set_loss_fn(MixedPpoLoss(loss_fn, self._mixed))

        def train_batch(self, data: Any) -> Any:
            from verl.utils import tensordict_utils as tu
            from verl.utils.device import get_device_id

            if self._mixed.estimator == "sequence":
                self._mixed.watch(_layers(self.engine), self.engine.get_data_parallel_group())
            device = get_device_id()
            mask = _padded(data, "response_mask").to(device)
            counts = count_step([mask], [expert_rows(data)], self.engine.get_data_parallel_group())
            tu.assign_non_tensor(data, **dict(zip(_COUNTS.values(), torch.stack(counts).tolist(), strict=True)))
            return super().train_batch(data)

        def save_checkpoint(self, local_path: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().save_checkpoint(local_path, *args, **kwargs)
            os.makedirs(local_path, exist_ok=True)
            save_whole(self._mixed.state_dict(), os.path.join(local_path, STATE_FILE.format(rank=_rank())))
            return result

        def load_checkpoint(self, local_path: Any, *args: Any, **kwargs: Any) -> Any:
            paths = [os.path.join(local_path or "", STATE_FILE.format(rank=rank)) for rank in (_rank(), 0)]
            found = next((path for path in paths if os.path.isfile(path)), None)
            # checked before the engine takes anything of the checkpoint
            state = None if found is None else load_state(found, self._mixed.entry(), then="load another checkpoint")
            result = super().load_checkpoint(local_path, *args, **kwargs)
            if found is not None:
                self._mixed.load_state_dict(state)
            elif local_path is not None:
                warnings.warn(f"{local_path} has no {STATE_FILE}: mu starts anew", stacklevel=2)
            return result

    return MixedTrainingWorker


class MixedPpoLoss:
    """A loss function for verl's engines: ``(model_output, data, dp_group) -> (loss, metrics)``.

    The policy loss, with its entropy and KL terms, sees the rollouts alone, and is divided by the rollouts of the whole
    mini-batch; the demonstrations' NLL by their tokens.

    Args:
        policy_loss: what it replaces: ``functools.partial(verl.workers.utils.losses.ppo_loss, config=...)``.
        mixed: follows mu.
    """

    def __init__(self, policy_loss: Callable, mixed: MixedBatch) -> None:
        self.policy_loss = policy_loss
        self.mixed = mixed

    def __call__(self, model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
        if not torch.is_grad_enabled():
            return self.policy_loss(model_output=model_output, data=data, dp_group=dp_group)
        from verl.utils import tensordict_utils as tu
        from verl.workers.utils.padding import no_padding_2_padding

        counts = StepCounts(*(tu.get(data, key) for key in _COUNTS.values()))
        if None in counts:
            raise ValueError(
                "the batch lacks the step's token counts: use gac.trainers.adapters.verl.install, or a worker made "
                "by training_worker"
            )
        metrics: dict[str, Any] = {}

        def policy_loss(*, old_logprobs: Any, advantages: Any, mask: Any, **_: Any) -> Tensor:
            rollouts = data.copy()
            rollouts["old_log_probs"], rollouts["advantages"] = old_logprobs, advantages
            rollouts["response_mask"] = mask
            tu.assign_non_tensor(
                rollouts, batch_num_tokens=max(counts.rl_tokens, 1), global_batch_size=max(counts.rl_rows, 1)
            )
            loss, found = self.policy_loss(model_output=model_output, data=rollouts, dp_group=dp_group)
            metrics.update(found)
            return loss

        told = _rows(data, tu) if self.mixed.estimator == "sequence" else {}
        logprobs = no_padding_2_padding(model_output["log_probs"], data)
        result = self.mixed.loss(
            logprobs=logprobs,
            old_logprobs=_padded(data, "old_log_probs"),
            advantages=_padded(data, "advantages"),
            mask=_padded(data, "response_mask"),
            is_expert=expert_rows(data).to(logprobs.device),
            policy_loss=policy_loss,
            sft_tokens=counts.sft_tokens,
            ranks=data["dp_size"],
            group=dp_group,
            **told,
        )
        return result.loss, metrics | self.mixed.metrics()


def _layers(engine: Any) -> nn.Module:
    """The engine's model. Raises ValueError where its layers do not see whole sequences, or are not torch's."""
    module = getattr(engine, "module", None)
    parallel = getattr(getattr(engine, "engine_config", None), "ulysses_sequence_parallel_size", 1)
    if not isinstance(module, nn.Module) or parallel > 1:
        what = type(engine).__name__ if parallel <= 1 else f"ulysses_sequence_parallel_size={parallel}"
        raise ValueError(
            f'estimator="sequence" reads gradients at the layers of a model in one piece as verl\'s FSDP engines have, '
            f'and not with {what}: use estimator="coefficient"'
        )
    return module


def _rows(data: Any, tu: Any) -> dict[str, Any]:
    """What ``estimator="sequence"`` is told: whose rollouts share a prompt, and where packed rows begin."""
    if tu.get(data, "use_fused_kernels", False):
        raise ValueError(
            'use_fused_kernels applies the head without calling it, so estimator="sequence" does not see its gradient: '
            'switch it off, or use estimator="coefficient"'
        )
    ids = data["input_ids"] if "input_ids" in set(data.keys()) else None
    packed = ids is not None and ids.is_nested and tu.get(data, "use_remove_padding", True)
    groups = None
    if UID in set(data.keys()):
        numbers: dict[Any, int] = {}
        groups = [numbers.setdefault(uid, len(numbers)) for uid in _listed(data[UID])]
    return {"groups": groups, "lengths": ids.offsets().diff() if packed else None}


def expert_rows(data: Any) -> Tensor:
    """``[B]`` bool on the host, from the field ``is_expert`` or from each row's ``extra_fields``.

    Raises KeyError where the batch has neither.
    """
    keys = set(data.keys())
    if EXPERT in keys:
        values = data[EXPERT]
        if isinstance(values, Tensor):
            return values.reshape(len(values), -1)[:, 0].bool().cpu()
    elif "extra_fields" in keys:
        values = [fields.get(EXPERT) for fields in _listed(data["extra_fields"])]
    else:
        raise KeyError(
            f"the batch says of no row whether it is a demonstration: whatever generates responses must put {EXPERT!r} "
            "into extra_fields of its output, for every row"
        )
    return torch.tensor([bool(value) for value in _listed(values)])


def _listed(values: Any) -> list:
    """Non-tensor fields come as lists, object arrays or tensordict stacks."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _padded(data: Any, key: str) -> Tensor:
    return data.select(key).to_padded_tensor()[key]


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
