"""The machine that a part was measured on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from lesft_testbed.bench.results import Machine

_PACKAGES = ("lesft", "torch", "transformers", "peft", "grpcio", "safetensors", "numpy")
_CPU_INFO = Path("/proc/cpuinfo")


def this_machine(torch_threads: int) -> Machine:
    """As it is now; `torch_threads` are those of each process that will be measured."""
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        processor=_processor(),
        cores=os.cpu_count() or 1,
        memory_mib=psutil.virtual_memory().total >> 20,
        torch_threads=torch_threads,
        load_average=psutil.getloadavg(),
        versions={"python": platform.python_version(), **_versions()},
    )


def _processor() -> str:
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # an optional one
    return found
