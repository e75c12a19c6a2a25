"""CommonsenseQA 1.11 with the human explanations of CoS-E (https://github.com/salesforce/cos-e)."""

from collections import Counter
from collections.abc import Iterable

from lesft.errors import DataError
from lesft_client.data.answers import with_final_line
from lesft_client.data.prompts import base_prompt, choice_line, reference_prompt, with_choices
from lesft_client.data.rows import Row
from lesft_client.data.samples import Sample

_STOCK_PHRASE = 3
"""An explanation given to this many questions word for word explains none of them.

In CoS-E "rivers flow trough valleys", "this word is most relavant" and their like stand under one
question in ten: what its annotators wrote to get past a form.
"""


def samples(rows: Iterable[Row], explanations: Iterable[Row]) -> list[Sample]:
    """The rows as samples: the target is a human's explanation, then the answer's letter.

    A question without an explanation gets a target made of the answer alone.
    """
    by_id = _usable_explanations(explanations)
    return [_sample(row, by_id.get(row.text("id"))) for row in rows]


def _usable_explanations(rows: Iterable[Row]) -> dict[str, str]:
    by_id = {row.text("id"): _explanation(row) for row in rows}
    times = Counter(_wording(text) for text in by_id.values())
    return {
        id_: text for id_, text in by_id.items() if text and times[_wording(text)] < _STOCK_PHRASE
    }


def _explanation(row: Row) -> str:
    explanation = row.fields.get("explanation")
    text = explanation.get("open-ended") if isinstance(explanation, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{row.where}: "explanation" must hold a string "open-ended"')
    return text.strip()


def _wording(text: str) -> str:
    return text.casefold().rstrip(".")


def _sample(row: Row, explanation: str | None) -> Sample:
    right = row.text("answerKey")
    stem, choices = _question(row, right)
    question = with_choices(stem, choices)
    return Sample(
        prompt=base_prompt(question, "letter of the right choice"),
        target=with_final_line(explanation or f"The answer is {choices[right]}.", right),
        reference=reference_prompt(question, choice_line(right, choices)),
        answer=right,
    )


def _question(row: Row, right: str) -> tuple[str, dict[str, str]]:
    """Stem and choices, from `{"stem": ..., "choices": [{"label": "A", "text": ...}, ...]}`."""
    try:
        question = row.fields["question"]
        stem = question["stem"].strip()
        letters = [choice["label"].strip() for choice in question["choices"]]
        texts = [choice["text"].strip() for choice in question["choices"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{row.where}: "question" must hold a "stem" and "choices", each with "label" and '
            '"text"; the file is laid out like CommonsenseQA\'s own'
        ) from error
    return stem, row.choices(letters, texts, right)
