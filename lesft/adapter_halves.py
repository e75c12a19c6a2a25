"""The two halves of a run's adapter as files that say what they are, and the two as one.

A half is a safetensors file of float32 tensors under whole-model names. Its metadata has one key,
`lesft`: a `HalfInfo` as canonical JSON, so that equal halves are equal bytes.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lesft.adapters import check_halves, name_at, num_layers
from lesft.errors import BundleError, HandshakeMismatch, ModelError
from lesft.files import write_atomically
from lesft.spec import RunSpec
from lesft.tensors import TensorSpec, check_tensors

ADAPTER_FILE = "adapter.safetensors"
"""A half, in the state folder of the client or the server that trained it."""
SPEC_FILE = "run_spec.json"
"""The run spec, beside it."""

Side = Literal["front", "back"]

_METADATA_KEY = "lesft"


class HalfInfo(BaseModel):
    """What a half is of."""

    model_config = ConfigDict(frozen=True, strict=True)

    run_id: str
    spec_fingerprint: str
    cut_layer: int = Field(ge=1)
    rounds: int = Field(ge=0)
    """Rounds of training that are in it."""
    side: Side

    @classmethod
    def of(cls, spec: RunSpec, side: Side, rounds: int) -> "HalfInfo":
        """One side's half after a number of rounds of a run."""
        return cls(
            run_id=spec.run_id,
            spec_fingerprint=spec.fingerprint(),
            cut_layer=spec.cut_layer,
            rounds=rounds,
            side=side,
        )


@dataclass(frozen=True)
class AdapterHalf:
    """One side's adapter."""

    info: HalfInfo
    tensors: dict[str, torch.Tensor]
    """float32, on the CPU, under whole-model names."""

    def sha256(self) -> str:
        """Of the tensors: what tells two halves of the same run and round apart."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
        return digest.hexdigest()


def encode_half(half: AdapterHalf) -> bytes:
    """The bytes of a half's file, the same for the same half."""
    text = json.dumps(half.info.model_dump(), sort_keys=True, separators=(",", ":"))
    return save(half.tensors, metadata={_METADATA_KEY: text})


def save_half(path: Path, half: AdapterHalf) -> None:
    """Write a half's file, whole or not at all."""
    write_atomically(path, encode_half(half))


def load_half(path: Path) -> AdapterHalf:
    """Read a half from its file, or from the state folder that it lies in.

    Raises ModelError when it is not there, damaged, or does not say what it is; BundleError when
    its tensors are not finite float32.
    """
    file = path if path.is_file() else path / ADAPTER_FILE
    if not path.exists():
        raise ModelError(f"{path} does not exist: give a --state folder or its {ADAPTER_FILE}")
    if not file.is_file():
        raise ModelError(f"{path} has no {ADAPTER_FILE}: is the training finished?")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata: dict[str, str] = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is no whole safetensors file: {error}") from None
    if _METADATA_KEY not in metadata:
        raise ModelError(
            f"{file} does not say which run it is of, as an older LESFT wrote it: start its client "
            "or server once more with the same --state, which writes it anew"
        )
    try:
        info = HalfInfo.model_validate_json(metadata[_METADATA_KEY])
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or _METADATA_KEY
        raise ModelError(f"{file}: its metadata cannot be used: {field}: {first['msg']}") from None
    return AdapterHalf(info, _checked(tensors, file))


def _checked(tensors: dict[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    try:
        check_tensors(
            tensors,
            {name: TensorSpec(tuple(t.shape), (torch.float32,)) for name, t in tensors.items()},
        )
    except BundleError as error:
        raise BundleError(f"{file}: {error}") from None
    return tensors


def join(front: AdapterHalf, back: AdapterHalf) -> dict[str, torch.Tensor]:
    """The whole adapter's tensors, sorted by name.

    Raises HandshakeMismatch, with the field and both values, when the halves are not of the same
    moment of the same run; ModelError when they overlap, leave out a layer or a part of one, or
    hold tensors that do not go together.
    """
    for half, side in ((front, "front"), (back, "back")):
        if half.info.side != side:
            raise HandshakeMismatch(
                f"side: the {side}'s half was expected, got the {half.info.side}'s; the front's is "
                "in a client's --state, the back's in the server's"
            )
    for field in ("run_id", "cut_layer", "rounds", "spec_fingerprint"):
        ours, theirs = getattr(front.info, field), getattr(back.info, field)
        if ours != theirs:
            raise HandshakeMismatch(
                f"{field}: front {ours}, back {theirs}; both halves must be of the same run, each "
                "after its last round"
            )
    check_halves(front.tensors.keys(), back.tensors.keys())
    try:
        check_tensors(back.tensors, back_tensor_specs(front, num_layers(back.tensors)))
    except BundleError as error:
        raise ModelError(f"the back's half does not go with the front's: {error}") from None
    return dict(sorted({**front.tensors, **back.tensors}.items()))


def back_tensor_specs(front: AdapterHalf, num_layers: int) -> dict[str, TensorSpec]:
    """What the back's half must hold: in every layer from the cut on, what layer 0 has.

    The layers of a supported model are all of the same shapes.
    """
    return {
        name_at(name, layer): TensorSpec(tuple(tensor.shape), (torch.float32,))
        for layer in range(front.info.cut_layer, num_layers)
        for name, tensor in front.tensors.items()
        if name_at(name, 0) == name
    }
