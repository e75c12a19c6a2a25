"""Micro-batches, held-out samples and results to and from their messages and bundles.

What comes in is hostile until checked: lengths before a byte of the bundle is accepted, then names,
dtypes, shapes, finiteness and the range of the label ids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lesft.bundle import bundle_info
from lesft.errors import BundleError, InvalidInput, TooLarge
from lesft.micro_batch import MicroBatch, Path, StepKey, StepResult, Targets
from lesft.spec import Encoding, RunSpec
from lesft.tensors import HEADER_BYTES, TensorSpec, decode_encoded, encode_tensors
from lesft.v1 import training_pb2

_ID_BYTES = 4
_MAX_FLOAT_BYTES = 4

MAX_ACTIVATION = 1e12
"""Largest activation that the server takes, in magnitude: far above what any model computes, and
far enough below float32's end that squares, their sums over a row, and gradients stay finite."""


@dataclass(frozen=True)
class Limits:
    """What a run and its model allow in a message."""

    spec: RunSpec
    hidden_size: int
    vocab_size: int

    def bundle_bytes(self, header: training_pb2.MicroBatch | training_pb2.HeldOut) -> int:
        """The most bytes that the bundle of a checked header may have."""
        tokens = sum(header.base_lengths) + sum(getattr(header, "reference_lengths", ()))
        activations = tokens * self.hidden_size * _MAX_FLOAT_BYTES
        return activations + sum(header.target_lengths) * _ID_BYTES + HEADER_BYTES

    def result_bytes(self, batch: MicroBatch) -> int:
        """The most bytes that the gradients of a micro-batch may have."""
        tokens = sum(batch.base.lengths) + sum(batch.reference.lengths if batch.reference else ())
        return tokens * self.hidden_size * _MAX_FLOAT_BYTES + HEADER_BYTES


# ---------------------------------------------------------------------- micro-batch, client side


def micro_batch_to_message(
    batch: MicroBatch, encoding: Encoding
) -> tuple[training_pb2.MicroBatch, bytes]:
    """The header and the bundle of a micro-batch; no bundle where the server holds it all."""
    data = encode_batch(batch, encoding) if batch.base.lengths else b""
    return training_pb2.MicroBatch(
        round=batch.key.round,
        micro=batch.key.micro,
        base_lengths=batch.base.lengths,
        reference_lengths=batch.reference.lengths if batch.reference else (),
        target_lengths=batch.targets.lengths,
        bundle=bundle_info(data) if data else None,
        samples=batch.samples,
        enclosed=batch.enclosed,
    ), data


def encode_batch(batch: MicroBatch, encoding: Encoding) -> bytes:
    """The bundle of a micro-batch."""
    tensors = _sample_tensors(batch.base, batch.targets)
    if batch.reference is not None:
        tensors["reference"] = batch.reference.activations_ND
    return encode_tensors(tensors, encoding)


def held_out_to_message(
    index: int, base: Path, targets: Targets, encoding: Encoding
) -> tuple[training_pb2.HeldOut, bytes]:
    """The header and the bundle of held-out samples."""
    data = encode_tensors(_sample_tensors(base, targets), encoding)
    return training_pb2.HeldOut(
        index=index,
        base_lengths=base.lengths,
        target_lengths=targets.lengths,
        bundle=bundle_info(data),
    ), data


def _sample_tensors(base: Path, targets: Targets) -> dict[str, torch.Tensor]:
    tensors = {"base": base.activations_ND}
    if targets.lengths:
        tensors["targets"] = targets.ids_T.to(torch.int32)
    return tensors


# ---------------------------------------------------------------------- micro-batch, server side

Admit = Callable[[str, torch.Tensor], torch.Tensor]
"""What a service does about activations that it has decoded, by name; see `lesft.norms`."""


def _as_it_is(name: str, activations_ND: torch.Tensor) -> torch.Tensor:
    return activations_ND


def check_lengths(header: training_pb2.MicroBatch | training_pb2.HeldOut, limits: Limits) -> None:
    """Check a header's lengths. Raises InvalidInput or TooLarge.

    Those of a micro-batch without a bundle, and which samples it is of, are for `check_samples`.
    """
    spec = limits.spec
    if isinstance(header, training_pb2.MicroBatch) and spec.loss.remembers_reference:
        _check_remembered_lengths(header, spec)
        return
    samples = len(header.target_lengths)
    if not 1 <= samples <= spec.batch_size:
        raise InvalidInput(
            f"target_lengths must have 1 to {spec.batch_size} entries (batch_size), got {samples}"
        )
    _check_path("base_lengths", header.base_lengths, header.target_lengths, spec.max_length)
    if isinstance(header, training_pb2.HeldOut):
        return
    if spec.loss.needs_reference:
        _check_path(
            "reference_lengths", header.reference_lengths, header.target_lengths, spec.max_length
        )
    elif header.reference_lengths:
        raise InvalidInput(
            "reference_lengths must be empty: this run's loss needs no reference path"
        )


def check_samples(header: training_pb2.MicroBatch, spec: RunSpec, num_samples: int) -> None:
    """Check which of a client's `num_samples` samples a micro-batch is of. Raises InvalidInput."""
    if not spec.names_samples:
        if header.samples or header.enclosed:
            raise InvalidInput(
                "samples must be empty: in this run clients send all of each micro-batch anew"
            )
        return
    if not 1 <= len(header.samples) <= spec.batch_size:
        raise InvalidInput(
            f"samples must have 1 to {spec.batch_size} entries (batch_size), got "
            f"{len(header.samples)}"
        )
    if len(header.enclosed) > len(header.samples):
        raise InvalidInput(
            f"enclosed must have at most {len(header.samples)} entries (samples), got "
            f"{len(header.enclosed)}"
        )
    samples, enclosed = list(header.samples), list(header.enclosed)
    if max(samples) >= num_samples:
        raise InvalidInput(
            f"samples: the client has samples 0 to {num_samples - 1}, got {max(samples)}"
        )
    if len(set(enclosed)) != len(enclosed) or not set(enclosed) <= set(samples):
        raise InvalidInput(f"enclosed must be some of samples {samples}, each once, got {enclosed}")
    if len(header.target_lengths) != len(enclosed):
        raise InvalidInput(
            f"target_lengths must have one entry for each of the {len(enclosed)} samples enclosed, "
            f"got {len(header.target_lengths)}"
        )


def _check_remembered_lengths(header: training_pb2.MicroBatch, spec: RunSpec) -> None:
    """Base lengths of all samples, the others of those enclosed; `samples` is checked already.

    Whether a sample that is remembered is long enough for its target, its memory knows.
    """
    if len(header.base_lengths) != len(header.samples):
        raise InvalidInput(
            f"base_lengths must have one entry per sample ({len(header.samples)}), got "
            f"{len(header.base_lengths)}"
        )
    for length in header.base_lengths:
        _check_length("base_lengths", length, spec.max_length)
    by_number = dict(zip(header.samples, header.base_lengths, strict=True))
    enclosed = [by_number[number] for number in header.enclosed]
    _check_path("base_lengths", enclosed, header.target_lengths, spec.max_length)
    _check_path(
        "reference_lengths", header.reference_lengths, header.target_lengths, spec.max_length
    )


def _check_length(name: str, length: int, max_length: int) -> None:
    if length > max_length:
        raise TooLarge(
            f"{name}: a sequence of {length} tokens, but the run's max_length is {max_length}: "
            "skip the sample or raise --max-length on the server"
        )
    if length < 2:
        raise InvalidInput(
            f"{name}: a sequence must have at least 2 tokens, prompt and target, got {length}"
        )


def _check_path(
    name: str, lengths: Sequence[int], target_lengths: Sequence[int], max_length: int
) -> None:
    if len(lengths) != len(target_lengths):
        raise InvalidInput(
            f"{name} must have one entry per sample ({len(target_lengths)}), got {len(lengths)}"
        )
    for length, target in zip(lengths, target_lengths, strict=True):
        _check_length(name, length, max_length)
        if not 1 <= target < length:
            raise InvalidInput(
                f"target_lengths: a target must have 1 to {length - 1} of its sequence's {length} "
                f"tokens, got {target}"
            )


def micro_batch_from_message(
    header: training_pb2.MicroBatch, data: bytes, limits: Limits, admit: Admit = _as_it_is
) -> MicroBatch:
    """The micro-batch of a checked header and its bundle; `admit` may cut down activations.

    Raises what `admit` raises, BundleError for a wrong name, dtype, shape or value, InvalidInput
    for a label id that is not in the vocabulary.
    """
    key = StepKey(header.round, header.micro)
    samples, enclosed = tuple(header.samples), tuple(header.enclosed)
    if not header.base_lengths:  # the server holds them all
        nothing = Path(torch.empty(0, limits.hidden_size), ())
        targets = Targets(torch.empty(0, dtype=torch.long), ())
        return MicroBatch(key, nothing, None, targets, samples, enclosed)
    paths = {"base": tuple(header.base_lengths)}
    if header.reference_lengths:
        paths["reference"] = tuple(header.reference_lengths)
    encoding = limits.spec.activation_encoding
    tensors = _decode_samples(paths, tuple(header.target_lengths), data, encoding, limits, admit)
    return MicroBatch(
        key=key,
        base=Path(tensors["base"], paths["base"]),
        reference=Path(tensors["reference"], paths["reference"]) if len(paths) > 1 else None,
        targets=Targets(tensors["targets"], tuple(header.target_lengths)),
        samples=samples,
        enclosed=enclosed,
    )


def held_out_from_message(
    header: training_pb2.HeldOut, data: bytes, limits: Limits, admit: Admit = _as_it_is
) -> tuple[Path, Targets]:
    """The held-out samples of a checked header and its bundle; raises as for micro-batches."""
    base_lengths, target_lengths = tuple(header.base_lengths), tuple(header.target_lengths)
    encoding, paths = limits.spec.inference_encoding, {"base": base_lengths}
    tensors = _decode_samples(paths, target_lengths, data, encoding, limits, admit)
    return Path(tensors["base"], base_lengths), Targets(tensors["targets"], target_lengths)


def _decode_samples(
    paths: dict[str, tuple[int, ...]],
    target_lengths: tuple[int, ...],
    data: bytes,
    encoding: Encoding,
    limits: Limits,
    admit: Admit,
) -> dict[str, torch.Tensor]:
    shapes = {name: (sum(lengths), limits.hidden_size) for name, lengths in paths.items()}
    targets = {"targets": TensorSpec((sum(target_lengths),), (torch.int32,))}
    others = targets if target_lengths else {}
    tensors = decode_encoded(data, shapes, encoding, others)
    for name in paths:
        check_magnitude(name, tensors[name])
        tensors[name] = admit(name, tensors[name])
    ids_T = tensors["targets"].long() if target_lengths else torch.empty(0, dtype=torch.long)
    outside = ids_T[(ids_T < 0) | (ids_T >= limits.vocab_size)]
    if len(outside):
        raise InvalidInput(
            f"label ids must lie between 0 and {limits.vocab_size - 1} (the model's vocabulary), "
            f"got {int(outside[0])}: client and server must use the same model's tokenizer"
        )
    tensors["targets"] = ids_T
    return tensors


def check_magnitude(name: str, activations_ND: torch.Tensor) -> None:
    """Raises BundleError for activations that no model makes."""
    largest = float(activations_ND.abs().max())
    if largest > MAX_ACTIVATION:
        raise BundleError(
            f"tensor {name!r} has values up to {largest:.1e} in magnitude, but activations must "
            f"stay within {MAX_ACTIVATION:.0e}: check the client's front and its precision"
        )


# ---------------------------------------------------------------------- results


def result_to_message(
    result: StepResult, encoding: Encoding
) -> tuple[training_pb2.StepResult, bytes]:
    """The header and the bundle of a result; no bundle where no gradients are returned."""
    gradients = {"base": result.base_gradient_ND, "reference": result.reference_gradient_ND}
    tensors = {name: tensor for name, tensor in gradients.items() if tensor is not None}
    data = encode_tensors(tensors, encoding) if tensors else b""
    return training_pb2.StepResult(
        round=result.key.round,
        micro=result.key.micro,
        loss=result.loss,
        nll=result.nll,
        class_counts=result.class_counts or (),
        bundle=bundle_info(data) if data else None,
        checkpoint=result.checkpoint,
        held=result.held,
    ), data


def result_from_message(
    header: training_pb2.StepResult, data: bytes, batch: MicroBatch, limits: Limits
) -> StepResult:
    """The result for `batch`. Raises BundleError when it is another one's or malformed."""
    key = StepKey(header.round, header.micro)
    if key != batch.key:
        raise BundleError(f"result of {batch.key} expected, got that of {key}")
    paths = {"base": batch.base} if limits.spec.train_front else {}
    if paths and batch.reference is not None and limits.spec.loss.trains_reference:
        paths["reference"] = batch.reference
    shapes = {name: (sum(path.lengths), limits.hidden_size) for name, path in paths.items()}
    tensors = decode_encoded(data, shapes, limits.spec.gradient_encoding) if shapes else {}
    counts = tuple(header.class_counts)
    if len(counts) not in (0, 3):
        raise BundleError(f"class_counts must have 3 entries or none, got {len(counts)}")
    return StepResult(
        key=key,
        base_gradient_ND=tensors.get("base"),
        reference_gradient_ND=tensors.get("reference"),
        loss=header.loss,
        nll=header.nll,
        class_counts=(counts[0], counts[1], counts[2]) if len(counts) == 3 else None,
        checkpoint=header.checkpoint,
        held=tuple(header.held),
        receipt=header.receipt.SerializeToString() if header.HasField("receipt") else b"",
    )
