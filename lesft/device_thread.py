"""The one thread that owns the device: whatever touches the model runs there, one job at a time."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from lesft.cpu_threads import compute_on_one_core, compute_on_this_thread

T = TypeVar("T")


class DeviceThread:
    """Runs jobs in the order they were given."""

    def __init__(self, num_threads: int = 0) -> None:
        """Jobs compute on so many cores, 0: all; the thread that makes it from now on on one."""
        compute_on_one_core()
        self._executor = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="device",
            initializer=compute_on_this_thread,
            initargs=(num_threads,),
        )

    async def run(self, job: Callable[[], T]) -> T:
        """Run a job and return its result. A job that has started always runs to its end."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, job)

    def close(self) -> None:
        """Wait for the running job and drop the rest."""
        self._executor.shutdown(wait=True, cancel_futures=True)
