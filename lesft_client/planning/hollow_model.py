"""A checkpoint of the model's shape whose weights are all zeros: computing with it takes as long.

The file is sparse, so that it takes no room on disk and no time to write.
"""

import json
from pathlib import Path

import torch

from lesft.split import build_front
from lesft.weights import Checkpoint, parse_config

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def hollow_checkpoint(
    folder: Path, config_json: str, num_layers: int, dtype: torch.dtype
) -> Checkpoint:
    """The front of `num_layers` layers, written to a folder. Raises ModelError, InvalidInput."""
    front = build_front(parse_config(config_json), num_layers, dtype)
    entries, end = {}, 0
    for name, tensor in front.state_dict().items():
        start, end = end, end + tensor.numel() * dtype.itemsize
        entries[f"model.{name}"] = {
            "dtype": _DTYPES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    (folder / "config.json").write_text(config_json, encoding="utf-8")
    return Checkpoint(folder)
