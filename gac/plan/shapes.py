"""Parameter lists of Llama-shaped models, computed from their sizes: no transformers, no weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LlamaShape:
    """The sizes of a Llama-architecture model.

    Attributes:
        name: what tables call it.
        tied: the output projection is the embedding.
    """

    name: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    def layer(self) -> list[tuple[int, ...]]:
        """Shapes of the parameters of one block."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = [(queries, self.hidden), (keys, self.hidden), (keys, self.hidden), (self.hidden, queries)]
        mlp = [(self.intermediate, self.hidden)] * 2 + [(self.hidden, self.intermediate)]
        return [*attention, *mlp, (self.hidden,), (self.hidden,)]

    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of all parameters in the order of ``model.parameters()``, tied ones once."""
        embedding = (self.vocabulary, self.hidden)
        head = [] if self.tied else [embedding]
        return [embedding, *self.layer() * self.layers, (self.hidden,), *head]

    def numel(self) -> int:
        """Parameters in all."""
        return sum(math.prod(shape) for shape in self.shapes())

    def fitting(self, elements: int) -> LlamaShape | None:
        """This model with as many layers as ``elements`` parameters allow; None when not even one fits."""
        if self.numel() <= elements:
            return self
        rest = replace(self, layers=0).numel()
        layers = (elements - rest) // sum(math.prod(shape) for shape in self.layer())
        return replace(self, layers=layers) if layers >= 1 else None

    def model(self, *, dtype: torch.dtype, device: torch.device | str, max_length: int) -> PreTrainedModel:
        """A transformers model of this shape with random weights."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=max_length,
            tie_word_embeddings=self.tied,
            use_cache=False,
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)


MODELS = {
    shape.name: shape
    for shape in (
        LlamaShape("10M", 9216, 256, 768, 9, 8, 8, 32, tied=True),
        LlamaShape("0.1B", 49152, 576, 1536, 30, 9, 3, 64, tied=True),  # the sizes of SmolLM-135M
        LlamaShape("1B", 128256, 2048, 8192, 16, 32, 8, 64, tied=True),  # of Llama 3.2 1B
        LlamaShape("8B", 128256, 4096, 14336, 32, 32, 8, 128, tied=False),  # of Llama 3.1 8B
        LlamaShape("70B", 128256, 8192, 28672, 80, 64, 8, 128, tied=False),  # of Llama 3.1 70B
        LlamaShape("405B", 128256, 16384, 53248, 126, 128, 8, 128, tied=False),  # of Llama 3.1 405B
    )
}
"""Models by name."""
