"""The aggregator's REST API over a real socket."""

import asyncio
import hashlib
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load

from lesft.spec import PROTOCOL_VERSION
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


def check(state: Path, expect: Any, **settings: Any) -> None:
    """Runs `expect(client, caller)` where a published and b has submitted for the next round."""

    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        await caller.submit("a", make_adapter(1), num_samples=10)
        await caller.submit("b", make_adapter(1), num_samples=30)
        await caller.fetch(1)
        await caller.submit("b", make_adapter(2), base_version=1, num_samples=31)
        async with httpx.AsyncClient(base_url=f"http://{addresses['control']}") as client:
            await expect(client, caller)

    run_aggregator(settings_for(state, **settings), scenario)


def test_run_clients_and_rounds_say_where_things_stand(tmp_path: Path) -> None:
    async def expect(client: httpx.AsyncClient, caller: Caller) -> None:
        assert (await client.get("/v1/run")).json() == {
            "run_id": "lesft",
            "protocol_version": PROTOCOL_VERSION,
            "clients": 2,
            "quorum": 2,
            "deadline_seconds": 0.0,
            "version": 1,
            "waiting_for": "the adapters of a",
            "ended": "",
        }
        clients = (await client.get("/v1/clients")).json()
        ages = [
            datetime.now(timezone.utc)
            - datetime.fromisoformat(row.pop("joined").replace("Z", "+00:00"))
            for row in clients
        ]
        assert all(0 <= age.total_seconds() < 60 for age in ages)
        assert clients == [
            {"client_id": "a", "num_samples": 10, "last_base_version": 0},
            {"client_id": "b", "num_samples": 31, "last_base_version": 1},
        ]
        assert (await client.get("/v1/rounds")).json() == [
            {
                "version": 1,
                "state": "published",
                "client_ids": ["a", "b"],
                "missing": [],
                "deadline": None,
            },
            {
                "version": 2,
                "state": "open",
                "client_ids": ["b"],
                "missing": ["a"],
                "deadline": None,
            },
        ]

    check(tmp_path, expect)


def test_an_adapter_is_described_and_can_be_downloaded(tmp_path: Path) -> None:
    async def expect(client: httpx.AsyncClient, caller: Caller) -> None:
        data = (await client.get("/v1/adapters/1/file")).content
        assert np.array_equal(load(data)[NAME], make_tensors(1)[NAME])
        adapter = (await client.get("/v1/adapters/1")).json()
        created = datetime.fromisoformat(adapter.pop("created").replace("Z", "+00:00"))
        assert 0 <= (datetime.now(timezone.utc) - created).total_seconds() < 60
        assert adapter == {
            "version": 1,
            "client_ids": ["a", "b"],
            "num_samples": 40,
            "num_bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }

    check(tmp_path, expect)


@pytest.mark.parametrize(
    ("path", "status", "error", "message"),
    [
        ("/v1/adapters/2", 404, "NotFound", "version 2 is not published: the newest is 1"),
        ("/v1/adapters/2/file", 404, "NotFound", "version 2 is not published: the newest is 1"),
        ("/v1/adapters/x", 422, "InvalidInput", "version: Input should be a valid integer"),
        ("/v1/adapters/0", 422, "InvalidInput", "version: Input should be greater than or equal"),
        (f"/v1/adapters/{2**70}", 422, "InvalidInput", "version: Input should be less than"),
        ("/v1/nothing", 404, "NotFound", "GET /v1/nothing: Not Found"),
        ("/v2/run", 404, "NotFound", "GET /v2/run: Not Found"),
        ("/docs", 404, "NotFound", "GET /docs: Not Found"),
    ],
)
def test_what_does_not_exist_gets_its_status_and_says_why(
    path: str, status: int, error: str, message: str, tmp_path: Path
) -> None:
    async def expect(client: httpx.AsyncClient, caller: Caller) -> None:
        response = await client.get(path)
        assert response.status_code == status
        body = response.json()
        assert body.keys() == {"error", "message"}
        assert body["error"] == error
        assert message in body["message"]

    check(tmp_path, expect)


def test_metrics_count_what_came_and_went(tmp_path: Path) -> None:
    async def expect(client: httpx.AsyncClient, caller: Caller) -> None:
        await caller.submit("b", make_adapter(2), base_version=1, num_samples=31)
        await error_of(caller.submit("b", make_adapter(3), base_version=1))
        await error_of(caller.submit("b", run_id="other"))
        text = (await client.get("/metrics")).text
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        sizes = len(make_adapter(1))
        prefix = "lesft_aggregator_"
        assert float(values[prefix + "version"]) == 1
        assert float(values[prefix + 'submissions_total{result="accepted"}']) == 3
        assert float(values[prefix + 'submissions_total{result="repeated"}']) == 1
        assert float(values[prefix + 'submissions_total{result="OutOfOrder"}']) == 1
        assert float(values[prefix + 'submissions_total{result="HandshakeMismatch"}']) == 1
        # The first of a client that has not joined is nobody's yet; strangers stay so.
        received = prefix + "received_bytes_total"
        assert float(values[received + '{client=""}']) == 2 * sizes
        assert float(values[received + '{client="b"}']) == 3 * sizes
        assert float(values[prefix + 'sent_bytes_total{client="a"}']) == sizes
        assert float(values[prefix + "averaging_seconds_count"]) == 1
        assert float(values[prefix + "averaging_seconds_sum"]) > 0

    check(tmp_path, expect)


def test_it_is_ready_until_it_stops_and_healthy_as_long_as_it_lives(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        async with httpx.AsyncClient(base_url=f"http://{addresses['control']}") as client:
            assert (await client.get("/readyz")).status_code == 200
            await aggregator.rounds.stop("the aggregator is stopping")
            response = await client.get("/readyz")
            assert (response.status_code, response.text) == (503, "the aggregator is stopping\n")
            assert (await client.get("/healthz")).status_code == 200

    run_aggregator(settings_for(tmp_path), scenario)


def test_the_api_describes_itself_with_the_bodies_it_sends(tmp_path: Path) -> None:
    async def expect(client: httpx.AsyncClient, caller: Caller) -> None:
        api = (await client.get("/openapi.json")).json()
        assert {"/v1/run", "/v1/clients", "/v1/rounds", "/v1/adapters/{version}"} <= set(
            api["paths"]
        )
        responses = api["paths"]["/v1/adapters/{version}"]["get"]["responses"]
        schemas = {
            status: body["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
            for status, body in responses.items()
        }
        assert schemas == {"200": "AdapterView", "404": "ErrorBody", "422": "ErrorBody"}
        described = set(api["components"]["schemas"]["AdapterView"]["properties"])
        assert described == set((await client.get("/v1/adapters/1")).json())

    check(tmp_path, expect)


def test_two_aggregators_in_one_process_count_apart(tmp_path: Path) -> None:
    async def run() -> None:
        both = [Aggregator(settings_for(tmp_path / name)) for name in "ab"]
        try:
            endpoints = [await aggregator.start() for aggregator in both]
            assert len({found[kind] for found in endpoints for kind in ("grpc", "control")}) == 4
        finally:
            for aggregator in both:
                await aggregator.stop("the aggregator is stopping")

    asyncio.run(run())
