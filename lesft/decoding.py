"""Decoding step by step with keys and values kept on both sides of the cut.

Each sequence has a cache of the library's own in each part of the model. A forward takes any number
of sequences at once, of any lengths and with any number of new tokens each: rows are padded on the
left, which the library's own masks understand, and no padding enters a sequence's cache. Row by row
the result is that of the sequence alone, up to the last bits of the kernels for another batch size.

Shape letters: B sequences, Q new tokens of the longest step, W tokens that an answer is wanted for,
D width, V vocabulary, H heads, K keys.
"""

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from lesft.split import base_model, head_logits


class SequenceCache:
    """The keys and values of one sequence in one part of the model.

    New tokens may be guesses: the sequence is as long as before until `keep` says how many of the
    last step's tokens stay.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        """`config` is that of the part, with as many layers as it has."""
        self._layers: list[Any] = DynamicCache(config=config).layers
        self._tentative: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens that are in it for good."""
        return int(self._layers[0].get_seq_length())

    @property
    def num_bytes(self) -> int:
        """Memory that it holds."""
        tensors = [t for layer in self._layers if layer.is_initialized for t in _both(layer)]
        tensors += [tensor for pair in self._tentative.values() for tensor in pair]
        return sum(tensor.nbytes for tensor in tensors)

    def keep(self, num_tokens: int) -> None:
        """Take over the first `num_tokens` of the tentative tokens, and forget the others."""
        if num_tokens:
            for index, (keys, values) in self._tentative.items():
                self._layers[index].update(keys[..., :num_tokens, :], values[..., :num_tokens, :])
        self._tentative.clear()

    def extended(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, tentative: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values `[1, H, K, d]` that new ones `[1, H, q, d]` of a layer attend to."""
        if not tentative:
            return self._layers[layer].update(keys, values)  # type: ignore[no-any-return]
        # Copies: they must not keep the whole batch's alive that they are a part of.
        self._tentative[layer] = (keys.clone(), values.clone())
        # An update makes new tensors, so the copy's leaves those of the original alone.
        return copy.copy(self._layers[layer]).update(keys, values)  # type: ignore[no-any-return]

    def window(self, layer: int) -> int | None:
        """The tokens that a layer with a sliding window sees; None where it sees all."""
        return self._layers[layer].sliding_window if self._layers[layer].is_sliding else None

    @property
    def num_layers(self) -> int:
        """Decoder layers of the part."""
        return len(self._layers)


def _both(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.keys, layer.values


@dataclass(frozen=True)
class Step:
    """New tokens of one sequence for one forward."""

    cache: SequenceCache
    inputs: torch.Tensor
    """Token ids `[q]` for the front, hidden states `[q, D]` for the back; q is at least 1."""
    tentative: bool = False
    """Whether the cache is to wait for `keep` before it takes them over."""


@torch.no_grad()
def front_steps(front: PreTrainedModel, steps: Sequence[Step]) -> list[torch.Tensor]:
    """Cut-layer activations `[q, D]` of every step's tokens."""
    return _forward(front, "input_ids", steps)


@torch.no_grad()
def back_steps(
    back: PreTrainedModel, steps: Sequence[Step], wanted: Sequence[int]
) -> list[torch.Tensor]:
    """Float32 logits `[W, V]` after the last W tokens of every step, W being its `wanted`."""
    hidden = _forward(base_model(back), "inputs_embeds", steps)
    last = [rows_QD[len(rows_QD) - w :] for rows_QD, w in zip(hidden, wanted, strict=True)]
    logits_NV = head_logits(back, torch.cat(last)).float()
    return list(torch.split(logits_NV, list(wanted)))


def _forward(model: torch.nn.Module, name: str, steps: Sequence[Step]) -> list[torch.Tensor]:
    """The model's own forward over all steps; each step's last hidden states `[q, D]`."""
    sizes = [len(step.inputs) for step in steps]
    longest = max(sizes)
    ends = [step.cache.length + size for step, size in zip(steps, sizes, strict=True)]
    past = max(ends) - longest
    inputs = torch.stack([_left_padded(step.inputs, longest, 0) for step in steps])
    positions_BQ = torch.stack(
        [
            _left_padded(torch.arange(end - size, end), longest, 0)
            for end, size in zip(ends, sizes, strict=True)
        ]
    )
    mask_BK = None
    if min(ends) < max(ends) or min(sizes) < longest:
        first_B = torch.tensor([max(ends) - end for end in ends])
        mask_BK = (torch.arange(max(ends)) >= first_B[:, None]).long().to(inputs.device)
    output = model(
        **{name: inputs, cache_argument(type(model)): _CacheBatch(steps, past)},  # type: ignore[arg-type]
        attention_mask=mask_BK,
        position_ids=positions_BQ.to(inputs.device),
        use_cache=True,
    )
    hidden_BQD: torch.Tensor = output.last_hidden_state
    return [row[longest - size :] for row, size in zip(hidden_BQD, sizes, strict=True)]


@functools.cache
def cache_argument(kind: type[torch.nn.Module]) -> str:
    """What the library calls the cache: `past_key_values` until 5.2x, `cache` since then."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def _left_padded(tensor: torch.Tensor, length: int, dim: int) -> torch.Tensor:
    missing = length - tensor.shape[dim]
    if missing == 0:
        return tensor
    return F.pad(tensor, [0, 0] * (tensor.dim() - 1 - dim) + [missing, 0])


class _CacheBatch(Cache):
    """The caches of several sequences as the library's forward sees them: one padded batch."""

    def __init__(self, steps: Sequence[Step], past: int) -> None:
        """All sequences end where the longest ends, `past` tokens and its new ones from the start.

        A shorter sequence begins later.
        """
        layers = range(steps[0].cache.num_layers)
        super().__init__(layers=[_LayerBatch(steps, past, layer) for layer in layers])


class _LayerBatch(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of a `_CacheBatch`."""

    def __init__(self, steps: Sequence[Step], past: int, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps = steps
        self._past = past
        self._layer = layer
        self.sliding_window = steps[0].cache.window(layer)
        self.is_sliding = self.sliding_window is not None

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is kept here."""

    def get_seq_length(self) -> int:
        """Tokens before the longest step's."""
        return self._past

    def get_max_length(self) -> int:
        """See the library."""
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys, and the place of the first one."""
        seen = self._past
        if self.sliding_window is not None:
            seen = min(seen, self.sliding_window - 1)
        return seen + query_length, self._past - seen

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give each sequence its new keys and values; all of all sequences, padded on the left."""
        longest = key_states.shape[-2]
        num_keys, _ = self.get_mask_sizes(longest)
        rows = []
        for index, step in enumerate(self._steps):
            new = slice(longest - len(step.inputs), None)
            keys, values = step.cache.extended(
                self._layer,
                key_states[index : index + 1, :, new],
                value_states[index : index + 1, :, new],
                step.tentative,
            )
            rows.append((_left_padded(keys, num_keys, 2), _left_padded(values, num_keys, 2)))
        if len(rows) == 1:
            return rows[0]
        return torch.cat([keys for keys, _ in rows]), torch.cat([values for _, values in rows])


def cache_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Memory of one more token in a `SequenceCache` of a part, where no layer's window is full."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * 2 * heads * width * dtype.itemsize)
