"""Micro-batches, held-out samples and results: exact both ways, and checked before use."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lesft.bundle import bundle_info
from lesft.errors import BundleError, InvalidInput, LesftError, TooLarge
from lesft.micro_batch import MicroBatch, Path, StepKey, StepResult, Targets
from lesft.quantization import QUANTIZED, dequantize, quantize
from lesft.spec import Encoding, LossSpec, RunSpec
from lesft.step_messages import (
    MAX_ACTIVATION,
    Limits,
    check_lengths,
    check_samples,
    held_out_from_message,
    held_out_to_message,
    micro_batch_from_message,
    micro_batch_to_message,
    result_from_message,
    result_to_message,
)
from lesft.tensors import encode_tensors
from lesft.v1 import training_pb2

WIDTH, VOCAB_SIZE = 6, 50
KEY = StepKey(3, 1)
BASE, REFERENCE, TARGET = (7, 5), (8, 6), (3, 2)


def limits(encoding: Encoding = "raw", **options: Any) -> Limits:
    values: dict[str, Any] = {
        "rounds": 10,
        "batch_size": 2,
        "max_length": 10,
        "activation_encoding": encoding,
        "gradient_encoding": encoding,
        "model_name": "tiny",
        "front_fingerprint": "sha256:0",
        "cut_layer": 1,
        **options,
    }
    return Limits(RunSpec(**values), WIDTH, VOCAB_SIZE)


NO_REFERENCE = {"loss": LossSpec(token_weights="uniform")}
TRAINED_REFERENCE = {"loss": LossSpec(reference_nll_weight=0.5)}


def random_path(lengths: Sequence[int], seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    return Path(torch.randn(sum(lengths), WIDTH, generator=generator), tuple(lengths))


def make_batch(reference: bool = True) -> MicroBatch:
    return MicroBatch(
        KEY,
        random_path(BASE, 1),
        random_path(REFERENCE, 2) if reference else None,
        Targets(torch.tensor([0, 1, VOCAB_SIZE - 1, 7, 7]), TARGET),
    )


def make_result(reference: bool = False) -> StepResult:
    return StepResult(
        key=KEY,
        base_gradient_ND=random_path(BASE, 3).activations_ND,
        reference_gradient_ND=random_path(REFERENCE, 4).activations_ND if reference else None,
        loss=0.1 + 0.2,
        nll=-1e-300,
        class_counts=(2, 3, 0),
    )


def rounded(tensor: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    if encoding in QUANTIZED:
        return dequantize(*quantize(tensor, encoding), encoding)
    return tensor.bfloat16() if encoding == "bf16" else tensor


def assert_same(tensor: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert tensor is not None
    assert tensor.dtype == expected.dtype
    assert torch.equal(tensor, expected)


# ---------------------------------------------------------------------- round trip


@pytest.mark.parametrize("encoding", ["raw", "bf16", "int8", "int4"])
@pytest.mark.parametrize("reference", [True, False])
def test_a_micro_batch_comes_back_as_it_was(encoding: Encoding, reference: bool) -> None:
    batch, allowed = make_batch(reference), limits(encoding, **({} if reference else NO_REFERENCE))
    header, data = micro_batch_to_message(batch, encoding)
    header = training_pb2.MicroBatch.FromString(header.SerializeToString())
    assert header.bundle == bundle_info(data)
    check_lengths(header, allowed)
    back = micro_batch_from_message(header, data, allowed)
    assert back.key == KEY
    assert back.base.lengths == BASE
    assert_same(back.base.activations_ND, rounded(batch.base.activations_ND, encoding))
    assert back.targets.lengths == TARGET
    assert_same(back.targets.ids_T, batch.targets.ids_T)
    if batch.reference is None:
        assert back.reference is None
    else:
        assert back.reference is not None
        assert back.reference.lengths == REFERENCE
        expected = rounded(batch.reference.activations_ND, encoding)
        assert_same(back.reference.activations_ND, expected)


@pytest.mark.parametrize("encoding", ["raw", "bf16", "int8", "int4"])
def test_held_out_samples_come_back_as_they_were(encoding: Encoding) -> None:
    batch = make_batch()
    header, data = held_out_to_message(5, batch.base, batch.targets, encoding)
    header = training_pb2.HeldOut.FromString(header.SerializeToString())
    assert (header.index, header.bundle) == (5, bundle_info(data))
    check_lengths(header, limits(encoding, inference_encoding=encoding))
    base, targets = held_out_from_message(
        header, data, limits(encoding, inference_encoding=encoding)
    )
    assert base.lengths == BASE
    assert_same(base.activations_ND, rounded(batch.base.activations_ND, encoding))
    assert targets.lengths == TARGET
    assert_same(targets.ids_T, batch.targets.ids_T)


@pytest.mark.parametrize("encoding", ["raw", "bf16", "int8", "int4"])
@pytest.mark.parametrize("reference", [True, False])
def test_a_result_comes_back_as_it_was(encoding: Encoding, reference: bool) -> None:
    result = make_result(reference)
    header, data = result_to_message(result, encoding)
    header = training_pb2.StepResult.FromString(header.SerializeToString())
    options: dict[str, Any] = TRAINED_REFERENCE if reference else {}
    back = result_from_message(header, data, make_batch(), limits(encoding, **options))
    assert_same(back.base_gradient_ND, rounded(result.base_gradient_ND, encoding))
    if result.reference_gradient_ND is None:
        assert back.reference_gradient_ND is None
    else:
        expected = rounded(result.reference_gradient_ND, encoding)
        assert_same(back.reference_gradient_ND, expected)
    assert (back.key, back.loss, back.nll) == (KEY, 0.1 + 0.2, -1e-300)
    assert back.class_counts == (2, 3, 0)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_result_says_whether_a_checkpoint_is_due(checkpoint: bool) -> None:
    header, data = result_to_message(replace(make_result(), checkpoint=checkpoint), "raw")
    header = training_pb2.StepResult.FromString(header.SerializeToString())
    assert result_from_message(header, data, make_batch(), limits()).checkpoint is checkpoint


def test_a_result_without_classes_has_no_counts() -> None:
    header, data = result_to_message(replace(make_result(), class_counts=None), "raw")
    assert list(header.class_counts) == []
    assert result_from_message(header, data, make_batch(), limits()).class_counts is None


def test_a_sender_in_bfloat16_may_send_it_raw() -> None:
    batch = make_batch()
    half = replace(batch, base=Path(batch.base.activations_ND.bfloat16(), BASE))
    header, data = micro_batch_to_message(half, "raw")
    back = micro_batch_from_message(header, data, limits("raw"))
    assert_same(back.base.activations_ND, batch.base.activations_ND.bfloat16())


# ---------------------------------------------------------------------- limits on sizes


def test_the_largest_right_bundles_fit_into_their_limits_with_little_to_spare() -> None:
    batch = make_batch()
    header, data = micro_batch_to_message(batch, "raw")
    numbers = (sum(BASE) + sum(REFERENCE)) * WIDTH * 4 + sum(TARGET) * 4
    assert limits().bundle_bytes(header) == numbers + 4096
    assert numbers < len(data) <= numbers + 4096
    held_out, data = held_out_to_message(0, batch.base, batch.targets, "raw")
    numbers = sum(BASE) * WIDTH * 4 + sum(TARGET) * 4
    assert limits().bundle_bytes(held_out) == numbers + 4096
    assert numbers < len(data) <= numbers + 4096
    _, data = result_to_message(make_result(reference=True), "raw")
    numbers = (sum(BASE) + sum(REFERENCE)) * WIDTH * 4
    assert limits().result_bytes(batch) == numbers + 4096
    assert numbers < len(data) <= numbers + 4096
    assert limits().result_bytes(make_batch(reference=False)) == sum(BASE) * WIDTH * 4 + 4096


# ---------------------------------------------------------------------- lengths


def header_of(**lengths: Sequence[int]) -> training_pb2.MicroBatch:
    right = {"base_lengths": BASE, "reference_lengths": REFERENCE, "target_lengths": TARGET}
    return training_pb2.MicroBatch(**{**right, **lengths})  # type: ignore[arg-type]


SKIP = "skip the sample or raise --max-length on the server"
WRONG_LENGTHS: dict[str, tuple[dict[str, Sequence[int]], type[LesftError], str]] = {
    "no sample": (
        {"base_lengths": (), "reference_lengths": (), "target_lengths": ()},
        InvalidInput,
        "target_lengths must have 1 to 2 entries (batch_size), got 0",
    ),
    "more samples than batch_size": (
        {"base_lengths": (7, 5, 5), "reference_lengths": (8, 6, 6), "target_lengths": (3, 2, 2)},
        InvalidInput,
        "target_lengths must have 1 to 2 entries (batch_size), got 3",
    ),
    "fewer targets than samples": (
        {"target_lengths": (3,)},
        InvalidInput,
        "base_lengths must have one entry per sample (1), got 2",
    ),
    "fewer references than samples": (
        {"reference_lengths": (8,)},
        InvalidInput,
        "reference_lengths must have one entry per sample (2), got 1",
    ),
    "no reference where the loss needs one": (
        {"reference_lengths": ()},
        InvalidInput,
        "reference_lengths must have one entry per sample (2), got 0",
    ),
    "a target of no token": (
        {"target_lengths": (3, 0)},
        InvalidInput,
        "target_lengths: a target must have 1 to 4 of its sequence's 5 tokens, got 0",
    ),
    "a target as long as its sequence": (
        {"target_lengths": (7, 2)},
        InvalidInput,
        "target_lengths: a target must have 1 to 6 of its sequence's 7 tokens, got 7",
    ),
    "a target as long as its reference sequence": (
        {"reference_lengths": (3, 6)},
        InvalidInput,
        "target_lengths: a target must have 1 to 2 of its sequence's 3 tokens, got 3",
    ),
    "a target longer than can be": (
        {"target_lengths": (2**32 - 1, 2)},
        InvalidInput,
        "target_lengths: a target must have 1 to 6 of its sequence's 7 tokens, got 4294967295",
    ),
    "a sequence of one token": (
        {"base_lengths": (7, 1), "target_lengths": (3, 1)},
        InvalidInput,
        "base_lengths: a sequence must have at least 2 tokens, prompt and target, got 1",
    ),
    "a sequence of none": (
        {"reference_lengths": (0, 6)},
        InvalidInput,
        "reference_lengths: a sequence must have at least 2 tokens, prompt and target, got 0",
    ),
    "more tokens than max_length": (
        {"base_lengths": (11, 5)},
        TooLarge,
        f"base_lengths: a sequence of 11 tokens, but the run's max_length is 10: {SKIP}",
    ),
    "more tokens on the reference path": (
        {"reference_lengths": (8, 11)},
        TooLarge,
        f"reference_lengths: a sequence of 11 tokens, but the run's max_length is 10: {SKIP}",
    ),
}


@pytest.mark.parametrize("what", WRONG_LENGTHS)
def test_wrong_lengths_are_refused_by_name(what: str) -> None:
    lengths, kind, message = WRONG_LENGTHS[what]
    with pytest.raises(kind) as caught:
        check_lengths(header_of(**lengths), limits())
    assert type(caught.value) is kind
    assert str(caught.value) == message


def test_lengths_at_their_limits_pass() -> None:
    check_lengths(
        header_of(base_lengths=(10, 2), reference_lengths=(2, 10), target_lengths=(1, 1)), limits()
    )
    check_lengths(
        header_of(base_lengths=(10,), reference_lengths=(10,), target_lengths=(9,)), limits()
    )


def test_a_reference_is_refused_where_the_loss_needs_none() -> None:
    message = r"^reference_lengths must be empty: this run's loss needs no reference path$"
    with pytest.raises(InvalidInput, match=message):
        check_lengths(header_of(), limits(**NO_REFERENCE))
    check_lengths(header_of(reference_lengths=()), limits(**NO_REFERENCE))


def test_held_out_samples_never_have_a_reference_and_their_lengths_are_checked_too() -> None:
    right = training_pb2.HeldOut(base_lengths=BASE, target_lengths=TARGET)
    check_lengths(right, limits())
    wrong = training_pb2.HeldOut(base_lengths=(11, 5), target_lengths=TARGET)
    with pytest.raises(TooLarge, match=r"^base_lengths: a sequence of 11 tokens"):
        check_lengths(wrong, limits())


# ---------------------------------------------------------------------- what the bundle holds


def tensors_with(**changes: torch.Tensor | None) -> bytes:
    batch = make_batch()
    assert batch.reference is not None
    tensors: dict[str, torch.Tensor | None] = {
        "base": batch.base.activations_ND,
        "reference": batch.reference.activations_ND,
        "targets": batch.targets.ids_T.int(),
        **changes,
    }
    return encode_tensors({name: t for name, t in tensors.items() if t is not None}, "raw")


def labels(*ids: int) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int32)


def activations(value: float) -> torch.Tensor:
    tensor = random_path(BASE, 1).activations_ND
    tensor[-1, -1] = value
    return tensor


TOKENIZER = "client and server must use the same model's tokenizer"
PRECISION = "check the client's front and its precision"
WRONG_BUNDLES: dict[str, tuple[bytes, type[LesftError], str]] = {
    "a negative label": (
        tensors_with(targets=labels(0, 1, 2, -1, 99)),
        InvalidInput,
        f"label ids must lie between 0 and 49 (the model's vocabulary), got -1: {TOKENIZER}",
    ),
    "a label too large": (
        tensors_with(targets=labels(0, 1, 2, 3, 50)),
        InvalidInput,
        f"label ids must lie between 0 and 49 (the model's vocabulary), got 50: {TOKENIZER}",
    ),
    "the largest label that can be": (
        tensors_with(targets=labels(2**31 - 1, 1, 2, 3, 4)),
        InvalidInput,
        "label ids must lie between 0 and 49 (the model's vocabulary), got 2147483647: "
        + TOKENIZER,
    ),
    "labels as floats": (
        tensors_with(targets=torch.zeros(5)),
        BundleError,
        "tensor 'targets' must be torch.int32, got torch.float32",
    ),
    "a label too few": (
        tensors_with(targets=labels(0, 1, 2, 3)),
        BundleError,
        "tensor 'targets' must have shape [5], got [4]",
    ),
    "activations of another width": (
        tensors_with(base=torch.zeros(12, WIDTH + 1)),
        BundleError,
        "tensor 'base' must have shape [12, 6], got [12, 7]",
    ),
    "activations of another length": (
        tensors_with(reference=torch.zeros(12, WIDTH)),
        BundleError,
        "tensor 'reference' must have shape [14, 6], got [12, 6]",
    ),
    "no reference": (
        tensors_with(reference=None),
        BundleError,
        "3 tensors expected, got 2; missing: 'reference'",
    ),
    "text": (
        tensors_with(prompt=torch.zeros(3, dtype=torch.int32)),
        BundleError,
        "3 tensors expected, got 4; not expected: 'prompt'",
    ),
    "NaN": (
        tensors_with(base=activations(float("nan"))),
        BundleError,
        "tensor 'base' has values that are NaN or infinite",
    ),
    "activations that no model computes": (
        tensors_with(base=activations(-2e15)),
        BundleError,
        "tensor 'base' has values up to 2.0e+15 in magnitude, but activations must stay within "
        f"1e+12: {PRECISION}",
    ),
    "the same on the reference path": (
        tensors_with(reference=torch.full((14, WIDTH), 3e38)),
        BundleError,
        "tensor 'reference' has values up to 3.0e+38 in magnitude, but activations must stay "
        f"within 1e+12: {PRECISION}",
    ),
}


@pytest.mark.parametrize("what", WRONG_BUNDLES)
def test_a_wrong_bundle_of_a_micro_batch_is_refused(what: str) -> None:
    data, kind, message = WRONG_BUNDLES[what]
    with pytest.raises(kind) as caught:
        micro_batch_from_message(header_of(), data, limits())
    assert type(caught.value) is kind
    assert str(caught.value) == message


def test_activations_and_labels_at_their_limits_are_taken() -> None:
    base = activations(-MAX_ACTIVATION)
    data = tensors_with(base=base, targets=labels(0, VOCAB_SIZE - 1, 1, 1, 1))
    batch = micro_batch_from_message(header_of(), data, limits())
    assert torch.equal(batch.base.activations_ND, base)
    assert batch.targets.ids_T.tolist() == [0, VOCAB_SIZE - 1, 1, 1, 1]
    assert batch.targets.ids_T.dtype == torch.int64


def test_float32_is_refused_where_bf16_was_agreed() -> None:
    with pytest.raises(
        BundleError, match=r"^tensor 'base' must be torch\.bfloat16, got torch\.float32$"
    ):
        micro_batch_from_message(header_of(), tensors_with(), limits("bf16"))


def test_wrong_held_out_samples_are_refused() -> None:
    header = training_pb2.HeldOut(base_lengths=BASE, target_lengths=TARGET)
    with pytest.raises(
        BundleError, match=r"^2 tensors expected, got 3; not expected: 'reference'$"
    ):
        held_out_from_message(header, tensors_with(), limits())
    data = tensors_with(reference=None, targets=labels(0, 1, 2, 3, VOCAB_SIZE))
    with pytest.raises(InvalidInput, match=r"^label ids must lie between 0 and 49"):
        held_out_from_message(header, data, limits())


# ---------------------------------------------------------------------- what the server sends


def wrong_result(what: str) -> tuple[training_pb2.StepResult, bytes]:
    header, data = result_to_message(make_result(), "raw")
    base = make_result().base_gradient_ND
    if what == "another micro-batch's":
        header.micro = 2
    elif what == "a class count too few":
        del header.class_counts[2]
    elif what == "NaN":
        data = encode_tensors({"base": base * float("nan")}, "raw")
    elif what == "a row too few":
        data = encode_tensors({"base": base[:-1]}, "raw")
    elif what == "a gradient nobody asked for":
        data = encode_tensors({"base": base, "reference": base + 1}, "raw")
    return header, data


WRONG_RESULTS = {
    "another micro-batch's": (
        "result of round 3 micro-batch 1 expected, got that of round 3 micro-batch 2"
    ),
    "a class count too few": "class_counts must have 3 entries or none, got 2",
    "NaN": "tensor 'base' has values that are NaN or infinite",
    "a row too few": "tensor 'base' must have shape [12, 6], got [11, 6]",
    "a gradient nobody asked for": "1 tensors expected, got 2; not expected: 'reference'",
}


@pytest.mark.parametrize("what", WRONG_RESULTS)
def test_a_wrong_result_is_refused(what: str) -> None:
    header, data = wrong_result(what)
    with pytest.raises(BundleError) as caught:
        result_from_message(header, data, make_batch(), limits())
    assert str(caught.value) == WRONG_RESULTS[what]


def test_a_result_must_have_the_references_gradient_where_the_loss_trains_it() -> None:
    header, data = result_to_message(make_result(), "raw")
    with pytest.raises(BundleError, match=r"^2 tensors expected, got 1; missing: 'reference'$"):
        result_from_message(header, data, make_batch(), limits(**TRAINED_REFERENCE))


# ---------------------------------------------------------------------- clients that do not train

FROZEN = {"train_front": False}


def frozen_batch(samples: tuple[int, ...], enclosed: tuple[int, ...]) -> MicroBatch:
    """Of two samples, or of none."""
    if enclosed:
        return replace(make_batch(), samples=samples, enclosed=enclosed)
    nothing = Path(torch.empty(0, WIDTH), ())
    return MicroBatch(KEY, nothing, None, Targets(torch.empty(0).long(), ()), samples)


@pytest.mark.parametrize("encoding", ["raw", "bf16", "int8", "int4"])
def test_a_micro_batch_names_its_samples_and_those_that_are_enclosed(encoding: Encoding) -> None:
    batch = frozen_batch((7, 2**32 - 1, 0), (7, 0))
    header, data = micro_batch_to_message(batch, encoding)
    header = training_pb2.MicroBatch.FromString(header.SerializeToString())
    back = micro_batch_from_message(header, data, limits(encoding, **FROZEN))
    assert (back.samples, back.enclosed) == (batch.samples, batch.enclosed)
    assert (back.base.lengths, back.targets.lengths) == (BASE, TARGET)
    assert_same(back.base.activations_ND, rounded(batch.base.activations_ND, encoding))
    assert back.reference is not None
    assert_same(
        back.reference.activations_ND, rounded(random_path(REFERENCE, 2).activations_ND, encoding)
    )
    assert_same(back.targets.ids_T, batch.targets.ids_T)


def test_a_micro_batch_without_anything_enclosed_has_no_bundle() -> None:
    header, data = micro_batch_to_message(frozen_batch((7, 0), ()), "raw")
    assert data == b""
    assert not header.HasField("bundle")
    assert header.ByteSize() < 20
    back = micro_batch_from_message(header, data, limits(**FROZEN))
    assert (back.key, back.samples, back.enclosed, back.reference) == (KEY, (7, 0), (), None)
    assert back.base.activations_ND.shape == (0, WIDTH)
    assert (back.base.lengths, back.targets.lengths) == ((), ())


def test_a_result_without_a_gradient_has_no_bundle_and_says_what_is_held() -> None:
    result = replace(make_result(), base_gradient_ND=None, held=(3, 9))
    header, data = result_to_message(result, "raw")
    assert data == b""
    assert not header.HasField("bundle")
    header = training_pb2.StepResult.FromString(header.SerializeToString())
    trained_reference = limits(**FROZEN, **TRAINED_REFERENCE)
    for allowed in (limits(**FROZEN), trained_reference):
        assert result_from_message(header, data, make_batch(), allowed) == result


def samples_header(
    samples: Sequence[int], enclosed: Sequence[int], lengths: int
) -> training_pb2.MicroBatch:
    return training_pb2.MicroBatch(samples=samples, enclosed=enclosed, target_lengths=[3] * lengths)


WRONG_SAMPLES: dict[str, tuple[training_pb2.MicroBatch, str]] = {
    "none": (
        samples_header([], [], 0),
        "samples must have 1 to 2 entries (batch_size), got 0",
    ),
    "more than batch_size": (
        samples_header([0, 1, 2], [], 0),
        "samples must have 1 to 2 entries (batch_size), got 3",
    ),
    "a number too large": (
        samples_header([0, 5], [0], 1),
        "samples: the client has samples 0 to 4, got 5",
    ),
    "enclosed that is none of them": (
        samples_header([0, 1], [2], 1),
        "enclosed must be some of samples [0, 1], each once, got [2]",
    ),
    "enclosed twice": (
        samples_header([1, 1], [1, 1], 2),
        "enclosed must be some of samples [1, 1], each once, got [1, 1]",
    ),
    "lengths of fewer than are enclosed": (
        samples_header([0, 1], [0, 1], 1),
        "target_lengths must have one entry for each of the 2 samples enclosed, got 1",
    ),
    "lengths although nothing is enclosed": (
        samples_header([0, 1], [], 2),
        "target_lengths must have one entry for each of the 0 samples enclosed, got 2",
    ),
}


@pytest.mark.parametrize("what", WRONG_SAMPLES)
def test_wrong_samples_are_refused_by_name(what: str) -> None:
    header, message = WRONG_SAMPLES[what]
    with pytest.raises(InvalidInput) as caught:
        check_samples(header, limits(**FROZEN).spec, num_samples=5)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("samples", "enclosed"), [([4], [4]), ([0, 4], []), ([3, 3], [3]), ([1, 0], [0, 1])]
)
def test_right_samples_pass(samples: list[int], enclosed: list[int]) -> None:
    header = samples_header(samples, enclosed, len(enclosed))
    check_samples(header, limits(**FROZEN).spec, num_samples=5)


@pytest.mark.parametrize(("samples", "enclosed"), [([0], [0]), ([0], []), ([], [0])])
def test_samples_are_refused_where_clients_train(samples: list[int], enclosed: list[int]) -> None:
    message = "samples must be empty: in this run clients send all of each micro-batch anew"
    with pytest.raises(InvalidInput) as caught:
        check_samples(samples_header(samples, enclosed, 1), limits().spec, num_samples=5)
    assert str(caught.value) == message
    check_samples(samples_header([], [], 1), limits().spec, num_samples=5)
