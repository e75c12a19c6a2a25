"""The run spec as a protobuf message: no field is missing on either side, and each survives."""

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import pytest
from google.protobuf.descriptor import Descriptor
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from lesft.errors import InvalidInput
from lesft.spec import LoraSpec, LossSpec, OptimizerSpec, RunSpec
from lesft.spec_messages import (
    encoding_name,
    encoding_to_message,
    lora_to_message,
    spec_from_message,
    spec_to_message,
)
from lesft.v1 import run_pb2, tensor_pb2

MESSAGES: dict[type[BaseModel], Descriptor] = {
    RunSpec: run_pb2.RunSpec.DESCRIPTOR,
    LoraSpec: run_pb2.LoraSpec.DESCRIPTOR,
    LossSpec: run_pb2.LossSpec.DESCRIPTOR,
    OptimizerSpec: run_pb2.OptimizerSpec.DESCRIPTOR,
}

PLAIN = RunSpec(rounds=1, model_name="m", front_fingerprint="sha256:0", cut_layer=1)
OTHER = RunSpec(
    run_id="Other.run_2",
    model_name="some/model-with-ünicode",
    front_fingerprint="sha256:" + "f" * 64,
    cut_layer=7,
    clients=5,
    rounds=2**32 - 1,
    accumulation=9,
    batch_size=11,
    aggregation_interval=13,
    train_front=False,
    aggregate=False,
    personal_layers=(0, 3),
    max_length=4097,
    seed=2**63 - 1,
    mode="deadline",
    quorum=3,
    deadline_seconds=0.5,
    activation_encoding="bf16",
    gradient_encoding="bf16",
    inference_encoding="bf16",
    adapter_encoding="int4",
    lora=LoraSpec(rank=3, alpha=0.1, dropout=0.3, target_modules=("q_proj", "v_proj")),
    loss=LossSpec(
        token_weights="uniform",
        uniform_weight=0.7,
        salient_threshold=0.9,
        gamma_salient=1.1,
        gamma_sub_salient=1.2,
        gamma_irrelevant=1.3,
        clustering="contiguous",
        cluster_similarity=-0.25,
        base_nll_weight=0.01,
        reference_nll_weight=0.02,
    ),
    optimizer=OptimizerSpec(
        learning_rate=1 / 3, schedule="cosine", warmup_rounds=2, weight_decay=0.1, max_grad_norm=0
    ),
)


def travelled(spec: RunSpec) -> RunSpec:
    """The spec after the way over the wire."""
    message = spec_to_message(spec)
    return spec_from_message(run_pb2.RunSpec.FromString(message.SerializeToString()))


def fields_of(model: BaseModel, prefix: str = "") -> dict[str, Any]:
    """All fields to the leaves, nested ones as `lora.rank`."""
    leaves: dict[str, Any] = {}
    for name, value in model:
        nested = isinstance(value, BaseModel)
        leaves |= fields_of(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return leaves


def with_field(spec: RunSpec, path: str, value: Any) -> RunSpec:
    """The spec with one field, `lora.rank` or `seed`, set to another value."""
    part, _, name = path.rpartition(".")
    if not part:
        return spec.model_copy(update={name: value})
    changed = getattr(spec, part).model_copy(update={name: value})
    return spec.model_copy(update={part: changed})


OTHER_FIELDS = {**fields_of(OTHER), "loss.reference_refresh": 3}
"""Those of OTHER, and one that it cannot have beside them: its reference path is trained."""

# ---------------------------------------------------------------------- nothing is missing


@pytest.mark.parametrize("model", MESSAGES, ids=lambda model: model.__name__)
def test_spec_and_message_have_the_same_fields(model: type[BaseModel]) -> None:
    assert set(model.model_fields) == {field.name for field in MESSAGES[model].fields}


@pytest.mark.parametrize("model", MESSAGES, ids=lambda model: model.__name__)
def test_every_choice_of_a_spec_is_a_choice_of_its_message(model: type[BaseModel]) -> None:
    checked = 0
    for field in MESSAGES[model].fields:
        annotation = model.model_fields[field.name].annotation
        assert (get_origin(annotation) is Literal) == (field.enum_type is not None)
        if field.enum_type is None:
            continue
        names = {value.name for value in field.enum_type.values}
        prefix = next(n for n in names if n.endswith("UNSPECIFIED")).removesuffix("UNSPECIFIED")
        choices = {prefix + choice.upper() for choice in get_args(annotation)}
        assert names == {f"{prefix}UNSPECIFIED", *choices}
        checked += 1
    expected = {RunSpec: 5, LoraSpec: 0, LossSpec: 2, OptimizerSpec: 1}
    assert checked == expected[model]


def test_the_other_spec_differs_from_the_plain_one_in_every_field() -> None:
    plain, other = fields_of(PLAIN), OTHER_FIELDS
    assert len(plain) == len(other) == 41
    assert [name for name in plain if plain[name] == other[name]] == []


# ---------------------------------------------------------------------- every field survives


@pytest.mark.parametrize("path", OTHER_FIELDS)
def test_each_field_travels_by_itself(path: str) -> None:
    changed = with_field(PLAIN, path, OTHER_FIELDS[path])
    assert spec_to_message(changed) != spec_to_message(PLAIN)
    assert travelled(changed) == changed
    assert fields_of(travelled(changed)) == {**fields_of(PLAIN), path: OTHER_FIELDS[path]}


def test_all_fields_travel_together() -> None:
    assert travelled(PLAIN) == PLAIN
    assert travelled(OTHER) == OTHER
    assert travelled(OTHER).fingerprint() == OTHER.fingerprint() != PLAIN.fingerprint()


counts = st.integers(1, 2**32 - 1)
positive = st.floats(0, exclude_min=True, allow_infinity=False)
weights = st.floats(0, allow_infinity=False)
encodings = st.sampled_from(["raw", "bf16"])
texts = st.text(max_size=20)
specs = st.builds(
    RunSpec,
    run_id=st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
    model_name=texts,
    front_fingerprint=texts,
    cut_layer=counts,
    clients=counts,
    rounds=counts,
    accumulation=counts,
    batch_size=counts,
    aggregation_interval=counts,
    max_length=st.integers(2, 2**32 - 1),
    seed=st.integers(0, 2**63 - 1),
    activation_encoding=encodings,
    gradient_encoding=encodings,
    inference_encoding=encodings,
    adapter_encoding=st.sampled_from(["raw", "int8", "int4"]),
    lora=st.builds(
        LoraSpec,
        rank=st.integers(1, 4096),
        alpha=positive,
        dropout=st.floats(0, 1, exclude_max=True),
        target_modules=st.lists(texts, min_size=1, max_size=4).map(tuple),
    ),
    loss=st.builds(
        LossSpec,
        token_weights=st.sampled_from(["adaptive", "uniform"]),
        uniform_weight=weights,
        salient_threshold=st.floats(0, 1, exclude_min=True, exclude_max=True),
        gamma_salient=positive,
        gamma_sub_salient=positive,
        gamma_irrelevant=positive,
        clustering=st.sampled_from(["global", "contiguous"]),
        cluster_similarity=st.floats(-1, 1),
        base_nll_weight=weights,
        reference_nll_weight=weights,
    ),
    optimizer=st.builds(
        OptimizerSpec,
        learning_rate=positive,
        schedule=st.sampled_from(["constant", "linear", "cosine"]),
        warmup_rounds=st.integers(0, 2**32 - 1),
        weight_decay=weights,
        max_grad_norm=weights,
    ),
)


@settings(deadline=None, max_examples=100)
@given(spec=specs)
def test_any_spec_travels(spec: RunSpec) -> None:
    assert travelled(spec) == spec
    assert travelled(spec).fingerprint() == spec.fingerprint()


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "name",
    [
        *("clients", "rounds", "accumulation", "batch_size", "aggregation_interval"),
        *("max_length", "cut_layer"),
    ],
)
def test_a_number_too_large_for_its_field_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        spec_to_message(with_field(PLAIN, name, 2**32))
    message = str(caught.value)
    assert message.startswith("the run spec does not fit into its message: ")
    assert name in message


WRONG: dict[str, tuple[Mapping[str, Any], str]] = {
    "rank 0": (
        {"lora": {"rank": 0}},
        "lora.rank: Input should be greater than or equal to 1, got 0",
    ),
    "no target modules": (
        {"lora": {"target_modules": []}},
        "lora.target_modules: Tuple should have at least 1 item after validation, not 0, got []",
    ),
    "a dropout of everything": (
        {"lora": {"dropout": 1.0}},
        "lora.dropout: Input should be less than 1, got 1.0",
    ),
    "an alpha that is no number": (
        {"lora": {"alpha": float("nan")}},
        "lora.alpha: Input should be a finite number, got 'NaN'",
    ),
    "no rounds": (
        {"rounds": 0},
        "rounds: Input should be greater than or equal to 1, got 0",
    ),
    "a seed too large": (
        {"seed": 2**63},
        "seed: Input should be less than 9223372036854775808, got '9223372036854775808'",
    ),
    "an encoding not chosen": (
        {"activation_encoding": 0},
        "activation_encoding: Input should be 'raw', 'bf16', 'int8' or 'int4', got 'unspecified'",
    ),
    "an encoding of the future": (
        {"gradient_encoding": 5},
        "gradient_encoding: Input should be 'raw', 'bf16', 'int8' or 'int4', got '5'",
    ),
    "a schedule not chosen": (
        {"optimizer": {"schedule": 0}},
        "optimizer.schedule: Input should be 'constant', 'linear' or 'cosine', got 'unspecified'",
    ),
    "two things wrong": (
        {"run_id": "a b", "cut_layer": 0},
        "run_id: String should match pattern '^[A-Za-z0-9._-]{1,64}$', got 'a b'; cut_layer: "
        "Input should be greater than or equal to 1, got 0",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_field_is_refused_by_name_in_one_line(what: str) -> None:
    fields, message = WRONG[what]
    received = spec_to_message(PLAIN)
    for name, value in fields.items():
        part = getattr(received, name) if isinstance(value, dict) else received
        for inner, inner_value in (value if isinstance(value, dict) else {name: value}).items():
            if isinstance(inner_value, list):
                part.ClearField(inner)
            else:
                setattr(part, inner, inner_value)
    with pytest.raises(InvalidInput) as caught:
        spec_from_message(received)
    assert str(caught.value) == f"the run spec received cannot be used: {message}"


@pytest.mark.parametrize("name", ["lora", "loss", "optimizer"])
def test_a_part_that_is_missing_does_not_silently_become_its_default(name: str) -> None:
    received = spec_to_message(OTHER)
    received.ClearField(name)
    with pytest.raises(InvalidInput) as caught:
        spec_from_message(received)
    assert str(caught.value) == f"the run spec received cannot be used: {name} is missing"


# ---------------------------------------------------------------------- its pieces


def test_the_adapters_settings_have_a_message_of_their_own() -> None:
    assert lora_to_message(OTHER.lora) == spec_to_message(OTHER).lora
    assert lora_to_message(OTHER.lora) != lora_to_message(PLAIN.lora)


def test_encodings_have_names() -> None:
    assert encoding_to_message("raw") == tensor_pb2.ENCODING_RAW
    assert encoding_to_message("bf16") == tensor_pb2.ENCODING_BF16
    assert encoding_to_message("int8") == tensor_pb2.ENCODING_INT8
    assert encoding_to_message("int4") == tensor_pb2.ENCODING_INT4
    names = [encoding_name(value) for value in range(6)]
    assert names == ["0", "raw", "bf16", "int8", "int4", "5"]
