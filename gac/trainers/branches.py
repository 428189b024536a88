"""The two branches of a micro-step of the hybrid trainer: their losses, and the passes that these go through.

What each branch's gradient is divided by, so that `mu` means the same at any accumulation, batch size and sequence
length:

- RL: TRL's own normalisation. TRL divides inside its loss and switches the trainer's accumulation scaling off
  (``loss_is_scaled_for_ga``), which is why the supervised loss must bring its own divisor.
- SFT: the token sum of a micro-batch over the loss tokens of the *whole* accumulation window on all ranks. The window's
  micro-batches are drawn together at its first micro-step, so the count is known before the first backward.

Under DDP the last backward of a micro-step is the one that may synchronise: the supervised one, in steps that have it.
Under FSDP2 every backward does: what is reduced together cannot be told apart. Every rank runs the same backwards in
every micro-step, whatever its data.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any, cast

import torch

from gac.losses import count_label_tokens
from gac.observe.contribution import UnweightedLoss
from gac.trainers.demonstrations import DemonstrationBatch, DemonstrationCollator, EpochSampler, pad_demonstrations
from gac.trainers.grouped_grpo import TOKEN_SUM_LOSSES, loss_mask
from gac.trainers.packing import PackedCollator, require_separable
from gac.trainers.prompts import TOKENS, demonstrations_of
from gac.trainers.rules import LossTerms
from gac.trainers.sourced import SourcedGRPOTrainer
from gac.trainers.token_stats import label_logprobs
from gac.trainers.window import Window

BYPASSED = (
    "the RL loss did not pass through compute_loss, so it was not weighted; this version of TRL or one of its options "
    "(a fused loss?) is not supported"
)


class BranchedGRPOTrainer(SourcedGRPOTrainer):
    """`SourcedGRPOTrainer` that adds a supervised forward and backward to every micro-step, and weights both losses.

    Args:
        *args, **kwargs: of `SourcedGRPOTrainer`.
        sft_dataset: demonstrations; not used by rules that take them from the prompts.

    Raises:
        ValueError: `sft_dataset` is empty or cannot be read; see `DemonstrationCollator`.
    """

    def __init__(self, *args: Any, sft_dataset: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = self.args
        self._collate: DemonstrationCollator | PackedCollator | None = None
        self._sampler: EpochSampler | None = None
        if not self._rule.from_prompts:
            collate = DemonstrationCollator(
                self._tokenizer,
                sft_dataset,
                completion_only=options.sft_completion_only,
                max_length=options.sft_max_length,
                source_column=options.gac_source_column,
                weight_column=options.sft_weight_column,
                template=self._template,
            )
            self._collate = collate
            if options.sft_weights == "reward":
                self.judge(collate)
            elif options.sft_weights == "source":
                self.trust_sources(collate)
            if options.sft_packing:
                require_separable(self.model)
                self._collate = PackedCollator(collate, cast(int, options.sft_max_length))
            seed = options.seed if options.sft_seed is None else options.sft_seed
            self._sampler = EpochSampler(len(self._collate), seed)
        self._observes = options.observe_tokens or options.estimator == "coefficient"
        self._sft_position = 0
        self._micro_steps_left = 0
        self._sft_window: deque[list[DemonstrationBatch]] = deque()
        self._sft_window_tokens: torch.Tensor | float = 0.0
        self._sft_window_loss: torch.Tensor | None = None
        self._rl_weighted = False

    def _detach(self) -> None:
        super()._detach()
        self._forget_window()
        self._prepared = None

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The step's branches, one after the other; returns the weighted sum of their losses."""
        if not self._micro_steps_left:
            self._begin_window()
        self._micro_steps_left -= 1
        self._reduce_in_every_backward()
        self._to_training(model)
        loss = torch.zeros((), device=self.accelerator.device)
        rollouts = None
        if self._rule.explores:
            rollouts = self._generate_rollouts(model, inputs)
            loss = loss + self._rl_step(model, inputs, num_items_in_batch, rollouts)
        if self._rule.supervises:
            loss = loss + self._sft_step(model, rollouts)
        return loss

    # -- demonstrations -----------------------------------------------------------------------------------------------

    def _begin_window(self) -> None:
        """Decides on the demonstrations of all micro-steps up to the next optimizer step, where that can be done."""
        self._micro_steps_left = self.current_gradient_accumulation_steps
        self._sft_window_loss = None
        if not self._rule.supervises:
            return
        window = Window(
            micro_steps=self.current_gradient_accumulation_steps,
            rows=self.args.sft_batch_size or self.args.per_device_train_batch_size,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
        )
        if self._rule.queues:
            demonstrations, pad = self._rule.dequeue(), self._tokenizer.pad_token_id
            self._sft_window.extend(window.from_queue(demonstrations, pad))
            self._sft_window_tokens = float(pad_demonstrations(demonstrations, pad).count_tokens())
        elif self._sampler is not None and self._collate is not None:
            self._sft_window.extend(window.from_set(self._sampler, self._collate, self._sft_position))
            if self.judges:
                drawn = [
                    window.of_rank(rank).indices(self._sampler, self._sft_position) for rank in range(window.ranks)
                ]
                self.score(drawn[window.rank], [index for own in drawn for index in own])
            self._sft_position += window.total
            self._sft_window_tokens = self._count_window()

    def _count_window(self) -> torch.Tensor:
        """Loss tokens of the window over all ranks, 0-dim."""
        tokens = torch.stack([count_label_tokens(batch.labels) for (batch,) in self._sft_window]).sum()
        tokens = tokens.to(self.accelerator.device)
        return self.accelerator.reduce(tokens, reduction="sum") if self.accelerator.num_processes > 1 else tokens

    def _forget_window(self) -> None:
        """The next micro-step begins a window."""
        self._sft_window.clear()
        self._micro_steps_left = 0

    # -- reinforcement ------------------------------------------------------------------------------------------------

    def _to_training(self, model: Any) -> None:
        """As the base class does in its training step, which comes later or, with supervision alone, not at all."""
        model.train()
        if callable(train := getattr(self.optimizer, "train", None)):
            train()

    def _generate_rollouts(self, model: Any, inputs: Any) -> dict[str, Any]:
        # As TRL's training_step is about to do; here, the branch can be told how many tokens its loss adds up.
        begin = time.perf_counter()
        rollouts = self.prepare_rollouts(inputs)
        self._current_train_step_time += time.perf_counter() - begin
        return rollouts

    def _rl_step(self, model: Any, inputs: Any, num_items_in_batch: Any, rollouts: Any) -> torch.Tensor:
        tokens = loss_mask(rollouts).sum() if self.loss_type in TOKEN_SUM_LOSSES else None
        # A supervised backward that follows is the one that may synchronise. Both contexts nest inside the trainer's.
        with self._mixer_of_run.rl(tokens=tokens), self._no_sync(model, last=not self._rule.supervises):
            self._rl_weighted = False
            try:
                loss = self._step_of_trl(model, inputs, num_items_in_batch)
            except UnweightedLoss as error:
                raise RuntimeError(BYPASSED) from error
        if not self._rl_weighted:  # in a step without hooks nobody else says so
            raise RuntimeError(BYPASSED)
        return loss

    def _step_of_trl(self, model: Any, inputs: Any, num_items_in_batch: Any) -> torch.Tensor:
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        """TRL's loss, with the rule's terms and weighted with ``1 - mu`` in training, as it is in evaluation."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, terms = self.policy_loss(model, inputs)
        if self._observes:
            self._observe_rollouts(terms)
        self._rl_weighted = True
        return self._weigh(loss)

    def _weigh(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss with the rule's scale and the weight of its branch."""
        scale = self._rule.scale
        return self._mixer_of_run.weigh(loss if scale == 1.0 else scale * loss)

    def _observe_rollouts(self, terms: LossTerms) -> None:
        advantages = terms.inputs["advantages"]
        experts = torch.zeros(len(advantages), dtype=torch.bool, device=advantages.device)
        if "gac_joined" in terms.inputs:
            experts = terms.inputs["gac_joined"]
        self._mixer_of_run.observe_tokens(terms.logprobs.detach(), advantages, terms.mask, experts)

    # -- supervision --------------------------------------------------------------------------------------------------

    def _sft_step(self, model: Any, rollouts: Any) -> torch.Tensor:
        tokens = self._sft_window_tokens
        if self._rule.from_prompts and not self._rule.queues:
            batches = [demonstrations_of(rollouts, self._tokenizer.pad_token_id)]
            tokens = self.share_of_window(rollouts[TOKENS])
        else:
            batches = self._sft_window.popleft()
        total = torch.zeros((), device=self.accelerator.device)
        for number, batch in enumerate(batches):
            # losses of a rule's demonstrations are divided by a constant, not by the tokens that a step has
            counted = None if self._rule.from_prompts else batch.count_tokens()
            with self._mixer_of_run.sft(tokens=counted), self._no_sync(model, last=number == len(batches) - 1):
                total = total + self._supervise(model, batch.to(self.accelerator.device), tokens)
        return total

    def _supervise(self, model: Any, batch: DemonstrationBatch, tokens: torch.Tensor | float) -> torch.Tensor:
        with self.compute_loss_context_manager():
            outputs = model(**batch.model_inputs(), use_cache=False)
            loss = self._rule.sft_loss(outputs.logits, batch.labels, tokens, self.weights_of(batch))
        if self._observes:
            logprobs, mask = map(batch.by_row, label_logprobs(outputs.logits.detach(), batch.labels))
            rows = len(mask)
            advantages, experts = logprobs.new_zeros(rows), mask.new_ones(rows)
            self._mixer_of_run.observe_tokens(logprobs, advantages, mask, experts)
        # the count spans all ranks and data parallelism averages gradients over them
        loss = loss * self.accelerator.num_processes
        self._sft_window_loss = loss.detach() + (0.0 if self._sft_window_loss is None else self._sft_window_loss)
        weighted = self._weigh(loss)
        self.accelerator.backward(weighted)
        return weighted.detach()
