"""Texts of a whole model that go through it together, a token of each at a time.

The rows of a batch end where the longest ends and are padded on the left, as in the library's own
`generate`. A row that is over goes and costs nothing any more; another one comes in its place.

Shape letters: B rows, K tokens of the longest row, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from lesft.decoding import cache_argument


class RowBatch:
    """The keys and values of some rows in one padded cache of the library's own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._lengths: list[int] = []
        self._cache = self._empty_cache()
        self._cache_argument = cache_argument(type(self._bare_model()))  # type: ignore[arg-type]

    @torch.no_grad()
    def join(self, prompt_ids: Sequence[int]) -> torch.Tensor:
        """One more row, the last one; logits `[V]` of its first token.

        A prompt goes through by itself: it keeps the device busy without others, which would pad
        it, and comes out the same whoever it is to be with.
        """
        cache = self._empty_cache()
        logits_1V = self._forward(cache, torch.tensor([list(prompt_ids)]))
        self._append(cache, len(prompt_ids))
        return logits_1V[0]

    @torch.no_grad()
    def step(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Put a token behind each row; logits `[B, V]` of those that come next."""
        length_B = torch.tensor(self._lengths)
        mask_BK = None
        if min(self._lengths) < max(self._lengths):
            longest = max(self._lengths)
            mask_BK = (torch.arange(longest + 1) >= (longest - length_B)[:, None]).long()
        ids_B1 = torch.tensor(token_ids)[:, None]
        logits_BV = self._forward(self._cache, ids_B1, mask_BK, length_B[:, None])
        self._lengths = [length + 1 for length in self._lengths]
        return logits_BV

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and the padding that only those needed."""
        if len(rows) == len(self._lengths):
            return
        self._lengths = [self._lengths[row] for row in rows]
        if not rows:
            self._cache = self._empty_cache()
            return
        self._cache.batch_select_indices(torch.tensor(rows, device=self._model.device))
        for layer in self._cache.layers:
            _resize(layer, max(self._lengths))

    def _append(self, cache: DynamicCache, num_tokens: int) -> None:
        self._lengths.append(num_tokens)
        if len(self._lengths) == 1:
            self._cache = cache
            return
        pairs: Any = zip(self._cache.layers, cache.layers, strict=True)
        for ours, theirs in pairs:
            _resize(ours, max(self._lengths))
            _resize(theirs, max(self._lengths))
            ours.keys = torch.cat([ours.keys, theirs.keys])
            ours.values = torch.cat([ours.values, theirs.values])

    def _forward(
        self,
        cache: DynamicCache,
        ids: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Float32 logits `[B, V]` after the last token of every row."""
        device = self._model.device
        output = self._model(
            input_ids=ids.to(device),
            attention_mask=None if mask is None else mask.to(device),
            position_ids=None if positions is None else positions.to(device),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: cache},
        )
        logits_BV: torch.Tensor = output.logits[:, -1].float()
        return logits_BV

    def _empty_cache(self) -> DynamicCache:
        return DynamicCache(config=self._bare_model().config)

    def _bare_model(self) -> PreTrainedModel:
        """The library's model where peft has wrapped it."""
        wrapped: Any = self._model
        bare: PreTrainedModel = (
            wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
        )
        return bare


def _resize(layer: Any, length: int) -> None:
    """Make a layer's keys and values as if all rows had `length` tokens, padded on the left."""
    width = length
    if layer.is_sliding:
        width = min(length, layer.sliding_window - 1)
        layer.cumulative_length = length
    missing = width - layer.keys.shape[-2]
    # A negative padding cuts off; the cut-off part is padding itself.
    layer.keys = F.pad(layer.keys, [0, 0, missing, 0])
    layer.values = F.pad(layer.values, [0, 0, missing, 0])
