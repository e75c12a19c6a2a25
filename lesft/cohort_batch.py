"""The parts of all clients of a cohort as one batch, and the batch's results by client again.

Shape letters: N tokens of the whole batch, T its target tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from lesft.device import joined
from lesft.loss import TokenClass
from lesft.micro_batch import MicroBatch, Path, StepKey, StepResult, Targets
from lesft.sample_memory import ClientMemory


@dataclass(frozen=True)
class Part:
    """One client's micro-batch within a cohort and that client's share |D_i| / |D| of its data.

    Where it names its samples, what the step finds of them goes into `memory`.
    """

    client_id: str
    micro_batch: MicroBatch
    share: float
    memory: ClientMemory | None = None

    @property
    def known(self) -> Sequence[torch.Tensor | None]:
        """Of each sample: log P~ `[T]` where it is known."""
        return self.micro_batch.known_log_probs or [None] * len(self.micro_batch.targets.lengths)


@dataclass(frozen=True)
class TokenTerms:
    """What the loss made of each target token of the batch; all `[T]`, without graph.

    `losses_T` are the tokens' terms before any scaling, `log_probs_T` those of the base path.
    """

    losses_T: torch.Tensor
    log_probs_T: torch.Tensor
    classes_T: torch.Tensor | None


class CohortBatch:
    """S = [S_1; ...; S_N]: the clients' paths and targets one after another, on one device."""

    def __init__(self, parts: Sequence[Part], device: torch.device, grad: bool) -> None:
        """With `grad` the activations are leaves that take a gradient."""
        batches = [part.micro_batch for part in parts]
        references = [batch.reference for batch in batches if batch.reference is not None]
        self.parts = parts
        self.base = concatenate([batch.base for batch in batches], device, grad)
        self.reference = concatenate(references, device, grad) if references else None
        self.targets = Targets(
            joined([batch.targets.ids_T for batch in batches], device),
            tuple(length for batch in batches for length in batch.targets.lengths),
        )
        self._known = [log_probs_T for part in parts for log_probs_T in part.known]

    @cached_property
    def reference_targets(self) -> Targets:
        """The targets of the samples that `reference` is of."""
        ids = torch.split(self.targets.ids_T, list(self.targets.lengths))
        unknown = [ids_T for ids_T, known in zip(ids, self._known, strict=True) if known is None]
        return Targets(torch.cat(unknown), tuple(len(ids_T) for ids_T in unknown))

    def with_known(self, found_T: torch.Tensor | None) -> torch.Tensor:
        """log P~ `[T]` of all target tokens: what was found for `reference_targets`, and known."""
        found = iter(
            () if found_T is None else torch.split(found_T, list(self.reference_targets.lengths))
        )
        device = self.targets.ids_T.device
        return torch.cat(
            [next(found) if known is None else known.to(device) for known in self._known]
        )

    def token_scales(self) -> torch.Tensor:
        """`[T]` float32: the factor of each token's term, share_i / (B_i |y|) (eq. 1 and 17)."""
        scales = [
            part.share / len(part.micro_batch.targets.lengths) / length
            for part in self.parts
            for length in part.micro_batch.targets.lengths
        ]
        device = self.targets.ids_T.device
        lengths = torch.tensor(self.targets.lengths, device=device)
        return torch.tensor(scales, device=device).repeat_interleave(lengths)

    def token_rows(self) -> list[slice]:
        """Each client's rows of the target tokens."""
        return _token_rows(self.parts)

    def reference_rows(self) -> list[slice]:
        """Each client's rows of `reference_targets`."""
        return _rows(
            [
                sum(
                    length
                    for length, known in zip(
                        part.micro_batch.targets.lengths, part.known, strict=True
                    )
                    if known is None
                )
                for part in self.parts
            ]
        )

    def results(self, key: StepKey, terms: TokenTerms) -> list[StepResult]:
        """Each client's losses and its rows of the activations' gradients (step 6), if any."""
        base = self._gradients([part.micro_batch.base for part in self.parts], self.base)
        reference = self._gradients(
            [part.micro_batch.reference for part in self.parts], self.reference
        )
        return [
            StepResult(
                key=key,
                base_gradient_ND=base[i],
                reference_gradient_ND=reference[i],
                loss=_mean_over_samples(terms.losses_T[rows], part.micro_batch.targets.lengths),
                nll=-float(terms.log_probs_T[rows].mean()),
                class_counts=_class_counts(terms.classes_T, rows),
            )
            for i, (part, rows) in enumerate(zip(self.parts, self.token_rows(), strict=True))
        ]

    def _gradients(
        self, paths: Sequence[Path | None], gathered: Path | None
    ) -> Sequence[torch.Tensor | None]:
        gradient_ND = gathered.activations_ND.grad if gathered else None
        if gradient_ND is None:
            return [None] * len(self.parts)
        return torch.split(gradient_ND, [sum(path.lengths) for path in paths if path is not None])


def grouped(parts: Sequence[Part], most_tokens: int) -> list[list[Part]]:
    """The parts in as few batches as have at most so many tokens each, with padding.

    In their order where one will do; else those of like lengths are together, so that there is
    little padding. A single part may have more.
    """
    if _padded_tokens(parts) <= most_tokens:
        return [list(parts)]
    groups: list[list[Part]] = []
    for part in sorted(parts, key=_longest):
        if groups and _padded_tokens([*groups[-1], part]) <= most_tokens:
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def _longest(part: Part) -> int:
    return max(length for path in _lengths([part]) for length in path)


def _padded_tokens(parts: Sequence[Part]) -> int:
    """Of the larger of both paths' batches."""
    return max(len(path) * max(path, default=0) for path in _lengths(parts))


def _lengths(parts: Sequence[Part]) -> tuple[list[int], list[int]]:
    """Of all sequences of the base path, and of the reference path."""
    batches = [part.micro_batch for part in parts]
    references = [batch.reference for batch in batches if batch.reference is not None]
    return (
        [length for batch in batches for length in batch.base.lengths],
        [length for path in references for length in path.lengths],
    )


def remember(parts: Sequence[Part], log_probs_T: torch.Tensor) -> None:
    """Each client's log P~, of a batch of these parts, into its memory, where it has one."""
    for part, rows in zip(parts, _token_rows(parts), strict=True):
        if part.memory is not None:
            lengths = list(part.micro_batch.targets.lengths)
            part.memory.keep(part.micro_batch, torch.split(log_probs_T[rows], lengths))


def _token_rows(parts: Sequence[Part]) -> list[slice]:
    return _rows([sum(part.micro_batch.targets.lengths) for part in parts])


def _rows(counts: Sequence[int]) -> list[slice]:
    stops = list(accumulate(counts))
    return [slice(stop - count, stop) for count, stop in zip(counts, stops, strict=True)]


def concatenate(paths: Sequence[Path], device: torch.device, grad: bool) -> Path:
    """The paths one after another on the device; with `grad`, as a leaf that takes a gradient."""
    activations_ND = joined([path.activations_ND for path in paths], device)
    lengths = tuple(length for path in paths for length in path.lengths)
    return Path(activations_ND.requires_grad_(grad), lengths)


def _mean_over_samples(losses_T: torch.Tensor, lengths: tuple[int, ...]) -> float:
    samples = [losses.sum() / len(losses) for losses in torch.split(losses_T, list(lengths))]
    return float(torch.stack(samples).mean())


def _class_counts(classes_T: torch.Tensor | None, rows: slice) -> tuple[int, int, int] | None:
    if classes_T is None:
        return None
    salient, sub_salient, irrelevant = torch.bincount(
        classes_T[rows], minlength=len(TokenClass)
    ).tolist()
    return salient, sub_salient, irrelevant
