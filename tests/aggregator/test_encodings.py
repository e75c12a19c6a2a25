"""Adapters that travel as changes: one average for all, however each client gets it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load, load_file, save

from lesft.adapter_codec import FloatArray, checksum, decode, encode
from lesft.errors import BundleError, HandshakeMismatch, InvalidInput, LesftError, OutOfOrder
from lesft.spec import AdapterEncoding
from lesft.spec_messages import adapter_encoding_to_message
from lesft.v1 import tensor_pb2
from lesft_aggregator.server import Aggregator
from tests.aggregator.harness import (
    Caller,
    error_of,
    make_adapter,
    make_tensors,
    run_aggregator,
    settings_for,
)

Addresses = Mapping[str, str]
Tensors = dict[str, FloatArray]
ENOUGH = 1 << 20


def trained(base: Tensors, seed: int) -> Tensors:
    change = make_tensors(seed)
    return {name: base[name] + np.float32(1e-3) * change[name] for name in base}


def mean(one: Tensors, other: Tensors) -> Tensors:
    """Of clients with as many samples."""
    return {n: ((one[n].astype(np.float64) + other[n]) / 2).astype(np.float32) for n in one}


async def submit(
    caller: Caller,
    name: str,
    state: Tensors,
    encoding: AdapterEncoding,
    version: int,
    base: Tensors,
) -> Tensors:
    """Hand in; returns what the aggregator makes of it."""
    data = encode(state, encoding, base)
    number = adapter_encoding_to_message(encoding)
    await caller.submit(
        name, data, base_version=version, encoding=number, base_crc32=checksum(base)
    )
    return decode(data, encoding, base, ENOUGH)


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_all_have_the_same_versions_whole_or_from_changes(
    encoding: AdapterEncoding, tmp_path: Path
) -> None:
    held: Tensors = {}

    async def first(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        held.clear()
        for version in range(2):
            begun = held or make_tensors(0)
            sent = [
                await submit(caller, name, trained(begun, seed), encoding, version, held)
                for name, seed in (("a", 1), ("b", 2))
            ]
            header, bundle = await caller.fetch_bundle(
                version + 1, held_version=version, held_crc32=checksum(held)
            )
            assert header.encoding == adapter_encoding_to_message(encoding)
            now = decode(bundle, encoding, held, ENOUGH)
            # It is what the encoding makes of the mean of what it made of the submissions.
            average = mean(*sent)
            assert equal(now, decode(encode(average, encoding, held), encoding, held, ENOUGH))
            assert not equal(now, average)
            held.clear()
            held.update(now)

    run_aggregator(settings_for(tmp_path), first)

    async def after_a_restart(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        base = load_file(tmp_path / "adapters" / "00001.safetensors")
        # Of no use to a change from version 1 to version 2: others, and another run's.
        for version, crc32 in ((0, 0), (2, checksum(held)), (7, 1), (1, checksum(base) ^ 1)):
            header, tensors = await caller.fetch(2, held_version=version, held_crc32=crc32)
            assert header.encoding == tensor_pb2.ADAPTER_ENCODING_RAW
            assert equal(tensors, held)
        _, bundle = await caller.fetch_bundle(2, held_version=1, held_crc32=checksum(base))
        assert equal(decode(bundle, encoding, base, ENOUGH), held)
        async with httpx.AsyncClient(base_url=f"http://{addresses['control']}") as client:
            file = await client.get("/v1/adapters/2/file")
        assert equal(load(file.content), held)

    run_aggregator(settings_for(tmp_path), after_a_restart)


def test_an_open_round_is_averaged_in_its_encoding_after_a_restart(tmp_path: Path) -> None:
    state = make_tensors(1)

    async def begun(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await submit(caller, "a", state, "int8", 0, {})

    async def ended(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        sent = await submit(caller, "b", state, "int8", 0, {})
        header, bundle = await caller.fetch_bundle(1, held_version=0)
        assert header.encoding == tensor_pb2.ADAPTER_ENCODING_INT8
        average = decode(bundle, "int8", {}, ENOUGH)
        for name, values in sent.items():  # equal but for rounding to the same codes again
            assert np.abs(average[name] - values).max() < 1e-6

    run_aggregator(settings_for(tmp_path), begun)
    run_aggregator(settings_for(tmp_path), ended)


def test_of_submissions_in_several_encodings_the_average_travels_whole(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        sent = await submit(caller, "a", make_tensors(1), "int8", 0, {})
        await caller.submit("b", save(make_tensors(2)))
        header, tensors = await caller.fetch(1, held_version=0)
        assert header.encoding == tensor_pb2.ADAPTER_ENCODING_RAW
        assert equal(tensors, mean(sent, make_tensors(2)))

    run_aggregator(settings_for(tmp_path), scenario)


def test_the_same_submission_gets_its_answer_again_and_another_one_is_a_fork(
    tmp_path: Path,
) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        for _ in range(2):
            await submit(caller, "a", make_tensors(1), "int8", 0, {})
        with_other_bytes = caller.submit("a", save(make_tensors(1)))
        assert type(await error_of(with_other_bytes)) is OutOfOrder

    run_aggregator(settings_for(tmp_path), scenario)


def test_a_change_to_another_runs_version_is_refused(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await submit(caller, "a", make_tensors(1), "int8", 0, {})
        await caller.fetch_bundle(1)
        other = make_tensors(5)
        error = await error_of(submit(caller, "a", trained(other, 2), "int8", 1, other))
        assert type(error) is HandshakeMismatch
        assert f"'a' has {checksum(other):08x}: it is of another run of that name" in str(error)

    run_aggregator(settings_for(tmp_path, clients=1), scenario)


def test_an_average_that_its_encoding_does_not_keep_finite_travels_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(adapter: Tensors, encoding: AdapterEncoding, base: Tensors) -> bytes:
        return with_infinities()

    monkeypatch.setattr("lesft_aggregator.rounds.encode", overflowing)

    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        sent = await submit(caller, "a", make_tensors(1), "int8", 0, {})
        header, tensors = await caller.fetch(1)
        assert header.encoding == tensor_pb2.ADAPTER_ENCODING_RAW
        assert equal(tensors, sent)

    run_aggregator(settings_for(tmp_path, clients=1), scenario)


def with_infinities() -> bytes:
    tensors = load(encode(make_tensors(1), "int8", {}))
    tensors["scales"] = np.full_like(tensors["scales"], 3e38)
    return save(tensors)


REFUSED: list[tuple[bytes, dict[str, Any], type[LesftError], str]] = [
    (make_adapter(1), {"encoding": 2}, BundleError, "must hold codes (U8), layout (U8), scales"),
    (encode(make_tensors(1), "int8", {}), {}, BundleError, "must be float32 (F32), got U8"),
    (save({"x": np.ones((1,) * 9, np.float32)}), {}, BundleError, "'x' may have 8 dimensions"),
    (with_infinities(), {"encoding": 2}, BundleError, "NaN or infinite"),
    (make_adapter(1), {"encoding": 77}, InvalidInput, "raw or int8 or int4, got number 77"),
]


@pytest.mark.parametrize(("data", "changes", "kind", "said"), REFUSED)
def test_what_is_not_in_the_encoding_that_it_names_is_refused(
    data: bytes, changes: dict[str, Any], kind: type[LesftError], said: str, tmp_path: Path
) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        error = await error_of(caller.submit("a", data, **changes))
        assert type(error) is kind
        assert said in str(error)
        assert list((tmp_path / "submissions").iterdir()) == []
        await submit(caller, "a", make_tensors(1), "int8", 0, {})

    run_aggregator(settings_for(tmp_path), scenario)


def test_a_layout_other_than_the_runs_is_refused(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await submit(caller, "a", make_tensors(1), "int8", 0, {})
        other = {"x": np.ones((2, 2), np.float32)}
        error = await error_of(submit(caller, "b", other, "int8", 0, {}))
        assert type(error) is BundleError
        assert "is missing; the run's first accepted adapter" in str(error)

    run_aggregator(settings_for(tmp_path), scenario)
