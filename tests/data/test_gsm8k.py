import pytest

from lesft.errors import DataError
from lesft_client.data import gsm8k
from lesft_client.data.rows import Row

ROW = Row(
    "train.jsonl:1",
    {
        "question": "Ada buys 3 crates of 400 nails.  How many nails does she buy? ",
        "answer": "One crate has 400 nails.\n"
        "She buys 3*400 = <<3*400=1200>>1200 nails.\n#### 1,200",
    },
)


def test_calculator_marks_go_and_the_worked_solution_stays() -> None:
    [sample] = gsm8k.samples([ROW])
    assert sample.target == "One crate has 400 nails.\nShe buys 3*400 = 1200 nails.\n#### 1200"


def test_the_answer_is_a_number_without_commas() -> None:
    assert gsm8k.samples([ROW])[0].answer == "1200"


def test_the_base_prompt_asks_for_steps_and_a_final_number() -> None:
    assert gsm8k.samples([ROW])[0].prompt == (
        "Solve the following problem step by step. End with a last line `#### <number>`.\n\n"
        "Ada buys 3 crates of 400 nails.  How many nails does she buy?"
    )


def test_the_reference_prompt_shows_the_answer_but_not_the_solution() -> None:
    assert gsm8k.samples([ROW])[0].reference == (
        "Consult the standard answer to the following question, then give your own answer to it "
        "step by step.\n\n"
        "### Question:\nAda buys 3 crates of 400 nails.  How many nails does she buy?\n\n"
        "### Standard answer:\n1200"
    )


@pytest.mark.parametrize("answer", ["It is 5.", "It is 5.\n####"])
def test_a_row_without_a_final_answer_is_refused_by_its_place(answer: str) -> None:
    row = Row("train.jsonl:7", {"question": "How many?", "answer": answer})
    with pytest.raises(DataError, match=r"^train\.jsonl:7: .*#### <number>"):
        gsm8k.samples([row])
