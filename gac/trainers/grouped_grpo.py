"""TRL's GRPO with whole groups in micro-batches, and with a rule between rewards and losses.

Needs TRL and transformers, as `hybrid_grpo`, which adds the supervised branch.
"""

import warnings
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from trl import GRPOTrainer
from trl.trainer.utils import split_tensor_dict

from gac.losses import IGNORE_INDEX
from gac.trainers.groups import GroupLayout, origins, take_rows
from gac.trainers.hybrid_config import HybridGRPOConfig
from gac.trainers.prompts import COLUMN, TOKENS, beside_rollouts, encode_demonstration, has_demonstration, with_labels
from gac.trainers.rules import LossTerms, Rule, ScoredBatch
from gac.trainers.rules.losses import normalized

TOKEN_SUM_LOSSES = ("cispo", "dapo", "vespo")
"""TRL's loss types that divide by the completion tokens of the whole optimizer step, so that a micro-batch counts for
as many tokens as it has. The others take means within micro-batches or divide by constants (TRL 1.16)."""


NO_IMAGES = "image inputs are not served; use text alone, or trl.GRPOTrainer"


class GroupedGRPOTrainer(GRPOTrainer):
    """`trl.GRPOTrainer` whose micro-batches hold whole groups wherever their size allows it.

    TRL shuffles the rows of a generation batch before it cuts micro-batches; here groups are shuffled instead. With a
    ``per_device_train_batch_size`` that is no multiple of ``num_generations``, groups must be cut: they are spread over
    as few micro-batches as possible (:func:`warn_of_cut_groups`).
    """

    # as they are once TRL's constructor is through
    args: HybridGRPOConfig
    model: torch.nn.Module
    num_generations: int
    _buffered_inputs: Any

    def __init__(
        self, model: Any, reward_funcs: Any, args: HybridGRPOConfig, rule: Rule, *positional: Any, **kwargs: Any
    ) -> None:
        self._rule = rule
        self._prepared: dict[str, Any] | None = None
        self._joining: dict[int, tuple[list[int], Any]] = {}
        self._rewards: torch.Tensor | None = None
        self._capturing = False
        self._captured: tuple[torch.Tensor, torch.Tensor] | None = None
        super().__init__(model, reward_funcs, args, *positional, **kwargs)

    # -- generation batches -------------------------------------------------------------------------------------------

    def prepare_rollouts(self, inputs: Any) -> dict[str, Any]:
        """The micro-batch of rollouts that the next `training_step` of TRL is going to use."""
        self._prepared = self._prepare_inputs(inputs)
        return self._prepared

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self._prepared is not None:
            prepared, self._prepared = self._prepared, None
            return prepared
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        if self._step % (self._steps_per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            layout = self._layout(len(generation_batch))
            if self.args.estimator == "sequence":
                batch |= origins(layout, generation_batch, self.args.gac_source_column)
            self._buffered_inputs = split_tensor_dict(take_rows(batch, layout.shuffled()), self._steps_per_generation)
        return self._buffered_inputs[self._step % self._steps_per_generation]

    @property
    def _template(self) -> dict[str, Any]:
        """What TRL renders prompts with: demonstrations are to be rendered alike."""
        own: dict[str, Any] = {"tools": self.tools or None, "chat_template": self.chat_template}
        given = cast("dict[str, Any]", self.chat_template_kwargs)  # TrainingArguments has read it if it was text
        return {name: value for name, value in own.items() if value is not None} | given

    @property
    def _steps_per_generation(self) -> int:
        return cast(int, self.args.steps_per_generation)  # GRPOConfig has put a number where there was None

    def _layout(self, rows: int) -> GroupLayout:
        return GroupLayout(rows, self.num_generations, self.accelerator.process_index * rows)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training or not self._rule.from_prompts:
            return self._of_text(super()._generate_and_score_completions(inputs))
        layout = self._layout(len(inputs))
        demonstrated = torch.tensor([has_demonstration(row) for row in inputs])
        pairs = {
            row: encode_demonstration(self._tokenizer, inputs[row], **self._template)
            for row in (layout.heads() & demonstrated).nonzero().flatten().tolist()
        }
        joining = {row: pair[1][: self.max_completion_length] for row, pair in pairs.items() if pair[1]}
        self._joining = {row: (ids, inputs[row][COLUMN]) for row, ids in joining.items() if self._rule.joins_groups}
        joined = torch.zeros(layout.rows, dtype=torch.bool)
        joined[list(self._joining)] = True
        try:
            output = self._of_text(super()._generate_and_score_completions(inputs))
        finally:
            self._joining = {}
        rewards = cast(torch.Tensor, self._rewards)  # of _calculate_rewards
        selection = self._rule.select(ScoredBatch(layout, rewards, output["advantages"], demonstrated, joined))
        output["advantages"] = selection.advantages
        output |= selection.extra
        if selection.demonstrate is not None:
            output |= self._place(selection.demonstrate.cpu(), layout, pairs)
        for name, value in self._rule.metrics().items():
            self._metrics["train"][f"gac/{name}"].append(value)
        return output

    @staticmethod
    def _of_text(output: dict[str, Any]) -> dict[str, Any]:
        if "num_images" in output:
            raise ValueError(f"a prompt, a tool or an environment brought images: {NO_IMAGES}")
        return output

    def _generate(self, prompts: list) -> tuple:
        result = super()._generate(prompts)
        if not self._joining:
            return result
        prompt_ids, completion_ids, tool_mask, completions, logprobs, *rest = result
        for row, (ids, demonstration) in self._joining.items():
            completion_ids[row] = ids
            completions[row] = demonstration
            if tool_mask is not None:
                tool_mask[row] = [1] * len(ids)
            if logprobs is not None:
                logprobs[row] = [None] * len(ids)  # not sampled: TRL corrects nothing where there is no number
        return prompt_ids, completion_ids, tool_mask, completions, logprobs, *rest

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args, **kwargs)
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        self._rewards = total.masked_fill(rewards.isnan().all(1), float("nan"))
        return rewards

    def _place(
        self, demonstrate: torch.Tensor, layout: GroupLayout, pairs: dict[int, tuple[list[int], list[int]]]
    ) -> dict[str, torch.Tensor]:
        """The selected demonstrations: to the queue of a rule that has one, else to tensors beside the rollouts.

        The supervised loss of a generation batch is divided by the mean length of its prompts' demonstrations times
        the number of its prompts, so that a prompt weighs the same whichever branch it goes to.
        """
        options: dict[str, Any] = {
            "completion_only": self.args.sft_completion_only,
            "max_length": self.args.sft_max_length,
        }
        encoded = {row: with_labels(*pair, **options) for row, pair in pairs.items()}
        chosen = {row: encoded[row] for row in encoded if demonstrate[row]}
        if self._rule.queues:
            self._rule.enqueue(gather_object(list(chosen.values())))
            return {}
        tokens = sum(label != IGNORE_INDEX for _, labels in encoded.values() for label in labels[1:])
        counts = torch.tensor(
            [tokens, len(encoded), len(chosen), int(layout.heads().sum())],
            dtype=torch.float32,
            device=self.accelerator.device,
        )
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        tokens, demonstrated, selected, prompts = counts.tolist()
        self._metrics["train"]["gac/demonstrated"].append(selected / prompts)
        pad = self._tokenizer.pad_token_id
        rows = beside_rollouts([chosen.get(row) for row in range(layout.rows)], pad)
        return rows | {TOKENS: torch.tensor(tokens * prompts / max(demonstrated, 1.0))}

    # -- losses -------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple:
        result = self._scores(*args, **kwargs)
        if self._capturing:
            self._captured = result[:2]
        return result

    def _scores(self, *args: Any, **kwargs: Any) -> tuple:
        """Log-probabilities and entropies of rollouts, as TRL has them."""
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def policy_loss(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, LossTerms]:
        """TRL's loss plus the rule's terms, both normalised alike, and what the policy said about the rollouts."""
        self._capturing, self._captured = True, None
        try:
            loss = super().compute_loss(model, inputs)
        finally:
            self._capturing = False
        if self._captured is None:
            raise RuntimeError(
                "TRL computed its loss without _get_per_token_logps_and_entropies, so the rollouts' probabilities are "
                "unknown; this version of TRL or one of its options (a fused loss?) is not supported"
            )
        logprobs, entropies = self._captured
        self._captured = None
        epsilon = (self.epsilon_low, self.epsilon_high)
        terms = LossTerms(logprobs, entropies, loss_mask(inputs), inputs, epsilon)
        token_losses = self._rule.rl_terms(terms)
        if token_losses is not None:
            loss = loss + normalized(
                token_losses,
                terms.mask,
                self.loss_type,
                step_tokens=self.share_of_window(inputs["num_items_in_batch"].clamp(min=1.0))
                / self.accelerator.num_processes,
                micro_batches=self.current_gradient_accumulation_steps,
                max_length=self.max_completion_length,
            )
        return loss, terms

    def share_of_window(self, of_generation_batch: torch.Tensor) -> torch.Tensor:
        """What of a count over the generation batch falls to one optimizer step."""
        return of_generation_batch * self.current_gradient_accumulation_steps / self._steps_per_generation


def loss_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """``[B, T]``: completion tokens that TRL's loss counts."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def warn_of_cut_groups(rows: int, size: int) -> None:
    """Warns where micro-batches of `rows` rollouts cannot hold whole groups of `size`.

    For constructors that users call: the warning names the line that calls the caller.
    """
    if rows % size:
        warnings.warn(
            f"per_device_train_batch_size={rows} is no multiple of num_generations={size}: groups are split over "
            "micro-batches, whose gradients are then correlated, and sigma_r2 reads low (docs/statistics.md). Make it "
            f"a multiple of {size} and lower gradient_accumulation_steps",
            stacklevel=3,
        )
