"""One text that a whole model writes: which token comes next, and when it is over."""

from collections.abc import Callable

import torch

from lesft.next_token import choose_token, penalize_repetition
from lesft_client.language_model import FinishReason, GenerationRequest, Piece
from lesft_client.text_stream import TextStream


class LocalText:
    """One text on its way."""

    def __init__(
        self,
        request: GenerationRequest,
        stream: TextStream,
        tell: Callable[[Piece | Exception], object],
    ) -> None:
        """`tell` gets the pieces, in the thread that computes."""
        self.request = request
        self.token_ids = list(request.prompt_ids)
        self.length = len(request.prompt_ids) + request.max_tokens
        """Most tokens that prompt and text will have."""
        self.abandoned = False
        self._stream = stream
        self._tell = tell
        self._ended = False

    @property
    def over(self) -> bool:
        """Whether nothing more is to be written."""
        return self._ended or self.abandoned

    def add(self, logits_V: torch.Tensor, likeliest: int) -> None:
        """Choose the next token and hand on what it says."""
        if self.over:
            return
        token_id = self._choose(logits_V, likeliest)
        self.token_ids.append(token_id)
        new, ended = self._stream.add(token_id)
        reason: FinishReason | None = "stop" if ended else None
        if len(self.token_ids) == self.length and not ended:
            new, reason = new + self._stream.finish(), "length"
        self._ended = reason is not None
        self._tell(Piece(new, (token_id,), reason))

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        if not self.over:
            self._ended = True
            self._tell(error)

    def _choose(self, logits_V: torch.Tensor, likeliest: int) -> int:
        sampling = self.request.sampling
        if sampling.repetition_penalty != 1:
            logits_V = logits_V.cpu()
            logits_V = penalize_repetition(
                logits_V, torch.arange(len(logits_V)), self.token_ids, sampling.repetition_penalty
            )
        elif sampling.temperature == 0:
            return likeliest
        return choose_token(logits_V, sampling, len(self.token_ids))
