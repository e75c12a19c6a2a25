"""Safetensors byte strings that lie: in their header, its length, or the numbers after it."""

import json
from random import Random
from typing import Any

from tests.hostile.mutate import HUGE, mutate_bytes, odd_json, odd_payload

ODD_DTYPES = (
    *("F32", "F64", "F16", "BF16", "I32", "I64", "U64", "BOOL", "F8_E4M3", "F4", "C64"),
    *("", "f32", "F33", None, 7, [], "F32\x00", "x" * 10_000),
)
ODD_NUMBERS = (*HUGE, -1, -(2**63), 2**64, 2**200, 1.5, 1e300, None, "0", [], True)


def lying_safetensors(random: Random, data: bytes) -> bytes:
    """A mutation of valid safetensors bytes; some are unchanged."""
    size = int.from_bytes(data[:8], "little")
    header, payload = json.loads(data[8 : 8 + size]), data[8 + size :]
    match random.randrange(16):
        case 0 | 15 | 14 | 13:
            return data
        case 1:
            return mutate_bytes(random, data)
        case 2:
            lie = random.choice((*HUGE[:8], 2**64 - 1, size - 1, size + 1, len(data), 100_000_001))
            return lie.to_bytes(8, "little") + data[8:]
        case 3:
            return assemble(data[8 : 8 + size], odd_payload(random, payload))
        case 4:
            return assemble(_raw_header(random, data[8 : 8 + size]), payload)
        case 5:
            return assemble(data[8 : 8 + size], payload[: random.randint(0, len(payload))])
        case 6:
            return assemble(data[8 : 8 + size], payload + bytes(random.choice((1, 8, 4096))))
    for _ in range(random.randint(1, 2)):
        _change_entry(random, header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return assemble(text, payload)


def assemble(header: bytes, payload: bytes) -> bytes:
    """Header and payload with the header's true length before them."""
    return len(header).to_bytes(8, "little") + header + payload


def many_tensors(number: int) -> bytes:
    """A header of as many empty tensors: little to send, much to hold."""
    entries = ",".join(
        f'"{n:x}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(number)
    )
    return assemble(f"{{{entries}}}".encode(), b"")


def _raw_header(random: Random, text: bytes) -> bytes:
    match random.randrange(6):
        case 0:
            return odd_json(random).encode("utf-8", "surrogatepass")
        case 1:  # names that are there twice
            return text[:-1] + b"," + text[1:-1] + b"}"
        case 2:
            return text.replace(b'"', b'"\xff\xfe', 1)
        case 3:
            return b"\xef\xbb\xbf" + text
        case 4:
            return text + b" " * random.choice((1, 8, 100_000))
    return mutate_bytes(random, text)


def _change_entry(random: Random, header: dict[str, Any]) -> None:
    if not header:
        header["a"] = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    name = random.choice(list(header))
    entry = header[name]
    if not isinstance(entry, dict):
        del header[name]
        return
    match random.randrange(8):
        case 0:
            entry["data_offsets"] = [random.choice(ODD_NUMBERS) for _ in range(2)]
        case 1 if isinstance(entry.get("data_offsets"), list) and entry["data_offsets"]:
            which = random.randrange(len(entry["data_offsets"]))
            entry["data_offsets"][which] = random.choice((*ODD_NUMBERS, 4, 8))
        case 2:
            entry["shape"] = [random.choice(ODD_NUMBERS) for _ in range(random.choice((0, 1, 2)))]
        case 3:
            entry["shape"] = [*entry.get("shape", []), *[random.choice((0, 1, 2))] * 3]
        case 4:
            entry["dtype"] = random.choice(ODD_DTYPES)
        case 5:
            header[random.choice(("", "\x00", "base", "__metadata__", "é", "\ud800"))] = entry
        case 6:
            header["__metadata__"] = random.choice(({"a": "b"}, {"a": 1}, [], "x", None))
        case _:
            del header[name]
