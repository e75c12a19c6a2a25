"""Which rounds the page's curve shows."""

import math
from itertools import pairwise

import pytest

from lesft.live import Curve
from lesft.live.curve import MAX_POINTS, thinned


def test_a_short_run_is_shown_whole() -> None:
    assert Curve.of([2.0, 1.5, None], [1.0, None, 0.5]) == Curve(
        rounds=[1, 2, 3], loss=[2.0, 1.5, None], nll=[1.0, None, 0.5], total=3
    )
    assert Curve.of([], []) == Curve(rounds=[], loss=[], nll=[], total=0)
    assert thinned(MAX_POINTS) == list(range(500))


@pytest.mark.parametrize("count", [501, 502, 998, 999, 1000, 1001, 12_345, 100_000])
def test_a_long_run_is_thinned_evenly_and_keeps_its_ends(count: int) -> None:
    kept = thinned(count)
    assert (kept[0], kept[-1]) == (0, count - 1)
    assert 200 < len(kept) <= MAX_POINTS
    steps = {after - before for before, after in pairwise(kept[:-1])}
    assert len(steps) == 1
    assert kept[-1] - kept[-2] <= steps.pop()


def test_the_points_of_a_thinned_curve_are_those_of_their_rounds() -> None:
    loss = [float(index) for index in range(1200)]
    curve = Curve.of(loss, [-value for value in loss])
    assert curve.total == 1200
    assert curve.loss == [round_number - 1.0 for round_number in curve.rounds]
    assert curve.nll == [1.0 - round_number for round_number in curve.rounds]


def test_a_growing_curve_keeps_the_points_that_it_has() -> None:
    assert set(thinned(1200)) - {1199} <= set(thinned(1300))


def test_what_is_not_finite_is_null_in_json() -> None:
    assert '"loss":[null,null]' in Curve.of([math.nan, math.inf], [1.0, 2.0]).model_dump_json()
