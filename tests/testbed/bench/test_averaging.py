"""Averaging files by the aggregator and by Flower: same arrays, same mean, memory that differs."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lesft.errors import InternalError, InvalidInput
from lesft_testbed.bench.aggregate import Aggregate, check_same_mean, write_submissions
from lesft_testbed.bench.averaging import measured_mean
from lesft_testbed.bench.jobs import run_program
from lesft_testbed.bench.part import Bench
from lesft_testbed.bench.settings import BenchSettings


def test_submissions_are_as_large_as_the_issue_says_and_differ(tmp_path: Path) -> None:
    parts = write_submissions(tmp_path, count=2, layers=9, seed=0)
    sizes = [path.stat().st_size for path, _ in parts]
    assert sizes[0] == pytest.approx(11.28e6, rel=0.01)
    one, other = (load_file(path) for path, _ in parts)
    assert one.keys() == other.keys()
    assert len(one) == 9 * 3 * 2
    name = "model.layers.8.mlp.down_proj.lora_A.weight"
    assert one[name].shape == (8, 11008)
    assert not np.array_equal(one[name], other[name])
    assert len({weight for _, weight in parts}) == 2


def by_hand(parts: list[tuple[Path, int]]) -> dict[str, np.ndarray]:
    total = sum(weight for _, weight in parts)
    files = [(load_file(path), weight) for path, weight in parts]
    return {
        name: sum(weight / total * file[name].astype(np.float64) for file, weight in files)
        for name in files[0][0]
    }


def measure(parts: list[tuple[Path, int]], folder: Path) -> dict[str, Any]:
    return measured_mean(
        {
            "implementation": "lesft",
            "parts": [(str(path), weight) for path, weight in parts],
            "mean": str(folder / "mean.safetensors"),
        }
    )


def test_the_mean_is_weighted(tmp_path: Path) -> None:
    parts = write_submissions(tmp_path, count=3, layers=1, seed=0, width=16, inner=24)
    answer = measure(parts, tmp_path)
    mean, expected = load_file(tmp_path / "mean.safetensors"), by_hand(parts)
    assert mean.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(mean[name], value, rtol=0, atol=1e-6)
    assert 0 < answer["values"]["call_seconds"] <= answer["values"]["seconds"]


def bench_in(folder: Path, **own: Any) -> Bench:
    settings = BenchSettings(aggregate={"submissions": 40, "layers": 4, **own}, output=folder)
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    return Bench(settings, "", folder, scratch)


@pytest.mark.parametrize("python", [sys.executable, "/no/such/python"])
def test_without_flower_the_message_says_how_to_get_it(
    tmp_path: Path, python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LESFT_TESTBED_AGGREGATE__FLOWER_PYTHON", raising=False)
    if python == sys.executable and find_spec("flwr"):
        pytest.skip("flwr is installed here")
    opened = Aggregate().alternatives(bench_in(tmp_path, flower_python=python))
    said = "pip install flwr" if python == sys.executable else "--aggregate.flower-python /no/such"
    with pytest.raises(InvalidInput, match=said), opened:
        pass


def flower_is_here() -> bool:
    """In this Python, or in the one that LESFT_TESTBED_AGGREGATE__FLOWER_PYTHON names."""
    return bool(BenchSettings().aggregate.flower_python or find_spec("flwr"))


def test_memory_is_the_largest_of_the_averaging_and_does_not_grow_with_the_submissions(
    tmp_path: Path,
) -> None:
    few, many = (write_submissions(tmp_path / n, c, 2, seed=0) for n, c in (("a", 2), ("b", 40)))
    peaks = [in_a_process(parts, tmp_path) for parts in (few, many)]
    size = 2 * 1.2  # MiB of an adapter
    assert size < peaks[0] < 12 * size
    assert peaks[1] < peaks[0] + 2 * size


def in_a_process(parts: list[tuple[Path, int]], folder: Path) -> float:
    request = {
        "implementation": "lesft",
        "parts": [(str(path), weight) for path, weight in parts],
        "mean": str(folder / "mean.safetensors"),
    }
    answer = run_program(bench_in(folder / f"{len(parts)}"), "mean", "averaging", request)
    peak: float = answer["values"]["peak_mib"]
    return peak


@pytest.mark.skipif(not flower_is_here(), reason="there is no Flower")
def test_flower_gives_the_same_mean_and_holds_all_submissions(tmp_path: Path) -> None:
    python = BenchSettings().aggregate.flower_python
    bench = bench_in(tmp_path, flower_python=python)
    with Aggregate().alternatives(bench) as (ours, flower):
        few, everything = ours.measure()["peak_mib"], flower.measure()["peak_mib"]
    in_files = 40 * 4 * 1.2
    assert few < in_files / 4
    assert everything > in_files * 0.9
    assert bench.versions["flwr"]


def test_means_that_differ_are_no_comparison(tmp_path: Path) -> None:
    for name, value in (("lesft", 0.0), ("flower", 1e-3)):
        save_file({"a": np.full(3, value, np.float32)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(InternalError, match="the two means differ in a"):
        check_same_mean(tmp_path)
