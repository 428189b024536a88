"""ms-swift: GRPO with CHORD's demonstrations, whose weight is measured instead of scheduled.

Written against ms-swift 4.6.0. Its GRPO trainer already draws demonstrations (``--chord_sft_dataset``), runs a forward
pass over them in each micro-batch and one backward over the sum; :func:`install`, called in a file given to
``--external_plugins``, replaces the schedule of the sum by mu.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gac.losses import sft_token_loss
from gac.trainers.callback import GacCallback
from gac.trainers.token_stats import label_logprobs

CLASS_NAME = "GacGRPOTrainer"
"""What :func:`install` adds to this module, for ms-swift's factory to find."""


def install(**options: Any) -> type:
    """Makes ``swift rlhf --rlhf_type grpo`` use a trainer with a measured mu. Idempotent; returns the class.

    Args:
        **options: of :class:`gac.trainers.GacCallback`, except ``estimator``.
    """
    from swift.rlhf_trainers import GRPOTrainer
    from swift.trainers import TrainerFactory

    trainer = type(CLASS_NAME, (MixedGRPOMixin, GRPOTrainer), {"gac_options": options, "__module__": __name__})
    globals()[CLASS_NAME] = trainer
    TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.{CLASS_NAME}"
    return trainer


class MixedGRPOMixin:
    """Goes before ms-swift's ``GRPOTrainer`` in the bases of a class.

    Both losses keep ms-swift's normalisation: GRPO by its ``loss_type``, the demonstrations by the mean over the tokens
    of a micro-batch, micro-batches counting alike. The callback's checkpoints and logs are the trainer's own.
    """

    gac_options: Mapping[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if getattr(self, "use_liger_loss", False):
            raise ValueError("use_liger_kernel fuses the loss, so its log-probabilities cannot be read; switch it off")
        if self.template.padding_free or self.template.sequence_parallel_size > 1:
            raise ValueError("padding_free and sequence parallelism put sequences together or apart; switch them off")
        if self.chord_sft_iterator is None:
            raise ValueError("there are no demonstrations: give --chord_sft_dataset")
        self.gac = GacCallback(estimator="coefficient", **self.gac_options).attach(self)
        self._policy_logprobs: Tensor | None = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if torch.is_grad_enabled():
            self._policy_logprobs = result[0].detach()
        return result

    def _compute_loss_and_metrics(self, model: Any, model_inputs: Any, grpo_batch: Any) -> Any:
        demonstrations, self.chord_sft_iterator = self.chord_sft_iterator, None  # or it adds its own weighted sum
        try:
            rl_loss, metrics = super()._compute_loss_and_metrics(model, model_inputs, grpo_batch)
        finally:
            self.chord_sft_iterator = demonstrations
        if not self.model.training:
            return rl_loss, metrics
        mixer = self.gac.mixer
        logprobs, mask = self._policy_logprobs, grpo_batch.completion_mask
        self._policy_logprobs = None
        rollouts = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
        mixer.observe_tokens(logprobs, grpo_batch.advantages, mask, rollouts)
        return mixer.mixed_loss(sft_loss=self._sft_loss(next(demonstrations)), rl_loss=rl_loss), metrics

    def _sft_loss(self, rows: Any) -> Tensor:
        """NLL of a micro-batch of demonstrations, as ms-swift encodes them; feeds the estimator."""
        inputs = self._prepare_input(self.template.data_collator(rows))
        labels = inputs.pop("labels")
        inputs.pop("loss_scale", None)
        logits = self.model(**inputs).logits
        logprobs, mask = label_logprobs(logits, labels)
        experts = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        self.gac.mixer.observe_tokens(logprobs, torch.zeros_like(logprobs), mask, experts)
        return sft_token_loss(logits, labels, phi=bool(self.args.chord_enable_phi_function))
