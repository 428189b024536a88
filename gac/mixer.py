"""The ``Mixer`` that :func:`gac.patch` returns: branches, backward, and the mu of the next step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from gac.branches import Branches, Within
from gac.cadence import Cadence
from gac.ending import UNTOLD, Ending, cadence_of, present_weights
from gac.following import Following
from gac.laws.controller import Controller
from gac.measurement import Measurement
from gac.metrics import StepMetrics
from gac.modes import Lasting
from gac.observe import deepspeed
from gac.observe.contribution import Tokens
from gac.observe.engine import EngineChecks
from gac.observe.observer import Observer
from gac.observe.topology import topology_of
from gac.observe.watched import claim, release, trainable
from gac.options import Options
from gac.quiet import Quiet
from gac.results import Results
from gac.saved import VERSION, MixerState, read_state
from gac.sequences.mixin import SequenceMethods
from gac.statistics.branch import Branch


class Mixer(SequenceMethods, Results):
    """Measures the gradients of both branches and holds the weight of each. Made by :func:`gac.patch`.

    A step of a training loop::

        with mixer.sft():
            mixer.backward(sft_loss)
        with mixer.rl():
            mixer.backward(rl_loss)
        optimizer.step()
        mixer.step()
        optimizer.zero_grad()
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.controller = Controller(options.law, **options.law_options)
        options.check_law(self.controller.law)
        self.report_interval = options.report_interval
        self._model, self._options = model, options
        self._patched: Observer | None = None
        self._following = Following(self._measure_by)
        weakref.finalize(self, self._following.remove)
        self._told: Mapping[str, Any] | None = None  # what the law is told of a step that has ended and is not settled
        self._quiet = Quiet(self.controller, present_weights(self.controller, torch.device("cpu")))
        self._watch_parameters()
        metrics = StepMetrics(self.device, self.controller.law.shows)
        self._ending = Ending(self._measurement, self.controller, metrics, self._quiet)
        self._in_sft, self._in_rl = (Within(self._ready, self._quiet, branch, None, self) for branch in Branch)
        if options.optimizer is not None:
            self._following.end_with(options.optimizer, self.step)
        self._ending.plan()

    def _watch_parameters(self, cadence: Cadence | None = None) -> None:
        """Puts hooks on what is trainable now, and begins a measurement of it."""
        model, options = self._model, self._options
        parameters = trainable(model, owner=self)
        topology = topology_of(model, parameters, options.process_group, of_layers=options.estimator == "sequence")
        if topology.managed:
            deepspeed.check(model, optimizer=options.optimizer, in_optimizer_space=options.in_optimizer_space)
        cadence = cadence or cadence_of(options, topology.ranks)
        self._measurement = Measurement(model, parameters, topology=topology, options=options, cadence=cadence)
        self.estimator = self._measurement.estimator
        self.device = self._measurement.device
        self._parameters = [parameter for _, parameter in parameters]
        self.controller.law.to(self.device)
        engine = EngineChecks(model, self._parameters, topology)
        self._branches = Branches(self._measurement, engine, options.scaler, self._quiet)
        self._branches.weights = present_weights(self.controller, self.device)
        self._patched = self._measurement.observer
        weakref.finalize(self, self._patched.remove)  # nobody could end a step any more
        self._following.look_out(self._parameters, named=options.optimizer)
        claim(self._parameters, self)

    @property
    def _observer(self) -> Observer:
        if self._patched is None:
            raise RuntimeError("this mixer was unpatched: call gac.patch(model) again")
        return self._patched

    def _ready(self) -> Branches:
        """The branches of a step whose weights are known. Raises RuntimeError after :meth:`unpatch`."""
        if self._patched is None or self._told is not None:
            _ = self._observer
            self._settle()
        return self._branches

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes momentum, and second moments for ``metric="optimizer"``, from this optimizer.

        For trainers that end the mixer's steps themselves. Without it, the first optimizer that steps a parameter of
        the model is followed. It may be called again with another one, between optimizer steps. Raises TypeError,
        ValueError where ``metric="optimizer"`` and the optimizer is not of the Adam family.
        """
        self._following.take(optimizer)
        self._settle(passed_by=True)
        if not self._observer.seen.fired:  # the step to come has not begun
            self._ending.plan()

    def repatch(self) -> None:
        """Watches the parameters that are trainable now, and goes on with the law's state and the statistics' errors.

        After freezing, unfreezing, resizing or replacing parameters. The history by module and comparisons with earlier
        steps begin again. Raises RuntimeError inside a branch or an unfinished step, and what :func:`gac.patch` does.
        """
        self._ready().require_none("mixer.repatch()", "leave the branch first")
        self._settle(passed_by=True)
        earlier, watched = self._measurement, self._parameters
        if earlier.observer.seen.fired:
            raise RuntimeError("mixer.repatch() in the middle of an optimizer step: call mixer.step() first")
        self._watch_parameters(earlier.spending.cadence)
        earlier.observer.remove()
        release(set(watched) - set(self._parameters))
        self._measurement.go_on_from(earlier)
        self._ending.measurement = self._measurement
        self._ending.plan()

    def _measure_by(self, optimizer: torch.optim.Optimizer) -> None:
        self._measurement.follow(optimizer)
        self.controller.law.follow(optimizer)

    # -- weights and branches -------------------------------------------------------------------------------------

    @property
    def mu(self) -> Tensor:
        """Weight of the SFT branch in this step: 0-dim float32 on the model's device."""
        self._settle()
        return self._branches.weights.mu if self._patched is None else self._branches.mu

    @property
    def weight(self) -> Tensor:
        """Weight of the active branch's loss: ``mu`` inside ``sft()``, ``1 - mu`` inside ``rl()``; 0-dim float32."""
        self._settle()
        return self._branches.weight

    def sft(self, *, tokens: Tokens = None) -> AbstractContextManager[Mixer]:
        """Context of the supervised branch: backward passes inside are its contributions; ``tokens``: of each."""
        if tokens is None:
            return self._in_sft
        return Within(self._ready, self._quiet, Branch.SFT, tokens, self)

    def rl(self, *, tokens: Tokens = None) -> AbstractContextManager[Mixer]:
        """Context of the reinforcement branch; as :meth:`sft`."""
        if tokens is None:
            return self._in_rl
        return Within(self._ready, self._quiet, Branch.RL, tokens, self)

    def backward(self, loss: Tensor, *, tokens: Tokens = None) -> None:
        """``(weight * loss).backward()`` as one contribution of the active branch.

        Args:
            loss: a scalar with a graph.
            tokens: the tokens whose losses were added up in ``loss``, when it is divided by the tokens of the whole
                step, so that contributions are unequal: a number, or a 0-dim tensor that is not read on the host.
                Leave it out where every contribution counts alike (a mean within each micro-batch). All contributions
                of a branch in a step have it, or none. Default: what the branch was entered with.

        Raises:
            RuntimeError: outside a branch. TypeError, ValueError: ``loss`` or ``tokens`` is wrong.
        """
        weight = self._quiet.weight
        if weight is None or tokens is not None or not isinstance(loss, Tensor):
            self._ready().backward(loss, tokens)
        else:
            (weight * loss).backward()

    def weigh(self, loss: Tensor, *, tokens: Tokens = None) -> Tensor:
        """``weight * loss`` for a backward pass of the branch that somebody else runs: a trainer, accelerate.

        It tells when its pass begins and ends, which spares hooks on every parameter where running sums are read. What
        it returns may be divided or scaled. ``loss`` and ``tokens`` are those of :meth:`backward`, and so are errors; a
        pass that runs when the branch has been left raises RuntimeError.
        """
        return self._ready().weigh(loss, tokens)

    def mixed_loss(self, *, sft_loss: Tensor, rl_loss: Tensor) -> Tensor:
        """``mu * sft_loss + (1 - mu) * rl_loss``, for one backward pass over a mixed batch, outside the branches.

        One pass cannot tell the branches' gradients apart, unless it runs inside :meth:`batch`: feed
        :meth:`observe_tokens`, and the coefficient estimator is used in this step.

        Args:
            sft_loss, rl_loss: scalars; one that lacks data may be a zero without a graph.
        """
        return self._ready().mixed(sft_loss, rl_loss)

    def aside(self) -> AbstractContextManager[None]:
        """Context whose backward passes go unnoticed: they are no part of the step. Outside the branches.

        For gradients that are taken for another purpose, such as an evaluation's; clear them before the next branch.
        """
        return self._ready().aside()

    def observe_tokens(self, logprobs: Tensor, advantages: Tensor, mask: Tensor, is_expert: Tensor) -> None:
        """Feeds the coefficient estimator with some sequences of the step; call it for each micro-batch.

        With ``estimator="coefficient"`` it gives the step's statistics, otherwise :attr:`coefficient`. With several
        ranks every rank calls it in every step, if need be with no rows.

        Args:
            logprobs: ``[B, T]`` log-probabilities of the taken tokens. advantages: ``[B, T]`` or ``[B]``; not used on
                demonstrations. mask: ``[B, T]``, non-zero where a token counts. is_expert: ``[B]``, True for
                demonstrations.

        Raises:
            TypeError, ValueError: wrong shapes or dtypes.
        """
        self._ready()
        with torch.no_grad():
            self._measurement.observe_tokens(logprobs, advantages, mask, is_expert)

    def observe(
        self,
        buffers: str | Callable[[nn.Parameter], Tensor | None] | Sequence[Tensor | None],
        *,
        tokens: Tokens = None,
    ) -> None:
        """One contribution of the active branch, from buffers that a trainer keeps its gradients in.

        For a mixer patched with ``hooks=False``, after each backward pass and before the buffers are reduced over
        ranks. They hold the sum of the step's gradients so far, as Megatron's ``main_grad`` does: what was added since
        the last call is the contribution.

        Args:
            buffers: the name of an attribute of every parameter (``"main_grad"``), a function from parameter to buffer,
                or one buffer for each trainable parameter in the order of ``model.named_parameters()``; None where a
                parameter has none yet.
            tokens: see :meth:`backward`.

        Raises:
            RuntimeError: outside a branch, or hooks watch already. ValueError: a buffer does not fit its parameter.
        """
        self._ready().take(buffers, self._parameters, tokens)

    # -- the step -------------------------------------------------------------------------------------------------

    def step(
        self,
        step: int | None = None,
        prior: float | None = None,
        alpha: float | None = None,
        *,
        kl: float | Tensor | None = None,
        entropy: float | Tensor | None = None,
    ) -> Tensor | None:
        """Ends the optimizer step: statistics of its contributions, then the mu of the next step.

        Nothing is read on the host. Call it once for each optimizer step, before or after ``zero_grad``.

        Args:
            step: number of the step, from 0; counted when None.
            prior, alpha: replace the law's own in this step.
            kl, entropy: of the policy, in nats per token, for the laws that follow them.

        With several ranks it starts one small all-reduce, which is waited for when a weight is needed: every rank must
        call it in every step.

        Returns:
            The new mu, 0-dim float32; None while the all-reduce is under way (read :attr:`mu` when you need it).

        Raises:
            RuntimeError: inside a branch, or when no backward pass was seen since the last step.
        """
        untold = step is prior is alpha is kl is entropy is None
        if untold and self._quiet.left and (weights := self._quiet.pass_by()):
            return weights.mu
        observer = self._observer
        self._branches.require_none("mixer.step()", "leave the branch first")
        self._settle()
        self._measurement.check_observed()
        self._following.settle()
        start = perf_counter()
        if untold and not observer.measuring and (weights := self._ending.pass_by(self._branches.weights, start)):
            self._branches.pass_by(weights)
            return weights.mu
        with Lasting():  # what is made here is saved for backward passes to come
            self._measurement.post()
        told = {"step": step, "prior": prior, "alpha": alpha, "kl": kl, "entropy": entropy}
        self._told = UNTOLD if untold else told
        observer.now.seconds += perf_counter() - start
        if self._measurement.topology.ranks == 1 or not self._measurement.confirmed:
            self._settle()
            return self._branches.weights.mu
        return None

    def _settle(self, *, passed_by: bool = False) -> None:
        """Finishes a step whose sums are on their way: statistics, law, weights of the step to come."""
        if self._quiet.entered:
            self._observer.seen.fired = True
        if passed_by:
            self._ending.catch_up()
        if self._told is None:
            return
        told, self._told = self._told, None
        start = perf_counter()
        try:
            with Lasting():
                self._branches.weights = self._ending.end(self._branches.weights, told, start)
        finally:
            self._branches.end_step()
            self._ending.ended(self._measurement.observer.now.seconds + perf_counter() - start)
            self._ending.plan()

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step needs: tensors and numbers alone. Raises RuntimeError in an unfinished step."""
        self._settle(passed_by=True)
        if any(self._observer.seen.counts.values()):
            raise RuntimeError("mixer.state_dict() in the middle of an optimizer step: call mixer.step() first")
        return {"version": VERSION, "controller": self.controller.state_dict(), **self._measurement.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where :meth:`state_dict` left off; an unfinished step is forgotten.

        The state is taken whole or, where this raises, not at all. Raises TypeError, ValueError for one that this mixer
        cannot have (law, model, version, names, shapes, dtypes, ranges), RuntimeError inside a branch.
        """
        _ = self._observer
        self._branches.require_none("mixer.load_state_dict()", "leave the branch first")
        self._settle(passed_by=True)
        own = self._measurement
        state = read_state(state_dict, MixerState(self.controller, self.device, own.sketches, exact=own.is_exact))
        self.controller.load_state_dict(state["controller"])
        self._measurement.take_state(state)
        self._branches.weights = present_weights(self.controller, self.device)
        self._branches.end_step()
        self._ending.plan()

    def unpatch(self) -> None:
        """Takes every hook off the model and the optimizer. The mixer cannot be used afterwards."""
        if self._patched is None:
            return
        self._settle()
        self._observer.remove()
        release(self._parameters)
        self._following.remove()
        self._patched, self._quiet.left = None, 0

    def __enter__(self) -> Mixer:
        _ = self._observer
        return self

    def __exit__(self, *exception: object) -> None:
        self.unpatch()
