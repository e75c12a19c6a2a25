"""The run spec to and from its protobuf message, field by field of the same name."""

from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict, ParseError
from pydantic import ValidationError

from lesft.errors import InvalidInput
from lesft.spec import AdapterEncoding, Encoding, LoraSpec, RunSpec
from lesft.v1 import run_pb2, tensor_pb2

# Enum values carry their type's name as a prefix in protobuf; ours are the bare lower-case rest.
_PREFIXES = {
    "activation_encoding": "ENCODING_",
    "gradient_encoding": "ENCODING_",
    "inference_encoding": "ENCODING_",
    "adapter_encoding": "ADAPTER_ENCODING_",
    "token_weights": "TOKEN_WEIGHTS_",
    "clustering": "CLUSTERING_",
    "schedule": "SCHEDULE_",
    "mode": "MODE_",
}


def spec_to_message(spec: RunSpec) -> run_pb2.RunSpec:
    """The message of a run spec. Raises InvalidInput when a number is too large for its field."""
    try:
        return ParseDict(_with_prefixes(spec.model_dump(mode="json")), run_pb2.RunSpec())
    except ParseError as error:
        raise InvalidInput(f"the run spec does not fit into its message: {error}") from None


def spec_from_message(message: run_pb2.RunSpec) -> RunSpec:
    """The run spec of a message. Raises InvalidInput when a field is missing or breaks its rule."""
    present = {field.name for field, _ in message.ListFields()}
    for field in message.DESCRIPTOR.fields:
        if field.message_type and field.name not in present:
            raise InvalidInput(f"the run spec received cannot be used: {field.name} is missing")
    values = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    try:
        return RunSpec.model_validate(_without_prefixes(values))
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}, got {detail['input']!r}"
            for detail in error.errors()
        )
        raise InvalidInput(f"the run spec received cannot be used: {wrong}") from None


def lora_to_message(lora: LoraSpec) -> run_pb2.LoraSpec:
    """The message of the adapters' settings."""
    return ParseDict(lora.model_dump(mode="json"), run_pb2.LoraSpec())


_ENCODINGS: dict[Encoding, tensor_pb2.Encoding.ValueType] = {
    "raw": tensor_pb2.ENCODING_RAW,
    "bf16": tensor_pb2.ENCODING_BF16,
    "int8": tensor_pb2.ENCODING_INT8,
    "int4": tensor_pb2.ENCODING_INT4,
}


def encoding_to_message(encoding: Encoding) -> tensor_pb2.Encoding.ValueType:
    """The protobuf value of an encoding."""
    return _ENCODINGS[encoding]


def encoding_name(value: int) -> str:
    """Our name of a protobuf encoding, or the bare number of one we do not know."""
    return next((name for name, number in _ENCODINGS.items() if number == value), str(value))


_ADAPTER_ENCODINGS: dict[AdapterEncoding, tensor_pb2.AdapterEncoding.ValueType] = {
    "raw": tensor_pb2.ADAPTER_ENCODING_RAW,
    "int8": tensor_pb2.ADAPTER_ENCODING_INT8,
    "int4": tensor_pb2.ADAPTER_ENCODING_INT4,
}


def adapter_encoding_to_message(
    encoding: AdapterEncoding,
) -> tensor_pb2.AdapterEncoding.ValueType:
    """The protobuf value of an adapter's encoding."""
    return _ADAPTER_ENCODINGS[encoding]


def adapter_encoding(value: int) -> AdapterEncoding:
    """Our name of an adapter's encoding, raw where it is left out; InvalidInput for others."""
    for name, number in _ADAPTER_ENCODINGS.items():
        if number == (value or tensor_pb2.ADAPTER_ENCODING_RAW):
            return name
    raise InvalidInput(
        f"encoding: an adapter is {' or '.join(_ADAPTER_ENCODINGS)}, got number {value}: install "
        "the same LESFT on both sides"
    )


def _with_prefixes(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _with_prefixes(value)
        if isinstance(value, dict)
        else _PREFIXES[key] + value.upper()
        if key in _PREFIXES
        else value
        for key, value in values.items()
    }


def _without_prefixes(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_prefixes(value)
        if isinstance(value, dict)
        else str(value).removeprefix(_PREFIXES[key]).lower()
        if key in _PREFIXES
        else value
        for key, value in values.items()
    }
