"""Which parts of a cohort's step are one batch."""

import pytest

from lesft.cohort_batch import Part, grouped
from tests.training.by_hand import random_part


def parts_of(*lengths: tuple[int, ...]) -> list[Part]:
    """One client each, with samples of these base lengths; reference ones are 3 longer."""
    return [
        random_part(f"client-{number}", 0.1, [(length, 2) for length in of_one])
        for number, of_one in enumerate(lengths)
    ]


def lengths_of(groups: list[list[Part]]) -> list[list[tuple[int, ...]]]:
    return [[part.micro_batch.base.lengths for part in group] for group in groups]


def test_what_fits_is_one_batch_in_its_order() -> None:
    parts = parts_of((20,), (5,), (9, 12))
    assert grouped(parts, 4 * 23) == [parts]


@pytest.mark.parametrize(
    ("most_tokens", "expected"),
    [
        (4 * 23 - 1, [[(5,), (9, 12)], [(20,)]]),
        (3 * 15, [[(5,), (9, 12)], [(20,)]]),
        (3 * 15 - 1, [[(5,)], [(9, 12)], [(20,)]]),
        (1, [[(5,)], [(9, 12)], [(20,)]]),
    ],
)
def test_what_does_not_is_several_of_like_lengths(
    most_tokens: int, expected: list[list[tuple[int, ...]]]
) -> None:
    """Padded, both of the short ones are three sequences of 15 tokens on the reference path."""
    assert lengths_of(grouped(parts_of((20,), (5,), (9, 12)), most_tokens)) == expected


def test_parts_as_long_as_each_other_stay_in_their_order() -> None:
    groups = grouped(parts_of((9,), (9,), (9,), (9,)), 2 * 12)
    assert [[part.client_id for part in group] for group in groups] == [
        ["client-0", "client-1"],
        ["client-2", "client-3"],
    ]


def test_without_a_reference_path_the_base_path_counts() -> None:
    parts = [random_part("a", 0.5, [(9, 2)], with_reference=False) for _ in range(2)]
    assert len(grouped(parts, 18)) == 1
    assert len(grouped(parts, 17)) == 2
