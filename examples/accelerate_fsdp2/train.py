"""A loop of your own on several ranks: accelerate shards the model with FSDP2, `gac.patch` watches what it returns.

    accelerate launch --config_file examples/accelerate_fsdp2/fsdp2.yaml examples/accelerate_fsdp2/train.py

Two GPUs, or two processes on a CPU, where it takes about 20 seconds, most of them imports; needs torch and accelerate.
accelerate has FSDP2 for accelerators alone: without one it leaves it out, and the same command trains with DDP. The
first line printed says which. The model learns to count from demonstrations and is rewarded for even numbers.
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

import gac

VOCABULARY, LENGTH = 64, 17
MICRO_BATCHES, ROWS = 2, 8


class Block(nn.Module):
    """The layer that fsdp2.yaml names: each becomes a unit of FSDP2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Token ids ``[B, T]`` to logits ``[B, T, 64]`` of the next ones, each from its own token alone."""

    def __init__(self, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def demonstrations(device: torch.device) -> Tensor:
    """Rows ``[B, T]`` that count upwards."""
    return (torch.randint(VOCABULARY, (ROWS, 1), device=device) + torch.arange(LENGTH, device=device)) % VOCABULARY


def sft_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of the next tokens."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def rl_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Policy gradient of next tokens sampled at each place, rewarded for being even."""
    logprobs = model(tokens[:, :-1]).log_softmax(-1)
    taken = torch.distributions.Categorical(logits=logprobs.detach()).sample()
    rewards = (taken % 2 == 0).float()
    return -((rewards - rewards.mean()) * logprobs.gather(-1, taken[..., None]).squeeze(-1)).mean()


def main() -> None:
    options = argparse.ArgumentParser(description="FSDP2 through accelerate, with gac.patch.")
    options.add_argument("--steps", type=int, default=50, help="optimizer steps")
    args = options.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    model = Model()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    mixer = gac.patch(model)  # what prepare returned: fully_shard drops hooks
    engine = "FSDP2" if accelerator.is_fsdp2 else accelerator.distributed_type.value
    accelerator.print(f"{engine} on {accelerator.num_processes} processes, {accelerator.device.type}", flush=True)

    torch.manual_seed(1 + accelerator.process_index)  # every rank has data of its own
    for step in range(1, args.steps + 1):
        with mixer.sft():
            for _ in range(MICRO_BATCHES):
                loss = sft_loss(model, demonstrations(accelerator.device)) / MICRO_BATCHES
                accelerator.backward(mixer.weigh(loss))
        with mixer.rl():
            for _ in range(MICRO_BATCHES):
                loss = rl_loss(model, demonstrations(accelerator.device)) / MICRO_BATCHES
                accelerator.backward(mixer.weigh(loss))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mixer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps:
            line = f"step {step}, rank {accelerator.process_index}: mu {mixer.mu:.9f}"  # the same on all ranks
            print(line + "\n", end="", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
