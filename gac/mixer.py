"""``gac.patch`` and the ``Mixer`` it returns: branches, backward, and the mu of the next step."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gac.coefficient import CoefficientOptions, sequence_rows, statistics_from_rows
from gac.controller import Controller
from gac.ledger import Branch
from gac.metrics import HostMirror
from gac.modules import ModuleStatistics
from gac.observer import Observer
from gac.optimizer_space import SecondMoments
from gac.reduction import StepSums, gather_rows, step_sums
from gac.statistics import NAN, Statistics, contribution_statistics, noise_from_weighted
from gac.temporal import MovingMeans
from gac.uncertainty import SuccessiveDifferences
from gac_kernels.arguments import accumulator_dtype

ESTIMATORS = ("auto", "sketch", "exact", "coefficient")
METRICS = ("gradient", "optimizer")

EXACT_BYTES = 32 * 2**20
"""``auto`` is exact where its two fp32 buffers take at most this much ..."""

EXACT_SHARE = 0.05
"""... or this share of the model's own parameters (LoRA)."""

MODULE_HISTORY = 512
"""Steps that :meth:`Mixer.report` looks back on, of those that were taken apart by module."""

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
        optimizer: call :meth:`Mixer.step` after each of its steps.
        process_group: the ranks that train replicas of the model (as in DDP); the default group when several processes
            run.
        metric: ``"gradient"``, or ``"optimizer"`` to measure in the space of Adam's steps: each element divided by
            ``sqrt(v) + eps``, with the second moments of ``optimizer``. An optimizer in place of the name lends its
            moments without the call of :meth:`Mixer.step`. Measuring begins once it has taken a step.
        report_interval: every so many measured steps are also taken apart by module, for :meth:`Mixer.report`; None:
            never.
        coefficient: options of the coefficient estimator: ``z_normalize``, ``phi``, ``trim``; see
            :func:`gac.coefficient_statistics`.
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
        self._second_moments = _second_moments(metric, optimizer)
        if self._second_moments is not None and estimator == "coefficient":
            raise ValueError('estimator="coefficient" reads no gradients: metric="optimizer" does not apply to it')
        parameters = _trainable(model)
        self.controller = Controller(law, **law_options)
        self.estimator = _choose(estimator, model, parameters)
        self._auto = estimator == "auto"
        self.interval = interval
        self.report_interval = report_interval
        self.device = parameters[0][1].device
        self._dtype = accumulator_dtype(self.device)
        self._coefficient_options = CoefficientOptions(**(coefficient or {}))
        self._rows: list[Tensor] = []  # of the coefficient estimator
        self._coefficient: Statistics | None = None
        self._group = process_group
        self._ranks = dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1
        exact = self.estimator == "exact"
        self._observer = Observer(
            parameters if self.estimator != "coefficient" else [],
            lossless=exact,
            running=not exact and self._ranks == 1,
            seed=0,
            second_moments=self._second_moments,
        )
        self._means = [MovingMeans(ledger.device) for ledger in self._observer.ledgers]
        self._uncertainty = SuccessiveDifferences(4, self.device, self._dtype)
        self._modules: deque[ModuleStatistics] = deque(maxlen=MODULE_HISTORY)
        self._used = self.estimator
        self._statistics: Statistics | None = None
        self._skipped = torch.zeros((), dtype=self.controller.mu.dtype, device=self.device)
        self._mirror = HostMirror(self.device)
        self._host: dict[int, tuple[float, str]] = {}  # host-side metrics of the last steps
        self.controller.law.to(self.device)
        self._take(self.controller.mu)
        reference = weakref.ref(self)
        self._parameters = [parameter for _, parameter in parameters]
        for parameter in self._parameters:
            _mixers[parameter] = reference
        self._optimizer_hook = None
        if optimizer is not None:
            self._optimizer_hook = optimizer.register_step_post_hook(lambda *_: self.step())
        self._plan_step()

    def _plan_step(self) -> None:
        """Decides what the step to come measures."""
        step, ready = self.controller.steps, self.estimator != "coefficient"
        if self._second_moments is not None and ready:
            ready = self._second_moments.ready
            if ready:  # of the moments that this step's gradients are divided by
                self._correction = self._second_moments.correction(self.device, self._dtype)
        measured = step // self.interval
        self._due = step % self.interval == 0
        by_module = ready and self.report_interval is not None and (measured + 1) % self.report_interval == 0
        self._observer.measure(ready and self._due, by_module=self._due and by_module)

    # -- weights and branches -------------------------------------------------------------------------------------

    def _take(self, mu: Tensor) -> None:
        """Makes ``mu`` the weight of the step to come. New tensors, so that those handed out keep their values."""
        self._mu = mu.to(torch.float32, copy=True)
        self._weights = {Branch.SFT: self._mu, Branch.RL: 1.0 - self._mu}
        self._scales = {b: torch.where(w > 0, 1.0 / w, 0.0) for b, w in self._weights.items()}

    @property
    def mu(self) -> Tensor:
        """Weight of the SFT branch in this step: 0-dim float32 on the model's device."""
        return self._mu

    @property
    def weight(self) -> Tensor:
        """Weight of the active branch's loss: ``mu`` inside ``sft()``, ``1 - mu`` inside ``rl()``; 0-dim float32."""
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
        self._check_tokens(branch, tokens)
        self._observer.enter(branch, self._scales[branch], tokens)
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
        self._observer.fired = True
        if self._due:
            with torch.no_grad():
                rows = sequence_rows(logprobs, advantages, mask, is_expert)
                self._rows.append(rows.to(self.device, non_blocking=True))

    # -- the step -------------------------------------------------------------------------------------------------

    def step(
        self,
        step: int | None = None,
        prior: float | None = None,
        alpha: float | None = None,
        *,
        kl: float | Tensor | None = None,
        entropy: float | Tensor | None = None,
    ) -> Tensor:
        """Ends the optimizer step: statistics of its contributions, then the mu of the next step.

        Nothing is read on the host. Call it once for each optimizer step, before or after ``zero_grad``.

        Args:
            step: number of the step, from 0; counted when None.
            prior, alpha: replace the law's own in this step.
            kl, entropy: of the policy, in nats per token, for the laws that follow them.

        Returns:
            The new mu, 0-dim float32.

        Raises:
            RuntimeError: inside a branch, or when no backward pass was seen since the last step.
        """
        self._require_patched()
        observer = self._observer
        if observer.branch is not None:
            raise RuntimeError(f"mixer.step() inside `with mixer.{observer.branch.value}():`: leave the branch first")
        if not observer.fired and not observer.broken:
            raise RuntimeError(
                "mixer.step() with nothing observed: no backward pass reached a patched parameter since the last step. "
                "Run the losses inside `with mixer.sft():` and `with mixer.rl():`. If you did, the hooks are gone: "
                "copy.deepcopy and load_state_dict(assign=True) drop them, so patch the model after either."
            )
        if self.estimator == "coefficient" and self._due and not self._rows and self._ranks == 1:
            raise RuntimeError(
                'mixer.step() without token coefficients: estimator="coefficient" is fed by mixer.observe_tokens(...), '
                "once for each micro-batch"
            )
        start = perf_counter()
        with torch.no_grad():
            self._statistics = self._measure()
            mu = self.controller.update(self._statistics, step=step, prior=prior, alpha=alpha, kl=kl, entropy=entropy)
            self._take(mu)
            self._publish(start)
        observer.clear()
        self._rows.clear()
        self._plan_step()
        return self._mu

    def _measure(self) -> Statistics | None:
        """Statistics of the step, of the estimator that applies to it; None when it was not measured."""
        observer = self._observer
        self._coefficient = None
        if self._rows or (self.estimator == "coefficient" and self._due):
            rows = torch.cat(self._rows) if self._rows else torch.zeros(0, 8, dtype=self._dtype, device=self.device)
            if self._ranks > 1:
                rows = gather_rows(rows, self._group)
            self._coefficient = statistics_from_rows(rows, self._coefficient_options)
        statistics = self._from_gradients() if observer.measuring else None
        self._used = self.estimator + ("+time" if self._uses_time() else "")
        if self.estimator == "coefficient" or (self._auto and observer.outside):
            statistics, self._used = self._coefficient, "coefficient"
        if statistics is None:
            return None
        healthy = statistics.nonfinite == 0
        self._skipped = self._skipped + (~healthy).to(self._skipped.dtype)
        names = ("sigma_s2", "sigma_r2", "distance2", "delta_g2")
        errors = self._uncertainty.update(torch.stack([getattr(statistics, name) for name in names]), healthy)
        return dataclasses.replace(
            statistics, **{f"{name}_se": error for name, error in zip(names, errors.unbind(), strict=True)}
        )

    def _uses_time(self) -> bool:
        """Whether a lone contribution is compared with earlier steps."""
        return self._ranks == 1 and 1 in self._observer.counts.values()

    def _from_gradients(self) -> Statistics:
        observer = self._observer
        sums = step_sums(observer, self.device, ranks=self._ranks, group=self._group)
        if self._second_moments is not None:
            sums = sums.scaled(self._correction)
        # a branch of weight 0 leaves no trace: its contributions are zeros, which say nothing
        n_s, n_r = (sums.n * torch.stack([self._weights[b] > 0 for b in Branch])).unbind()
        norm_s2, norm_r2, dot = sums.norms.unbind()
        noise = {
            branch: noise_from_weighted(power * tokens, norm2, n)
            for branch, power, tokens, norm2, n in zip(
                Branch, sums.power, sums.tokens, (norm_s2, norm_r2), (n_s, n_r), strict=True
            )
        }
        if self._ranks == 1:
            healthy = sums.nonfinite == 0
            for branch, n in zip(Branch, (n_s, n_r), strict=True):
                if observer.counts[branch] == 1:
                    noise[branch] = self._noise_from_time(branch, healthy, n)
        statistics = contribution_statistics(
            sigma_s2=noise[Branch.SFT],
            sigma_r2=noise[Branch.RL],
            norm_s2=norm_s2,
            norm_r2=norm_r2,
            dot=dot,
            n_s=n_s,
            n_r=n_r,
            nonfinite=sums.nonfinite,
        )
        if sums.module_norms is not None:
            self._take_apart(sums, statistics)
        return statistics

    def _take_apart(self, sums: StepSums, whole: Statistics) -> None:
        """Keeps the step's statistics by module."""
        norm_s2, norm_r2, dot = sums.module_norms.unbind(1)
        power_s, power_r = (sums.module_power * sums.tokens).unbind(1)
        sigma_s2 = noise_from_weighted(power_s, norm_s2, whole.n_s)
        sigma_r2 = noise_from_weighted(power_r, norm_r2, whole.n_r)
        distance2 = (norm_s2 + norm_r2 - 2 * dot).clamp(min=0.0)
        columns = [sigma_s2, sigma_r2, distance2 - sigma_s2 - sigma_r2, distance2, norm_s2, norm_r2, dot]
        has_s, has_r = whole.n_s >= 1, whole.n_r >= 1
        known = torch.stack([has_s, has_r, has_s & has_r, has_s & has_r, has_s, has_r, has_s & has_r])
        values = torch.where(known & (whole.nonfinite == 0), torch.stack(columns, dim=1), NAN)
        labels = tuple(self._observer.module_labels)
        self._modules.append(ModuleStatistics(self.controller.steps + 1, labels, values, whole))

    def _noise_from_time(self, branch: Branch, healthy: Tensor, n: Tensor) -> Tensor:
        total = None
        for ledger, means in zip(self._observer.ledgers, self._means, strict=True):
            part = means.noise(branch, ledger.totals[branch]).to(self.device, non_blocking=True)
            total = part if total is None else total + part
            means.update(branch, ledger.totals[branch], (healthy & (n > 0)).to(ledger.device, non_blocking=True))
        if self._second_moments is not None:
            total = total * self._correction
        return torch.where(n > 0, total, NAN)

    def _publish(self, start: float) -> None:
        statistics = self._statistics or Statistics(n_s=torch.zeros((), device=self.device))
        law = self.controller.law.state
        unknown = torch.full_like(law["mu"], NAN)
        numbers = [self._mu.to(law["mu"].dtype), *(law.get(k, unknown) for k in ("raw", "mu_se", "prior"))]
        numbers = torch.stack([*numbers, self._skipped])
        self._mirror.publish(
            self.controller.steps - 1, torch.cat([numbers, statistics.stacked(), statistics.cosine[None]])
        )
        seconds = self._observer.seconds + perf_counter() - start
        self._host = {k: v for k, v in self._host.items() if k >= self.controller.steps - 2}
        self._host[self.controller.steps - 1] = (seconds, self._used)

    # -- what was found -------------------------------------------------------------------------------------------

    @property
    def statistics(self) -> Statistics | None:
        """Statistics of the last step, as 0-dim tensors on the device; None where it measured none."""
        return self._statistics

    @property
    def coefficient(self) -> Statistics | None:
        """The coefficient estimator's statistics of the last step; None without :meth:`observe_tokens`."""
        return self._coefficient

    @property
    def modules(self) -> ModuleStatistics | None:
        """Statistics by module, of the newest step that was taken apart (every ``report_interval`` measured steps)."""
        return self._modules[-1] if self._modules else None

    @property
    def nbytes(self) -> int:
        """Device memory that measuring takes."""
        return sum(ledger.nbytes for ledger in self._observer.ledgers)

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
        if any(self._observer.counts.values()):
            raise RuntimeError("mixer.state_dict() in the middle of an optimizer step: call mixer.step() first")
        return {
            "controller": self.controller.state_dict(),
            "skipped": self._skipped.to("cpu", copy=True),
            "means": [{k: v.to("cpu", copy=True) for k, v in means.state.items()} for means in self._means],
            "uncertainty": {k: v.to("cpu", copy=True) for k, v in self._uncertainty.state.items()},
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues where :meth:`state_dict` left off. Raises ValueError for the state of another law or model."""
        missing = {"controller", "skipped", "means", "uncertainty"} - set(state_dict)
        if missing:
            raise ValueError(f"state_dict lacks {sorted(missing)}: pass what Mixer.state_dict() returned")
        self.controller.load_state_dict(state_dict["controller"])
        self._skipped = state_dict["skipped"].to(self._skipped.device, copy=True)
        if len(state_dict["means"]) == len(self._means):
            for means, saved in zip(self._means, state_dict["means"], strict=True):
                means.state = {k: v.to(means.device, copy=True) for k, v in saved.items()}
        saved = state_dict["uncertainty"]
        self._uncertainty.state = {k: v.to(self.device, self._dtype, copy=True) for k, v in saved.items()}
        self._take(self.controller.mu)
        self._observer.clear()
        self._rows.clear()
        self._plan_step()

    def unpatch(self) -> None:
        """Takes every hook off the model and the optimizer. The mixer cannot be used afterwards."""
        if self._observer is None:
            return
        self._observer.remove()
        for parameter in self._parameters:
            _mixers.pop(parameter, None)
        if self._optimizer_hook is not None:
            self._optimizer_hook.remove()
        self._observer = None

    def __enter__(self) -> Mixer:
        self._require_patched()
        return self

    def __exit__(self, *exception) -> None:
        self.unpatch()

    def _require_patched(self) -> None:
        if self._observer is None:
            raise RuntimeError("this mixer was unpatched: call gac.patch(model) again")


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
        if _is_dtensor(parameter):
            raise ValueError(
                f"parameter {name!r} is a DTensor: sharded models (FSDP2, tensor parallelism) are not supported yet; "
                "use DDP or one process"
            )
        if parameter.device.type == "meta":
            raise ValueError(f"parameter {name!r} is on the meta device: load or materialise the model first")
        other = _mixers.get(parameter)
        if other is not None and other() is not None:
            raise RuntimeError(f"parameter {name!r} is patched already: call unpatch() on the earlier mixer first")
    return parameters


def _is_dtensor(tensor: Tensor) -> bool:
    """Without importing torch.distributed.tensor, which takes a second: where it is not loaded, no DTensor exists."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _choose(estimator: str, model: nn.Module, parameters: list[tuple[str, nn.Parameter]]) -> str:
    """What ``auto`` stands for."""
    if estimator != "auto":
        return estimator
    buffers = 8 * sum(p.numel() for _, p in parameters)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return "exact" if buffers <= max(EXACT_BYTES, EXACT_SHARE * whole) else "sketch"
