"""The one thread that owns the device: whatever touches the model runs there, one job at a time."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class DeviceThread:
    """Runs jobs in the order they were given."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")

    async def run(self, job: Callable[[], T]) -> T:
        """Run a job and return its result. A job that has started always runs to its end."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, job)

    def close(self) -> None:
        """Wait for the running job and drop the rest."""
        self._executor.shutdown(wait=True, cancel_futures=True)
