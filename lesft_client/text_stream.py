"""Tokens to text, one by one: what is shown is never taken back.

A token is no piece of text by itself. It may be half of a character, a space that belongs to the
next word, or a part of a stop string; such text waits until what follows settles it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
"""What decoders write for bytes that are no character, or not yet."""

_MOST_UNFINISHED = 3
"""So many of them may still become a character: of the longest, all bytes but one are there."""

_LONG_WINDOW = 32
_SHORT_WINDOW = 16
"""Of a window that grows long, for its bytes are no text, so many tokens are kept: enough for the
decoder to find the beginnings of characters again, and for all that may become one."""


class TextStream:
    """The text of one answer, as it grows.

    All texts together are `tokenizer.decode(ids, skip_special_tokens=True)`, without any cleaning
    up of spaces, up to the first stop string, which is the one that is complete first. A token
    costs the same at the end of a long text as at its beginning: only a window of the last few
    tokens is decoded, and what it gives beyond the text shown already is new. This is the method
    of text-generation-inference and vLLM, which is also right for decoders that strip a space at
    the beginning of a text.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        stop: Sequence[str],
        end_ids: frozenset[int],
    ) -> None:
        """`end_ids` are the tokens that end the text, and `stop` the strings; neither is shown."""
        self._tokenizer = tokenizer
        self._stop = [string for string in stop if string]
        self._end_ids = end_ids
        self._silent_ids = _special_ids(tokenizer)
        self._window: list[int] = []
        # The first tokens of the window are there for those after them: they are dropped next.
        self._num_settled = 0
        # Of the text of the window.
        self._num_shown = 0
        # Text that may be the beginning of a stop string.
        self._held = ""

    def add(self, token_id: int) -> tuple[str, bool]:
        """The text that is final with this token, and whether the text has ended."""
        if token_id in self._end_ids:
            return self.finish(), True
        if token_id in self._silent_ids or self._tokenizer.convert_ids_to_tokens(token_id) is None:
            return "", False
        self._window.append(token_id)
        return self._until_stop(self._new_text())

    def finish(self) -> str:
        """What is left when no token will follow."""
        text, ended = self._until_stop(self._decode(self._window)[self._num_shown :])
        if not ended:
            text += self._held
        self._window, self._num_settled, self._num_shown, self._held = [], 0, 0, ""
        return text

    def _new_text(self) -> str:
        text = self._decode(self._window)
        num_final = len(text.rstrip(_UNFINISHED))
        if len(self._window) > _LONG_WINDOW:
            num_final = max(num_final, len(text) - _MOST_UNFINISHED)
        new = text[self._num_shown : num_final]
        self._num_shown = max(self._num_shown, num_final)
        if new and num_final == len(text):
            self._shorten(self._window[self._num_settled :], 0)
            self._num_settled = len(self._window)
        elif len(self._window) > _LONG_WINDOW:
            self._shorten(self._window[-_SHORT_WINDOW:], max(0, len(text) - self._num_shown))
            self._num_settled = 0
        return new

    def _shorten(self, window: list[int], num_waiting: int) -> None:
        """Go on with a shorter window; so many of its characters are not shown yet."""
        self._window = window
        self._num_shown = max(0, len(self._decode(window)) - num_waiting)

    def _until_stop(self, new: str) -> tuple[str, bool]:
        text = self._held + new
        found = [(text.index(stop) + len(stop), -len(stop)) for stop in self._stop if stop in text]
        if found:
            end, minus_length = min(found)
            self._held = ""
            return text[: end + minus_length], True
        num_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of a stop string."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


def _special_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """All tokens that give no text; a chat template's are not always in `all_special_ids`."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids).union(
        token_id for token_id, token in added if token.special
    )
