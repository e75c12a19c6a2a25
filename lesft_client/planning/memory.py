"""How much memory the client needs at a cut: computed from shapes and from what one layer keeps."""

import importlib
import resource
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from lesft_client.planning.workload import Workload

_MIB = 1 << 20
_ADAPTER_BYTES = 4 * 4
"""Of one adapter parameter: itself, its gradient and AdamW's two moments, in float32."""

_GAPS = 1.4
"""What activations take for what they are: an allocator keeps room between tensors of many sizes.
Measured with glibc, as the peak of training SmolLM2-135M with 7 and with 12 layers."""


class FrontShape(BaseModel):
    """What the front is made of; all sizes in bytes."""

    model_config = ConfigDict(frozen=True)

    layer_bytes: int
    """Frozen weights of one layer, in the precision asked for; rows of the embedding are read."""
    adapter_parameters: int
    """Of one layer."""
    kept_bytes: float
    """What one layer keeps of one token for the backward pass."""
    hidden_bytes: int
    """One token's hidden state."""


class MemoryModel(BaseModel):
    """The client's memory as a sum of what it holds."""

    model_config = ConfigDict(frozen=True)

    process_bytes: int
    """Interpreter and libraries, where they share memory with the model."""
    front: FrontShape
    gradient_checkpointing: bool

    def mib(self, cut_layer: int, workload: Workload, trains: bool) -> float:
        """At the largest window of the run."""
        front = self.front
        adapters = cut_layer * front.adapter_parameters * (_ADAPTER_BYTES if trains else 4)
        # What is sent is held as a tensor, and encoded until the server has it.
        sent = 2 * workload.window_sent_tokens * front.hidden_bytes
        layer_under_way = _GAPS * workload.most_tokens * front.kept_bytes
        kept = front.hidden_bytes if self.gradient_checkpointing else front.kept_bytes
        window = _GAPS * workload.window_tokens * cut_layer * kept if trains else 0.0
        weights = cut_layer * front.layer_bytes
        total = self.process_bytes + weights + adapters + sent + layer_under_way + window
        return total / _MIB


def training_process_bytes() -> int:
    """What this process holds now, with all that training loads."""
    importlib.import_module("lesft_client.train")
    return _process_bytes()


def _process_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * resource.getpagesize()


def free_bytes(device: torch.device) -> int:
    """Memory that the model could have on this device; 0 where the system does not say."""
    if device.type == "cuda" and not torch.cuda.get_device_properties(device).is_integrated:
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(available.split()[1]) * 1024 + _process_bytes()
    except (OSError, ValueError, IndexError, StopIteration):
        return 0


def shares_memory(device: torch.device) -> bool:
    """Whether the device computes in the memory that the process itself is in."""
    return device.type != "cuda" or bool(torch.cuda.get_device_properties(device).is_integrated)
