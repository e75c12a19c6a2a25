"""A half of the adapter as a file that says what it is, and two of them as one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lesft.adapter_halves import AdapterHalf, encode_half, join, load_half, save_half
from lesft.errors import BundleError, HandshakeMismatch, LesftError, ModelError
from tests.export.harness import SplitModel, save_base, with_info

UP_A = "model.layers.{}.mlp.up_proj.lora_A.weight"


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> SplitModel:
    return SplitModel(save_base(tmp_path_factory.mktemp("base"), "llama"), cut_layer=2)


def test_a_half_comes_back_as_it_was_saved_and_always_as_the_same_bytes(
    split: SplitModel, tmp_path: Path
) -> None:
    file = tmp_path / "state" / "adapter.safetensors"
    save_half(file, split.front)
    backwards = dict(reversed(split.front.tensors.items()))
    assert file.read_bytes() == encode_half(replace(split.front, tensors=backwards))
    for half in (load_half(file), load_half(file.parent)):
        assert half.info == split.front.info
        assert (half.info.rounds, half.info.side, half.info.cut_layer) == (9, "front", 2)
        assert half.info.spec_fingerprint == split.spec.fingerprint()
        assert half.tensors.keys() == split.front.tensors.keys()
        assert all(torch.equal(half.tensors[n], t) for n, t in split.front.tensors.items())


@pytest.mark.parametrize(
    ("metadata", "value", "kind", "message"),
    [
        (None, 1.0, ModelError, "does not say which run it is of, as an older LESFT wrote it: "),
        ({"lesft": "{"}, 1.0, ModelError, "its metadata cannot be used: lesft: Invalid JSON"),
        (
            {"lesft": '{"run_id":"a","spec_fingerprint":"b","cut_layer":1,"side":"front"}'},
            1.0,
            ModelError,
            "its metadata cannot be used: rounds: Field required",
        ),
        ("front", float("nan"), BundleError, "values that are NaN or infinite"),
        ("front", float("inf"), BundleError, "values that are NaN or infinite"),
    ],
    ids=["older", "no JSON", "no rounds", "NaN", "infinite"],
)
def test_a_half_that_cannot_be_used_is_refused(
    split: SplitModel,
    tmp_path: Path,
    metadata: Any,
    value: float,
    kind: type[LesftError],
    message: str,
) -> None:
    file, tensors = tmp_path / "adapter.safetensors", {UP_A.format(0): torch.full((2, 3), value)}
    if metadata == "front":
        save_half(file, AdapterHalf(split.front.info, tensors))
    else:
        save_file(tensors, file, metadata)
    with pytest.raises(kind) as caught:
        load_half(tmp_path)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


def test_a_half_that_is_not_there_or_damaged_is_refused(split: SplitModel, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        load_half(tmp_path)
    why = "has no adapter.safetensors: is the training finished?"
    assert str(caught.value) == f"{tmp_path} {why}"
    with pytest.raises(ModelError, match=r"none does not exist: give a --state folder"):
        load_half(tmp_path / "none")
    file = tmp_path / "adapter.safetensors"
    file.write_bytes(encode_half(split.front)[:-1])
    with pytest.raises(ModelError, match=r"adapter\.safetensors is no whole safetensors file: "):
        load_half(file)


def test_halves_of_one_run_are_one_adapter(split: SplitModel) -> None:
    joined = join(split.front, split.back)
    assert list(joined) == sorted(split.front.tensors | split.back.tensors)
    assert joined[UP_A.format(1)] is split.front.tensors[UP_A.format(1)]
    assert joined[UP_A.format(2)] is split.back.tensors[UP_A.format(2)]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rounds", 6, "rounds: front 9, back 6; both halves must be of the same run, each after "),
        ("cut_layer", 1, "cut_layer: front 2, back 1; "),
        ("run_id", "other", "run_id: front lesft, back other; "),
        ("spec_fingerprint", "sha256:0", r"spec_fingerprint: front sha256:\w+, back sha256:0; "),
        ("side", "front", "side: the back's half was expected, got the front's; the front's is "),
    ],
)
def test_halves_of_two_runs_are_refused_by_name(
    split: SplitModel, field: str, value: Any, message: str
) -> None:
    with pytest.raises(HandshakeMismatch, match=f"^{message}"):
        join(split.front, with_info(split.back, **{field: value}))


def test_halves_that_overlap_leave_something_out_or_differ_in_shape_are_refused(
    split: SplitModel,
) -> None:
    back = split.back.tensors
    for change, message in (
        ({UP_A.format(1): torch.zeros(3, 32)}, f"front and back both hold '{UP_A.format(1)}'"),
        ({UP_A.format(3): None}, f"the halves lack '{UP_A.format(3)}'"),
        (
            {UP_A.format(3): torch.zeros(4, 32)},
            rf"^the back's half does not go with the front's: tensor '{UP_A.format(3)}' must have "
            r"shape \[3, 32\], got \[4, 32\]",
        ),
    ):
        tensors = {n: t for n, t in {**back, **change}.items() if t is not None}
        with pytest.raises(ModelError, match=message):
            join(split.front, replace(split.back, tensors=tensors))
