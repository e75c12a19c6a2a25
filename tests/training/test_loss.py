"""The token weights of METHOD section 4 against a plain loop in Python floats."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lesft.loss import TokenClass, sample_token_weights, slice_log_probs, token_weights
from lesft.spec import LossSpec
from tests.training.by_hand import single, weigh

exhaustive = settings(deadline=None, derandomize=True, max_examples=150)

DEFAULT = LossSpec()
SALIENT, SUB_SALIENT, IRRELEVANT = TokenClass
JUST_ABOVE = single(0.95) + 2**-24
JUST_BELOW = single(0.95) - 2**-24
SMALLEST_DENORMAL = 2.0**-149

thresholds = st.sampled_from([0.95, 0.9, 0.8, 0.5, 0.05])
gammas = st.floats(0.2, 8)


def probabilities(threshold: float) -> st.SearchStrategy[float]:
    """Float32 values in [0, 1], often where they matter."""
    tie = torch.tensor(threshold)
    neighbours = [float(torch.nextafter(tie, torch.tensor(end))) for end in (0.0, 1.0)]
    edges = [0.0, 1.0, 1 - 2**-24, float(tie), *neighbours, SMALLEST_DENORMAL, 1e-38, 1e-6]
    return st.one_of(st.sampled_from(edges).map(single), st.floats(0, 1, width=32))


@st.composite
def specs(draw: st.DrawFn) -> LossSpec:
    return LossSpec(
        salient_threshold=draw(thresholds),
        gamma_salient=draw(gammas),
        gamma_sub_salient=draw(gammas),
        gamma_irrelevant=draw(gammas),
        clustering=draw(st.sampled_from(["global", "contiguous"])),
        cluster_similarity=draw(st.sampled_from([-0.4, 0.3, 0.6, 0.9])),
    )


@st.composite
def samples(draw: st.DrawFn, spec: LossSpec) -> tuple[list[float], list[list[float]]]:
    """P̃ and hidden states of 1 to 30 tokens: few directions, many lengths, some zero vectors."""
    num_tokens = draw(st.integers(1, 30))
    directions = st.lists(st.integers(-2, 2), min_size=3, max_size=3)
    scales = st.sampled_from([1e-3, 0.3, 1.0, 7.0, 1e3])
    hidden = [
        [single(x * scale) for x in draw(directions)]
        for scale in draw(st.lists(scales, min_size=num_tokens, max_size=num_tokens))
    ]
    probs = st.lists(
        probabilities(spec.salient_threshold), min_size=num_tokens, max_size=num_tokens
    )
    return draw(probs), hidden


def weigh_tensors(
    probs: list[float], hidden: list[list[float]], spec: LossSpec
) -> tuple[list[float], list[int]]:
    weights, classes = sample_token_weights(torch.tensor(probs), torch.tensor(hidden), spec)
    assert classes is not None
    return weights.tolist(), classes.tolist()


# ---------------------------------------------------------------------- against the plain loop


@exhaustive
@given(st.data())
def test_weights_and_classes_are_those_of_a_plain_loop(data: st.DataObject) -> None:
    spec = data.draw(specs())
    probs, hidden = data.draw(samples(spec))
    expected = weigh(probs, hidden, spec)
    assume(expected.margin > 1e-5)
    weights, classes = weigh_tensors(probs, hidden, spec)
    assert classes == expected.classes
    assert weights == pytest.approx(expected.weights, rel=2e-5, abs=1e-6)


@exhaustive
@given(st.data())
def test_weights_lie_in_their_class_range_and_grow_with_the_reference_probability(
    data: st.DataObject,
) -> None:
    spec = data.draw(specs())
    probs = sorted(data.draw(st.lists(probabilities(spec.salient_threshold), max_size=30)))
    threshold = single(spec.salient_threshold)
    above = [p for p in probs if p > threshold]
    below = [p for p in probs if p <= threshold]
    for kind, values, low, high in (
        (SALIENT, above, 1, 2),
        (SUB_SALIENT, below, 0, 1),
        (IRRELEVANT, below, 0, 1),
    ):
        classes = torch.full((len(values),), kind)
        weights = token_weights(torch.tensor(values), classes, spec).tolist()
        assert all(low <= weight <= high for weight in weights)
        assert weights == pytest.approx(sorted(weights), rel=1e-6)  # pow is right to its last bit


@pytest.mark.parametrize(
    ("kind", "prob", "weight"),
    [
        (SALIENT, 1.0, 2.0),
        (SALIENT, 0.975, 1 + 0.5**5),
        (SALIENT, JUST_ABOVE, 1.0),
        (SUB_SALIENT, 0.95, 1.0),
        (SUB_SALIENT, 0.475, 0.5**0.3),
        (SUB_SALIENT, 0.0, 0.0),
        (IRRELEVANT, 0.95, 1.0),
        (IRRELEVANT, 0.475, 0.5**0.6),
        (IRRELEVANT, 1e-38, (1e-38 / 0.95) ** 0.6),
        (IRRELEVANT, 0.0, 0.0),
    ],
)
def test_weights_at_the_defaults_are_those_of_equation_16(
    kind: TokenClass, prob: float, weight: float
) -> None:
    weights = token_weights(torch.tensor([prob]), torch.tensor([kind]), DEFAULT)
    assert weights.dtype == torch.float32
    assert weights.item() == pytest.approx(weight, rel=2e-6, abs=1e-30)


def test_a_denormal_probability_has_a_tiny_weight_that_is_not_zero() -> None:
    probs = torch.tensor([SMALLEST_DENORMAL] * 2)
    weights = token_weights(probs, torch.tensor([SUB_SALIENT, IRRELEVANT]), DEFAULT)
    assert weights.tolist() == pytest.approx([3.6e-14, 1.27e-27], rel=0.05)


# ---------------------------------------------------------------------- classes


def test_salient_is_strictly_above_the_threshold() -> None:
    probs = [0.0, JUST_BELOW, single(0.95), JUST_ABOVE, 1.0]
    apart = torch.eye(5).tolist()
    _, classes = weigh_tensors(probs, apart, DEFAULT)
    assert classes == [IRRELEVANT, IRRELEVANT, IRRELEVANT, SALIENT, SALIENT]


@pytest.mark.parametrize("clustering", ["global", "contiguous"])
@pytest.mark.parametrize(("similarity", "kind"), [(0.5, SUB_SALIENT), (0.50001, IRRELEVANT)])
def test_a_similarity_equal_to_the_threshold_is_near(
    clustering: Literal["global", "contiguous"], similarity: float, kind: TokenClass
) -> None:
    spec = LossSpec(clustering=clustering, cluster_similarity=similarity)
    one_half = [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]  # their cosine, exactly
    _, classes = weigh_tensors([1.0, 0.5], one_half, spec)
    assert classes == [SALIENT, kind]


def test_similarity_ignores_the_length_of_the_vectors() -> None:
    hidden = [[1e-3, 0.0], [1e4, 1e3], [1e3, 1e4]]
    _, classes = weigh_tensors([1.0, 0.5, 0.5], hidden, DEFAULT)
    assert classes == [SALIENT, SUB_SALIENT, IRRELEVANT]


def test_global_clustering_takes_the_nearest_salient_token_wherever_it_stands() -> None:
    hidden = directions(0, 100, 10, 100, 200)
    _, classes = weigh_tensors([1.0, 0.5, 0.5, 1.0, 0.5], hidden, DEFAULT)
    assert classes == [SALIENT, SUB_SALIENT, SUB_SALIENT, SALIENT, IRRELEVANT]


CONTIGUOUS = LossSpec(clustering="contiguous")


def test_contiguous_clustering_follows_a_centre_that_moves() -> None:
    # After 45 degrees the centre is at 22.5, from where 70 is near; from 0 it is not.
    hidden = directions(0, 45, 70)
    _, classes = weigh_tensors([1.0, 0.5, 0.5], hidden, CONTIGUOUS)
    assert classes == [SALIENT, SUB_SALIENT, SUB_SALIENT]
    _, classes = weigh_tensors([1.0, 0.5, 0.5], hidden, DEFAULT)
    assert classes == [SALIENT, SUB_SALIENT, IRRELEVANT]


def test_contiguous_clustering_stops_at_the_first_token_that_is_not_near() -> None:
    _, classes = weigh_tensors([0.5, 0.5, 1.0, 0.5], directions(0, 120, 0, 5), CONTIGUOUS)
    assert classes == [IRRELEVANT, IRRELEVANT, SALIENT, SUB_SALIENT]


def test_contiguous_clustering_grows_left_first_and_carries_its_centre_to_the_right() -> None:
    # The centre is at 25 degrees after the left neighbour: -40 is no longer near.
    _, classes = weigh_tensors([0.5, 1.0, 0.5], directions(50, 0, -40), CONTIGUOUS)
    assert classes == [SUB_SALIENT, SALIENT, IRRELEVANT]
    _, classes = weigh_tensors([0.5, 1.0, 0.5], directions(-40, 0, 50), CONTIGUOUS)
    assert classes == [SUB_SALIENT, SALIENT, IRRELEVANT]


def test_contiguous_clustering_gives_every_salient_token_a_centre_of_its_own() -> None:
    # 40 degrees is out of reach of the centre that comes from 120 over 80, not of that from 0.
    probs = [0.5, 1.0, 0.5, 0.5, 1.0]
    _, classes = weigh_tensors(probs, directions(-50, 0, 40, 80, 120), CONTIGUOUS)
    assert classes == weigh(probs, directions(-50, 0, 40, 80, 120), CONTIGUOUS).classes
    assert classes == [SUB_SALIENT, SALIENT, IRRELEVANT, SUB_SALIENT, SALIENT]


@pytest.mark.parametrize("clustering", ["global", "contiguous"])
def test_degenerate_samples_have_finite_weights(
    clustering: Literal["global", "contiguous"],
) -> None:
    spec = LossSpec(clustering=clustering)
    zeros, same = [[0.0, 0.0]] * 3, [[1.0, 2.0]] * 3
    half = (0.5 / 0.95) ** 0.6
    for probs, hidden, expected_classes, expected_weights in (
        ([0.5, 1.0, 0.5], zeros, [IRRELEVANT, SALIENT, IRRELEVANT], [half, 2, half]),
        ([0.5, 0.5, 0.0], same, [IRRELEVANT] * 3, [half, half, 0]),
        ([1.0, 1.0, 1.0], same, [SALIENT] * 3, [2, 2, 2]),
        ([1.0], [[0.0, 0.0]], [SALIENT], [2]),
        ([0.0], [[1.0, 2.0]], [IRRELEVANT], [0]),
    ):
        weights, classes = weigh_tensors(probs, hidden, spec)
        assert classes == expected_classes
        assert weights == pytest.approx(expected_weights, rel=2e-6)


def directions(*degrees: float) -> list[list[float]]:
    return [[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]


# ---------------------------------------------------------------------- around the weights


@pytest.mark.parametrize("uniform_weight", [0.0, 0.25, 1.0, 2.0])
def test_uniform_weights_are_the_given_one_and_know_no_classes(uniform_weight: float) -> None:
    spec = LossSpec(token_weights="uniform", uniform_weight=uniform_weight)
    weights, classes = sample_token_weights(None, torch.randn(5, 3), spec)
    assert weights.tolist() == [uniform_weight] * 5
    assert classes is None


def test_a_token_weighs_its_own_probability_where_that_is_asked_for() -> None:
    """DFT, arXiv:2508.05629, equation 9: sg(P_t) before -log P_t; no classes."""
    spec = LossSpec(token_weights="probability")
    probs = [0.0, SMALLEST_DENORMAL, 0.25, single(0.95), JUST_ABOVE, 1.0]
    given = torch.tensor(probs, requires_grad=True)
    weights, classes = sample_token_weights(given, torch.randn(6, 3), spec)
    assert weights.tolist() == probs
    assert classes is None
    assert not weights.requires_grad
    assert not spec.needs_reference


@pytest.mark.parametrize("clustering", ["global", "contiguous"])
def test_weights_carry_no_gradient(clustering: Literal["global", "contiguous"]) -> None:
    probs = torch.tensor([0.5, 1.0, 0.9], requires_grad=True)
    hidden = torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    weights, _ = sample_token_weights(probs, hidden, LossSpec(clustering=clustering))
    assert not weights.requires_grad


def test_weights_of_bfloat16_inputs_are_computed_in_float32() -> None:
    probs = torch.tensor([0.5, 1.0], dtype=torch.bfloat16)
    hidden = torch.tensor(directions(10, 0)).bfloat16()
    weights, _ = sample_token_weights(probs, hidden, DEFAULT)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([(0.5 / 0.95) ** 0.3, 2.0], rel=2e-6)


def test_log_probs_are_taken_in_float32_and_do_not_overflow() -> None:
    logits = torch.tensor([[300.0, 0.0, 0.0], [1.0, 2.0, 3.0]], dtype=torch.bfloat16)
    log_probs = slice_log_probs(logits, torch.tensor([1, 2]))
    assert log_probs.dtype == torch.float32
    assert log_probs.tolist() == pytest.approx(
        [-300.0, 3 - math.log(math.exp(1) + math.exp(2) + math.exp(3))], rel=1e-6
    )
