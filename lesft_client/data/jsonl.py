"""Your own data: a JSONL file of `{"prompt", "target", "reference", "answer"}`.

`prompt` and `target` are used as they stand and must not be empty. The other two may be left out:
- without `answer`, it is what the target's last `#### ...` line says, if there is one;
- without `reference`, the reference prompt shows the prompt and that answer; a line with neither is
  an error, since then the reference path would know no more than the base path.
"""

from collections.abc import Iterable

from lesft.errors import DataError
from lesft_client.data.answers import MARK, final_answer, plain_answer
from lesft_client.data.prompts import reference_prompt
from lesft_client.data.rows import Row
from lesft_client.data.samples import Sample

_FIELDS = ("prompt", "target", "reference", "answer")


def samples(rows: Iterable[Row]) -> list[Sample]:
    """The rows as samples. Raises DataError, with file and line, for the first bad one."""
    return [_sample(row) for row in rows]


def _sample(row: Row) -> Sample:
    unknown = sorted(set(row.fields) - set(_FIELDS))
    if unknown:
        raise DataError(
            f'{row.where}: unknown field "{unknown[0]}"; a line may have {", ".join(_FIELDS)}'
        )
    prompt, target = row.text("prompt"), row.text("target")
    answer = plain_answer(_optional(row, "answer")) or final_answer(target)
    reference = _optional(row, "reference")
    if not reference and not answer:
        raise DataError(
            f'{row.where}: needs "reference", "answer" or a target that ends in `{MARK} <answer>`: '
            "the reference path must show the ground truth (where it is not used, as in "
            'cross-entropy training, repeat the prompt as "reference")'
        )
    return Sample(prompt, target, reference or reference_prompt(prompt, answer), answer)


def _optional(row: Row, name: str) -> str:
    return "" if row.fields.get(name) is None else row.text(name)
