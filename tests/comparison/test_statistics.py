"""Intervals and tests against values worked out by hand or taken from published tables."""

import math

import pytest

from lesft_testbed.comparison.statistics import (
    estimate,
    holm,
    mcnemar,
    paired_t_test,
    verdict,
)


def test_a_t_interval_is_mean_and_table_value_times_standard_error() -> None:
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)  # t of 4 degrees of freedom at 97.5%
    assert (found.count, found.mean) == (5, 3.0)
    assert found.sd == pytest.approx(math.sqrt(2.5))
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half), abs=1e-6)


def test_two_values_have_a_very_wide_interval() -> None:
    found = estimate([0.0, 1.0])
    assert found.high == pytest.approx(0.5 + 12.706205 * math.sqrt(0.5) / math.sqrt(2), abs=1e-5)


def test_one_value_has_no_interval() -> None:
    found = estimate([0.4])
    assert (found.count, found.mean, found.sd, found.low, found.high) == (1, 0.4, None, None, None)


def test_the_paired_t_test_has_the_p_of_student_s_own_example() -> None:
    # Student (1908): additional hours of sleep; t = 4.0621 with 9 degrees of freedom, p = 0.00283.
    gained = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    assert paired_t_test(gained) == pytest.approx(0.002833, abs=1e-6)


def test_the_paired_t_test_of_two_pairs_is_worked_out_with_the_arctangent() -> None:
    # One degree of freedom is Cauchy's distribution; differences 1 and 3 have t = 2.
    assert paired_t_test([1.0, 3.0]) == pytest.approx(1 - 2 / math.pi * math.atan(2))


def test_no_test_is_made_of_one_pair_or_without_any_spread() -> None:
    assert paired_t_test([0.3]) is None
    assert paired_t_test([0.1 - 0.05, 0.2 - 0.15, 0.4 - 0.35]) is None  # equal but for rounding
    assert paired_t_test([0.0, 0.0, 0.0]) == 1.0


def test_holm_multiplies_by_the_tests_left_and_never_falls() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_a_test_that_could_not_be_made_still_counts_for_holm() -> None:
    assert holm([0.01, None, 0.02]) == pytest.approx([0.03, None, 0.04])


def test_mcnemar_counts_disagreements_and_has_the_binomial_p() -> None:
    pairs = [(True, True)] * 50 + [(True, False)] * 8 + [(False, True)] * 2 + [(False, False)] * 5
    found = mcnemar(pairs)
    assert (found.only_method, found.only_reference, found.questions) == (8, 2, 65)
    assert found.p == pytest.approx(2 * (1 + 10 + 45) / 2**10)


def test_mcnemar_without_disagreement_has_p_one() -> None:
    assert mcnemar([(True, True), (False, False)]).p == 1.0


def test_a_verdict_needs_a_small_corrected_p() -> None:
    assert verdict(0.1, 0.049, higher_is_better=True) == "better"
    assert verdict(0.1, 0.049, higher_is_better=False) == "worse"
    assert verdict(-0.1, 0.001, higher_is_better=False) == "better"
    assert verdict(0.9, 0.05, higher_is_better=True) == "no difference shown"
    assert verdict(0.9, None, higher_is_better=True) == "not tested"
