"""``gac.patch`` and the ``Mixer`` it returns: branches, backward, and the mu of the next step."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gac.controller import Controller
from gac.ledger import Branch
from gac.metrics import HostMirror
from gac.observer import Observer
from gac.reduction import all_reduce
from gac.statistics import Statistics, contribution_statistics, noise_from_contributions
from gac.temporal import MovingMeans

ESTIMATORS = ("auto", "sketch", "exact")

EXACT_BYTES = 32 * 2**20
"""``auto`` is exact where its two fp32 buffers take at most this much ..."""

EXACT_SHARE = 0.05
"""... or this share of the model's own parameters (LoRA)."""

_mixers: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> weak reference to the mixer that watches it


def patch(
    model: nn.Module,
    *,
    law: str = "gac",
    estimator: str = "auto",
    interval: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    process_group: dist.ProcessGroup | None = None,
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
            the trainable parameters' size) or ``"auto"`` (exact where the buffers are small).
        interval: measure in every ``interval``-th optimizer step; the others run without hooks, and a backward pass
            outside a branch goes unnoticed in them.
        optimizer: call :meth:`Mixer.step` after each of its steps.
        process_group: the ranks that train replicas of the model (as in DDP); the default group when several processes
            run.
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

    def __init__(self, model: nn.Module, *, law, estimator, interval, optimizer, process_group, **law_options) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if estimator not in ESTIMATORS:
            raise ValueError(f"unknown estimator {estimator!r}; known: {', '.join(ESTIMATORS)}")
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be a whole number of steps from 1 on, got {interval!r}")
        if optimizer is not None and not hasattr(optimizer, "register_step_post_hook"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        parameters = _trainable(model)
        self.controller = Controller(law, **law_options)
        self.estimator = _choose(estimator, model, parameters)
        self.interval = interval
        self.device = parameters[0][1].device
        self._group = process_group
        self._ranks = dist.get_world_size(process_group) if dist.is_available() and dist.is_initialized() else 1
        exact = self.estimator == "exact"
        self._observer = Observer(parameters, lossless=exact, running=not exact and self._ranks == 1, seed=0)
        self._means = [MovingMeans(ledger.device) for ledger in self._observer.ledgers]
        self._uses_time = False
        self._statistics: Statistics | None = None
        self._skipped = torch.zeros((), dtype=self.controller.mu.dtype, device=self.device)
        self._mirror = HostMirror(self.device)
        self._host: dict[int, tuple[float, str]] = {}  # host-side metrics of the last steps
        self.controller.law.to(self.device)
        self._take(self.controller.mu)
        reference = weakref.ref(self)
        for _, parameter in parameters:
            _mixers[parameter] = reference
        self._optimizer_hook = None
        if optimizer is not None:
            self._optimizer_hook = optimizer.register_step_post_hook(lambda *_: self.step())

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

    def sft(self):
        """Context of the supervised branch: backward passes inside are its contributions."""
        return self._branch(Branch.SFT)

    def rl(self):
        """Context of the reinforcement branch: backward passes inside are its contributions."""
        return self._branch(Branch.RL)

    @contextmanager
    def _branch(self, branch: Branch) -> Iterator[Mixer]:
        self._require_patched()
        active = self._observer.branch
        if active is not None:
            raise RuntimeError(
                f"`with mixer.{branch.value}():` inside `with mixer.{active.value}():`: leave the first branch before "
                "entering another; several backward passes may share one"
            )
        self._observer.enter(branch, self._scales[branch])
        try:
            yield self
        except BaseException:
            self._observer.leave(failed=True)
            raise
        self._observer.leave(failed=False)

    def backward(self, loss: Tensor) -> None:
        """``(weight * loss).backward()`` as one contribution of the active branch.

        Args:
            loss: a scalar with a graph.

        Raises:
            RuntimeError: outside a branch. TypeError: ``loss`` is no tensor.
        """
        self._require_patched()
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss must be a tensor, got {type(loss).__name__}")
        if self._observer.branch is None:
            raise RuntimeError("backward outside a branch: call it inside `with mixer.sft():` or `with mixer.rl():`")
        try:
            (self.weight * loss).backward()
        except BaseException:
            self._observer.fail()
            raise
        self._observer.finish()

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
        start = perf_counter()
        with torch.no_grad():
            self._statistics = self._measure() if observer.measuring else None
            mu = self.controller.update(self._statistics, step=step, prior=prior, alpha=alpha, kl=kl, entropy=entropy)
            self._take(mu)
            self._publish(start)
        observer.clear()
        observer.measure(self.controller.steps % self.interval == 0)
        return self._mu

    def _measure(self) -> Statistics:
        observer = self._observer
        counts = observer.counts if self._ranks == 1 else all_reduce(observer, self._group)
        sums = observer.ledgers[0].sums()
        for ledger in observer.ledgers[1:]:
            sums = sums + ledger.sums().to(self.device, non_blocking=True)
        power_s, power_r, nonfinite, norm_s2, norm_r2, dot = sums.unbind()
        n = {b: counts[b] * (self._weights[b] > 0).to(sums.dtype) for b in Branch}
        if observer.broken:
            nonfinite = nonfinite + 1
        healthy = nonfinite == 0
        noise = {
            Branch.SFT: noise_from_contributions(power_s, norm_s2, n[Branch.SFT]),
            Branch.RL: noise_from_contributions(power_r, norm_r2, n[Branch.RL]),
        }
        self._uses_time = False
        for branch in Branch:
            if self._ranks == 1 and observer.counts[branch] == 1:
                noise[branch] = self._noise_from_time(branch, healthy, n[branch])
                self._uses_time = True
        self._skipped = self._skipped + (~healthy).to(self._skipped.dtype)
        return contribution_statistics(
            sigma_s2=noise[Branch.SFT],
            sigma_r2=noise[Branch.RL],
            norm_s2=norm_s2,
            norm_r2=norm_r2,
            dot=dot,
            n_s=n[Branch.SFT],
            n_r=n[Branch.RL],
            nonfinite=nonfinite,
        )

    def _noise_from_time(self, branch: Branch, healthy: Tensor, n: Tensor) -> Tensor:
        total = None
        for ledger, means in zip(self._observer.ledgers, self._means, strict=True):
            part = means.noise(branch, ledger.totals[branch]).to(self.device, non_blocking=True)
            total = part if total is None else total + part
            means.update(branch, ledger.totals[branch], (healthy & (n > 0)).to(ledger.device, non_blocking=True))
        return torch.where(n > 0, total, float("nan"))

    def _publish(self, start: float) -> None:
        statistics = self._statistics or Statistics(n_s=torch.zeros((), device=self.device))
        law = self.controller.law.state
        numbers = torch.stack([self._mu.to(law["mu"].dtype), law["raw"], law["prior"], self._skipped])
        self._mirror.publish(
            self.controller.steps - 1, torch.cat([numbers, statistics.stacked(), statistics.cosine[None]])
        )
        estimator = self.estimator + ("+time" if self._uses_time else "")
        seconds = self._observer.seconds + perf_counter() - start
        self._host = {k: v for k, v in self._host.items() if k >= self.controller.steps - 2}
        self._host[self.controller.steps - 1] = (seconds, estimator)

    # -- what was found -------------------------------------------------------------------------------------------

    @property
    def statistics(self) -> Statistics | None:
        """Statistics of the last step, as 0-dim tensors on the device; None where it measured none."""
        return self._statistics

    def metrics(self, *, wait: bool = False) -> dict[str, float | str]:
        """Numbers of the newest step that has reached the host; empty before the first.

        On a GPU that is usually the step before the last one: nothing waits, unless ``wait`` is true.

        Returns:
            ``mu`` (of the step to come), ``mu_raw`` (the law's estimate before prior and guardrails), ``prior``, the
            fields of :class:`gac.Statistics`, ``cosine``, ``skipped`` (steps dropped for non-finite gradients so far),
            ``seconds`` (host time spent in GAC during the step), ``step`` and the name of the ``estimator`` (with
            ``+time`` where a lone contribution was compared with earlier steps). NaN: not measured.
        """
        latest = self._mirror.latest(wait=wait)
        if latest is None:
            return {}
        step, values = latest
        names = ("mu", "mu_raw", "prior", "skipped", *Statistics.names(), "cosine")
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
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Continues where :meth:`state_dict` left off. Raises ValueError for the state of another law or model."""
        missing = {"controller", "skipped", "means"} - set(state_dict)
        if missing:
            raise ValueError(f"state_dict lacks {sorted(missing)}: pass what Mixer.state_dict() returned")
        self.controller.load_state_dict(state_dict["controller"])
        self._skipped = state_dict["skipped"].to(self._skipped.device, copy=True)
        if len(state_dict["means"]) == len(self._means):
            for means, saved in zip(self._means, state_dict["means"], strict=True):
                means.state = {k: v.to(means.device, copy=True) for k, v in saved.items()}
        self._take(self.controller.mu)
        self._observer.clear()
        self._observer.measure(self.controller.steps % self.interval == 0)

    def unpatch(self) -> None:
        """Takes every hook off the model and the optimizer. The mixer cannot be used afterwards."""
        if self._observer is None:
            return
        self._observer.remove()
        for parameter in self._observer.parameters:
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
