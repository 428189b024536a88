"""``gac.patch`` and the ``Mixer`` it returns: branches, backward, and the mu of the next step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from time import perf_counter
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gac.laws.controller import Controller
from gac.laws.optimizer import FirstStep
from gac.measurement import ESTIMATORS, Measurement
from gac.metrics import HostMirror
from gac.observe import deepspeed
from gac.observe.optimizer_space import SecondMoments
from gac.observe.topology import fsdp2_modules, has_unreduced_gradients, topology_of
from gac.statistics import NAN, Branch, ModuleStatistics, Statistics
from gac.statistics.coefficient import CoefficientOptions

if TYPE_CHECKING:
    from gac.report import Report

METRICS = ("gradient", "optimizer")

_mixers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> weak reference to the mixer that watches it


def patch(
    model: nn.Module,
    *,
    law: str = "gac",
    estimator: str = "auto",
    interval: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    process_group: dist.ProcessGroup | None = None,
    metric: str | torch.optim.Optimizer = "gradient",
    report_interval: int | None = 10,
    coefficient: Mapping | None = None,
    scaler: torch.amp.GradScaler | None = None,
    hooks: bool = True,
    **law_options,
) -> Mixer:
    """Watches the gradients of ``model`` and sets the weight ``mu`` of its SFT branch from them.

    Hooks are put on the parameters that require gradients now; the model's outputs, parameters and ``state_dict`` stay
    as they are, and the accumulated gradient is bit for bit that of ``(weight * loss).backward()``. Patch before
    wrapping in ``torch.compile`` or after, but after freezing parameters, adding adapters and moving the model to its
    device. Gradients must be cleared between optimizer steps, as every training loop does.

    Args:
        model: any module with floating-point parameters on one or several devices.
        law: how mu follows from the statistics; a name of :func:`gac.laws.available`.
        estimator: ``"sketch"`` (random projection, no buffer of the gradient's size), ``"exact"`` (two fp32 buffers of
            the trainable parameters' size), ``"coefficient"`` (the paper's proxies from token coefficients, see
            :meth:`Mixer.observe_tokens`; no hooks) or ``"auto"``: exact where the buffers are small, else the sketch,
            and the coefficients in steps whose losses were mixed before their backward pass
            (:meth:`Mixer.mixed_loss`).
        interval: measure in every ``interval``-th optimizer step; the others run without hooks, and a backward pass
            outside a branch goes unnoticed in them.
        optimizer: call :meth:`Mixer.step` after each of its steps. Law ``gac`` counts the noise that is left in the
            optimizer's average of gradients; it takes the momentum from here, or else from the first ``torch.optim``
            optimizer that steps a parameter of the model. Engines that step copies of the parameters (DeepSpeed,
            Megatron) hide theirs: pass ``momentum=0.9`` for Adam.
        process_group: the ranks that train replicas of the model (as in DDP); the default group when several processes
            run. Sharded models (FSDP2, tensor parallelism) bring their device mesh: patch after ``fully_shard``.
        metric: ``"gradient"``, or ``"optimizer"`` to measure in the space of Adam's steps: each element divided by
            ``sqrt(v) + eps``, with the second moments of ``optimizer``. An optimizer in place of the name lends its
            moments without the call of :meth:`Mixer.step`. Measuring begins once it has taken a step.
        report_interval: every so many measured steps are also taken apart by module, for :meth:`Mixer.report`; None:
            never.
        coefficient: options of the coefficient estimator: ``z_normalize``, ``phi``, ``trim``; see
            :func:`gac.coefficient_statistics`.
        scaler: whose ``scale`` multiplies the losses (AMP in float16): contributions are divided by it.
        hooks: False for trainers that keep gradients in buffers of their own: hand them over with
            :meth:`Mixer.observe` after each backward pass.
        **law_options: options of the law.

    Returns:
        The mixer; also a context manager that unpatches at its end.

    Raises:
        TypeError, ValueError: wrong arguments, or a model without trainable parameters.
        RuntimeError: some parameter is patched already.
    """
    return Mixer(
        model,
        law=law,
        estimator=estimator,
        interval=interval,
        optimizer=optimizer,
        process_group=process_group,
        metric=metric,
        report_interval=report_interval,
        coefficient=coefficient,
        scaler=scaler,
        hooks=hooks,
        **law_options,
    )


class Mixer:
    """Measures the gradients of both branches and holds the weight of each. Made by :func:`patch`.

    A step of a training loop::

        with mixer.sft():
            mixer.backward(sft_loss)
        with mixer.rl():
            mixer.backward(rl_loss)
        optimizer.step()
        mixer.step()
        optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        law,
        estimator,
        interval,
        optimizer,
        process_group,
        metric,
        report_interval,
        coefficient,
        scaler,
        hooks,
        **law_options,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
        _require_steps("interval", interval)
        if report_interval is not None:
            _require_steps("report_interval", report_interval)
        if optimizer is not None and not hasattr(optimizer, "register_step_post_hook"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        second_moments = _second_moments(metric, optimizer)
        if second_moments is not None and estimator == "coefficient":
            raise ValueError('estimator="coefficient" reads no gradients: metric="optimizer" does not apply to it')
        if scaler is not None and not hasattr(scaler, "scale"):
            raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
        parameters = _trainable(model)
        topology = topology_of(model, parameters, process_group)
        if topology.managed:
            deepspeed.check(model, optimizer=optimizer, in_optimizer_space=second_moments is not None)
        self.controller = Controller(law, **law_options)
        self._measurement = Measurement(
            model,
            parameters,
            topology=topology,
            group=process_group,
            estimator=estimator,
            interval=interval,
            report_interval=report_interval,
            second_moments=second_moments,
            coefficient=CoefficientOptions(**(coefficient or {})),
            hooks=hooks,
        )
        self.estimator = self._measurement.estimator
        self.interval = interval
        self.report_interval = report_interval
        self.device = self._measurement.device
        self._observer = self._measurement.observer
        self._scaler = scaler
        self._fsdp2 = fsdp2_modules(model)
        self._last_branch: Branch | None = None
        self._told: dict | None = None  # what the law is told of a step that has ended and is not settled
        self._statistics: Statistics | None = None
        self._mirror = HostMirror(self.device)
        self._not_measured = _row(Statistics(n_s=torch.zeros((), device=self.device)))
        self._host: dict[int, tuple[float, str]] = {}  # host-side metrics of the last steps
        self.controller.law.to(self.device)
        self._unknown = torch.full_like(self.controller.mu, NAN)
        self._take(self.controller.mu)
        reference = weakref.ref(self)
        self._parameters = [parameter for _, parameter in parameters]
        for parameter in self._parameters:
            _mixers[parameter] = reference
        self._optimizer_hook = None
        if optimizer is not None:
            self._optimizer_hook = optimizer.register_step_post_hook(lambda *_: self.step())
        known = metric if optimizer is None and not isinstance(metric, str) else optimizer
        self._first_step = None
        if known is not None:
            self.controller.law.follow(known)
        else:
            law = weakref.ref(self.controller.law)
            self._first_step = FirstStep(self._parameters, lambda found: law() and law().follow(found))
            weakref.finalize(self, self._first_step.remove)
        self._measurement.plan(self.controller.steps)

    # -- weights and branches -------------------------------------------------------------------------------------

    def _take(self, mu: Tensor) -> None:
        """Makes ``mu`` the weight of the step to come. New tensors, so that those handed out keep their values."""
        self._mu = mu.to(torch.float32, copy=True)
        pair = torch.stack([self._mu, 1.0 - self._mu])
        self._present = pair > 0
        self._weights = dict(zip(Branch, pair.unbind(), strict=True))
        self._scales = dict(zip(Branch, torch.where(self._present, 1.0 / pair, 0.0).unbind(), strict=True))

    @property
    def mu(self) -> Tensor:
        """Weight of the SFT branch in this step: 0-dim float32 on the model's device."""
        self._settle()
        return self._mu

    @property
    def weight(self) -> Tensor:
        """Weight of the active branch's loss: ``mu`` inside ``sft()``, ``1 - mu`` inside ``rl()``; 0-dim float32."""
        self._settle()
        if self._observer.branch is None:
            raise RuntimeError("mixer.weight belongs to a branch: read it inside `with mixer.sft():` or `mixer.rl()`")
        return self._weights[self._observer.branch]

    def sft(self, *, tokens: float | Tensor | None = None):
        """Context of the supervised branch: backward passes inside are its contributions.

        Args:
            tokens: what each of them counts for; see :meth:`backward`.
        """
        return self._branch(Branch.SFT, tokens)

    def rl(self, *, tokens: float | Tensor | None = None):
        """Context of the reinforcement branch; as :meth:`sft`."""
        return self._branch(Branch.RL, tokens)

    @contextmanager
    def _branch(self, branch: Branch, tokens: float | Tensor | None) -> Iterator[Mixer]:
        self._require_patched()
        active = self._observer.branch
        if active is not None:
            raise RuntimeError(
                f"`with mixer.{branch.value}():` inside `with mixer.{active.value}():`: leave the first branch before "
                "entering another; several backward passes may share one"
            )
        self._settle()
        self._check_tokens(branch, tokens)
        if not self._measurement.topology.managed and deepspeed.is_managed(self._parameters[:1]):
            raise RuntimeError(
                "DeepSpeed took the parameters over after gac.patch: call deepspeed.initialize first, then patch the "
                "engine that it returns"
            )
        if branch is not self._last_branch and has_unreduced_gradients(self._fsdp2):
            raise RuntimeError(
                f"gradient sync was off in the last backward pass of the {self._last_branch.value} branch, so FSDP2 "
                f"would reduce its gradient together with that of the {branch.value} branch: leave sync on in the last "
                "pass of each branch (module.set_requires_gradient_sync)"
            )
        self._last_branch = branch
        scale = self._measurement.scaled(self._scales[branch])
        if self._scaler is not None and self._observer.measuring:
            scale = scale / self._scaler.scale(torch.ones_like(scale))
        self._observer.enter(branch, scale, tokens)
        try:
            yield self
        except BaseException:
            self._observer.leave(failed=True)
            raise
        self._observer.leave(failed=False)

    def backward(self, loss: Tensor, *, tokens: float | Tensor | None = None) -> None:
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
        self._require_patched()
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a tensor, got {type(loss).__name__}")
        observer = self._observer
        if observer.branch is None:
            raise RuntimeError("backward outside a branch: call it inside `with mixer.sft():` or `with mixer.rl():`")
        entered_with = observer.tokens
        if tokens is not None:
            self._check_tokens(observer.branch, tokens)
            observer.tokens = tokens
        try:
            (self.weight * loss).backward()
        except BaseException:
            observer.fail()
            raise
        observer.finish()
        observer.tokens = entered_with

    def _check_tokens(self, branch: Branch, tokens: float | Tensor | None) -> None:
        if isinstance(tokens, Tensor):
            if tokens.numel() != 1:
                raise ValueError(f"tokens must hold one number, got shape {tuple(tokens.shape)}")
        elif tokens is not None:
            if isinstance(tokens, bool) or not isinstance(tokens, Real):
                raise TypeError(f"tokens must be a number or a tensor, got {tokens!r}")
            if not 0 <= tokens < float("inf"):
                raise ValueError(f"tokens must be finite and not negative, got {tokens}")
        for earlier in self._observer.contributions:
            if earlier.branch is branch and (earlier.tokens is None) != (tokens is None):
                raise ValueError(
                    f"some contributions of the {branch.value} branch were told their tokens and some not: pass "
                    "tokens= with each of them in a step, or with none"
                )

    def mixed_loss(self, *, sft_loss: Tensor, rl_loss: Tensor) -> Tensor:
        """``mu * sft_loss + (1 - mu) * rl_loss``, for one backward pass over a mixed batch, outside the branches.

        One pass cannot tell the branches' gradients apart: feed :meth:`observe_tokens`, and the coefficient estimator
        is used in this step.

        Args:
            sft_loss, rl_loss: scalars; one that lacks data may be a zero without a graph.
        """
        self._require_patched()
        for name, loss in (("sft_loss", sft_loss), ("rl_loss", rl_loss)):
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"{name} must be a scalar tensor, got {got}")
        if self._observer.branch is not None:
            raise RuntimeError("mixer.mixed_loss inside a branch: it weights both by itself, call it outside")
        self._settle()
        self._observer.outside = self._observer.fired = True
        return self._weights[Branch.SFT] * sft_loss + self._weights[Branch.RL] * rl_loss

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
        self._require_patched()
        self._settle()
        with torch.no_grad():
            self._measurement.observe_tokens(logprobs, advantages, mask, is_expert)

    def observe(
        self,
        buffers: str | Callable[[nn.Parameter], Tensor | None] | Sequence[Tensor | None],
        *,
        tokens: float | Tensor | None = None,
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
        self._require_patched()
        observer = self._observer
        if observer.hooks:
            raise RuntimeError("mixer.observe beside hooks would count gradients twice: patch with hooks=False")
        if observer.branch is None:
            raise RuntimeError("mixer.observe belongs to a branch: call it inside `with mixer.sft():` or `mixer.rl()`")
        if not observer.measuring:
            return
        if isinstance(buffers, str):
            name = buffers
            buffers = lambda parameter: getattr(parameter, name, None)
        found = [buffers(p) for p in self._parameters] if callable(buffers) else list(buffers)
        if len(found) != len(self._parameters):
            raise ValueError(f"buffers must be one for each of {len(self._parameters)} parameters, got {len(found)}")
        for name, parameter, buffer in zip(observer.names, self._parameters, found, strict=True):
            if buffer is not None and buffer.numel() != parameter.numel():
                raise ValueError(
                    f"the buffer of parameter {name!r} has {buffer.numel()} elements, the parameter {parameter.numel()}"
                )
        if all(buffer is None for buffer in found):
            raise ValueError("none of the parameters has a buffer: name the attribute that holds their gradients")
        if tokens is not None:
            self._check_tokens(observer.branch, tokens)
        entered_with = observer.tokens
        observer.tokens = tokens if tokens is not None else entered_with
        with torch.no_grad():
            observer.take(found)
        observer.tokens = entered_with

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
        self._require_patched()
        observer = self._observer
        if observer.branch is not None:
            raise RuntimeError(f"mixer.step() inside `with mixer.{observer.branch.value}():`: leave the branch first")
        self._settle()
        self._measurement.check_observed()
        start = perf_counter()
        with torch.no_grad():
            self._measurement.post()
        self._told = {"step": step, "prior": prior, "alpha": alpha, "kl": kl, "entropy": entropy}
        observer.seconds += perf_counter() - start
        if self._measurement.topology.ranks == 1 or not self._measurement.confirmed:
            self._settle()
            return self._mu
        return None

    def _settle(self) -> None:
        """Finishes a step whose sums are on their way: statistics, law, weights of the step to come."""
        if self._told is None:
            return
        told, self._told = self._told, None
        start = perf_counter()
        try:
            with torch.no_grad():
                self._statistics = self._measurement.finish(self._present, self.controller.steps)
                self._take(self.controller.update(self._statistics, **told))
                self._publish(start)
        finally:
            self._last_branch = None
            self._measurement.plan(self.controller.steps)

    def _publish(self, start: float) -> None:
        law = self.controller.law.state
        numbers = [self._mu.to(law["mu"].dtype), *(law.get(k, self._unknown) for k in ("raw", "mu_se", "prior"))]
        numbers = torch.stack([*numbers, self._measurement.skipped.to(law["mu"].dtype)])
        measured = self._not_measured if self._statistics is None else _row(self._statistics)
        self._mirror.publish(self.controller.steps - 1, torch.cat([numbers, measured]))
        seconds = self._observer.seconds + perf_counter() - start
        self._host = {k: v for k, v in self._host.items() if k >= self.controller.steps - 2}
        self._host[self.controller.steps - 1] = (seconds, self._measurement.used)

    # -- what was found -------------------------------------------------------------------------------------------

    @property
    def statistics(self) -> Statistics | None:
        """Statistics of the last step, as 0-dim tensors on the device; None where it measured none."""
        self._settle()
        return self._statistics

    @property
    def coefficient(self) -> Statistics | None:
        """The coefficient estimator's statistics of the last step; None without :meth:`observe_tokens`."""
        return self._measurement.coefficient

    @property
    def modules(self) -> ModuleStatistics | None:
        """Statistics by module, of the newest step that was taken apart (every ``report_interval`` measured steps)."""
        self._settle()
        return self._measurement.modules[-1] if self._measurement.modules else None

    def report(self, **options) -> Report:
        """What the gradients say so far, overall and by module: signal-to-noise ratio, noise scale, disagreement.

        It averages over the steps that were taken apart (every ``report_interval`` measured steps, the last 512 at
        most) and waits for the device. ``print`` it, or see :class:`gac.report.Report`.

        Args:
            **options: of :class:`gac.report.Report`, such as ``sizes`` and ``unit``.

        Raises:
            RuntimeError: no step was taken apart yet.
        """
        from gac.report import Report

        self._settle()
        if not self._measurement.modules:
            raise RuntimeError(
                f"mixer.report() has nothing to tell yet: with report_interval={self.report_interval} and "
                f"interval={self.interval}, {self.controller.steps} steps hold none that was taken apart by module"
            )
        return Report(list(self._measurement.modules), **options)

    @property
    def nbytes(self) -> int:
        """Device memory that measuring takes."""
        return 0 if self._observer is None else sum(ledger.nbytes for ledger in self._observer.ledgers)

    def metrics(self, *, wait: bool = False) -> dict[str, float | str]:
        """Numbers of the newest step that has reached the host; empty before the first.

        On a GPU that is usually the step before the last one: nothing waits, unless ``wait`` is true.

        Returns:
            ``mu`` (of the step to come), ``mu_raw`` (the law's estimate before prior and guardrails), ``mu_se`` (its
            standard error), ``prior``, the fields of :class:`gac.Statistics`, ``cosine``, ``skipped`` (steps dropped
            for non-finite gradients so far), ``seconds`` (host time spent in GAC during the step), ``step`` and the
            name of the ``estimator`` (with ``+time`` where a lone contribution was compared with earlier steps). NaN:
            not measured.
        """
        if wait:
            self._settle()
        latest = self._mirror.latest(wait=wait)
        if latest is None:
            return {}
        step, values = latest
        names = ("mu", "mu_raw", "mu_se", "prior", "skipped", *Statistics.names(), "cosine")
        seconds, estimator = self._host[step]
        return dict(zip(names, values, strict=True)) | {"seconds": seconds, "step": step, "estimator": estimator}

    # -- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict:
        """Everything the next step needs: tensors and numbers alone. Take it between optimizer steps.

        Raises RuntimeError when contributions of an unfinished step would be lost.
        """
        self._settle()
        if any(self._observer.counts.values()):
            raise RuntimeError("mixer.state_dict() in the middle of an optimizer step: call mixer.step() first")
        return {"controller": self.controller.state_dict(), **self._measurement.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues where :meth:`state_dict` left off. Raises ValueError for the state of another law or model."""
        missing = {"controller", "skipped", "means", "uncertainty"} - set(state_dict)
        if missing:
            raise ValueError(f"state_dict lacks {sorted(missing)}: pass what Mixer.state_dict() returned")
        self._settle()
        self.controller.load_state_dict(state_dict["controller"])
        self._measurement.load_state_dict(state_dict)
        self._take(self.controller.mu)
        self._measurement.plan(self.controller.steps)

    def unpatch(self) -> None:
        """Takes every hook off the model and the optimizer. The mixer cannot be used afterwards."""
        if self._observer is None:
            return
        self._settle()
        self._observer.remove()
        for parameter in self._parameters:
            _mixers.pop(parameter, None)
        if self._optimizer_hook is not None:
            self._optimizer_hook.remove()
        if self._first_step is not None:
            self._first_step.remove()
        self._observer = None

    def __enter__(self) -> Mixer:
        self._require_patched()
        return self

    def __exit__(self, *exception) -> None:
        self.unpatch()

    def _require_patched(self) -> None:
        if self._observer is None:
            raise RuntimeError("this mixer was unpatched: call gac.patch(model) again")


def _row(statistics: Statistics) -> Tensor:
    """What the metrics say of a step's statistics, in the order of their names, and the cosine."""
    return torch.cat([statistics.stacked(), statistics.cosine[None]])


def _require_steps(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of steps from 1 on, got {value!r}")


def _second_moments(metric: str | torch.optim.Optimizer, optimizer: torch.optim.Optimizer | None):
    if isinstance(metric, str):
        if metric not in METRICS:
            raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}, or an optimizer")
        return SecondMoments(optimizer) if metric == "optimizer" else None
    return SecondMoments(metric)


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Named parameters that require gradients, tied ones once."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            "model has no trainable parameters: every requires_grad is False. Unfreeze some, or add adapters, first"
        )
    for name, parameter in parameters:
        if parameter.device.type == "meta":
            raise ValueError(f"parameter {name!r} is on the meta device: load or materialise the model first")
        other = _mixers.get(parameter)
        if other is not None and other() is not None:
            raise RuntimeError(f"parameter {name!r} is patched already: call unpatch() on the earlier mixer first")
    return parameters
