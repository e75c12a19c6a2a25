"""One thread of a process computes on many cores, all others on one."""

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lesft.cpu_threads import compute_on_this_thread
from lesft.device_thread import DeviceThread

OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def test_jobs_compute_on_as_many_cores_as_asked_and_all_other_threads_on_one() -> None:
    async def numbers() -> list[int]:
        device = DeviceThread(3)
        try:
            return [
                await device.run(torch.get_num_threads),
                torch.get_num_threads(),
                await asyncio.to_thread(torch.get_num_threads),
                await device.run(torch.get_num_threads),
            ]
        finally:
            device.close()

    assert asyncio.run(numbers()) == [3, 1, 1, 3]


def test_a_second_device_thread_takes_nothing_from_the_first() -> None:
    async def numbers() -> list[int]:
        devices = [DeviceThread(2), DeviceThread(3)]
        try:
            return [await devices[i].run(torch.get_num_threads) for i in (0, 1, 0)]
        finally:
            for device in devices:
                device.close()

    assert asyncio.run(numbers()) == [2, 3, 2]


def test_the_number_asked_for_holds_in_the_calling_thread_alone() -> None:
    found = []

    def ask() -> None:
        compute_on_this_thread(4)
        with ThreadPoolExecutor(1) as another:
            found.extend([torch.get_num_threads(), another.submit(torch.get_num_threads).result()])

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == [4, 1]


@pytest.mark.parametrize("main", ["lesft_server.main", "lesft_client.main"])
def test_a_service_says_how_threads_wait_before_torch_is_loaded(main: str) -> None:
    """By the first of which torch's OpenMP goes, and its user before that."""
    program = f"""
import os, sys, unittest.mock
import {main} as program
program.PROGRAM = unittest.mock.Mock(log_format="%(message)s")
program.main([])
print("torch" in sys.modules, *map(os.environ.get, ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")))
"""
    asked = {name: value for name, value in os.environ.items() if name not in OPENMP}
    for own, expected in (
        ({}, ["PASSIVE", "1000"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "None"]),
    ):
        said = subprocess.run(
            [sys.executable, "-c", program],
            env={**asked, **own},
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stdout.split() == ["False", *expected]
