import pytest

from lesft_client.data.answers import final_answer, plain_answer, with_final_line


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1,080", "1080"),
        ("$1,080.", "1080"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("12.50 dollars", "12.50"),
        ("18km", "18"),
        ("20%", "20"),
        ("1/2", "1/2"),
        ("12.5/3", "12.5/3"),
        ("3:15", "3:15"),
        ("2024-05-01", "2024-05-01"),
        ("B", "B"),
        ("B) bank", "B"),
        ("(C).", "C"),
        ("A dog", "A dog"),
        ("B. bank", "B. bank"),
        ("U.S. Supreme Court", "U.S. Supreme Court"),
        ("J. K. Rowling", "J. K. Rowling"),
        ("E. coli", "E. coli"),
        ("10,000-12,000", "10,000-12,000"),
        ("1,200/7", "1,200/7"),
        ("1 1/2", "1 1/2"),
        ("21 March 1999", "21 March 1999"),
        ("42nd Street", "42nd Street"),
        ("3M", "3M"),
        ("1.5 million", "1.5 million"),
        (" New York. ", "New York"),
        ("", ""),
    ],
)
def test_an_answer_has_one_plain_form(text: str, answer: str) -> None:
    assert plain_answer(text) == answer


def test_the_final_answer_is_what_the_last_marked_line_says() -> None:
    assert final_answer("#### 3\nNo, wait.\n#### 1,204 apples\nThat is all.") == "1204"


@pytest.mark.parametrize("text", ["The answer is 18.", "", "18\n####", "18\n####  \n"])
def test_a_text_without_a_marked_answer_has_none(text: str) -> None:
    assert final_answer(text) == ""


def test_a_final_line_written_is_the_final_answer_read() -> None:
    solution = with_final_line("2 + 2 = 4", "4")
    assert solution == "2 + 2 = 4\n#### 4"
    assert final_answer(solution) == "4"
