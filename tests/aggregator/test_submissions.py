"""Submissions whose bytes are not what they must be: each is refused and changes nothing."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from lesft.bundle import CHUNK_BYTES, bundle_chunks, bundle_info
from lesft.errors import BundleError, LesftError, OutOfOrder, TooLarge
from lesft.v1 import aggregation_pb2 as pb
from lesft.v1.tensor_pb2 import BundleInfo, Chunk
from lesft_aggregator.server import Aggregator
from tests.aggregator.harness import (
    NAME,
    Caller,
    error_of,
    make_adapter,
    make_tensors,
    run_aggregator,
    settings_for,
)

Addresses = Mapping[str, str]


def state_of(state: Path) -> dict[str, bytes]:
    """Every file that is left, but for the database's own journal."""
    found = sorted((state / "submissions").iterdir()) + sorted((state / "adapters").iterdir())
    return {path.name: path.read_bytes() for path in found}


def refuse(
    state: Path,
    kind: type[LesftError],
    message: str,
    data: bytes,
    chunks: Sequence[Chunk] | None = None,
    bundle: BundleInfo | None = None,
    first: bytes | None = None,
) -> None:
    """Client b's submission is refused, nothing has changed, and b's good one counts after it.

    With `first`, client a's submission of that comes before.
    """

    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        if first is not None:
            await caller.submit("a", first)
        before = state_of(state)
        error = await error_of(caller.submit("b", data, bundle=bundle, chunks=chunks))
        assert type(error) is kind
        assert message in str(error)
        assert state_of(state) == before
        # Had the refused one left a name, a slot or a layout behind, this would fail or differ.
        await caller.submit("b", make_adapter(2))
        await caller.submit("a", first or make_adapter(1))
        header, tensors = await caller.fetch(1)
        assert list(header.client_ids) == ["a", "b"]
        dense = (make_tensors(1)[NAME].astype(np.float64) + make_tensors(2)[NAME]) / 2
        assert np.array_equal(tensors[NAME], dense.astype(np.float32))

    run_aggregator(settings_for(state, max_submission_mib=4), scenario)


def with_values(name: str = NAME, **changes: Any) -> bytes:
    """A small adapter with one tensor changed: `value` at one place, or `dtype`, or `shape`."""
    tensors: dict[str, Any] = dict(make_tensors(3))
    if "value" in changes:
        tensors[name][1, 1] = changes["value"]
    tensors[name] = tensors[name].astype(changes.get("dtype", np.float32))
    tensors[name] = tensors[name].reshape(changes.get("shape", tensors[name].shape))
    return save(tensors)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, f"tensor '{NAME}' has values that are NaN or infinite"),
        (np.inf, f"tensor '{NAME}' has values that are NaN or infinite"),
        (-np.inf, f"tensor '{NAME}' has values that are NaN or infinite"),
    ],
)
def test_values_that_are_not_finite_are_refused(value: float, message: str, tmp_path: Path) -> None:
    refuse(tmp_path, BundleError, message, with_values(value=value))


@pytest.mark.parametrize(
    ("dtype", "found"), [(np.float64, "F64"), (np.float16, "F16"), (np.int32, "I32")]
)
def test_other_dtypes_than_float32_are_refused(dtype: Any, found: str, tmp_path: Path) -> None:
    message = f"tensor '{NAME}' must be float32 (F32), got {found}"
    refuse(tmp_path, BundleError, message, with_values(dtype=dtype))


def renamed() -> bytes:
    tensors = make_tensors(3)
    tensors["model.layers.1.mlp.gate_proj.lora_A.weight"] = tensors.pop(NAME)
    return save(tensors)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (renamed(), f"tensor '{NAME}' is missing"),
        (save(make_tensors(3) | {"z": np.ones(1, np.float32)}), "tensor 'z' is unknown"),
        (with_values(shape=(5, 2)), f"tensor '{NAME}' must have shape [2, 5], got [5, 2]"),
    ],
)
def test_names_and_shapes_must_be_those_of_the_first_accepted_adapter(
    data: bytes, message: str, tmp_path: Path
) -> None:
    refuse(tmp_path, BundleError, message, data, first=make_adapter(1))


def safetensors_of(header: Mapping[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


LIES = {
    "no safetensors": b"\xff" * 64,
    "longer header than bytes": struct.pack("<Q", 1 << 40) + b"{}",
    "more elements than bytes": safetensors_of({"x": entry([2], 0, 4)}, bytes(4)),
    "elements that overflow": safetensors_of({"x": entry([2**40, 2**40], 0, 4)}, bytes(4)),
    "bytes of no tensor": safetensors_of({"x": entry([1], 0, 4)}, bytes(12)),
    "a gap": safetensors_of({"x": entry([1], 4, 8)}, bytes(8)),
    "an overlap": safetensors_of({"x": entry([1], 0, 4), "y": entry([1], 0, 4)}, bytes(4)),
    "past the end": safetensors_of({"x": entry([4], 0, 16)}, bytes(4)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_header_that_lies_is_refused(lie: str, tmp_path: Path) -> None:
    refuse(tmp_path, BundleError, "adapter is no safetensors byte string", LIES[lie])


def test_an_adapter_without_tensors_or_elements_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "a", BundleError, "adapter holds no tensors", safetensors_of({}, b""))
    empty = safetensors_of({"x": entry([0, 7], 0, 0)}, b"")
    refuse(tmp_path / "b", BundleError, "tensor 'x' has no elements: its shape is [0, 7]", empty)


def test_names_from_the_wire_are_cut_short_in_messages(tmp_path: Path) -> None:
    data = save({"n" * 100_000: np.ones(2, np.float64)})
    refuse(tmp_path, BundleError, "n... must be float32", data)


LARGE = save({"x": np.arange(CHUNK_BYTES // 4 + 5, dtype=np.float32)})
PIECES = list(bundle_chunks(LARGE))


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "bundle ended after 0 of"),
        (PIECES[:1], "chunk 1 is missing"),
        (PIECES[1:], "chunk 0 expected, got chunk 1"),
        (PIECES[::-1], "chunk 0 expected, got chunk 1"),
        ([PIECES[0], PIECES[0]], "chunk 1 expected, got chunk 0"),
        ([*PIECES, PIECES[1]], "after the bundle's last one"),
        ([PIECES[0], Chunk(index=1, data=PIECES[1].data + b"x")], "chunk 1 must have"),
        ([Chunk(index=0, data=PIECES[0].data[:-1])], "chunk 0 must have 1048576 bytes, got 104857"),
        ([PIECES[0], Chunk(index=1, data=bytes(len(PIECES[1].data)))], "damaged on the way"),
    ],
    ids=["none", "missing", "gap", "reordered", "repeated", "extra", "long", "short", "damaged"],
)
def test_chunks_must_come_in_order_whole_and_once(
    chunks: Sequence[Chunk], message: str, tmp_path: Path
) -> None:
    refuse(tmp_path, BundleError, message, LARGE, chunks=chunks)


@pytest.mark.parametrize("total_bytes", [(4 << 20) + 1, 2**64 - 1])
def test_a_submission_over_the_limit_is_refused_before_its_chunks(
    total_bytes: int, tmp_path: Path
) -> None:
    message = f"adapter of {total_bytes} bytes announced, but at most 4194304 are accepted"
    refuse(tmp_path, TooLarge, message, b"", [], BundleInfo(total_bytes=total_bytes))


def test_a_submission_opens_with_its_header_and_goes_on_with_chunks_only(tmp_path: Path) -> None:
    data = make_adapter(1)
    header = pb.SubmitRequest(
        submission=pb.Submission(
            client_id="a", run_id="lesft", num_samples=1, bundle=bundle_info(data)
        )
    )
    chunk = pb.SubmitRequest(chunk=Chunk(index=0, data=data))

    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        for requests in ([], [chunk], [pb.SubmitRequest()]):
            error = await error_of(caller.stub.Submit(iter(requests)))
            assert type(error) is OutOfOrder
            assert "first message must be its header" in str(error)
        error = await error_of(caller.stub.Submit(iter([header, header])))
        assert type(error) is OutOfOrder
        assert "after the submission only chunks may follow" in str(error)
        assert (await caller.stub.Submit(iter([header, chunk]))).received == 1

    run_aggregator(settings_for(tmp_path), scenario)
