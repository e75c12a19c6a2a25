import json
import re
from pathlib import Path
from typing import Any

import pytest

from lesft.errors import DataError
from lesft_client.data import jsonl
from lesft_client.data.rows import read_rows
from lesft_client.data.samples import Sample

GOOD = {"prompt": "Add 2 and 2.", "target": "2 + 2 = 4", "reference": "It is 4.", "answer": "4"}


def read(path: Path) -> list[Sample]:
    return jsonl.samples(read_rows(path))


def write(tmp_path: Path, *lines: Any) -> Path:
    path = tmp_path / "mine.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def refuses(path: Path, line: int, message: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:{line}: .*{message}"):
        read(path)


def test_a_full_line_is_used_as_it_stands(tmp_path: Path) -> None:
    assert read(write(tmp_path, GOOD)) == [Sample("Add 2 and 2.", "2 + 2 = 4", "It is 4.", "4")]


def test_without_an_answer_it_is_what_the_target_ends_with(tmp_path: Path) -> None:
    line = {"prompt": "Add.", "target": "2 + 2 = 4\n#### 4", "reference": "It is 4."}
    assert read(write(tmp_path, line))[0].answer == "4"


def test_a_sample_with_a_reference_needs_no_answer(tmp_path: Path) -> None:
    line = {
        "prompt": "Write a poem.",
        "target": "Roses",
        "reference": "With roses.",
        "answer": None,
    }
    assert read(write(tmp_path, line)) == [Sample("Write a poem.", "Roses", "With roses.", "")]


def test_a_label_is_read_and_may_be_left_out_or_empty(tmp_path: Path) -> None:
    path = write(tmp_path, {**GOOD, "label": " sums "}, GOOD, {**GOOD, "label": ""})
    assert [sample.label for sample in read(path)] == ["sums", "", ""]


def test_a_line_that_was_written_is_read_as_the_same_sample(tmp_path: Path) -> None:
    samples = [
        Sample("Größe?", "≈ 2 m\n#### 2", "Es sind 2 m.", "2", "Maße"),
        Sample("Write a poem.", "Roses", "With roses.", ""),
    ]
    lines = [jsonl.line(sample) for sample in samples]
    assert lines[1] == (
        '{"prompt": "Write a poem.", "target": "Roses", "reference": "With roses."}\n'
    )
    assert read(write(tmp_path, *lines)) == samples


def test_without_a_reference_the_prompt_and_the_answer_make_one(tmp_path: Path) -> None:
    line = {"prompt": "Add 2 and 2.", "target": "2 + 2 = 4", "answer": "4"}
    assert read(write(tmp_path, line))[0].reference == (
        "Consult the standard answer to the following question, then give your own answer to it "
        "step by step.\n\n### Question:\nAdd 2 and 2.\n\n### Standard answer:\n4"
    )


def test_blank_lines_and_a_byte_order_mark_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line + b"\n\n")
    assert len(read(path)) == 2


def test_other_line_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    target = "one\u2028two\u0085three"
    path = write(tmp_path, json.dumps({**GOOD, "target": target}, ensure_ascii=False), GOOD)
    assert [sample.target for sample in read(path)] == [target, "2 + 2 = 4"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": "Add', "is not JSON: Invalid control character at .column 16."),
        ('{"prompt": "Add"} {"target": "4"}', "is not JSON: Extra data .column 19."),
        ("[" * 100_000, "is not JSON: nested too deeply"),
        ('["Add", "4"]', "must be a JSON object, got list"),
        ({"prompt": "Add."}, 'needs the field "target"; its fields are: prompt'),
        ({"target": "4"}, 'needs the field "prompt"'),
        ({**GOOD, "target": ""}, '"target" must not be empty'),
        ({**GOOD, "target": " \n"}, '"target" must not be empty'),
        ({**GOOD, "prompt": ""}, '"prompt" must not be empty'),
        ({**GOOD, "prompt": 4}, '"prompt" must be a string, got int'),
        ({**GOOD, "answer": 4}, '"answer" must be a string, got int'),
        ({**GOOD, "label": 4}, '"label" must be a string, got int'),
        ({**GOOD, "label": " "}, '"label" must not be empty'),
        ({**GOOD, "reference": ["4"]}, '"reference" must be a string, got list'),
        ({**GOOD, "refrence": "4"}, 'unknown field "refrence"; a line may have prompt, target'),
        ({"prompt": "Add.", "target": "4"}, 'needs "reference", "answer" or a target'),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(tmp_path: Path, bad: Any, message: str) -> None:
    refuses(write(tmp_path, GOOD, "", bad, GOOD), 3, message)


def test_text_that_is_not_utf8_is_refused_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "caf\xe9"}\n')
    refuses(path, 2, "is not UTF-8 .byte 0xe9 at column 16")


def test_a_utf16_file_is_refused_as_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(GOOD), encoding="utf-16")
    refuses(path, 1, "is not UTF-8")


def test_half_a_surrogate_pair_is_refused_where_it_stands(tmp_path: Path) -> None:
    line = '{"prompt": "Add \\ud83d", "target": "4", "answer": "4"}'
    refuses(write(tmp_path, GOOD, line), 2, '"prompt" holds half a surrogate pair')
