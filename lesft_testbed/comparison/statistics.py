"""Means, intervals and tests over seeds, and their assumptions: plain numbers in and out.

Over seeds: a seed draws training data, test questions and every random number of a run, so runs of
different seeds are taken as independent repetitions, and two methods of the same seed as a pair.
With few seeds the t-interval and the paired t-test rest on the assumption that what differs between
seeds is about normal; they cannot check it. Independence is wholly true of generated problems only:
- Of one file, each seed holds out another tenth: what one seed tests on another trains on, and some
  questions come in several seeds. Intervals are then somewhat too narrow.
- Where all questions of a fixed test split are asked, all seeds ask the same: intervals are then
  about training anew with the same questions, and say nothing about other questions.

Over questions (McNemar): takes the trained adapters as given and only the questions as drawn, each
of which may count once. It says whether these adapters differ, not whether the methods do.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel

ALPHA = 0.05
_CONFIDENCE = 0.95
_ROUNDING = 1e-9
"""Spread below this share of the values themselves is rounding and no spread."""

Verdict = Literal["better", "worse", "no difference shown", "not tested"]


class Estimate(BaseModel):
    """The mean of one figure over seeds, with its 95% t-interval where there are two or more."""

    count: int
    mean: float
    sd: float | None
    """Sample standard deviation (n - 1); null for one value."""
    low: float | None
    high: float | None


class McNemar(BaseModel):
    """Questions on which two methods of the same seed disagree; each question once."""

    only_method: int
    """Answered right by the method alone."""
    only_reference: int
    questions: int
    p: float
    """Two-sided and exact: a binomial test of 1/2 on the disagreements; 1 without any."""


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, standard deviation and 95% t-interval (n - 1 degrees of freedom) of one value or more.

    The interval of a share is not cut at 0 and 1.
    """
    # Takes half a second to load; only where it is used.
    from scipy.stats import t

    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(count=1, mean=mean, sd=None, low=None, high=None)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(t.ppf((1 + _CONFIDENCE) / 2, count - 1)) * sd / math.sqrt(count)
    return Estimate(count=count, mean=mean, sd=sd, low=mean - half, high=mean + half)


def paired_t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p of the paired t-test that the mean difference is zero.

    None where it says nothing: for fewer than two pairs, and where all differences are the same but
    not zero, for the spread cannot then be estimated. 1 where all are zero.
    """
    from scipy.stats import t

    if len(differences) < 2:
        return None
    found = estimate(differences)
    assert found.sd is not None
    if found.sd <= _ROUNDING * max(map(abs, differences)):
        return 1.0 if all(difference == 0 for difference in differences) else None
    statistic = found.mean / (found.sd / math.sqrt(found.count))
    return float(2 * t.sf(abs(statistic), found.count - 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction over one family (Scand. J. Statistics 6, 1979), in order.

    Tests that could not be made (None) stay so, and count for the family's size all the same.
    """
    family = len(p_values)
    corrected: list[float | None] = [None] * family
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (family - rank) * p))
        corrected[index] = largest
    return corrected


def mcnemar(pairs: Iterable[tuple[bool, bool]]) -> McNemar:
    """McNemar's exact test on pairs of right answers, (method, reference), one a question.

    Each question may come once only: asked again, it is no further evidence.
    """
    from scipy.stats import binomtest

    questions = only_method = only_reference = 0
    for method, reference in pairs:
        questions += 1
        only_method += method and not reference
        only_reference += reference and not method
    differing = only_method + only_reference
    p = float(binomtest(only_method, differing, 0.5).pvalue) if differing else 1.0
    return McNemar(only_method=only_method, only_reference=only_reference, questions=questions, p=p)


def verdict(difference: float, p_corrected: float | None, higher_is_better: bool) -> Verdict:
    """What may be said of a method that differs from the reference by `difference`.

    "better" or "worse" only when the corrected p is below ALPHA.
    """
    if p_corrected is None:
        return "not tested"
    if p_corrected >= ALPHA:
        return "no difference shown"
    return "better" if (difference > 0) == higher_is_better else "worse"
