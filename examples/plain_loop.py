"""A loop of your own with `gac.patch`: a small network learns sums from demonstrations and from rewards.

    python examples/plain_loop.py

Takes about 10 seconds on one CPU core and needs torch alone. Every fourth demonstration is wrong, so that to imitate
them ends at about 75% of right samples; rewards are right, but have to be found by sampling. The loop prints how the
weight `mu` of the demonstrations follows both gradients, what measuring took, and what the gradients say of each layer.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gac

DIGITS, SUMS = 10, 19
DEMONSTRATIONS, SAMPLES = 2000, 16
MICRO_BATCHES, ROWS = 4, 16


class Adder(nn.Module):
    """Two digits ``[B, 2]`` to logits ``[B, 19]`` of their sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.digits = nn.Embedding(DIGITS, width)
        self.hidden = nn.Linear(2 * width, width)
        self.answer = nn.Linear(width, SUMS)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.answer(F.gelu(self.hidden(self.digits(pairs).flatten(1))))


def sft_loss(model: nn.Module, pairs: Tensor, answers: Tensor) -> Tensor:
    """Negative log-likelihood of the demonstrated answers."""
    return F.cross_entropy(model(pairs), answers)


def rl_loss(model: nn.Module, pairs: Tensor) -> Tensor:
    """Policy gradient: of several sampled answers to a sum, those better than their mean become likelier."""
    logprobs = model(pairs).log_softmax(-1)
    taken = torch.multinomial(logprobs.detach().exp(), SAMPLES, replacement=True)
    rewards = (taken == pairs.sum(1, keepdim=True)).float()
    advantages = rewards - rewards.mean(1, keepdim=True)
    return -(advantages * logprobs.gather(1, taken)).mean(1).mean()


def main() -> None:
    options = argparse.ArgumentParser(description="Sums from demonstrations and rewards, mixed by gac.patch.")
    options.add_argument("--steps", type=int, default=80, help="optimizer steps")
    options.add_argument("--width", type=int, default=1024, help="of the network")
    args = options.parse_args()

    torch.manual_seed(0)
    pairs = torch.cartesian_prod(torch.arange(DIGITS), torch.arange(DIGITS))
    demonstrated = pairs[torch.randint(len(pairs), (DEMONSTRATIONS,))]
    answers = demonstrated.sum(1)
    answers[::4] = torch.randint(SUMS, answers[::4].shape)

    model = Adder(args.width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    mixer = gac.patch(model, report_interval=2)  # every second measured step by module, for the report below

    for step in range(1, args.steps + 1):
        with mixer.sft():
            for rows in torch.randint(len(demonstrated), (MICRO_BATCHES, ROWS)):
                mixer.backward(sft_loss(model, demonstrated[rows], answers[rows]) / MICRO_BATCHES)
        with mixer.rl():
            for rows in torch.randint(len(pairs), (MICRO_BATCHES, ROWS)):
                mixer.backward(rl_loss(model, pairs[rows]) / MICRO_BATCHES)
        optimizer.step()
        mixer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps:
            with torch.no_grad():
                right = model(pairs).softmax(-1).gather(1, pairs.sum(1, keepdim=True)).mean()
            print(f"step {step:3d}: right {right:.0%}, mu {mixer.mu:.3f}")

    share = mixer.metrics()["overhead"]
    print(f"\nmu {mixer.mu:.3f}; measured every {mixer.interval} steps by now, {share:.2%} of the time in GAC\n")
    print(mixer.report())


if __name__ == "__main__":
    main()
