"""What a mixer offers where it measures the gradients of sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gac.observe.observer import Observer
from gac.sequences.alignment import Alignment
from gac.sequences.layers import Layers
from gac.sequences.observer import SequenceObserver
from gac.sequences.rows import chosen_of, rows_of
from gac.sequences.sources import SourceTable, StepOfSources, table_of

if TYPE_CHECKING:
    from typing_extensions import Self


class SequenceMethods:
    """What :class:`gac.Mixer` has for ``estimator="sequence"``, and the memory of every estimator."""

    def _sequences(self, call: str) -> SequenceObserver:
        """The observer, an unpatched mixer's too."""
        observer = self._measurement.observer  # type: ignore[attr-defined]
        if not isinstance(observer, SequenceObserver):
            raise RuntimeError(
                f'{call} needs gac.patch(model, estimator="sequence"); this mixer has estimator={self.estimator!r}'  # type: ignore[attr-defined]
            )
        return observer

    @property
    def nbytes(self) -> int:
        """Device memory that measuring takes; sketches of sequences take more while their batch runs."""
        observer: Observer | None = self._patched  # type: ignore[attr-defined]
        if observer is None:
            return 0
        own = observer.nbytes if isinstance(observer, SequenceObserver) else 0
        return own + sum(ledger.nbytes for ledger in observer.ledgers)

    @contextmanager
    def batch(
        self,
        *,
        is_expert: Tensor | Sequence[bool],
        groups: Tensor | Sequence[int] | None = None,
        sources: Sequence[Any] | Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        position_ids: Tensor | Sequence[int] | None = None,
        tokens: Tensor | Sequence[float] | None = None,
        index: Tensor | Sequence[int] | None = None,
    ) -> Iterator[Self]:
        """Context of a batch whose sequences are told apart, for ``estimator="sequence"``::

            with mixer.batch(is_expert=is_expert):
                sft_loss, rl_loss = losses(model, batch)
                mixer.mixed_loss(sft_loss=sft_loss, rl_loss=rl_loss).backward()

        Forward and backward passes run inside; rows of dimension 0 of what the model is called with are the sequences.
        Each branch's loss is a weighted sum over its rows, and a row's gradient is its contribution: the contributions
        of a branch add up to the gradient of its loss. A step may have several batches (gradient accumulation).

        Args:
            is_expert: ``[B]`` bool, True for demonstrations.
            groups: ``[B]`` whole numbers. Rows of a branch with one number, such as the rollouts of a prompt, are one
                contribution; a negative number stands alone. A group lies within one batch. None: every row by itself.
            sources: a label for each row (a data set, a teacher), for :meth:`sources`.
            lengths: ``[B]``, tokens of each sequence, where they are packed end to end into one row.
            cu_seqlens: ``[B + 1]``, the same as offsets.
            position_ids: ``[T]`` or ``[1, T]``, the same as positions that begin again at 0 with each sequence; zeros
                behind the last one are padding.
            tokens: ``[B]``, what each row counts for where losses are sums over tokens, divided by those of the step:
                as the ``tokens`` of :meth:`backward`. All batches of a step have it, or none.
            index: ``[B]``, the number of each row's data, for :meth:`alignment`.

        Raises:
            RuntimeError: another estimator; inside a branch or another batch; ``loss.backward()`` without
                :meth:`mixed_loss`. TypeError, ValueError: an argument is wrong, or the model was called with another
                number of rows.
        """
        observer = self._sequences("mixer.batch")
        branches = self._ready()  # type: ignore[attr-defined]
        rows = rows_of(
            is_expert,
            observer.device,
            groups=groups,
            tokens=tokens,
            sources=sources,
            index=index,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            position_ids=position_ids,
        )
        with branches.batch(observer, rows):
            yield self  # type: ignore[misc]

    @contextmanager
    def selected(self, lengths: Tensor | Sequence[int]) -> Iterator[None]:
        """Context of a forward pass in which some layers get chosen tokens alone, such as a head that is called on the
        positions whose loss counts::

            with mixer.batch(is_expert=is_expert):
                hidden = backbone(ids)
                with mixer.selected(labelled.sum(1)):  # [B, T] bool
                    logits = head(hidden[labelled])

        They come in the order of the batch's sequences, those of each side by side, flattened to ``[tokens, ...]`` or
        ``[1, tokens, ...]``. What else is called inside is told apart by its shape, as it is outside.

        Args:
            lengths: ``[B]``, how many of each sequence. Read on the host: keep them there.

        Raises:
            RuntimeError: another estimator. TypeError, ValueError: ``lengths`` is wrong.
        """
        observer = self._sequences("mixer.selected")
        if not observer.measuring:
            yield
            return
        with observer.selected(chosen_of(lengths, observer.device)):
            yield

    def sources(self) -> SourceTable:
        """What each source of data gives to the gradient: noise, signal, cosine with the RL gradient and with others.

        Of all steps whose batches were told ``sources``, the last 4,096 at most. On several ranks of all rows, where
        ``gac.patch(sequences={"sources": [...]})`` names the labels, so that their sums travel with the step's;
        otherwise of this rank's rows. Averages over steps of unbiased inner products, with jackknife errors. ``print``
        it. Waits for the device.

        Raises:
            RuntimeError: another estimator; no batch was told ``sources`` yet.
        """
        observer = self._sequences("mixer.sources()")
        self._settle()  # type: ignore[attr-defined]
        if not observer.history.sources:
            raise RuntimeError("mixer.sources() has nothing to tell yet: pass sources= to mixer.batch")
        return table_of(observer.history.sources)

    def newest_sources(self) -> tuple[int, StepOfSources | None]:
        """How many steps have told of sources since the model was patched, and the newest of them (None before any).

        On several ranks it waits for the step's all-reduce.

        Raises:
            RuntimeError: another estimator.
        """
        observer = self._sequences("mixer.newest_sources()")
        self._settle()  # type: ignore[attr-defined]
        history = observer.history
        return history.added, history.sources[-1] if history.added else None

    def _known_sources(self) -> SourceTable | None:
        """The table of sources; None where there is none."""
        observer = self._measurement.observer  # type: ignore[attr-defined]
        return (
            table_of(observer.history.sources)
            if isinstance(observer, SequenceObserver) and observer.history.sources
            else None
        )

    def alignment(self, index: Sequence[int] | None = None, *, all_ranks: bool = False) -> Alignment:
        """How demonstrations point, compared with the RL gradient: of those of ``index``, or of all that were seen.

        Demonstrations are known by the ``index`` that :meth:`batch` was told. A single one is judged poorly
        (docs/sequences.md): compare the means of many. Waits for the device.

        Args:
            index: numbers of demonstrations. None: all that were seen.
            all_ranks: whether those that other ranks have seen count too: then every rank has to ask, at the same
                point of its run, and all get the same. The RL gradient is that of all ranks either way.

        Raises:
            RuntimeError: another estimator.
        """
        observer = self._sequences("mixer.alignment()")
        self._settle()  # type: ignore[attr-defined]
        history = observer.history
        return (history.alignments_of_all() if all_ranks else history.alignments).of(index)

    @property
    def coverage(self) -> Layers:
        """Which layers ``estimator="sequence"`` sees: ``share`` of the trainable elements, and names of the ``unseen``.

        Raises RuntimeError with another estimator.
        """
        return self._sequences("mixer.coverage").layers
