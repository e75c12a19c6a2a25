"""An aggregator that weights by the server's word alone, and what it does not take for that."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from lesft.errors import HandshakeMismatch, InvalidInput, NotAllowed
from lesft.identity.attestation import KEY_PREFIX, Attester, Verifier
from lesft.v1 import aggregation_pb2 as pb
from lesft.v1.receipt_pb2 import Receipt, Statement
from lesft_aggregator.receipts import check_receipt
from lesft_aggregator.server import Aggregator
from tests.aggregator.harness import Caller, error_of, make_adapter, run_aggregator, settings_for

TRUE: dict[str, Any] = {
    "run_id": "lesft",
    "run_fingerprint": "sha256:run",
    "client_id": "a",
    "base_version": 0,
    "rounds": 3,
    "num_samples": 10,
    "samples_trained": 30,
    "run_instance": "today's",
}


def vouched(attester: Attester, **changes: Any) -> Receipt:
    return attester.receipt(Statement(**{**TRUE, **changes}))


def submission(receipt: Receipt | None, **changes: Any) -> pb.Submission:
    said = {"run_id": "lesft", "client_id": "a", "base_version": 0, "num_samples": 10}
    return pb.Submission(receipt=receipt, **{**said, **changes})


def test_a_receipt_is_the_same_each_time_and_says_what_was_signed(tmp_path: Path) -> None:
    attester = Attester(tmp_path)
    receipt = vouched(attester)
    assert receipt == vouched(Attester(tmp_path))
    assert Verifier(attester.public_key).statement(receipt) == Statement(**TRUE)
    assert attester.public_key.startswith(KEY_PREFIX)
    assert (tmp_path / "receipts.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("signed", "said", "complaint"),
    [
        ({}, {"num_samples": 1000}, "num_samples is 10 by the server's receipt, and 1000 by the"),
        ({"client_id": "b"}, {}, "client_id is 'b' by the server's receipt, and 'a' by the"),
        (
            {"base_version": 0},
            {"base_version": 1},
            "base_version is 0 by the server's receipt",
        ),
        ({"base_version": 7}, {}, "base_version is 7 by the server's receipt, and 0 by the"),
        ({"run_id": "other"}, {}, "run_id is 'other' by the server's receipt, and 'lesft' by the"),
        ({"run_fingerprint": "x"}, {}, "run_fingerprint is 'x' by the server's receipt, and"),
    ],
    ids=["inflated", "another client's", "replayed", "of the future", "another run's", "other run"],
)
def test_a_receipt_of_something_else_is_refused_by_name(
    tmp_path: Path, signed: dict[str, Any], said: dict[str, Any], complaint: str
) -> None:
    attester = Attester(tmp_path)
    verifier = Verifier(attester.public_key)
    with pytest.raises(NotAllowed, match=complaint):
        check_receipt(verifier, submission(vouched(attester, **signed), **said), "sha256:run")


def test_a_receipt_of_another_server_or_a_changed_one_is_refused(tmp_path: Path) -> None:
    attester, other = Attester(tmp_path / "ours"), Attester(tmp_path / "theirs")
    verifier = Verifier(attester.public_key)
    good = vouched(attester)
    inflated = Statement(**{**TRUE, "num_samples": 1000}).SerializeToString()
    forged = [
        vouched(other),
        Receipt(statement=inflated, signature=good.signature),
        Receipt(
            statement=good.statement,
            signature=bytes([good.signature[0] ^ 1]) + good.signature[1:],
        ),
        Receipt(statement=good.statement),
        Receipt(),
    ]
    for receipt in forged:
        with pytest.raises(NotAllowed, match="not signed by the server that this aggregator"):
            check_receipt(verifier, submission(receipt, num_samples=1000), "sha256:run")
    with pytest.raises(NotAllowed, match="receipt: missing"):
        check_receipt(verifier, submission(None), "sha256:run")
    check_receipt(verifier, submission(good), "sha256:run")


@pytest.mark.parametrize("text", ["x", KEY_PREFIX, f"{KEY_PREFIX}AA", "A" * 43, "lesft-key-\u00e9"])
def test_what_is_no_public_key_is_refused_at_the_start(tmp_path: Path, text: str) -> None:
    async def start() -> None:
        Aggregator(settings_for(tmp_path, server_key=text))

    with pytest.raises(InvalidInput, match="--server-key is what lesft-server key prints"):
        asyncio.run(start())


def test_only_what_the_server_vouches_for_is_averaged_and_after_a_restart_too(
    tmp_path: Path,
) -> None:
    attester = Attester(tmp_path / "server")
    settings = settings_for(tmp_path / "aggregator", server_key=attester.public_key)

    async def first(aggregator: Aggregator, caller: Caller, addresses: Any) -> None:
        # Who comes first with something made up locks nobody out.
        await caller.join("b", run_fingerprint="sha256:made up")
        await caller.join("a", run_fingerprint="sha256:run")
        receipt = vouched(attester)
        refused: Callable[[Awaitable[Any]], Awaitable[Any]] = error_of
        without = await refused(caller.submit("a"))
        inflated = await refused(caller.submit("a", num_samples=1000, receipt=receipt))
        foreign = await refused(caller.submit("b", receipt=receipt))
        assert {type(error) for error in (without, inflated, foreign)} == {NotAllowed}
        assert (await caller.submit("a", receipt=receipt)).received == 1

    async def second(aggregator: Aggregator, caller: Caller, addresses: Any) -> None:
        await caller.submit(
            "b",
            make_adapter(1),
            num_samples=30,
            receipt=vouched(attester, client_id="b", num_samples=30),
        )
        header, _ = await caller.fetch(1)
        assert (header.client_ids, header.num_samples) == (["a", "b"], 40)
        again = await error_of(
            caller.submit("a", base_version=1, receipt=vouched(attester))  # the one of version 0
        )
        assert isinstance(again, NotAllowed)
        # A client that is started again joins again; one of another run does not.
        await caller.join("a", run_fingerprint="sha256:run")
        stranger = await error_of(caller.join("a", run_fingerprint="sha256:other"))
        assert isinstance(stranger, HandshakeMismatch)

    run_aggregator(settings, first)
    run_aggregator(settings, second)


def test_a_receipt_of_an_earlier_run_of_the_same_settings_is_refused(tmp_path: Path) -> None:
    attester = Attester(tmp_path / "server")
    settings = settings_for(tmp_path / "aggregator", server_key=attester.public_key)
    old = vouched(attester, client_id="b", num_samples=9000, run_instance="last year's")

    async def first(aggregator: Aggregator, caller: Caller, addresses: Any) -> None:
        assert (await caller.submit("a", receipt=vouched(attester))).received == 1
        await still_refused(aggregator, caller, addresses)

    async def still_refused(aggregator: Aggregator, caller: Caller, addresses: Any) -> None:
        error = await error_of(caller.submit("b", num_samples=9000, receipt=old))
        assert isinstance(error, NotAllowed)
        assert "run_instance is \"last year's\" by the server's receipt" in str(error)

    run_aggregator(settings, first)
    run_aggregator(settings, still_refused)


def test_a_receipt_that_is_refused_shuts_nobody_out(tmp_path: Path) -> None:
    """Genuine, of another run of the same server, and the first that the aggregator sees."""
    attester = Attester(tmp_path / "server")
    settings = settings_for(tmp_path / "aggregator", server_key=attester.public_key)
    other = {"run_id": "last-year", "base_version": 7}
    receipt = vouched(attester, client_id="b", run_fingerprint="sha256:other", **other)

    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Any) -> None:
        error = await error_of(caller.submit("b", receipt=receipt, **other))
        assert isinstance(error, HandshakeMismatch)
        await caller.join("a", run_fingerprint="sha256:run")
        assert (await caller.submit("a", receipt=vouched(attester))).received == 1

    run_aggregator(settings, scenario)
