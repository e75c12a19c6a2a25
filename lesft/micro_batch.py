"""Micro-batches as tensors: what crosses the cut, without padding, and how it is padded for torch.

Shape letters: N tokens of a whole micro-batch, T its target tokens, D width, B samples, L tokens of
the longest sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True, order=True)
class StepKey:
    """Which micro-batch of a run: round and index within the round, both counted from 0."""

    round: int
    micro: int

    def __str__(self) -> str:
        return f"round {self.round} micro-batch {self.micro}"

    def following(self, accumulation: int) -> "StepKey":
        """The key after this one."""
        if self.micro + 1 < accumulation:
            return StepKey(self.round, self.micro + 1)
        return StepKey(self.round + 1, 0)


@dataclass(frozen=True)
class Path:
    """The cut-layer activations of one path, sample after sample.

    `activations_ND` float32 or bfloat16; `lengths` sums to N.
    """

    activations_ND: torch.Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Targets:
    """The target tokens y, sample after sample; each ends its sample's sequence.

    `ids_T` int64; `lengths` sums to T.
    """

    ids_T: torch.Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class MicroBatch:
    """One client's part of one step. `reference` is there when the loss needs it.

    Where the server holds something of the samples, `samples` numbers all of the micro-batch, and
    on its way there what it holds is only of those `enclosed`: where clients do not train, that is
    all, else `targets` and `reference`. What completes it fills in the rest. Of the reference path
    it may know what comes of it: `known_log_probs` then has an entry for each sample, log P~ `[T]`
    of its target tokens (float32, on the CPU), or None for those that `reference` is of.
    """

    key: StepKey
    base: Path
    reference: Path | None
    targets: Targets
    samples: tuple[int, ...] = ()
    enclosed: tuple[int, ...] = ()
    known_log_probs: tuple[torch.Tensor | None, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """What one client gets back for a micro-batch.

    `base_gradient_ND` and `reference_gradient_ND` are gradients of the scaled loss with respect to
    the activations as sent: the former is there when clients train, the latter when also the loss
    trains the reference path. `loss` and `nll` are means over this client's samples and target
    tokens, unscaled, in nats.
    `class_counts` are its salient, sub-salient and irrelevant tokens, where there are classes.
    `checkpoint` says that the client is to take a checkpoint when the round is done. `held` are
    those of the micro-batch's `samples` that need not be sent again. `receipt` is a serialized
    Receipt where the adapters are averaged after this round, for the aggregator alone.
    """

    key: StepKey
    base_gradient_ND: torch.Tensor | None
    reference_gradient_ND: torch.Tensor | None
    loss: float
    nll: float
    class_counts: tuple[int, int, int] | None
    checkpoint: bool = False
    held: tuple[int, ...] = ()
    receipt: bytes = b""


def sum_class_counts(results: Sequence[StepResult]) -> tuple[int, int, int] | None:
    """Salient, sub-salient and irrelevant tokens of all results that have classes, if any do."""
    counts = [result.class_counts for result in results if result.class_counts is not None]
    if not counts:
        return None
    salient, sub_salient, irrelevant = (sum(column) for column in zip(*counts, strict=True))
    return salient, sub_salient, irrelevant


def pad(flat_N: torch.Tensor, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Right-padded `[B, L, ...]` and its int64 mask `[B, L]`, or None where nothing is padded."""
    if len(lengths) == 1:
        return flat_N.unsqueeze(0), None
    padded = pad_sequence(list(torch.split(flat_N, list(lengths))), batch_first=True)
    if min(lengths) == max(lengths):
        return padded, None
    lengths_B = torch.tensor(lengths, device=flat_N.device)
    mask = torch.arange(max(lengths), device=flat_N.device) < lengths_B.unsqueeze(1)
    return padded, mask.long()


def unpad(padded: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """The inverse of `pad`: `[B, L, ...]` to `[N, ...]`."""
    return torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])


def at_predictors(
    padded_BLD: torch.Tensor, lengths: tuple[int, ...], target_lengths: tuple[int, ...]
) -> torch.Tensor:
    """The hidden states `[T, D]` at the positions that predict the target tokens.

    A target token at position p is predicted at p - 1, and the target ends its sequence.
    """
    return torch.cat(
        [
            row[length - target - 1 : length - 1]
            for row, length, target in zip(padded_BLD, lengths, target_lengths, strict=True)
        ]
    )
