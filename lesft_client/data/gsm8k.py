"""GSM8K (https://github.com/openai/grade-school-math): `question` and a worked `answer`."""

import re
from collections.abc import Iterable

from lesft.errors import DataError
from lesft_client.data.answers import MARK, final_answer, with_final_line
from lesft_client.data.prompts import base_prompt, reference_prompt
from lesft_client.data.rows import Row
from lesft_client.data.samples import Sample

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


def samples(rows: Iterable[Row]) -> list[Sample]:
    """The rows as samples: the target is the data set's own solution, x̃ shows only its answer.

    The solution loses its calculator marks (`<<48/2=24>>`) and its answer the commas in numbers.
    """
    return [_sample(row) for row in rows]


def _sample(row: Row) -> Sample:
    question, solution = row.text("question"), row.text("answer")
    answer = final_answer(solution)
    if not answer:
        raise DataError(f'{row.where}: "answer" must end in a line `{MARK} <number>`')
    steps = _CALCULATOR_MARK.sub("", solution.rpartition(MARK)[0]).strip()
    return Sample(
        prompt=base_prompt(question, "number"),
        target=with_final_line(steps, answer),
        reference=reference_prompt(question, answer),
        answer=answer,
    )
