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
import dataclasses
import itertools
import logging
import math
import os
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import DistributedType, send_to_device
from transformers import TrainerCallback
from trl import GRPOConfig

import gac
from gac.laws.controller import Controller
from gac.losses import count_label_tokens
from gac.observe.topology import fsdp2_modules
from gac.options import ESTIMATORS, METRICS
from gac.report import append_record
from gac.statistics import ModuleStatistics
from gac.trainers.demonstrations import DemonstrationBatch, DemonstrationCollator, EpochSampler, pad_demonstrations
from gac.trainers.grouped_grpo import TOKEN_SUM_LOSSES, GroupedGRPOTrainer, loss_mask
from gac.trainers.prompts import TOKENS, demonstrations_of, require_column
from gac.trainers.resume import IMAGES, Batching, Position, redistribute
from gac.trainers.rules import LossTerms, rule_of
from gac.trainers.token_stats import label_logprobs

logger = logging.getLogger(__name__)

STATE_FILE = "gac_state.pt"
"""The last file written into a checkpoint: a checkpoint without it is incomplete."""
ROLLOUT_FILE = "gac_rollouts_{rank}.pt"
SFT_LOSSES = ("nll", "phi")
_COUNTERS = ("step", "skipped")
"""Metrics that count: logged with their newest value, where the others are averaged over the logging window."""


@dataclass
class HybridGRPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` with the options of the supervised branch and of the mix.

    Raises:
        ValueError: unknown law, law option, estimator or loss, or a number out of range; at construction.
    """

    law: str = field(default="gac", metadata={"help": "How mu follows from the statistics; see gac.laws.available()."})
    mu: float | None = field(
        default=None, metadata={"help": "A constant SFT weight in [0, 1]; short for law='fixed' with this mu."}
    )
    law_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the law, such as {'half_life': 20.0, 'cap': 0.02}."}
    )
    estimator: str = field(
        default="auto", metadata={"help": "'auto', 'sketch', 'exact' or 'coefficient'; see gac.patch."}
    )
    observe_tokens: bool = field(
        default=False,
        metadata={"help": "Feed the coefficient estimator too; estimator='coefficient' does so by itself."},
    )
    gac_interval: int = field(default=1, metadata={"help": "Measure in every so many optimizer steps."})
    gac_metric: str = field(
        default="gradient",
        metadata={"help": "'gradient', or 'optimizer' to measure in the space of Adam's steps; see gac.patch."},
    )
    gac_report_interval: int | None = field(
        default=10,
        metadata={"help": "Take every so many measured steps apart by module, for `gac report`; None: never."},
    )
    gac_report_dir: str | None = field(
        default=None, metadata={"help": "Folder of the statistics by module; default: output_dir."}
    )
    sft_batch_size: int | None = field(
        default=None,
        metadata={"help": "Demonstrations per device and micro-step; default: per_device_train_batch_size."},
    )
    sft_loss: str = field(
        default="nll", metadata={"help": "'nll', or 'phi' to weight each token with its detached p * (1 - p)."}
    )
    sft_max_length: int | None = field(
        default=None, metadata={"help": "Demonstrations keep their first so many tokens; default: no limit."}
    )
    sft_completion_only: bool = field(
        default=True, metadata={"help": "Loss on completion tokens only; otherwise on the prompt too."}
    )
    sft_seed: int | None = field(
        default=None, metadata={"help": "Seed of the order of the demonstrations; default: seed."}
    )

    # TrainingArguments parses dict options given as JSON text for the fields named here; no annotation, or it would
    # become a field
    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "law_options"]  # noqa: RUF012

    def __post_init__(self):
        super().__post_init__()
        if self.sft_loss not in SFT_LOSSES:
            raise ValueError(f"unknown sft_loss {self.sft_loss!r}; known: {', '.join(SFT_LOSSES)}")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {self.estimator!r}; known: {', '.join(ESTIMATORS)}")
        if self.gac_metric not in METRICS:
            raise ValueError(f"unknown gac_metric {self.gac_metric!r}; known: {', '.join(METRICS)}")
        for name in ("sft_batch_size", "gac_interval", "gac_report_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.build_controller()

    def law_and_options(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the law, with `mu` folded in."""
        options = dict(self.law_options or {})
        if self.mu is None:
            return self.law, options
        if self.law not in ("fixed", "gac") or options:
            raise ValueError(
                f"mu={self.mu} is a constant weight and cannot be combined with law={self.law!r} and "
                f"law_options={options}; leave one of them out"
            )
        return "fixed", {"mu": self.mu}

    def build_controller(self) -> Controller:
        """A fresh controller of the law; raises ValueError for what the law does not know."""
        law, options = self.law_and_options()
        try:
            return Controller(law, **options)
        except TypeError as error:
            raise ValueError(str(error)) from error


class HybridGRPOTrainer(GroupedGRPOTrainer):
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
        self._rl_sampler = None
        self._checkpoint: dict[str, Any] | None = None  # what training continues from
        self._position = Position(0, 0, 0)
        self._taken = 0  # micro-steps from the data loader, over all epochs
        self._epoch_length = 0
        self._sharded: list[torch.nn.Module] = []
        self._mixer_state: dict | None = None
        self._last_metrics: dict[str, float] = {}
        self.mixer: gac.Mixer | None = None
        self._recorded: ModuleStatistics | None = None
        # first, so that a callback of the user sees the new mu in the same event
        self.callback_handler.callbacks.insert(0, _MixerStep(self))

    # -- the two branches ---------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
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

    def _generate_rollouts(self, model, inputs) -> dict[str, Any]:
        # As TRL's training_step is about to do; here, the branch can be told how many tokens its loss adds up.
        begin = time.perf_counter()
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        rollouts = self.prepare_rollouts(inputs)
        self._current_train_step_time += time.perf_counter() - begin
        return rollouts

    def _rl_step(self, model, inputs, num_items_in_batch, rollouts) -> torch.Tensor:
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

    def _no_sync(self, model, *, last: bool):
        """For a backward pass that need not synchronise: under DDP, all but the last of a micro-step."""
        return contextlib.nullcontext() if last or self._sharded else self.accelerator.no_sync(model=model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """TRL's loss, with the rule's terms and weighted with ``1 - mu`` in training, as it is in evaluation."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, terms = self.policy_loss(model, inputs)
        if self._observes:
            self._observe_rollouts(terms)
        self._rl_weighted = True
        return loss * (self._rule.scale * self.mixer.weight).to(loss.dtype)

    def _sft_step(self, model, rollouts) -> torch.Tensor:
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

    def _supervise(self, model, batch: DemonstrationBatch, tokens: torch.Tensor | float) -> torch.Tensor:
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

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
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

    def _inner_training_loop(self, *args, resume_from_checkpoint=None, **kwargs):
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

    def _on_optimizer_step(self) -> None:
        self._rule.end_step()
        self._record_modules()
        self.mixer.step(**{name: self._mean_of_step(name) for name in self.mixer.controller.law.needs})
        metrics = self.mixer.metrics()
        self._last_metrics = {f"gac/{name}": metrics[name] for name in _COUNTERS if name in metrics}
        series = self._metrics["train"]
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and name not in _COUNTERS:
                series[f"gac/{name}"].append(float(value))
        if self._sft_window_loss is not None:
            # a device scalar until it is logged: TRL's own metrics wait for the device, ours need not
            series["gac/sft_loss"].append(self._sft_window_loss)

    def _record_modules(self) -> None:
        """Writes the newest statistics by module. Called a step later, when they wait for nothing any more."""
        modules = self.mixer.modules
        if modules is not None and modules is not self._recorded and self.args.should_save:
            append_record(self.args.gac_report_dir or self.args.output_dir, modules)
        self._recorded = modules

    def _mean_of_step(self, name: str) -> float:
        """Mean over the step's micro-batches of a number that TRL has brought to the host: ``kl`` or ``entropy``."""
        values = self._metrics["train"][name][-self.current_gradient_accumulation_steps :]
        return sum(values) / len(values)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's logging, with the metrics of the mix under ``gac/``."""
        if self.model.training and "loss" in logs:
            losses = self._metrics["train"].get("gac/sft_loss")
            if losses:
                mean = torch.stack([loss.float() for loss in losses]).mean()
                self._metrics["train"]["gac/sft_loss"] = [self.accelerator.gather(mean).mean().item()]
            # what was not measured (NaN) is left out rather than logged as a number
            for name in [key for key, values in self._metrics["train"].items() if key.startswith("gac/")]:
                if all(value != value for value in self._metrics["train"][name]):
                    del self._metrics["train"][name]
            logs.update(self._last_metrics)
        super().log(logs, start_time)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset=None):
        self._rl_sampler = super()._get_train_sampler(dataset)
        return self._rl_sampler

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            _save(self._buffered_inputs, os.path.join(folder, ROLLOUT_FILE.format(rank=self.args.process_index)))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            epoch, taken = divmod(self._taken, self._epoch_length)
            state = {
                "mixer": self.mixer.state_dict(),
                "sft_position": self._sft_position,
                "sft_size": self._sampler.size if self._sampler else 0,
                "global_step": self.state.global_step,
                "position": dataclasses.asdict(Position(epoch, taken, self._step)),
                "batching": dataclasses.asdict(self._batching()),
                "rule": self._rule.state_dict(),
            }
            _save(state, os.path.join(folder, STATE_FILE))

    def _batching(self) -> Batching:
        return Batching(
            ranks=self.accelerator.num_processes,
            rows=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            steps_per_generation=self.args.steps_per_generation,
            iterations=self.num_iterations,
            group=self.num_generations,
        )

    def _read_checkpoint(self, checkpoint: str) -> dict[str, Any]:
        """The state to continue from, once it is clear that it can be, and where."""
        path = os.path.join(checkpoint, STATE_FILE)
        if not os.path.isfile(path):
            raise ValueError(
                f"{checkpoint} has no {STATE_FILE}: it was cut short or another trainer wrote it; resume from one of "
                "gac.trainers.hybrid_grpo.complete_checkpoints(output_dir)"
            )
        state = torch.load(path, weights_only=True)
        size = self._sampler.size if self._sampler else 0
        if state["sft_size"] != size:
            raise ValueError(
                f"{checkpoint} was written with {state['sft_size']} demonstrations, sft_dataset has {size}; resume "
                "with the same set"
            )
        old, new = Batching(**state["batching"]), self._batching()
        self._position = Position(**state["position"])
        if old == new:
            return state
        if self.args.ignore_data_skip:
            self._position = dataclasses.replace(self._position, trained=0)
            logger.warning(
                "resuming with other batch sizes and ignore_data_skip=True: prompts begin anew, and rollouts that "
                "%s may hold are dropped",
                checkpoint,
            )
            return state
        try:
            countable = self.args.max_steps > 0 and hasattr(self.train_dataset, "__len__")
            if old.step_rows != new.step_rows and not countable:
                raise ValueError("without a length of train_dataset and max_steps, what is left to do is not known")
            self._position = self._position.moved(old, new)
        except ValueError as error:
            raise ValueError(
                f"{checkpoint} cannot be continued with these batch sizes: {error}. Choose gradient_accumulation_steps "
                f"such that an optimizer step has {old.step_rows} rollouts over all ranks, as before "
                f"(per_device_train_batch_size * gradient_accumulation_steps = {old.step_rows} / {new.ranks} ranks), "
                f"and generation_batch_size={old.generation_rows}; or set ignore_data_skip=True to begin the prompts "
                "anew, without buffered rollouts"
            ) from error
        return state

    def set_initial_training_values(self, args, dataloader) -> tuple:
        """As the base class counts them, with enough epochs for a run that goes on with other batch sizes."""
        epochs, updates, examples, samples, batch, self._epoch_length, max_steps = super().set_initial_training_values(
            args, dataloader
        )
        if self._checkpoint is not None and args.max_steps > 0:
            ahead = self._position.taken // args.gradient_accumulation_steps + max_steps
            ahead -= self._checkpoint["global_step"]
            epochs = max(epochs, self._position.epoch + math.ceil(ahead / updates))
        return epochs, updates, examples, samples, batch, self._epoch_length, max_steps

    def _init_training_state(self, *args, **kwargs) -> tuple[int, int]:
        epoch, taken = super()._init_training_state(*args, **kwargs)
        if self._checkpoint is not None and not self.args.ignore_data_skip:
            # by what was taken, where the base class goes by optimizer steps of today's size
            epoch, taken = self._position.epoch, self._position.taken
        self._taken = epoch * self._epoch_length + taken
        return divmod(self._taken, self._epoch_length)  # larger generations may have no more of the epoch to take

    def _load_gac_state(self, checkpoint: str) -> None:
        state = self._checkpoint
        self.mixer.load_state_dict(state["mixer"])
        self._rule.load_state_dict(state["rule"])
        self._sft_position = state["sft_position"]
        self._sft_window.clear()
        self._micro_steps_left = 0
        self._step = self._position.trained
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            self._buffered_inputs = self._load_rollouts(checkpoint, Batching(**state["batching"]))
        # TRL's sampler draws one permutation per epoch from its own generator, which a checkpoint does not hold
        if getattr(self._rl_sampler, "shuffle", False):
            for _ in range(self._taken // self._epoch_length):
                torch.randperm(self._rl_sampler.num_samples, generator=self._rl_sampler.generator)

    def _load_rollouts(self, checkpoint: str, old: Batching) -> list[dict[str, Any]] | None:
        """What is left to train on of the generation under way; None, on all ranks, where it has to be generated."""
        new, rank = self._batching(), self.args.process_index
        ranks = [rank] if new == old else range(old.ranks)
        paths = [os.path.join(checkpoint, ROLLOUT_FILE.format(rank=rank)) for rank in ranks]
        saved = [torch.load(path, weights_only=True, map_location="cpu") for path in paths if os.path.isfile(path)]
        usable = len(saved) == len(paths) and (new == old or not IMAGES & set(saved[0][0]))
        unusable = torch.tensor(float(not usable), device=self.accelerator.device)
        if self.accelerator.reduce(unusable, reduction="sum") > 0:
            logger.warning(
                "the rollouts of the generation under way cannot be read from %s by every rank (files of some ranks "
                "are missing there, or they hold images): the prompts of this generation get new ones",
                checkpoint,
            )
            return None
        own = saved[0] if new == old else redistribute(saved, new, rank, self._tokenizer.pad_token_id)
        return [send_to_device(part, self.accelerator.device) for part in own]


class _MixerStep(TrainerCallback):
    """Ends the mixer's step after the optimizer's, before anything is logged or saved."""

    def __init__(self, trainer: HybridGRPOTrainer):
        self._trainer = trainer

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._trainer._on_optimizer_step()


def complete_checkpoints(output_dir: str) -> list[str]:
    """Folders of finished checkpoints in `output_dir`, oldest step first; a kill during saving leaves none behind."""
    steps = []
    for name in os.listdir(output_dir) if os.path.isdir(output_dir) else ():
        prefix, _, step = name.rpartition("-")
        if prefix == "checkpoint" and step.isdigit() and os.path.isfile(os.path.join(output_dir, name, STATE_FILE)):
            steps.append((int(step), os.path.join(output_dir, name)))
    return [path for _, path in sorted(steps)]


def _save(value: Any, path: str) -> None:
    """`torch.save` that leaves either the whole file or none."""
    torch.save(value, path + ".part")
    os.replace(path + ".part", path)
