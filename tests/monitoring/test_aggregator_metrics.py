"""The aggregator's metrics over its rounds."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx

from lesft.v1 import aggregation_pb2 as pb
from lesft.v1.tensor_pb2 import BundleInfo
from lesft_aggregator.server import Aggregator
from tests.aggregator.harness import (
    Caller,
    error_of,
    make_adapter,
    run_aggregator,
    settings_for,
)
from tests.monitoring.scraped import Scraped, parse

Addresses = Mapping[str, str]
PREFIX = "lesft_aggregator_"


async def scraped_from(addresses: Addresses) -> Scraped:
    async with httpx.AsyncClient() as client:
        return parse((await client.get(f"http://{addresses['control']}/metrics")).text)


def database_bytes(state: Path) -> int:
    return sum(file.stat().st_size for file in state.glob("aggregator.sqlite*"))


def test_the_open_round_and_what_was_published(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        before = await scraped_from(addresses)
        assert before.value(PREFIX + "run_info", run_id="lesft") == 1
        assert before.value(PREFIX + "clients") == 0
        assert before.value(PREFIX + "clients_expected") == 2
        assert before.value(PREFIX + "clients_required") == 1
        assert before.value(PREFIX + "deadline_seconds") == 600
        assert before.value(PREFIX + "open_round_seconds") == 0
        assert before.value(PREFIX + "version") == 0
        assert (PREFIX + "publish_age_seconds", frozenset()) not in before.samples

        await caller.join("a")
        await caller.join("b")
        start = time.time()
        await caller.submit("a", make_adapter(1))
        await asyncio.sleep(0.2)
        during = await scraped_from(addresses)
        assert during.value(PREFIX + "clients") == 2
        assert during.value(PREFIX + "clients_submitted") == 1
        assert 0.2 <= during.value(PREFIX + "open_round_seconds") <= time.time() - start
        assert during.value(PREFIX + "submission_bytes") == len(make_adapter(1))
        assert during.value(PREFIX + "adapter_bytes") == 0

        await caller.submit("b", make_adapter(2))
        await caller.fetch(1, "b")
        after = await scraped_from(addresses)
        assert after.value(PREFIX + "version") == 1
        assert after.value(PREFIX + "clients_submitted") == 0
        assert after.value(PREFIX + "open_round_seconds") == 0
        assert 0 <= after.value(PREFIX + "publish_age_seconds") <= time.time() - start
        assert after.value(PREFIX + "submission_bytes") == 0
        assert after.value(PREFIX + "adapter_bytes") == len(make_adapter(1))
        assert after.value(PREFIX + "database_bytes") == database_bytes(tmp_path)
        received = after.series(PREFIX + "received_bytes_total", "client")
        assert received == {"a": len(make_adapter(1)), "b": len(make_adapter(2))}
        assert after.series(PREFIX + "sent_bytes_total", "client") == {"b": len(make_adapter(1))}
        assert after.value("process_resident_memory_bytes") > 10e6

    settings = settings_for(tmp_path, deadline_seconds=600, quorum=1)
    run_aggregator(settings, scenario)


def test_strangers_are_counted_and_make_no_labels(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        for name in ("stranger-1", "stranger-2"):
            await error_of(caller.submit(name, b"not an adapter"))
        await error_of(caller.join("stranger-3", run_id="stranger-4"))
        async with httpx.AsyncClient() as client:
            await client.get(f"http://{addresses['control']}/stranger-5")
        scraped = await scraped_from(addresses)
        assert "stranger" not in scraped.text
        received = scraped.series(PREFIX + "received_bytes_total", "client")
        assert received == {"": 2 * len(b"not an adapter")}
        method = "lesft.v1.AggregationService/"
        refusals = PREFIX + "refusals_total"
        assert scraped.value(refusals, method=method + "Submit", error="BundleError") == 2
        assert scraped.value(refusals, method=method + "Join", error="HandshakeMismatch") == 1
        assert scraped.series(PREFIX + "http_refusals_total", "status") == {"404": 1}

    run_aggregator(settings_for(tmp_path), scenario)


def test_what_is_being_received_is_shown_with_its_limit(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        async def shows(used: int, waiting: int) -> None:
            while True:
                scraped = await scraped_from(addresses)
                assert scraped.value(PREFIX + "receiving_limit_bytes") == 1 << 20
                names = ("receiving_bytes", "receiving_waiting")
                if [scraped.value(PREFIX + name) for name in names] == [used, waiting]:
                    return
                await asyncio.sleep(0.01)

        async def announce(client_id: str) -> AsyncIterator[pb.SubmitRequest]:
            bundle = BundleInfo(total_bytes=1 << 20)
            header = pb.Submission(
                client_id=client_id, run_id="lesft", num_samples=1, bundle=bundle
            )
            yield pb.SubmitRequest(submission=header)
            await asyncio.sleep(60)

        await shows(used=0, waiting=0)
        first = caller.stub.Submit(announce("a"))
        await shows(used=1 << 20, waiting=0)
        second = caller.stub.Submit(announce("b"))
        await shows(used=1 << 20, waiting=1)
        first.cancel()
        await shows(used=1 << 20, waiting=0)
        second.cancel()
        await shows(used=0, waiting=0)

    run_aggregator(settings_for(tmp_path, max_submission_mib=1), scenario)


def test_a_full_disk_is_shown(tmp_path: Path) -> None:
    async def scenario(aggregator: Aggregator, caller: Caller, addresses: Addresses) -> None:
        assert (await scraped_from(addresses)).value(PREFIX + "disk_wait") == 0
        aggregator.rounds.obstacle = "no room on disk"
        assert (await scraped_from(addresses)).value(PREFIX + "disk_wait") == 1
        aggregator.rounds.obstacle = ""

    run_aggregator(settings_for(tmp_path), scenario)
