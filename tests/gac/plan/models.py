"""Models and steps that plans are held against."""

from __future__ import annotations

import torch

from gac.plan import Parameters


class Listed(torch.nn.Module):
    """Parameters of given shapes, and a loss that reaches all of them."""

    def __init__(self, shapes, dtype=torch.float32, *, frozen=0):
        super().__init__()
        self.parts = torch.nn.ParameterList(torch.zeros(shape, dtype=dtype) for shape in shapes)
        self.frozen = torch.nn.Parameter(torch.zeros(frozen, dtype=dtype), requires_grad=False)

    def forward(self):
        return torch.stack([part.sum() for part in self.parts]).sum()


def parameters_of(model) -> Parameters:
    return Parameters.of_shapes("model", [p.shape for p in model.parameters() if p.requires_grad])


def a_step(mixer, loss, micro_batches):
    for branch in (mixer.sft, mixer.rl):
        with branch():
            for _ in range(micro_batches):
                mixer.backward(loss())
