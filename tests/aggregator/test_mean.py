"""The weighted mean against a dense one, and its memory."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st
from safetensors.numpy import save_file

from lesft_aggregator.mean import FloatArray, weighted_mean


def write_parts(
    folder: Path, stack: FloatArray, weights: list[int], name: str = "x"
) -> list[tuple[Path, int]]:
    paths = [folder / f"{index}.safetensors" for index in range(len(weights))]
    for path, values in zip(paths, stack, strict=True):
        save_file({name: values}, path)
    return list(zip(paths, weights, strict=True))


@st.composite
def stacks(draw: st.DrawFn) -> tuple[FloatArray, list[int]]:
    """Adapters of one tensor, stacked, and their weights."""
    shape = draw(np_st.array_shapes(min_dims=1, max_dims=3, max_side=6))
    count = draw(st.integers(1, 6))
    numbers = st.floats(-1e6, 1e6, width=32)
    stack = draw(np_st.arrays(np.float32, (count, *shape), elements=numbers))
    return stack, draw(st.lists(st.integers(1, 10**6), min_size=count, max_size=count))


@settings(max_examples=150, deadline=None)
@given(stacks())
def test_it_equals_a_dense_float64_mean_to_float32_rounding(
    case: tuple[FloatArray, list[int]],
) -> None:
    stack, weights = case
    with tempfile.TemporaryDirectory() as folder:
        mean = weighted_mean(write_parts(Path(folder), stack, weights))["x"]
    dense = np.average(stack.astype(np.float64), axis=0, weights=weights)
    assert mean.dtype == np.float32
    assert mean.shape == dense.shape
    # Half a float32 step, and what a float64 sum loses where large terms cancel.
    half_step = np.spacing(np.abs(mean)).astype(np.float64) / 2
    cancelled = 1e-15 * np.abs(stack.astype(np.float64)).max(axis=0) * len(weights)
    assert np.all(np.abs(mean - dense) <= half_step + cancelled)


def test_data_sizes_weigh_the_parts(tmp_path: Path) -> None:
    stack = np.array([[1.0, 10.0], [5.0, -10.0]], np.float32)
    mean = weighted_mean(write_parts(tmp_path, stack, [3, 1]))["x"]
    assert mean.tolist() == [2.0, 5.0]


def test_equal_adapters_give_that_adapter_bit_for_bit(tmp_path: Path) -> None:
    values = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    mean = weighted_mean(write_parts(tmp_path, np.stack([values] * 5), [3, 7, 11, 800, 1]))["x"]
    assert np.array_equal(mean, values)


def test_small_terms_survive_beside_large_ones_because_the_sum_is_float64(tmp_path: Path) -> None:
    stack = np.array([[2.0**30], [1.0], [-(2.0**30)]], np.float32)
    mean = weighted_mean(write_parts(tmp_path, stack, [1, 1, 1]))["x"]
    assert mean[0] == np.float32(1 / 3)


def test_every_tensor_is_averaged_by_its_own_name(tmp_path: Path) -> None:
    for index in range(2):
        tensors = {"u": np.full(2, index, np.float32), "v": np.full(3, 10 * index, np.float32)}
        save_file(tensors, tmp_path / f"{index}.safetensors")
    mean = weighted_mean([(tmp_path / "0.safetensors", 1), (tmp_path / "1.safetensors", 3)])
    assert {name: values.tolist() for name, values in mean.items()} == {
        "u": [0.75] * 2,
        "v": [7.5] * 3,
    }


MEASURE = """
import sys, threading, time
from pathlib import Path
import numpy, psutil
from safetensors.numpy import save, save_file
from lesft_aggregator.mean import weighted_mean

folder, count = Path(sys.argv[1]), int(sys.argv[2])
tensors = {f"layer.{i}": numpy.ones((8, 14_375), numpy.float32) for i in range(24)}
path = folder / "part.safetensors"
save_file(tensors, path)
del tensors
paths = [folder / f"{i}.safetensors" for i in range(count)]
for each in paths:
    each.hardlink_to(path)
process, done, most = psutil.Process(), threading.Event(), [0]
before = process.memory_info().rss
def watch():
    while not done.is_set():
        most[0] = max(most[0], process.memory_info().rss)
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
data = save(weighted_mean((each, 1) for each in paths))
done.set()
watcher.join()
print(path.stat().st_size / 1e6, (most[0] - before) / 1e6)
"""


def peak_growth_mb(folder: Path, count: int) -> float:
    """How far averaging `count` submissions of 11 MB raises a fresh process' resident memory."""
    folder.mkdir()
    command = [sys.executable, "-c", MEASURE, str(folder), str(count)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    size, growth = map(float, output.split())
    assert size == pytest.approx(11, abs=0.1)
    return growth


def test_memory_does_not_grow_with_the_number_of_submissions(tmp_path: Path) -> None:
    few, many = peak_growth_mb(tmp_path / "few", 4), peak_growth_mb(tmp_path / "many", 64)
    assert many - few < 30, f"4 submissions take {few:.1f} MB, 64 take {many:.1f} MB"
