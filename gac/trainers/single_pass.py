"""``estimator="sequence"`` in the hybrid trainer: one pass over the rollouts and demonstrations of a micro-step.

Rows are the contributions: a demonstration, or the rollouts of a prompt. Losses are those of two passes, divided by the
same numbers (`branches`), and so are gradients, to rounding. Being the only backward pass of a micro-step, it may
reduce gradients, free them or take the optimizer's step, as engines do that shard them.
"""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import nn

from gac.losses import target_token_loss
from gac.observe.contribution import UnweightedLoss
from gac.trainers.branches import BYPASSED, BranchedGRPOTrainer
from gac.trainers.demonstrations import DemonstrationBatch
from gac.trainers.grouped_grpo import TOKEN_SUM_LOSSES, loss_mask
from gac.trainers.groups import GROUP, ROLLOUTS, SOURCE
from gac.trainers.joint_batch import SelectedHead, join, scores


class SinglePassGRPOTrainer(BranchedGRPOTrainer):
    """`BranchedGRPOTrainer` that, with ``estimator="sequence"``, runs both branches in one pass.

    Raises:
        ValueError: a law that acts per prompt, or a model with a load-balancing loss, which is no sum over rows.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._single = self.args.estimator == "sequence"
        self._beside: DemonstrationBatch | None = None  # of the micro-step under way, on the device
        self._sft_loss: torch.Tensor | None = None  # theirs
        self._head: SelectedHead | None = None
        if not self._single:
            return
        if self._rule.from_prompts:
            raise ValueError(
                f"law={self.args.law!r} gives prompts to one branch or the other, and estimator='sequence' has rows "
                "of both: use estimator='auto'"
            )
        if self.aux_loss_enabled:
            raise ValueError(
                "the model has a load-balancing loss (output_router_logits), which is no sum over sequences: switch it "
                "off, or use another estimator than 'sequence'"
            )
        rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        if rows * self.accelerator.num_processes < 2 * self.num_generations:
            warnings.warn(
                f"an optimizer step has the rollouts of one prompt ({rows} a rank, num_generations="
                f"{self.num_generations}): one contribution, whose noise cannot be told. Give it two prompts or more",
                stacklevel=2,
            )

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._single:
            self._head = SelectedHead(self._output_embeddings())
        return prepared

    def _output_embeddings(self) -> nn.Module:
        model: Any = self.accelerator.unwrap_model(self.model)
        found = (model.get_base_model() if hasattr(model, "get_base_model") else model).get_output_embeddings()
        if not isinstance(found, nn.Module):
            raise ValueError(f"{type(model).__name__} has no output embeddings: estimator='sequence' does not serve it")
        return found

    def _detach(self) -> None:
        super()._detach()
        self._beside = self._sft_loss = None
        if self._head is not None:
            self._head.remove()
            self._head = None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As the base class; with ``estimator="sequence"`` in one pass."""
        if not self._single:
            return super().training_step(model, inputs, num_items_in_batch)
        if not self._micro_steps_left:
            self._begin_window()
        self._micro_steps_left -= 1
        self._to_training(model)
        rollouts = self._generate_rollouts(model, inputs)
        (demonstrations,) = self._sft_window.popleft()
        self._beside, self._rl_weighted = demonstrations.to(self.accelerator.device), False
        try:
            with self._mixer_of_run.batch(**self._rows(rollouts, demonstrations)):
                loss = self._step_of_trl(model, inputs, num_items_in_batch)
        except UnweightedLoss as error:
            raise RuntimeError(BYPASSED) from error
        finally:
            self._beside = self._sft_loss = None
        if not self._rl_weighted:
            raise RuntimeError(BYPASSED)
        return loss

    def _rows(self, rollouts: dict[str, Any], demonstrations: DemonstrationBatch) -> dict[str, Any]:
        """What the mixer is told of the rows: rollouts first."""
        groups = rollouts[GROUP].cpu()
        count, own = len(groups), len(demonstrations.labels)
        column = self.args.gac_source_column
        labels = demonstrations.sources or ()
        return {
            "is_expert": torch.arange(count + own) >= count,
            "groups": torch.cat([groups, groups.new_full((own,), -1)]),
            "tokens": torch.cat([self._weights_of_rollouts(rollouts), self._beside_tokens()]),
            "index": [-1] * count + list(cast("tuple[int, ...]", demonstrations.index)),
            "sources": None if column is None else [*rollouts.get(SOURCE, [ROLLOUTS] * count), *labels],
        }

    def _weights_of_rollouts(self, rollouts: dict[str, Any]) -> torch.Tensor:
        """``[B]``, what each rollout counts for: its tokens where the loss divides by those of all."""
        tokens = loss_mask(rollouts).sum(1)
        if self.loss_type in TOKEN_SUM_LOSSES:
            return tokens.double()
        if self.loss_type == "bnpo":  # of the micro-batch; micro-batches count alike
            return tokens / tokens.sum().clamp(min=1).double()
        return torch.ones_like(tokens, dtype=torch.float64)

    def _beside_tokens(self) -> torch.Tensor:
        """``[D]``, labelled tokens of each demonstration."""
        assert self._beside is not None
        return (self._beside.labels[:, 1:] != -100).sum(1).double()

    # -- the losses of one pass ---------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        """As the base class; the losses of both branches with their weights where one pass has both."""
        if self._beside is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, terms = self.policy_loss(model, inputs)
        if self._observes:
            self._observe_rollouts(terms)
        if self._sft_loss is None:
            raise RuntimeError(BYPASSED)
        self._rl_weighted = True
        # the count spans all ranks and data parallelism averages gradients over them
        sft_loss = self._sft_loss * self.accelerator.num_processes
        self._sft_window_loss = sft_loss.detach() + (0.0 if self._sft_window_loss is None else self._sft_window_loss)
        scale = self._rule.scale
        return self._mixer_of_run.mixed_loss(sft_loss=sft_loss * scale, rl_loss=loss * scale)

    def _scores(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple:
        """As the base class; within :meth:`policy_loss` the pass has the demonstrations too, and leaves their loss."""
        if self._beside is None or not self._capturing:
            return super()._scores(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        unserved = [name for name, value in kwargs.items() if isinstance(value, (torch.Tensor, list))]
        if unserved:
            raise ValueError(
                f"rollouts with {', '.join(unserved)}: estimator='sequence' joins rows of text; use another estimator"
            )
        assert self._head is not None
        batch = join(input_ids, attention_mask, logits_to_keep, self._beside, self._tokenizer.pad_token_id)
        kept = batch.scored
        lengths = kept.sum(1).cpu()
        with self.accelerator.autocast(), self._head.only(kept), self._mixer_of_run.selected(lengths):
            outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        if outputs.logits.shape[:-1] != (1, int(lengths.sum())):
            raise ValueError(
                f"logits of {int(lengths.sum())} chosen positions were expected, got {tuple(outputs.logits.shape)}: "
                "estimator='sequence' does not serve this model's head"
            )
        targets = batch.targets[kept]
        parts = [int(lengths[: batch.rollouts].sum()), int(lengths[batch.rollouts :].sum())]
        (of_rollouts, of_others), (sampled, labelled) = outputs.logits[0].split(parts), targets.split(parts)
        self._supervise_beside(of_others, labelled, kept[batch.rollouts :])
        found = scores(of_rollouts, sampled, self.temperature)
        where = kept[: batch.rollouts]
        end = input_ids.shape[1] - 1
        place = lambda x: x.new_zeros(where.shape).masked_scatter(where, x)[:, end - logits_to_keep : end]
        return *map(place, found), None

    def _supervise_beside(self, logits: torch.Tensor, targets: torch.Tensor, where: torch.Tensor) -> None:
        """The loss of the demonstrations' labelled tokens, ``[n, V]`` and ``[n]``, which stand at ``where`` (bool)."""
        assert self._beside is not None
        weights = self.weights_of(self._beside)
        self._sft_loss = target_token_loss(
            logits,
            targets,
            num_tokens=self._sft_window_tokens,
            phi=self._rule.phi,
            weights=None if weights is None else weights[:, None].expand(where.shape)[where],
        )
        if not self._observes:
            return
        with torch.no_grad():
            logprobs, _ = scores(logits.detach(), targets, 1.0)
        mask = self._beside.labels[:, 1:] != -100
        placed = logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)
        rows = len(mask)
        self._mixer_of_run.observe_tokens(placed, placed.new_zeros(rows), mask, mask.new_ones(rows))
