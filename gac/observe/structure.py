"""Whether a model still consists of the parameters that are watched."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from operator import is_

from torch import Tensor, nn

from gac.observe.module_names import some

_requires_grad, _device = Tensor.requires_grad.__get__, Tensor.device.__get__  # type: ignore[attr-defined]


class Structure:
    """The modules and parameters of a model as they were when it was patched.

    Args:
        model: what was patched. parameters: the watched ones.
        fixed: False where the engine exchanges parameters by itself (FSDP, DeepSpeed): only freezing is looked at.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], *, fixed: bool) -> None:
        self._model, self._watched, self._fixed = model, list(parameters), fixed
        self._sizes = list(map(nn.Parameter.numel, self._watched))
        self._devices = list(map(_device, self._watched))
        self._take()

    def _take(self) -> None:
        watched = set(map(id, self._watched))
        self._frozen = [p for p in self._model.parameters() if id(p) not in watched]
        modules = list(self._model.modules()) if self._fixed else []
        self._contents: list[dict] = [m._parameters for m in modules] + [m._modules for m in modules]
        self._kept = self._found()

    def _found(self) -> list:
        return list(chain.from_iterable(map(dict.values, self._contents)))

    def check(self) -> None:
        """Raises RuntimeError where a trainable parameter is not watched, or a watched one is another than it was."""
        if not any(map(_requires_grad, self._frozen)) and self._as_it_was():
            return
        watched = set(map(id, self._watched))
        new = [name for name, p in self._model.named_parameters() if p.requires_grad and id(p) not in watched]
        changed = self._resized() if self._fixed else []
        if not new and not changed:
            self._take()  # parts were taken away or moved: what is left is watched
            return
        raise RuntimeError(
            f"since gac.patch parameters became trainable, were added, replaced or resized ({some(new + changed)}): "
            "no statistic would hold their gradients. load_state_dict(assign=True) and fully_shard replace them all: "
            "patch the model after any of these. Otherwise freeze them, or call mixer.repatch() between optimizer "
            "steps, which watches what is trainable then and keeps the law's state"
        )

    def _as_it_was(self) -> bool:
        if not self._fixed:
            return True
        found = self._found()
        return (
            len(found) == len(self._kept)
            and all(map(is_, found, self._kept))
            and list(map(nn.Parameter.numel, self._watched)) == self._sizes
            and list(map(_device, self._watched)) == self._devices
        )

    def _resized(self) -> list[str]:
        """Names of watched parameters that have another size, or are on another device."""
        names = {id(p): name for name, p in self._model.named_parameters()}
        return [
            names[id(p)]
            for p, size, device in zip(self._watched, self._sizes, self._devices, strict=True)
            if id(p) in names and (p.numel() != size or p.device != device)
        ]
