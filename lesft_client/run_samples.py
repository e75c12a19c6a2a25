"""A client's samples as its run takes them: encoded, within the run's limits and vocabulary."""

from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from lesft.errors import DataError, ModelError
from lesft.spec import RunSpec
from lesft_client.data import EncodedSample, Sample, Split, encode_samples

SERVERS_OPTION = "which its server sets by --max-length"
"""Where the limit of a split run is set."""


def encode_for_run(
    samples: Sequence[Sample],
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    spec: RunSpec,
    max_length: int,
    limit_option: str,
    say: Callable[[str], None],
) -> list[EncodedSample]:
    """Those that are not too long; says how many are.

    `max_length` is the client's own limit, 0 where it has none; `limit_option` is where the run's
    is set. Raises DataError when nothing is left.
    """
    limit = min(max_length or spec.max_length, spec.max_length)
    try:
        kept, skipped = encode_samples(samples, tokenizer, limit)
    except DataError as error:
        if limit < spec.max_length:
            raise
        raise DataError(f"{error}; {limit} is the run's limit, {limit_option}") from None
    if skipped:
        say(
            f"{skipped} of {len(samples)} {split} samples are longer than {limit} tokens and were "
            "skipped (--max-length)"
        )
    return kept


def check_vocabulary(
    samples: Sequence[EncodedSample], vocab_size: int, model: str, spec: RunSpec
) -> None:
    """Raises ModelError when the tokenizer, that of `model`, cannot be the run's model's."""
    largest = max(max(s.base_ids + s.reference_ids + s.target_ids) for s in samples)
    if largest >= vocab_size:
        raise ModelError(
            f"--model {model}: its tokenizer gives token {largest}, but the run's model knows "
            f"{vocab_size} tokens only: use the tokenizer of {spec.model_name}"
        )
