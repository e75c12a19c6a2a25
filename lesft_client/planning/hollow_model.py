"""A checkpoint of the model's shape whose weights are all zeros: computing with it takes as long.

The file is sparse, so that it takes no room on disk and no time to write.
"""

from pathlib import Path

import torch

from lesft.split import build_front
from lesft.tensor_file import Entry, file_header
from lesft.weights import Checkpoint, parse_config

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def hollow_checkpoint(
    folder: Path, config_json: str, num_layers: int, dtype: torch.dtype
) -> Checkpoint:
    """The front of `num_layers` layers, written to a folder. Raises ModelError, InvalidInput."""
    front = build_front(parse_config(config_json), num_layers, dtype)
    header, spans = file_header(
        Entry(f"model.{name}", _DTYPES[dtype], tensor.shape, tensor.numel() * dtype.itemsize)
        for name, tensor in front.state_dict().items()
    )
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + max(end for _, end in spans.values()))
    (folder / "config.json").write_text(config_json, encoding="utf-8")
    return Checkpoint(folder)
