"""The server's command in this process: it may begin anew while a test looks on."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lesft.spec import PROTOCOL_VERSION, RunSpec
from lesft.spec_messages import spec_from_message
from lesft.v1 import model_pb2, model_pb2_grpc
from lesft_server.server import serve_until
from lesft_server.settings import ServerSettings
from tests.server.harness import raw_channel


@contextmanager
def serving(settings: ServerSettings) -> Iterator[str]:
    """The command's own loop, on a thread; gives the address of gRPC."""
    loop, stopping = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(serve_until(stopping, settings))
    )
    endpoints = settings.state / "endpoints.json"
    endpoints.unlink(missing_ok=True)
    thread.start()
    try:
        while not endpoints.exists():
            assert thread.is_alive()
            time.sleep(0.05)
        yield json.loads(endpoints.read_text())["grpc"]
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(30)
        loop.close()


def spec_at(address: str) -> RunSpec:
    with raw_channel(address) as channel:
        stub = model_pb2_grpc.ModelServiceStub(channel)
        request = model_pb2.DescribeRunRequest(protocol_version=PROTOCOL_VERSION)
        return spec_from_message(stub.DescribeRun(request, wait_for_ready=True, timeout=20).spec)
