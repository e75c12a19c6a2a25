"""What all tests need of the process that they run in."""

import asyncio
from collections.abc import Iterator

import grpc
import pytest
import torch

_SPARE = 32


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread for torch in this process: with tiny models others would only wait.

    Results are compared to the last bit, which depends on how many there are. Commands and servers
    that are tested here choose a number for the whole process.
    """
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def keep_grpc_up() -> Iterator[None]:
    """gRPC's asyncio side is set up with its first server or channel and torn down with its last.

    A process that starts and stops hundreds of them, as no service does, was seen to end in a
    segmentation fault in `shutdown_grpc_aio` ("assert refcount > 0") while garbage was collected.
    As long as a few channels are held there is no tearing down before the end.
    """
    loop = asyncio.new_event_loop()

    async def channels() -> list[grpc.aio.Channel]:
        return [grpc.aio.insecure_channel("127.0.0.1:1") for _ in range(_SPARE)]

    held = loop.run_until_complete(channels())
    yield
    for channel in held:
        loop.run_until_complete(channel.close())
    loop.close()
