"""Seeded mutators: bytes, protobuf messages by their wire format and by their fields, JSON.

Each takes a `random.Random`, so that a seed names a message for good.
"""

import math
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeVar

from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

HUGE = (0, 1, 2**7, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
ODD_FLOATS = (
    *(0.0, -0.0, 5e-324, 1e-40, 1e38, -1e308, math.nan, math.inf, -math.inf, -1.0, 0.5, 1e15),
)
ODD_TEXTS = (
    *("", "\x00", "a\nb", "\u202e", "client-0", "../../x", "%s%n", "x" * 65, "é" * 5_000),
    *("client-0 ", "\ud7ff\U0010ffff", "'; DROP TABLE client; --", "sha256:" + "0" * 64),
)


# ---------------------------------------------------------------------- bytes


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """One to four small accidents."""
    for _ in range(random.randint(1, 4)):
        data = random.choice(_BYTE_ACCIDENTS)(random, data)
    return data


def _span(random: Random, data: bytes) -> tuple[int, int]:
    start = random.randint(0, len(data))
    return start, min(len(data), start + random.randint(1, 64))


def _flip(random: Random, data: bytes) -> bytes:
    if not data:
        return b"\xff"
    changed = bytearray(data)
    for _ in range(random.randint(1, 8)):
        changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _truncate(random: Random, data: bytes) -> bytes:
    return data[: random.randint(0, len(data))]


def _repeat(random: Random, data: bytes) -> bytes:
    start, end = _span(random, data)
    return data[:end] + data[start:end] * random.randint(1, 50) + data[end:]


def _remove(random: Random, data: bytes) -> bytes:
    start, end = _span(random, data)
    return data[:start] + data[end:]


def _noise(random: Random, data: bytes) -> bytes:
    start, end = _span(random, data)
    return data[:start] + random.randbytes(random.randint(1, 64)) + data[end:]


def _huge_varint(random: Random, data: bytes) -> bytes:
    start, end = _span(random, data)
    return data[:start] + b"\xff" * random.choice((4, 8, 9, 10, 11, 40)) + b"\x01" + data[end:]


def _rotate(random: Random, data: bytes) -> bytes:
    start = random.randint(0, len(data))
    return data[start:] + data[:start]


_BYTE_ACCIDENTS: Sequence[Callable[[Random, bytes], bytes]] = (
    *(_flip, _truncate, _repeat, _remove, _noise, _huge_varint, _rotate),
)


# ---------------------------------------------------------------------- protobuf, as it travels

Record = tuple[int, int, bytes]
"""Field number, wire type, payload as it is encoded without its tag."""


def varint(number: int) -> bytes:
    """A protobuf varint of any size, also of more than 64 bits."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def records(data: bytes) -> list[Record]:
    """The records of a well-formed message."""
    found, at = [], 0
    while at < len(data):
        tag, at = _read_varint(data, at)
        start = at
        if tag & 7 == 0:
            _, at = _read_varint(data, at)
        elif tag & 7 == 2:
            size, at = _read_varint(data, at)
            at += size
        else:
            at += {1: 8, 5: 4}[tag & 7]
        found.append((tag >> 3, tag & 7, data[start:at]))
    return found


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at


def mutate_records(random: Random, data: bytes) -> bytes:
    """Records of a valid message dropped, repeated, put elsewhere, renamed, or of another type."""
    parts = records(data)
    for _ in range(random.randint(1, 3)):
        if not parts:
            break
        at = random.randrange(len(parts))
        number, kind, payload = parts[at]
        match random.randrange(7):
            case 0:
                del parts[at]
            case 1:
                parts[at:at] = [parts[at]] * random.choice((1, 3, 200))
            case 2:
                random.shuffle(parts)
            case 3:
                other = random.choice((0, 1, number + 1, 15, 19_000, 2**29 - 1, 2**29))
                parts[at] = (other, kind, payload)
            case 4:
                parts[at] = (number, random.choice((0, 1, 2, 3, 4, 5, 6, 7)), payload)
            case 5:
                parts[at] = (number, 0, varint(random.choice((*HUGE, 2**70))))
            case _ if kind == 2:
                size, start = _read_varint(payload, 0)
                lie = random.choice((size + 1, max(0, size - 1), *HUGE))
                parts[at] = (number, 2, varint(lie) + payload[start:])
    return b"".join(varint(number << 3 | kind) + payload for number, kind, payload in parts)


# ---------------------------------------------------------------------- protobuf, by its fields


def mutate_fields(random: Random, message: M) -> M:
    """A message that still parses, with one to three fields at values that nobody expects."""
    copy = type(message)()
    copy.CopyFrom(message)
    for _ in range(random.randint(1, 3)):
        _mutate_field(random, copy)
    return copy


def _mutate_field(random: Random, message: Message) -> None:
    field = random.choice(message.DESCRIPTOR.fields)
    if random.random() < 0.15:
        message.ClearField(field.name)
    elif field.is_repeated:
        _mutate_repeated(random, field, getattr(message, field.name))
    elif field.message_type:
        inner = getattr(message, field.name)
        inner.SetInParent()
        if inner.DESCRIPTOR.fields:
            _mutate_field(random, inner)
    else:
        setattr(message, field.name, _odd_value(random, field))


def _mutate_repeated(random: Random, field: Any, values: Any) -> None:
    kept = list(values)
    match random.randrange(4):
        case 0:
            del values[random.randint(0, len(kept)) :]
        case 1:
            values.extend(kept * random.choice((1, 2, 500 if len(kept) < 100 else 3)))
        case 2 if not field.message_type:
            value = _odd_value(random, field)
            most = 20_000 if not isinstance(value, str) else 1_000_000 // (2 * len(value) + 50)
            values.extend([value] * random.choice((1, 2, most)))
        case _ if kept and field.message_type:
            _mutate_field(random, values[random.randrange(len(kept))])
        case _ if kept:
            values[random.randrange(len(kept))] = _odd_value(random, field)


def _odd_value(random: Random, field: Any) -> Any:
    match field.cpp_type:
        case field.CPPTYPE_DOUBLE | field.CPPTYPE_FLOAT:
            return random.choice(ODD_FLOATS)
        case field.CPPTYPE_STRING if field.type == field.TYPE_BYTES:
            return random.randbytes(random.choice((0, 1, 1000)))
        case field.CPPTYPE_STRING:
            return random.choice(ODD_TEXTS)
        case field.CPPTYPE_BOOL:
            return random.random() < 0.5
        case field.CPPTYPE_ENUM:
            return random.choice((0, 1, 2, 3, 15, 2**31 - 1, -(2**31)))
        case field.CPPTYPE_UINT32:
            return random.choice((*(n for n in HUGE if n < 2**32), random.randrange(100)))
    return random.choice((*HUGE, random.randrange(100)))


def mutate_message(random: Random, message: Message) -> bytes:
    """A message as bytes, mutated in one of all ways, itself or within; one in ten as it was."""
    within = [(field, value) for field, value in message.ListFields() if _is_message(field)]
    if within and random.random() < 0.6:
        field, value = random.choice(within)
        inner = mutate_message(random, value)
        outer = type(message)()
        outer.CopyFrom(message)
        outer.ClearField(field.name)
        tag = varint(field.number << 3 | 2) + varint(len(inner))
        return outer.SerializeToString() + tag + inner
    match random.randrange(10):
        case 0:
            return message.SerializeToString()
        case 1 | 2:
            return mutate_bytes(random, message.SerializeToString())
        case 3 | 4 | 5:
            return mutate_records(random, message.SerializeToString())
    return mutate_fields(random, message).SerializeToString()


def _is_message(field: Any) -> bool:
    return bool(field.message_type) and not field.is_repeated


# ---------------------------------------------------------------------- numbers and JSON


def odd_payload(random: Random, data: bytes) -> bytes:
    """Float32 numbers of which a few are NaN, infinite, denormal or huge."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        if len(changed) >= 4:
            at = 4 * random.randrange(len(changed) // 4)
            value = random.choice((math.nan, math.inf, -math.inf, 1e-44, 3e38, -1e15, 1e14))
            changed[at : at + 4] = struct.pack("<f", value)
    return bytes(changed)


def odd_json(random: Random) -> str:
    """A JSON value, or nearly one, that few readers were tried with."""
    return random.choice(
        (
            *("null", "true", "-1", "1e999", "NaN", "-Infinity", '"', "{", "[]", "{}", "1" * 5000),
            *('"\\ud800"', '"\\u0000"', "[" * 100_000, '{"a":' * 50_000, '"' + "x" * 100_000 + '"'),
            *('{"a": 1, "a": 2}', "0x10", "1_000", "'a'", "\ufeff{}", "18446744073709551616"),
        )
    )
