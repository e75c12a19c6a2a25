"""A model folder's weights, read tensor by tensor: partial loading, fingerprint and hand-out.

Tensor names are those of the whole model, such as `model.layers.7.mlp.gate_proj.weight`.
"""

import hashlib
import json
import re
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lesft.device import Precision, compute_dtype
from lesft.embedding_rows import EmbeddingRows
from lesft.errors import ModelError
from lesft.quantized_linear import BITS, QuantizedLinear
from lesft.split import build_back, build_front, check_cut_layer, check_family
from lesft.tensor_file import Entry, TensorFile, file_header

# What may differ between two copies of one model without any effect on its numbers; not used.
_VOLATILE_CONFIG = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
    *("use_cache", "_attn_implementation", "attn_implementation", "auto_map"),
    "quantization_config",
}
_STORED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"
_READ_BYTES = 1 << 20


class Checkpoint:
    """A folder in Hugging Face layout: config.json and one or more safetensors files.

    Files stay memory-mapped; nothing is read before it is asked for.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ModelError when the folder cannot be used or its family is not supported."""
        self.folder = folder
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise ModelError(
                f"{folder} has no config.json: give a folder in Hugging Face layout or a hub id"
            )
        try:
            self.config_json = config_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{config_file} cannot be read: {error}") from None
        self.config = parse_config(self.config_json)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelError(
                f"{folder} has no *.safetensors file: save the model with save_pretrained first"
            )
        self._files: dict[str, TensorFile] = {}
        for path in files:
            try:
                file = TensorFile(path)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} is no whole safetensors file: {error}") from None
            self._files.update(dict.fromkeys(file.names, file))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def dtype_and_shape(self, name: str) -> tuple[str, list[int]]:
        """A tensor's safetensors dtype (such as "BF16") and shape, without reading it."""
        return self.file(name).dtype_and_shape(name)

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU as it is stored, mapped. Raises ModelError when there is none."""
        return self.file(name).mapped(name)

    def front_names(self, cut_layer: int) -> list[str]:
        """The tensors of the front: token embedding and layers up to the cut, sorted."""
        check_cut_layer(cut_layer, self.config.num_hidden_layers)
        layers = [f"model.layers.{index}." for index in range(cut_layer)]
        names = [name for name in self._files if name.startswith(tuple(layers))]
        return sorted([_EMBEDDING, *names])

    def file(self, name: str) -> TensorFile:
        """The file with a tensor. Raises ModelError when there is none."""
        if name not in self._files:
            raise ModelError(f"{self.folder} lacks the tensor {name!r}: is the download complete?")
        return self._files[name]


def parse_config(config_json: str) -> PreTrainedConfig:
    """The config of a config.json. Raises ModelError when it is none or not supported."""
    try:
        values = json.loads(config_json)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"config.json is no JSON: {error}") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise ModelError("config.json names no model_type: is it a model's?")
    check_family(values["model_type"])
    try:
        return AutoConfig.for_model(**_lasting(values))
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ModelError(f"config.json cannot be used: {error}") from None


def _lasting(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _VOLATILE_CONFIG}


# ---------------------------------------------------------------------- loading


def load_front(
    checkpoint: Checkpoint, cut_layer: int, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The front with frozen weights in eval mode; reads only its own tensors."""
    front = build_front(checkpoint.config, cut_layer, dtype)
    return _load(front, checkpoint, _front_names(front), dtype, device)


def load_frugal_front(
    checkpoint: Checkpoint, cut_layer: int, precision: Precision, device: torch.device
) -> PreTrainedModel:
    """As `load_front`, in as little memory as the precision allows.

    Rows of the token embedding stay on disk; int8 and int4 quantise linear layers, one at a time.
    """
    dtype = compute_dtype(precision, device)
    front = build_front(checkpoint.config, cut_layer, dtype)
    embedding: Any = front.get_input_embeddings()
    table = checkpoint.file(_EMBEDDING)
    _check(checkpoint, _EMBEDDING, embedding.weight)
    front.set_input_embeddings(
        EmbeddingRows(embedding, lambda row: table.read_rows(_EMBEDDING, row, row + 1), dtype)
    )
    if bits := BITS.get(precision):
        for name, module in list(front.named_modules()):
            if isinstance(module, torch.nn.Linear):
                weight = f"model.{name}.weight"
                _check(checkpoint, weight, module.weight)
                rows = partial(checkpoint.file(weight).read_rows, weight)
                front.set_submodule(name, QuantizedLinear(module, rows, bits, device))
    return _load(front, checkpoint, _front_names(front), dtype, device)


def _front_names(front: PreTrainedModel) -> dict[str, str]:
    return {name: f"model.{name}" for name in front.state_dict()}


def load_back(
    checkpoint: Checkpoint, cut_layer: int, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The back with frozen weights in eval mode; reads only its own tensors.

    A tied LM head takes the embedding's table, unless the files hold one of its own.
    """
    back = build_back(checkpoint.config, cut_layer, dtype)
    names = {name: _whole_name(name, cut_layer) for name in back.state_dict()}
    if checkpoint.config.tie_word_embeddings and _HEAD not in checkpoint:
        names[_HEAD] = _EMBEDDING
    return _load(back, checkpoint, names, dtype, device)


def _whole_name(name: str, offset: int) -> str:
    """A back's tensor name with its layer's number in the whole model."""
    return re.sub(
        r"(?<=\blayers\.)\d+", lambda match: str(int(match.group()) + offset), name, count=1
    )


def _load(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    names: dict[str, str],
    dtype: torch.dtype,
    device: torch.device,
) -> PreTrainedModel:
    empty = model.state_dict()
    state = {}
    for name, whole_name in names.items():
        _check(checkpoint, whole_name, empty[name])
        file = checkpoint.file(whole_name)
        if device.type == "cpu" and file.mapped(whole_name).dtype == dtype:
            state[name] = file.mapped(whole_name)  # what is computed with as it is, is not copied
        else:
            state[name] = file.read(whole_name).to(device, dtype)
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)
    model.train(False)
    module: torch.nn.Module = model
    module.to(device)  # the buffers
    return model


def _check(checkpoint: Checkpoint, name: str, empty: torch.Tensor) -> None:
    """Raises ModelError for a tensor that cannot take the place of an empty one."""
    tensor = checkpoint.read(name)
    if tensor.dtype not in _STORED_DTYPES:
        raise ModelError(
            f"{checkpoint.folder}: tensor {name!r} is stored as {tensor.dtype}; give a copy of the "
            "model that is not quantised"
        )
    if tensor.shape != empty.shape:
        raise ModelError(
            f"{checkpoint.folder}: tensor {name!r} must have shape {list(empty.shape)} by its "
            f"config.json, got {list(tensor.shape)}"
        )


# ---------------------------------------------------------------------- fingerprint and hand-out


def front_fingerprint(checkpoint: Checkpoint, cut_layer: int) -> str:
    """`sha256:` and 64 hex digits over the config and the front's tensors as they are stored.

    The same for a whole checkpoint, sharded or not, and for a folder with just the front.
    """
    values = json.loads(checkpoint.config_json)
    tensors = [
        [name, *checkpoint.dtype_and_shape(name), _sha256(checkpoint, name)]
        for name in checkpoint.front_names(cut_layer)
    ]
    text = json.dumps({"config": _lasting(values), "tensors": tensors}, sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _sha256(checkpoint: Checkpoint, name: str) -> str:
    digest = hashlib.sha256()
    for start in range(0, checkpoint.read(name).nbytes, _READ_BYTES):
        digest.update(checkpoint.file(name).read_bytes(name, start, start + _READ_BYTES))
    return digest.hexdigest()


class FrontFile:
    """The front as one safetensors file that is never written: made from the checkpoint as read."""

    def __init__(self, checkpoint: Checkpoint, cut_layer: int) -> None:
        self._checkpoint = checkpoint
        self._names = checkpoint.front_names(cut_layer)

    @cached_property
    def _header_and_spans(self) -> tuple[bytes, dict[str, tuple[int, int]]]:
        read = self._checkpoint.read
        sizes = [(name, read(name).nbytes) for name in self._names]
        return file_header(
            Entry(name, *self._checkpoint.dtype_and_shape(name), size) for name, size in sizes
        )

    @cached_property
    def size(self) -> int:
        """Length in bytes."""
        header, spans = self._header_and_spans
        return len(header) + max(stop for _, stop in spans.values())

    def read(self, offset: int, max_bytes: int) -> bytes:
        """At most `max_bytes` from `offset` on; empty at the end only."""
        header, spans = self._header_and_spans
        if offset < len(header):
            return header[offset : offset + max_bytes]
        position = offset - len(header)
        for name, (start, stop) in spans.items():
            if start <= position < stop:
                first = position - start
                file = self._checkpoint.file(name)
                return bytes(file.read_bytes(name, first, first + max_bytes))
        return b""
