"""A safetensors file: mapped tensors, and parts that are read."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lesft.tensor_file import TensorFile

TENSORS = {
    "matrix": torch.arange(24, dtype=torch.float32).reshape(6, 4),
    "halves": torch.arange(8).bfloat16().reshape(2, 2, 2),
    "scalar": torch.tensor(7.5),
}


@pytest.fixture
def file(tmp_path: Path) -> TensorFile:
    save_file(TENSORS, tmp_path / "some.safetensors")
    return TensorFile(tmp_path / "some.safetensors")


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_the_same_mapped_and_read(file: TensorFile, name: str) -> None:
    for found in (file.mapped(name), file.read(name)):
        assert found.dtype == TENSORS[name].dtype
        assert torch.equal(found, TENSORS[name])


def test_rows_are_those_of_the_first_dimension(file: TensorFile) -> None:
    assert torch.equal(file.read_rows("matrix", 2, 5), TENSORS["matrix"][2:5])
    assert torch.equal(file.read_rows("matrix", 5, 9), TENSORS["matrix"][5:])
    assert torch.equal(file.read_rows("halves", 1, 2), TENSORS["halves"][1:])


def test_bytes_end_where_the_tensor_does(file: TensorFile) -> None:
    data = TENSORS["matrix"].numpy().tobytes()
    assert file.read_bytes("matrix", 10, 90) == data[10:90]
    assert file.read_bytes("matrix", 90, 1000) == data[90:]
    assert file.read_bytes("matrix", 96, 97) == b""


def test_a_file_that_has_become_shorter_is_an_error(file: TensorFile, tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    with path.open("r+b") as other:
        other.truncate(path.stat().st_size - 60)
    with pytest.raises(OSError, match=r"some\.safetensors has become shorter$"):
        [file.read_bytes(name, 0, 1000) for name in TENSORS]
