"""TRL's GRPO with a supervised branch whose weight is set from measured gradient statistics.

`HybridGRPOTrainer` keeps groups of rollouts together, leaves TRL's reinforcement side as it is otherwise and adds one
supervised forward and backward to every micro-step. What each branch's gradient is divided by, so that `mu` means the
same at any accumulation, batch size and sequence length:

- RL: TRL's own normalisation. TRL divides inside its loss and switches the trainer's accumulation scaling off
  (``loss_is_scaled_for_ga``), which is why the supervised loss must bring its own divisor.
- SFT: the token sum of a micro-batch over the loss tokens of the *whole* accumulation window on all ranks. The window's
  micro-batches are drawn together at its first micro-step, so the count is known before the first backward.

Under DDP the last backward of a micro-step is the one that may synchronise: the supervised one, in steps that have it.
Under FSDP2 every backward does: what is reduced together cannot be told apart. Every rank runs the same backwards in
every micro-step, whatever its data.

Laws that act per prompt or token (`gac.laws.rules`) are carried out by a rule (`gac.trainers.rules`): it chooses
prompts, rollouts and demonstrations between rewards and losses.
"""

import contextlib
import itertools
import logging
import time
from collections import deque
from typing import Any

import torch
from accelerate.utils import DistributedType
from transformers import TrainerCallback

import gac
from gac.losses import count_label_tokens
from gac.observe.topology import fsdp2_modules
from gac.trainers.checkpoints import complete_checkpoints
from gac.trainers.demonstrations import DemonstrationBatch, DemonstrationCollator, EpochSampler, pad_demonstrations
from gac.trainers.grouped_grpo import TOKEN_SUM_LOSSES, loss_mask
from gac.trainers.hybrid_config import HybridGRPOConfig
from gac.trainers.prompts import TOKENS, demonstrations_of, require_column
from gac.trainers.rules import LossTerms, rule_of
from gac.trainers.step_log import LoggedGRPOTrainer
from gac.trainers.token_stats import label_logprobs

__all__ = ["HybridGRPOConfig", "HybridGRPOTrainer", "complete_checkpoints"]

logger = logging.getLogger(__name__)


class HybridGRPOTrainer(LoggedGRPOTrainer):
    """`trl.GRPOTrainer` with a supervised branch.

    Each optimizer step follows ``mu * SFT gradient + (1 - mu) * RL gradient``; the logged loss is the same weighted
    sum, and everything measured is logged under ``gac/`` next to the unweighted ``gac/sft_loss``. The model is patched
    while `train` runs and left without hooks afterwards; `mixer` keeps the last values.

    Checkpoints continue exactly: they hold the mixer's state, the position in the demonstrations, TRL's micro-step
    counter and, where a checkpoint falls between two generations (``steps_per_generation`` or ``num_iterations`` above
    their defaults), the buffered rollouts. The order of prompts is restored in later epochs too, which TRL alone does
    not do. They also continue on another number of ranks or with other batch sizes: prompts and demonstrations go on
    in order, and buffered rollouts are dealt out anew (docs/trainers.md). `complete_checkpoints` tells finished
    checkpoints from those that a kill cut short; keep ``save_total_limit`` at 2 or more so that one of them always is.

    ``use_liger_kernel`` works: TRL 1.16 applies Liger's layers only and refuses its fused loss itself. Should another
    version of TRL not call `compute_loss`, the first step raises instead of training unweighted.

    Args:
        model, reward_funcs, train_dataset: as for `GRPOTrainer`; `train_dataset` holds the prompts. For laws whose
            demonstrations belong to prompts, a column ``demonstration`` holds them; None leaves a prompt to RL alone.
        args: a `HybridGRPOConfig`.
        sft_dataset: demonstrations, a map-style data set or a list of dicts with ``prompt`` and ``completion`` (text
            or messages) or ``input_ids`` and ``labels``; see `DemonstrationCollator`. Not used by laws whose
            demonstrations belong to prompts.
        **kwargs: everything else that `GRPOTrainer` takes.

    Raises:
        ValueError: empty `sft_dataset` or missing columns; a law that follows KL with ``beta=0``, or whose options do
            not fit ``num_generations``; DeepSpeed or FSDP1 (the message says why).
        TypeError: `args` is not a `HybridGRPOConfig`.
    """

    _tag_names = ["trl", "grpo", "gac"]  # noqa: RUF012 - the type of the base class

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: HybridGRPOConfig | None = None,
        train_dataset: Any = None,
        sft_dataset: Any = None,
        **kwargs: Any,
    ):
        if args is not None and not isinstance(args, HybridGRPOConfig):
            raise TypeError(f"args must be a HybridGRPOConfig, got {type(args).__name__}")
        if args is None:
            args = HybridGRPOConfig("hybrid-grpo")
        law = args.build_controller().law
        rule = rule_of(law)
        rule.check(args.num_generations)
        rule.phi |= args.sft_loss == "phi"
        if rule.from_prompts:
            require_column(train_dataset, law.name)
            if args.remove_unused_columns:
                raise ValueError(
                    f"law={law.name!r} reads demonstrations from train_dataset, and remove_unused_columns=True takes "
                    "that column away; leave it False, TRL's default for GRPO"
                )
            if sft_dataset is not None:
                logger.warning("law %r takes demonstrations from the prompts: sft_dataset is not used", law.name)
        elif sft_dataset is None:
            raise ValueError("sft_dataset is missing; pass demonstrations, or use trl.GRPOTrainer for RL alone")
        if "kl" in law.needs and args.beta == 0:
            raise ValueError(
                f"law={args.law!r} follows the KL divergence from the reference model, which TRL measures only with "
                "beta > 0; set beta (1e-6 measures it and hardly pulls)"
            )
        super().__init__(model, reward_funcs, args, rule, train_dataset, **kwargs)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise ValueError(
                "under accelerate, DeepSpeed takes its optimizer step within the last backward pass, and a branch "
                "would still be to come: use DDP (accelerate launch --multi_gpu) or FSDP2 (--use_fsdp --fsdp_version 2)"
            )
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1:
            raise ValueError(
                "FSDP1 flattens parameters and frees their gradients, so that branches cannot be measured; use FSDP2 "
                "(accelerate launch --use_fsdp --fsdp_version 2)"
            )
        self._collate = self._sampler = None
        if not rule.from_prompts:
            self._collate = DemonstrationCollator(
                self._tokenizer, sft_dataset, completion_only=args.sft_completion_only, max_length=args.sft_max_length
            )
            self._sampler = EpochSampler(len(sft_dataset), args.seed if args.sft_seed is None else args.sft_seed)
        self._observes = args.observe_tokens or args.estimator == "coefficient"
        self._sft_position = 0
        self._micro_steps_left = 0
        self._sft_window: deque[list[DemonstrationBatch]] = deque()
        self._sft_window_tokens: torch.Tensor | float = 0.0
        self._sft_window_loss: torch.Tensor | None = None
        self._rl_weighted = False
        self._sharded: list[torch.nn.Module] = []
        self._mixer_state: dict | None = None
        self.mixer: gac.Mixer | None = None
        # first, so that a callback of the user sees the new mu in the same event
        self.callback_handler.callbacks.insert(0, _MixerStep(self))

    # -- the two branches ---------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The step's branches, one after the other; returns the weighted sum of their losses."""
        if not self._micro_steps_left:
            self._begin_window()
        self._micro_steps_left -= 1
        self._taken += 1
        for module in self._sharded:
            # where accumulation turned it off, FSDP2 would reduce the branches' gradients together
            module.set_requires_gradient_sync(True, recurse=False)
        loss = torch.zeros((), device=self.accelerator.device)
        rollouts = None
        if self._rule.explores:
            rollouts = self._generate_rollouts(model, inputs)
            loss = loss + self._rl_step(model, inputs, num_items_in_batch, rollouts)
        if self._rule.supervises:
            loss = loss + self._sft_step(model, rollouts)
        return loss

    def _begin_window(self) -> None:
        """Decides on the demonstrations of all micro-steps up to the next optimizer step, where that can be done."""
        self._micro_steps_left = self.current_gradient_accumulation_steps
        self._sft_window_loss = None
        if not self._rule.supervises:
            return
        if self._rule.queues:
            self._draw_from_queue()
        elif not self._rule.from_prompts:
            self._draw_from_set()

    def _generate_rollouts(self, model: Any, inputs: Any) -> dict[str, Any]:
        # As TRL's training_step is about to do; here, the branch can be told how many tokens its loss adds up.
        begin = time.perf_counter()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        rollouts = self.prepare_rollouts(inputs)
        self._current_train_step_time += time.perf_counter() - begin
        return rollouts

    def _rl_step(self, model: Any, inputs: Any, num_items_in_batch: Any, rollouts: Any) -> torch.Tensor:
        tokens = loss_mask(rollouts).sum() if self.loss_type in TOKEN_SUM_LOSSES else None
        # A supervised backward that follows is the one that may synchronise. Both contexts nest inside the trainer's.
        with self.mixer.rl(tokens=tokens), self._no_sync(model, last=not self._rule.supervises):
            self._rl_weighted = False
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not self._rl_weighted:
            raise RuntimeError(
                "the RL loss did not pass through compute_loss, so it was not weighted; this version of TRL or one of "
                "its options (a fused loss?) is not supported"
            )
        return loss

    def _no_sync(self, model: Any, *, last: bool) -> Any:
        """For a backward pass that need not synchronise: under DDP, all but the last of a micro-step."""
        return contextlib.nullcontext() if last or self._sharded else self.accelerator.no_sync(model=model)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Any:
        """TRL's loss, with the rule's terms and weighted with ``1 - mu`` in training, as it is in evaluation."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, terms = self.policy_loss(model, inputs)
        if self._observes:
            self._observe_rollouts(terms)
        self._rl_weighted = True
        return loss * (self._rule.scale * self.mixer.weight).to(loss.dtype)

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
            with self.mixer.sft(tokens=counted), self._no_sync(model, last=number == len(batches) - 1):
                total = total + self._supervise(model, batch.to(self.accelerator.device), tokens)
        return total

    def _supervise(self, model: Any, batch: DemonstrationBatch, tokens: torch.Tensor | float) -> torch.Tensor:
        with self.compute_loss_context_manager():
            outputs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            loss = self._rule.sft_loss(outputs.logits, batch.labels, tokens)
        if self._observes:
            logprobs, mask = label_logprobs(outputs.logits.detach(), batch.labels)
            rows = len(batch.labels)
            advantages, experts = logprobs.new_zeros(rows), mask.new_ones(rows)
            self.mixer.observe_tokens(logprobs, advantages, mask, experts)
        # the count spans all ranks and data parallelism averages gradients over them
        loss = loss * self.accelerator.num_processes
        self._sft_window_loss = loss.detach() + (0.0 if self._sft_window_loss is None else self._sft_window_loss)
        weighted = loss * (self._rule.scale * self.mixer.weight)
        self.accelerator.backward(weighted)
        return weighted.detach()

    def _observe_rollouts(self, terms: LossTerms) -> None:
        advantages = terms.inputs["advantages"]
        experts = torch.zeros(len(advantages), dtype=torch.bool, device=advantages.device)
        if "gac_joined" in terms.inputs:
            experts = terms.inputs["gac_joined"]
        self.mixer.observe_tokens(terms.logprobs.detach(), advantages, terms.mask, experts)

    @property
    def _sft_rows(self) -> int:
        return self.args.sft_batch_size or self.args.per_device_train_batch_size

    def _draw_from_set(self) -> None:
        """Demonstrations of the window from `sft_dataset`, and their token count over all ranks."""
        size = self._sft_rows
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        for _ in range(self.current_gradient_accumulation_steps):
            indices = self._sampler.take(self._sft_position + rank * size, size)
            self._sft_position += world * size
            self._sft_window.append([self._collate(indices)])
        tokens = torch.stack([count_label_tokens(batch.labels) for (batch,) in self._sft_window]).sum()
        tokens = tokens.to(self.accelerator.device)
        self._sft_window_tokens = self.accelerator.reduce(tokens, reduction="sum") if world > 1 else tokens

    def _draw_from_queue(self) -> None:
        """Demonstrations of the window from the rule's queue, in as many equal pieces on every rank."""
        demonstrations = self._rule.dequeue()
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        micro_steps = self.current_gradient_accumulation_steps
        share = -(-len(demonstrations) // world)
        pieces = -(-share // (micro_steps * self._sft_rows))
        size = -(-share // (micro_steps * pieces))
        own = iter(demonstrations[rank::world])
        pad = self._tokenizer.pad_token_id
        for _ in range(micro_steps):
            self._sft_window.append([pad_demonstrations(list(itertools.islice(own, size)), pad) for _ in range(pieces)])
        whole = pad_demonstrations(demonstrations, pad)
        self._sft_window_tokens = float(whole.count_tokens())

    # -- mixer --------------------------------------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps: Any, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._sharded = fsdp2_modules(self.model_wrapped)
        # the wrapped model, so that data parallelism is seen; hooks live only while training runs
        law, options = self.args.law_and_options()
        self.mixer = gac.patch(
            self.model_wrapped,
            law=law,
            estimator=self.args.estimator,
            interval=self.args.gac_interval,
            metric=self.args.gac_metric,
            report_interval=self.args.gac_report_interval,
            scaler=self.accelerator.scaler,  # of fp16=True, else None
            carries_out_rules=True,
            **options,
        )
        self.mixer.follow(self.optimizer)  # the trainer ends the mixer's steps itself
        self._rule.attach(self.mixer.controller.law)
        if self._mixer_state is not None:
            self.mixer.load_state_dict(self._mixer_state)
        if resume_from_checkpoint is not None:
            self._load_gac_state(resume_from_checkpoint)
        return prepared

    def _inner_training_loop(self, *args: Any, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        self._checkpoint = None if resume_from_checkpoint is None else self._read_checkpoint(resume_from_checkpoint)
        try:
            return super()._inner_training_loop(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self._detach()

    def _detach(self) -> None:
        if self.mixer is not None:
            self._record_modules()
            with contextlib.suppress(RuntimeError):  # an exception in mid-step leaves nothing worth keeping
                self._mixer_state = self.mixer.state_dict()
            self.mixer.unpatch()
        self._sft_window.clear()
        self._micro_steps_left = 0
        self._prepared = None


class _MixerStep(TrainerCallback):
    """Ends the mixer's step after the optimizer's, before anything is logged or saved."""

    def __init__(self, trainer: HybridGRPOTrainer):
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.end_optimizer_step()
