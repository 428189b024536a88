"""What is known of a step's contributions beside their gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real

from torch import Tensor

from gac.statistics.branch import Branch

_PLAIN = frozenset((int, float))  # Real asks its registry, which no cache holds between backward passes

Tokens = float | Tensor | None
"""What a contribution counts for; see :meth:`gac.Mixer.backward`."""


class UnweightedLoss(RuntimeError):
    """A backward pass of a branch whose weight nobody has read."""

    @classmethod
    def of(cls, branch: Branch) -> UnweightedLoss:
        """The error that says so and what to do."""
        return cls(
            f"a backward pass in the {branch.value} branch, whose weight nobody has read: the loss lacks it. "
            "Call mixer.backward(loss), mixer.weigh(loss).backward(), or (mixer.weight * loss).backward()"
        )


@dataclass(frozen=True)
class Contribution:
    """What one backward pass added to the gradients: its branch, and the tokens that it counts for (None: untold)."""

    branch: Branch
    tokens: Tokens


@dataclass
class Seen:
    """What was seen of the optimizer step under way. A new step gets a new record.

    Attributes:
        contributions: in order.
        fired: whether a hook ran, or a branch was entered in a step without hooks.
        entered: the branches that were entered.
        outside: whether backward passes outside a branch are expected: their losses were mixed before.
        broken: whether a backward pass raised: the step's sums are incomplete.
        weighted: branches whose weight was read: their losses may have it.
    """

    contributions: list[Contribution] = field(default_factory=list)
    fired: bool = False
    entered: set[Branch] = field(default_factory=set)
    outside: bool = False
    broken: bool = False
    weighted: set[Branch] = field(default_factory=set)

    def begin_again(self) -> None:
        """Forgets a step that was not measured: a new record would say the same."""
        self.fired = self.outside = self.broken = False
        self.entered.clear()
        self.weighted.clear()

    @property
    def counts(self) -> dict[Branch, int]:
        """Contributions of each branch."""
        of_rl = 0
        for contribution in self.contributions:
            of_rl += contribution.branch is Branch.RL
        return {Branch.SFT: len(self.contributions) - of_rl, Branch.RL: of_rl}

    def check_tokens(self, branch: Branch, tokens: Tokens) -> None:
        """Checks what a contribution to come is said to count for.

        Raises:
            TypeError: no number. ValueError: not finite, negative or several numbers; or some contributions of the
                branch were told their tokens and some not.
        """
        if tokens is None:
            pass  # first: asking whether something is a tensor takes longer
        elif isinstance(tokens, Tensor):
            if tokens.numel() != 1:
                raise ValueError(f"tokens must hold one number, got shape {tuple(tokens.shape)}")
        else:
            if type(tokens) not in _PLAIN and (isinstance(tokens, bool) or not isinstance(tokens, Real)):
                raise TypeError(f"tokens must be a number or a tensor, got {tokens!r}")
            if not 0 <= tokens < float("inf"):
                raise ValueError(f"tokens must be finite and not negative, got {tokens}")
        for earlier in reversed(self.contributions):
            if earlier.branch is not branch:
                continue
            if (earlier.tokens is None) == (tokens is None):
                break  # those before it agree with it
            raise ValueError(
                f"some contributions of the {branch.value} branch were told their tokens and some not: pass "
                "tokens= with each of them in a step, or with none"
            )
