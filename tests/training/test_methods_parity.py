"""Every preset of the compared methods against the method in plain torch and peft.

With one client, and wherever no two samples share a batch, equal bit for bit; else within rounding.
"""

import math
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from lesft.adapters import attach_lora, lora_state
from lesft.spec import LoraSpec
from lesft_testbed.methods import METHODS
from tests.harness import random_samples, save_tiny_model
from tests.training.method_runs import SEED, Data, MethodRuns, draw
from tests.training.plain_methods import (
    PLAIN_METHODS,
    Outcome,
    PlainMethod,
    State,
    is_front,
    train_plainly,
)

WITHIN = 1e-5

ONE = [random_samples(3, seed=0)]
THREE = [random_samples(size, seed) for seed, size in enumerate((3, 5, 8))]

UNIFORM = [name for name in METHODS if name.startswith("uniform-")]


@dataclass
class PlainRuns:
    """Plain trainings of one model from one adapter. Methods that are the same share theirs."""

    base: PreTrainedModel
    initial: State
    _done: dict[tuple[PlainMethod, int], Outcome] = field(default_factory=dict)

    def outcome(self, method: str, data: Data) -> Outcome:
        plain, clients = PLAIN_METHODS[method], len(data)
        if (plain, clients) not in self._done:
            self._done[plain, clients] = train_plainly(plain, self.base, self.initial, data, draw)
        return self._done[plain, clients]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> MethodRuns:
    return MethodRuns(model, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def plain_runs(model: Path) -> PlainRuns:
    base, other = (AutoModelForCausalLM.from_pretrained(model) for _ in range(2))
    attach_lora(other, LoraSpec(), SEED, 0)
    return PlainRuns(base, lora_state(other, 0))


# ---------------------------------------------------------------------- parity


@pytest.mark.parametrize("method", METHODS)
def test_a_preset_with_one_client_is_the_plain_method_bit_for_bit(
    runs: MethodRuns, plain_runs: PlainRuns, method: str
) -> None:
    assert_identical(runs.outcome(method, ONE), plain_runs.outcome(method, ONE))


@pytest.mark.parametrize("method", METHODS)
def test_a_preset_with_several_clients_is_the_plain_method(
    runs: MethodRuns, plain_runs: PlainRuns, method: str
) -> None:
    ours, plain = runs.outcome(method, THREE), plain_runs.outcome(method, THREE)
    if method in ("fedavg", "lesft-fl"):
        assert_identical(ours, plain)  # each client has a batch to itself
    assert ours.class_counts == plain.class_counts
    assert ours.losses == [pytest.approx(losses, abs=WITHIN) for losses in plain.losses]
    for adapter, expected in zip(ours.adapters, plain.adapters, strict=True):
        assert largest_difference(adapter, expected) < WITHIN


def assert_identical(ours: Outcome, plain: Outcome) -> None:
    assert ours.losses == plain.losses
    assert ours.class_counts == plain.class_counts
    for adapter, expected in zip(ours.adapters, plain.adapters, strict=True):
        assert largest_difference(adapter, expected) == 0


def largest_difference(one: State, other: State) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_every_preset_has_its_plain_method() -> None:
    assert PLAIN_METHODS.keys() == METHODS.keys()


# ---------------------------------------------------------------------- what parity is worth


def test_methods_that_differ_come_to_different_results(plain_runs: PlainRuns) -> None:
    """Else it would say nothing that each preset equals its own."""
    distinct = {plain: name for name, plain in PLAIN_METHODS.items()}  # uniform-1 has two others
    assert len(distinct) == len(METHODS) - 2
    for one, other in combinations(distinct.values(), 2):
        first, second = (plain_runs.outcome(method, THREE) for method in (one, other))
        if one in UNIFORM and other in UNIFORM:
            # AdamW takes no notice of a loss's scale, but for the rounds that are clipped.
            assert not math.isclose(first.losses[0][0], second.losses[0][0], rel_tol=0.2)
            continue
        # These two differ only in how old the weights of tokens are, by a few rounds.
        far = 30 if {one, other} == {"lesft", "lesft-once"} else 100
        difference = largest_difference(first.adapters[0], second.adapters[0])
        assert difference > far * WITHIN, f"{one} and {other}"


def test_what_is_trained_moves_far_beyond_rounding_and_the_rest_not_at_all(
    plain_runs: PlainRuns,
) -> None:
    for method in METHODS:
        [adapter] = plain_runs.outcome(method, ONE).adapters
        for name, value in adapter.items():
            moved = (value - plain_runs.initial[name]).abs().max()
            still = method == "uniform-0" or (method == "splitfrozen" and is_front(name))
            assert moved == 0 if still else moved > 100 * WITHIN


@pytest.mark.parametrize("method", ["lesft", "lesft-contiguous"])
def test_tokens_of_every_class_take_part(plain_runs: PlainRuns, method: str) -> None:
    rounds = [counts for rows in plain_runs.outcome(method, THREE).class_counts for counts in rows]
    totals = [sum(counts[name] for counts in rounds if counts is not None) for name in range(3)]
    assert min(totals) >= 10
