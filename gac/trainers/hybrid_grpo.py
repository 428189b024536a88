"""TRL's GRPO with a supervised branch whose weight is set from measured gradient statistics.

`HybridGRPOTrainer` keeps groups of rollouts together, leaves TRL's reinforcement side as it is otherwise and adds one
supervised forward and backward to every micro-step. It is made of one class a job, each upon the one before:

- `grouped_grpo`: whole groups in micro-batches, and a rule (`gac.trainers.rules`) between rewards and losses, which
  carries out laws that act per prompt or token (`gac.laws.rules`);
- `patched`: the mixer, from patching to the end of training;
- `scored`: what demonstrations are worth by the reward functions, where that is asked;
- `branches`: the losses of both branches;
- `checkpoints`: what continues a run;
- `step_log`: what is logged.

Here is what users give, checked before anything is built.
"""

import logging
from collections.abc import Mapping
from typing import Any, cast

from gac.laws.base import Law
from gac.trainers.checkpoints import complete_checkpoints
from gac.trainers.grouped_grpo import NO_IMAGES, warn_of_cut_groups
from gac.trainers.hybrid_config import HybridGRPOConfig
from gac.trainers.prompts import require_column
from gac.trainers.rules import Rule, rule_of
from gac.trainers.step_log import LoggedGRPOTrainer

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
            or messages), ``messages``, ``text``, or ``input_ids`` and ``labels``; see `DemonstrationCollator`. Not
            used by laws whose demonstrations belong to prompts.
        **kwargs: everything else that `GRPOTrainer` takes.

    Raises:
        ValueError: empty `sft_dataset` or missing columns; data sets with images; a law that follows KL with
            ``beta=0``, or whose options do not fit ``num_generations``; DeepSpeed or FSDP1 (the message says why),
            except with ``estimator="sequence"``.
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
    ) -> None:
        if args is not None and not isinstance(args, HybridGRPOConfig):
            raise TypeError(f"args must be a HybridGRPOConfig, got {type(args).__name__}")
        if args is None:
            args = HybridGRPOConfig("hybrid-grpo")
        law = args.build_controller().law
        rule = rule_of(law)
        group = cast(int, args.num_generations)  # TRL allows None in the type alone
        rule.check(group)
        rule.phi |= args.sft_loss == "phi"
        _require_demonstrations(law, rule, args, train_dataset, sft_dataset)
        if "kl" in law.needs and args.beta == 0:
            raise ValueError(
                f"law={args.law!r} follows the KL divergence from the reference model, which TRL measures only with "
                "beta > 0; set beta (1e-6 measures it and hardly pulls)"
            )
        _require_text(train_dataset=train_dataset, eval_dataset=kwargs.get("eval_dataset"), sft_dataset=sft_dataset)
        super().__init__(model, reward_funcs, args, rule, train_dataset, sft_dataset=sft_dataset, **kwargs)
        warn_of_cut_groups(args.per_device_train_batch_size, group)


def _require_demonstrations(law: Law, rule: Rule, args: HybridGRPOConfig, prompts: Any, sft_dataset: Any) -> None:
    """Raises ValueError where the law's demonstrations are missing."""
    if rule.from_prompts:
        require_column(prompts, law.name)
        if args.remove_unused_columns:
            raise ValueError(
                f"law={law.name!r} reads demonstrations from train_dataset, and remove_unused_columns=True takes "
                "that column away; leave it False, TRL's default for GRPO"
            )
        if args.sft_packing:
            raise ValueError(
                f"law={law.name!r} trains on demonstrations beside the rollouts of their prompts, and sft_packing=True "
                "packs those of sft_dataset: set sft_packing=False"
            )
        if args.weighing:
            raise ValueError(
                f"law={law.name!r} chooses demonstrations by the rewards at their prompts itself: leave "
                f"{args.weighing[0]} out"
            )
        if sft_dataset is not None:
            logger.warning("law %r takes demonstrations from the prompts: sft_dataset is not used", law.name)
    elif sft_dataset is None:
        raise ValueError("sft_dataset is missing; pass demonstrations, or use trl.GRPOTrainer for RL alone")


def _require_text(**datasets: Any) -> None:
    """Raises ValueError for data sets with images, by their columns or by the messages of their first row."""
    for name, given in datasets.items():
        parts = given.values() if isinstance(given, Mapping) else [given]
        for part in parts:
            named = getattr(part, "column_names", None)
            first = part[0] if hasattr(part, "__getitem__") and hasattr(part, "__len__") and len(part) else {}
            columns = set(named or ()) | set(first if isinstance(first, Mapping) else ())
            found = sorted(columns & {"image", "images"})
            found += [column for column in ("prompt", "completion", "messages") if _shows(first, column)]
            if found:
                raise ValueError(f"{name} has images in column {found[0]!r}: {NO_IMAGES}")


def _shows(row: Any, column: str) -> bool:
    """Whether a message list has parts of kind ``image``."""
    messages = row.get(column) if isinstance(row, Mapping) else None
    contents = [message.get("content") for message in messages or () if isinstance(message, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)
