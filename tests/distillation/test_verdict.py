import pytest

from lesft_client.data.answer_values import same_answer
from lesft_client.distillation.verdict import Verdict, judge


def kept(text: str, answer: str = "18") -> str:
    verdict = judge(text, "stop", answer)
    assert verdict.fault is None, verdict
    return verdict.target


def fault(text: str, answer: str = "18", finish_reason: str | None = "stop") -> str | None:
    verdict = judge(text, finish_reason, answer)
    assert verdict.target == ""
    return verdict.fault


def test_a_right_final_line_is_kept_as_it_stands() -> None:
    assert kept("9 * 2 = 18\n#### 18") == "9 * 2 = 18\n#### 18"


@pytest.mark.parametrize(
    "line",
    [
        "#### $18",
        "#### 18 dollars.",
        "#### 18.00",
        "**#### 18**",
        "#### **18**",
        "####18",
        "#### \\boxed{18}",
        "#### The answer is 18.",
        "####\n18",
        "#### $18$",
        "#### \\$18 per day",
    ],
)
def test_the_final_line_is_put_into_the_data_sets_form(line: str) -> None:
    assert kept(f"9 * 2 = 18\n{line}") == "9 * 2 = 18\n#### 18"


@pytest.mark.parametrize(
    "text",
    [
        "9 * 2 = \\boxed{18}",
        "So it is\n\\[\n\\boxed{\\text{18 eggs}}\n\\]",
        "9 * 2 = 18.\nThe answer is 18.",
        "9 * 2 = 18.\n**Final Answer:** $18",
        "9 * 2 = 18.\n### Answer: 18",
        "Hence the answer is: \\(18\\).",
    ],
)
def test_an_answer_stated_otherwise_gets_a_final_line_below(text: str) -> None:
    assert kept(text) == f"{text}\n#### 18"


def test_numbers_are_compared_as_numbers() -> None:
    assert same_answer("18.00", "18")
    assert same_answer("-0.50", "-0.5")
    assert not same_answer("180", "18")
    assert kept("so\n#### 1,080 dollars", "1080") == "so\n#### 1080"
    assert kept("so\n#### \N{MINUS SIGN}3", "-3") == "so\n#### -3"


def test_letters_and_words_are_compared_whatever_their_case() -> None:
    assert kept("Banks hold money.\n#### B) bank", "B") == "Banks hold money.\n#### B"
    assert kept("Banks hold money.\nThe answer is (B) bank 24.", "B").endswith("24.\n#### B")
    assert kept("Of course.\n#### paris", "Paris") == "Of course.\n#### Paris"
    assert fault("Banks hold money.\n#### C", "B") == "wrong"
    assert fault("Yes.\n#### NaN", "nan?") == "wrong"


def test_a_wrong_answer_is_not_kept_although_the_right_number_occurs() -> None:
    assert fault("9 * 2 = 18, and 18 + 1 = 19\n#### 19") == "wrong"
    assert fault("The answer is 18.\n#### 19") == "wrong"
    assert fault("9 * 2 = \\boxed{18}\n#### 19") == "wrong"


@pytest.mark.parametrize(
    "text",
    [
        "9 * 2 = 18",
        "9 * 2 = 18\n#### 18 or 20",
        "9 * 2 = 18\n#### 18 more than the number of hens that were there before",
        "9 * 2 = 18\n####",
        "\\boxed{18} eggs, I think.\nBut who knows?",
        "#### 18. Counting the eggs\nThere are many.",
    ],
)
def test_an_answer_that_is_not_clear_is_not_kept(text: str) -> None:
    assert fault(text) == "unclear"


def test_a_comma_that_groups_no_thousands_makes_a_number_unclear() -> None:
    assert fault("so\n#### 1,8") == "unclear"
    assert kept("so\n#### 12,345.5", "12345.5") == "so\n#### 12345.5"


def test_what_follows_a_bare_final_line_is_cut_off() -> None:
    text = "9 * 2 = 18\n#### 18\n\nLet me know whether that helps!"
    assert kept(text) == "9 * 2 = 18\n#### 18"


def test_headings_are_no_final_lines() -> None:
    text = "#### Step 1: count\n9 * 2 = 18\n#### Result\nThe answer is 18."
    assert kept(text) == f"{text}\n#### 18"


def test_an_answer_that_was_cut_off_is_not_kept_though_it_reads_right() -> None:
    assert fault("9 * 2 = 18\n#### 18", finish_reason="length") == "cut off"
    assert fault("9 * 2 = 18\n#### 18", finish_reason="content_filter") == "cut off"
    assert judge("9 * 2 = 18\n#### 18", None, "18").fault is None


def test_thoughts_are_no_part_of_the_target() -> None:
    assert kept("<think>\nIs it 17?\n#### 17\n</think>\n\n9 * 2 = 18\n#### 18") == (
        "9 * 2 = 18\n#### 18"
    )
    assert fault("<think>\n9 * 2 = 18\n#### 18") == "cut off"


def test_an_answer_without_its_working_is_not_kept() -> None:
    assert fault("#### 18") == "no working"
    assert fault("**#### 18**") == "no working"


def test_no_text_is_a_fault_of_its_own() -> None:
    assert judge(" \n", "stop", "18") == Verdict(fault="empty")
    assert fault("half a \ud83d\n#### 18") == "empty"


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("10,000-12,000", "10"),
        ("21 March 1999", "21 April 1999"),
        ("E. coli", "E"),
        ("U.S. Supreme Court", "U.K. Supreme Court"),
    ],
)
def test_an_answer_that_only_begins_with_a_number_or_a_letter_counts_as_a_whole(
    right: str, wrong: str
) -> None:
    assert judge(f"so it is\n#### {right}", "stop", right).fault is None
    assert judge(f"so it is\n#### {wrong}", "stop", right).fault == "wrong"
