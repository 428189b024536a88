"""Checkpoints of the hybrid trainer: what they hold beside TRL's, and how a run goes on from one."""

import contextlib
import dataclasses
import logging
import math
import os
from typing import Any, cast

import torch
from accelerate.utils import send_to_device

from gac.files import load_state, save_whole, sync_tree
from gac.saved import MixerState
from gac.state import ListOf, Table, Unchanged, Whole
from gac.trainers.resume import Batching, Position, redistribute
from gac.trainers.single_pass import SinglePassGRPOTrainer

logger = logging.getLogger(__name__)

STATE_FILE = "gac_state.pt"
"""The last file written into a checkpoint: a checkpoint without it is incomplete."""
ROLLOUT_FILE = "gac_rollouts_{rank}.pt"

THEN = (
    "resume from another of gac.trainers.hybrid_grpo.complete_checkpoints(output_dir); without this folder, gac train "
    "--resume does"
)
"""What to do about a checkpoint that cannot be read."""


class CheckpointedGRPOTrainer(SinglePassGRPOTrainer):
    """`SinglePassGRPOTrainer` whose checkpoints continue exactly, on other ranks and batch sizes too.

    `HybridGRPOTrainer` says what they hold.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._rl_sampler: Any = None
        self._checkpoint: dict[str, Any] | None = None  # what training continues from
        self._rollouts: list[dict[str, Any]] | None = None  # ... and what is left of the generation under way
        self._position = Position(0, 0, 0)
        self._taken = 0  # micro-steps from the data loader, over all epochs
        self._epoch_length = 0
        self._saving = False
        self._to_push: str | None = None  # a checkpoint that is not yet complete

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._taken += 1
        return super().training_step(*args, **kwargs)

    # -- saving -------------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        self._rl_sampler = super()._get_train_sampler(dataset)
        return self._rl_sampler

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:  # written over an earlier one, it is no complete checkpoint until the end
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, STATE_FILE))
        self.accelerator.wait_for_everyone()
        self._saving, self._to_push = True, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        if self._step % self._batching().cycle:
            save_whole(self._buffered_inputs, os.path.join(folder, ROLLOUT_FILE.format(rank=self.args.process_index)))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            epoch, taken = divmod(self._taken, self._epoch_length)
            state = {
                "mixer": self._mixer_of_run.state_dict(),
                "sft_position": self._sft_position,
                "sft_size": self._sampler.size if self._sampler else 0,
                "global_step": self.state.global_step,
                "position": dataclasses.asdict(Position(epoch, taken, self._step)),
                "batching": dataclasses.asdict(self._batching()),
                "rule": self._rule.state_dict(),
                **({} if self._values is None else {"values": self._values.state_dict()}),
                **({} if self._trust is None else {"sources": self._trust.state_dict()}),
            }
            sync_tree(folder)  # first, so that this file never vouches for one that a crash of the machine took
            save_whole(state, os.path.join(folder, STATE_FILE))
        if self._to_push is not None:
            self._push_from_checkpoint(self._to_push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the base class, once the folder is complete: it pushes as soon as its own files are there."""
        if self._saving:
            self._to_push = checkpoint_folder
        else:
            super()._push_from_checkpoint(checkpoint_folder)

    def _batching(self) -> Batching:
        return Batching(
            ranks=self.accelerator.num_processes,
            rows=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            steps_per_generation=self._steps_per_generation,
            iterations=self.num_iterations,
            group=self.num_generations,
        )

    # -- going on -----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As the base class; True goes on from the last complete checkpoint in ``output_dir``.

        Raises:
            ValueError: the checkpoint is incomplete, damaged, or of a run that this one cannot continue. It is read
                first, before the model or anything else of it is loaded.
        """
        if resume_from_checkpoint is True:
            complete = complete_checkpoints(cast(str, self.args.output_dir))
            if not complete:
                raise ValueError(f"{self.args.output_dir} holds no complete checkpoint to resume from; train anew")
            resume_from_checkpoint = complete[-1]
        given = resume_from_checkpoint or None
        self._checkpoint = None if given is None else self._read_checkpoint(given)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prepare_for_training(self, max_steps: Any, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self._checkpoint is not None:
            self._load_gac_state(self._checkpoint)
        return prepared

    def check_checkpoint(self, checkpoint: str) -> None:
        """Raises what :meth:`train` would raise where it could not go on from the folder `checkpoint`."""
        self._read_checkpoint(checkpoint)

    def _read_checkpoint(self, checkpoint: str) -> dict[str, Any]:
        """The state to continue from, once it is clear that it can be, and where."""
        path = os.path.join(checkpoint, STATE_FILE)
        if not os.path.isfile(path):
            raise ValueError(
                f"{checkpoint} has no {STATE_FILE}: it was cut short or another trainer wrote it; resume from one of "
                "gac.trainers.hybrid_grpo.complete_checkpoints(output_dir)"
            )
        state = load_state(path, self._entries(), then=THEN)
        size = self._sampler.size if self._sampler else 0
        if state["sft_size"] != size:
            raise ValueError(
                f"{checkpoint} was written with {state['sft_size']} demonstrations, sft_dataset has {size}; resume "
                "with the same set"
            )
        old, saved = Batching(**state["batching"]), Position(**state["position"])
        self._position = self._continued(checkpoint, saved, old)
        within = self._position.trained % self._batching().cycle
        self._rollouts = self._load_rollouts(checkpoint, old) if within else None
        return state

    def _entries(self) -> Table:
        """What :data:`STATE_FILE` holds; the mixer reads its part again, which it alone knows in full."""
        return Table(
            {
                "mixer": Unchanged(MixerState(self.args.build_controller(), torch.device("cpu"))),
                "sft_position": Whole(),
                "sft_size": Whole(),
                "global_step": Whole(),
                "position": Table({field.name: Whole() for field in dataclasses.fields(Position)}),
                "batching": Table({field.name: Whole(1) for field in dataclasses.fields(Batching)}),
                "rule": self._rule.entries(),
                **({} if self._values is None else {"values": self._values.entries()}),
                **({} if self._trust is None else {"sources": self._trust.entries()}),
            },
            misfit="it was written with another sft_weights, or by another version",
        )

    def _continued(self, checkpoint: str, saved: Position, old: Batching) -> Position:
        """Where this run goes on. Raises ValueError where none of its steps begins there."""
        new = self._batching()
        if old == new:
            return saved
        if self.args.ignore_data_skip:
            logger.warning(
                "resuming with other batch sizes and ignore_data_skip=True: prompts begin anew, and rollouts that "
                "%s may hold are dropped",
                checkpoint,
            )
            return dataclasses.replace(saved, trained=0)
        try:
            countable = self.args.max_steps > 0 and hasattr(self.train_dataset, "__len__")
            if old.step_rows != new.step_rows and not countable:
                raise ValueError("without a length of train_dataset and max_steps, what is left to do is not known")
            return saved.moved(old, new)
        except ValueError as error:
            raise ValueError(
                f"{checkpoint} cannot be continued with these batch sizes: {error}. Choose gradient_accumulation_steps "
                f"such that an optimizer step has {old.step_rows} rollouts over all ranks, as before "
                f"(per_device_train_batch_size * gradient_accumulation_steps = {old.step_rows} / {new.ranks} ranks), "
                f"and generation_batch_size={old.generation_rows}; or set ignore_data_skip=True to begin the prompts "
                "anew, without buffered rollouts"
            ) from error

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple:
        """As the base class counts them, with enough epochs for a run that goes on with other batch sizes."""
        epochs, updates, *counts, length, max_steps = super().set_initial_training_values(args, dataloader)
        self._epoch_length = cast(int, length)
        if self._checkpoint is not None and args.max_steps > 0:
            ahead = self._position.taken // args.gradient_accumulation_steps + max_steps
            ahead -= self._checkpoint["global_step"]
            epochs = max(epochs, self._position.epoch + math.ceil(ahead / updates))
        return epochs, updates, *counts, length, max_steps

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epoch, taken = super()._init_training_state(*args, **kwargs)
        if self._checkpoint is not None and not self.args.ignore_data_skip:
            # by what was taken, where the base class goes by optimizer steps of today's size
            epoch, taken = self._position.epoch, self._position.taken
        self._taken = epoch * self._epoch_length + taken
        return divmod(self._taken, self._epoch_length)  # larger generations may have no more of the epoch to take

    def _load_gac_state(self, state: dict[str, Any]) -> None:
        self._mixer_of_run.load_state_dict(state["mixer"])
        self._rule.load_state_dict(state["rule"])
        if self._values is not None:
            self._values.load_state_dict(state["values"])
        if self._trust is not None:
            self._trust.load_state_dict(state["sources"])
        self._sft_position = state["sft_position"]
        self._forget_window()
        self._step = self._position.trained
        if self._step % self._batching().cycle:
            self._buffered_inputs, self._rollouts = self._rollouts, None
        # TRL's sampler draws one permutation per epoch from its own generator, which a checkpoint does not hold
        if getattr(self._rl_sampler, "shuffle", False):
            for _ in range(self._taken // self._epoch_length):
                torch.randperm(self._rl_sampler.num_samples, generator=self._rl_sampler.generator)

    def _load_rollouts(self, checkpoint: str, old: Batching) -> list[dict[str, Any]] | None:
        """What is left to train on of the generation under way; None, on all ranks, where it has to be generated."""
        new, rank = self._batching(), self.args.process_index
        ranks = [rank] if new == old else range(old.ranks)
        paths = [os.path.join(checkpoint, ROLLOUT_FILE.format(rank=rank)) for rank in ranks]
        entry = ListOf(_MicroBatch(), length=old.steps_per_generation)
        saved = [load_state(path, entry, then=THEN) for path in paths if os.path.isfile(path)]
        unusable = torch.tensor(float(len(saved) != len(paths)), device=self.accelerator.device)
        if self.accelerator.reduce(unusable, reduction="sum") > 0:
            logger.warning(
                "the rollouts of the generation under way cannot be read from %s by every rank (files of some ranks "
                "are missing there): the prompts of this generation get new ones",
                checkpoint,
            )
            return None
        own = saved[0] if new == old else redistribute(saved, new, rank, self._tokenizer.pad_token_id)
        return [send_to_device(part, self.accelerator.device) for part in own]


def complete_checkpoints(output_dir: str) -> list[str]:
    """Folders of finished checkpoints in `output_dir`, oldest step first; a kill during saving leaves none behind."""
    steps = []
    for name in os.listdir(output_dir) if os.path.isdir(output_dir) else ():
        prefix, _, step = name.rpartition("-")
        if prefix == "checkpoint" and step.isdigit() and os.path.isfile(os.path.join(output_dir, name, STATE_FILE)):
            steps.append((int(step), os.path.join(output_dir, name)))
    return [path for _, path in sorted(steps)]


class _MicroBatch:
    """The entry of a micro-batch among the saved rollouts: what TRL makes of it is TRL's."""

    def read(self, value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise TypeError(f"{at} must be a dictionary of names, got {type(value).__name__}")
        return value
