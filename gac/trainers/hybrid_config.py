"""Options of the hybrid trainer: TRL's, and those of the supervised branch and of the mix."""

from dataclasses import dataclass, field
from typing import Any, cast

from trl import GRPOConfig

from gac.laws.controller import Controller
from gac.options import ESTIMATORS, METRICS
from gac.sequences.options import SequenceOptions

SFT_LOSSES = ("nll", "phi")
SFT_WEIGHTS = ("reward", "source")
LOSS_TYPES = ("bnpo", "cispo", "dapo", "dr_grpo", "grpo", "luspo", "sapo", "vespo")
"""TRL 1.16's; of each it has to be known what it divides by."""


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
        default="auto", metadata={"help": "'auto', 'sketch', 'exact', 'coefficient' or 'sequence'; see gac.patch."}
    )
    gac_sequences: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of estimator='sequence', such as {'sketch_size': 16}; see gac.patch."}
    )
    gac_source_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of sft_dataset (and of train_dataset, where it has it) that labels the source of each row, "
            "for mixer.sources(); with estimator='sequence'."
        },
    )
    observe_tokens: bool = field(
        default=False,
        metadata={"help": "Feed the coefficient estimator too; estimator='coefficient' does so by itself."},
    )
    gac_overhead: float | None = field(
        default=None,
        metadata={"help": "Share of a step's time that measuring may take; default: 0.01. See gac.patch."},
    )
    gac_interval: int | None = field(
        default=None,
        metadata={"help": "Measure in every so many optimizer steps instead: such a run repeats to the bit."},
    )
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
    sft_weights: str | None = field(
        default=None,
        metadata={
            "help": "'reward': demonstrations are scored by the reward functions, and each weighs what its reward is "
            "above the policy's at its prompt, in [0, 1]. 'source': each weighs how surely the gradient of its source "
            "(gac_source_column) points with that of the rewards; with estimator='sequence'. Default: all weigh 1."
        },
    )
    sft_weight_column: str | None = field(
        default=None,
        metadata={"help": "Column of sft_dataset with a number for each row that its loss is multiplied by."},
    )
    sft_max_length: int | None = field(
        default=None, metadata={"help": "Demonstrations keep their first so many tokens; default: no limit."}
    )
    sft_packing: bool = field(
        default=False,
        metadata={
            "help": "Demonstrations one after the other in packs of up to sft_max_length tokens, without padding; "
            "sft_batch_size counts packs."
        },
    )
    sft_completion_only: bool = field(
        default=True,
        metadata={"help": "Loss on completion tokens only, of messages the assistant's; otherwise on every token."},
    )
    sft_seed: int | None = field(
        default=None, metadata={"help": "Seed of the order of the demonstrations; default: seed."}
    )

    # TrainingArguments parses dict options given as JSON text for the fields named here; no annotation, or it would
    # become a field
    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "law_options", "gac_sequences"]  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sft_loss not in SFT_LOSSES:
            raise ValueError(f"unknown sft_loss {self.sft_loss!r}; known: {', '.join(SFT_LOSSES)}")
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"unknown loss_type {self.loss_type!r}; known: {', '.join(LOSS_TYPES)}")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {self.estimator!r}; known: {', '.join(ESTIMATORS)}")
        self._check_sequences()
        if self.gac_metric not in METRICS:
            raise ValueError(f"unknown gac_metric {self.gac_metric!r}; known: {', '.join(METRICS)}")
        for name in ("sft_batch_size", "gac_interval", "gac_report_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._check_packing()
        self._check_weights()
        if self.gac_overhead is not None and not (self.gac_interval is None and 0 < self.gac_overhead <= 1):
            raise ValueError(
                f"gac_overhead must be in (0, 1], without gac_interval; got {self.gac_overhead} and {self.gac_interval}"
            )
        self.build_controller()

    def _check_packing(self) -> None:
        if self.sft_packing and self.sft_max_length is None:
            raise ValueError("sft_packing=True needs sft_max_length, the tokens of a pack, got None")
        if self.sft_packing and self.estimator == "sequence":
            raise ValueError(
                "sft_packing=True puts several demonstrations in a row, and estimator='sequence' measures each by "
                "itself: set sft_packing=False, or use another estimator"
            )

    def _check_weights(self) -> None:
        if self.sft_weights not in (None, *SFT_WEIGHTS):
            raise ValueError(f"unknown sft_weights {self.sft_weights!r}; known: {', '.join(SFT_WEIGHTS)}, or None")
        if self.sft_weights == "source" and (self.estimator != "sequence" or self.gac_source_column is None):
            raise ValueError(
                "sft_weights='source' compares gradients of sources: it needs estimator='sequence' and "
                f"gac_source_column, got {self.estimator!r} and {self.gac_source_column!r}"
            )
        given = self.weighing
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both weigh demonstrations: leave one of them out")
        if given and self.sft_packing:
            raise ValueError(
                f"{given[0]} weighs each demonstration, and sft_packing=True puts several in a row: leave one of them "
                "out"
            )
        if given and (self.observe_tokens or self.estimator == "coefficient"):
            raise ValueError(
                f"{given[0]} changes gradients, and the coefficient estimator reads none: use estimator='auto' without "
                "observe_tokens"
            )

    @property
    def weighing(self) -> list[str]:
        """The options that weigh demonstrations, as they were given."""
        options = {"sft_weights": self.sft_weights, "sft_weight_column": self.sft_weight_column}
        return [f"{name}={value!r}" for name, value in options.items() if value is not None]

    def _check_sequences(self) -> None:
        try:
            SequenceOptions(**cast("dict[str, Any]", self.gac_sequences or {}))
        except TypeError as error:
            raise ValueError(f"gac_sequences: {error}") from error
        if self.estimator == "sequence" and self.gac_metric == "optimizer":
            raise ValueError("gac_metric='optimizer' reads gradients of parameters, estimator='sequence' of layers")
        if self.estimator != "sequence":
            for name in ("gac_sequences", "gac_source_column"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} belongs to estimator='sequence', got estimator={self.estimator!r}")

    def law_and_options(self) -> tuple[str, dict[str, Any]]:
        """Name and options of the law, with `mu` folded in."""
        options = dict(cast("dict[str, Any]", self.law_options or {}))  # TrainingArguments has read it if it was text
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
