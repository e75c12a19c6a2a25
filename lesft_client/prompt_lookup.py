"""Guesses at the next tokens, from the text so far (prompt lookup decoding)."""

from collections.abc import Sequence

_LONGEST_MATCH = 3
_SHORTEST_MATCH = 2
"""Tokens at the end of the text that are looked for earlier in it. A match of one says little."""

_TRY_AGAIN = 12
"""So many chances to guess are let pass, where guessing has not been worth its time, before it is
tried again: the text may have come to a part that repeats another."""


def next_tokens_by_lookup(token_ids: Sequence[int], most: int) -> list[int]:
    """What followed when the text's last tokens stood in it before; empty where they never did.

    The longest match goes first, of these the latest. Source: prompt lookup decoding, as in
    transformers' `prompt_lookup_num_tokens`.
    """
    ids = list(token_ids)
    for length in range(min(_LONGEST_MATCH, len(ids) - 1), _SHORTEST_MATCH - 1, -1):
        tail = ids[-length:]
        for start in range(len(ids) - length - 1, -1, -1):
            if ids[start : start + length] == tail:
                return ids[start + length : start + length + most]
    return []


class Guesser:
    """Guesses as long as that is faster.

    A step with guesses takes longer, on a slow link a little and on a CPU without one a lot. So it
    is measured: what a step takes with guesses and without, and how many of them are right.
    """

    def __init__(self, most: int) -> None:
        """`most` is how many to guess at once; 0 never guesses."""
        self._most = most
        self._plain_seconds = _Mean()
        self._guess_seconds = _Mean()
        self._right = _Mean()
        self._passed = 0

    def guesses(self, token_ids: Sequence[int], most: int) -> list[int]:
        """Guesses at what follows, at most `most`; empty where none are worth their time."""
        most = min(self._most, most)
        found = next_tokens_by_lookup(token_ids, most) if most > 0 else []
        if not found or self._worth_it():
            return found
        self._passed += 1
        if self._passed < _TRY_AGAIN:
            return []
        self._passed = 0
        return found

    def learn(self, guessed: int, right: int, seconds: float) -> None:
        """What came of a step with so many guesses, or with none."""
        if guessed:
            self._guess_seconds.add(seconds)
            self._right.add(right)
        else:
            self._plain_seconds.add(seconds)

    def _worth_it(self) -> bool:
        plain, guess, right = (
            self._plain_seconds.value,
            self._guess_seconds.value,
            self._right.value,
        )
        if guess is None or right is None:
            return True
        if plain is None:  # every step has found something to guess
            return right >= 1
        return (1 + right) * plain > guess


class _Mean:
    """A mean in which what is new counts more."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else 0.8 * self.value + 0.2 * value
