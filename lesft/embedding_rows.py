"""A token embedding that reads from disk the rows it is asked for, and keeps none.

The table is the largest tensor of a small device's share, of which a text uses a few hundred rows.
"""

from collections.abc import Callable

import torch

ReadRow = Callable[[int], torch.Tensor]
"""The row `[1, D]` of a token id, as it is stored."""


class EmbeddingRows(torch.nn.Module):
    """Stands in for the library's module, which goes on doing whatever its family does."""

    def __init__(
        self, embedding: torch.nn.Embedding, read_row: ReadRow, dtype: torch.dtype
    ) -> None:
        """`embedding` may be on the meta device; its table is not used."""
        super().__init__()
        self._num_rows = embedding.num_embeddings
        self._read_row = read_row
        self._dtype = dtype
        self.embedding = embedding
        embedding.padding_idx = None  # matters to a table's gradient only, and this is frozen
        del embedding.weight

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        """Embeddings `[B, L, D]` of token ids, on their device. Raises IndexError as torch does."""
        unique_N, places_BL = torch.unique(ids_BL, return_inverse=True)
        ids = unique_N.tolist()
        if ids and not 0 <= ids[0] <= ids[-1] < self._num_rows:
            raise IndexError("index out of range in self")
        rows_ND = torch.cat([self._read_row(token_id) for token_id in ids])
        self.embedding.weight = rows_ND.to(ids_BL.device, self._dtype)
        embedded_BLD: torch.Tensor = self.embedding(places_BL)
        del self.embedding.weight
        return embedded_BLD
