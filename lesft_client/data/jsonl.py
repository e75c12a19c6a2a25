"""Your own data: a JSONL file of `{"prompt", "target", "reference", "answer", "label"}`.

`prompt` and `target` are used as they stand and must not be empty. The others may be left out
or empty:
- without `answer`, it is what the target's last `#### ...` line says, if there is one;
- without `reference`, the reference prompt shows the prompt and that answer; a line with neither is
  an error, since then the reference path would know no more than the base path;
- `label` is the kind of problem, by which the shares of clients may differ (`--skew label`).
"""

import json
from collections.abc import Iterable
from dataclasses import asdict

from lesft.errors import DataError
from lesft_client.data.answers import MARK, final_answer, plain_answer
from lesft_client.data.prompts import reference_prompt
from lesft_client.data.rows import Row
from lesft_client.data.samples import Sample

_FIELDS = ("prompt", "target", "reference", "answer", "label")


def samples(rows: Iterable[Row]) -> list[Sample]:
    """The rows as samples. Raises DataError, with file and line, for the first bad one."""
    return [_sample(row) for row in rows]


def line(sample: Sample) -> str:
    """The sample as one line that `samples` reads again, without the fields that are empty."""
    fields = {name: text for name, text in asdict(sample).items() if text}
    return json.dumps(fields, ensure_ascii=False) + "\n"


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
    return Sample(
        prompt=prompt,
        target=target,
        reference=reference or reference_prompt(prompt, answer),
        answer=answer,
        label=_optional(row, "label"),
    )


def _optional(row: Row, name: str) -> str:
    return "" if row.fields.get(name) in (None, "") else row.text(name)
