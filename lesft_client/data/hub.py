"""The data sets on the Hugging Face hub, as rows laid out like their own original files.

Needs the `datasets` library (the extra `lesft[hub]`), which is imported only here and when used.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from lesft.errors import DataError
from lesft_client.data.rows import Row
from lesft_client.data.samples import Split

_ADDRESS = {
    "gsm8k": ("openai/gsm8k", "main"),
    "commonsense_qa": ("tau/commonsense_qa", None),
    "aqua_rat": ("deepmind/aqua_rat", "raw"),
}
_EXPLANATIONS = ("Salesforce/cos_e", "v1.11")


def read_rows(name: str, split: Split) -> Iterator[Row]:
    """The rows of a data set. CommonsenseQA's test split has no answers; validation stands for it.

    Raises DataError when the library is missing or the hub cannot be reached.
    """
    repository, config = _ADDRESS[name]
    hub_split = "validation" if (name, split) == ("commonsense_qa", "test") else split
    for row in _load(name, repository, config, hub_split):
        yield Row(row.where, _with_stem(row.fields)) if name == "commonsense_qa" else row


def read_explanations() -> Iterator[Row]:
    """CoS-E's explanations of CommonsenseQA's training questions."""
    for row in _load("commonsense_qa", *_EXPLANATIONS, "train"):
        text = row.fields.get("abstractive_explanation")
        yield Row(row.where, {"id": row.fields.get("id"), "explanation": {"open-ended": text}})


def _load(name: str, repository: str, config: str | None, split: str) -> Iterator[Row]:
    folder = f"give a local folder that has the data set's files, such as --data ./{name}"
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{name} comes from the Hugging Face hub, which needs the datasets library: "
            f"pip install 'lesft[hub]', or {folder}"
        ) from error
    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(repository, config, split=split)
    # The library raises errors of many kinds and of other libraries when it cannot download.
    except Exception as error:
        raise DataError(
            f"{name} cannot be loaded from the Hugging Face hub ({repository}, {split}): {error}; "
            f"check the network, or {folder}"
        ) from error
    for number, fields in enumerate(rows):
        yield Row(f"{repository} {split} row {number}", dict(fields))


def _with_stem(fields: dict[str, Any]) -> dict[str, Any]:
    """CommonsenseQA's own layout: a question has stem and choices, a choice label and text."""
    choices = fields["choices"]
    pairs = zip(choices["label"], choices["text"], strict=True)
    return {
        "id": fields["id"],
        "answerKey": fields["answerKey"],
        "question": {
            "stem": fields["question"],
            "choices": [{"label": label, "text": text} for label, text in pairs],
        },
    }
