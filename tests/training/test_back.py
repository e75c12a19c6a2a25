"""The back's training step against autograd through a plainly written whole computation."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import lesft.back
from lesft.adapters import lora_parameters, lora_state
from lesft.back import Back
from lesft.cohort_batch import Part
from lesft.errors import InvalidInput
from lesft.micro_batch import MicroBatch, Path, StepKey, StepResult, Targets
from lesft.spec import LossSpec, RunSpec
from lesft.split import back_hidden, head_logits
from lesft.weights import Checkpoint
from tests.harness import save_tiny_model
from tests.training.by_hand import (
    PlainPart,
    make_back,
    plain_forward,
    plain_part,
    random_part,
    run_spec,
)

FIRST = StepKey(0, 0)

# Random tokens have probabilities around 0.01; this threshold makes about a third of them salient.
MIXED: dict[str, Any] = {"salient_threshold": 0.012, "cluster_similarity": 0.2}

LOSSES = {
    "adaptive": LossSpec(**MIXED),
    "contiguous": LossSpec(**MIXED, clustering="contiguous"),
    "other gammas": LossSpec(
        **MIXED, gamma_salient=1.5, gamma_sub_salient=2.0, gamma_irrelevant=4.0
    ),
    "beside a plain term": LossSpec(**MIXED, base_nll_weight=0.5),
    "both paths trained": LossSpec(**MIXED, reference_nll_weight=0.7),
    "uniform": LossSpec(token_weights="uniform", uniform_weight=0.75),
    "base only": LossSpec(token_weights="uniform", uniform_weight=0.0, base_nll_weight=1.0),
    "reference only": LossSpec(
        token_weights="uniform", uniform_weight=0.0, reference_nll_weight=1.0
    ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_tiny_model(tmp_path_factory.mktemp("model")))


def two_clients(spec: LossSpec, key: StepKey = FIRST) -> list[Part]:
    """Unequal data, two samples and one, all of different lengths."""
    needed = spec.needs_reference
    return [
        random_part("ada", 0.3, [(12, 5), (17, 11)], key, needed),
        random_part("ben", 0.7, [(9, 1)], key, needed),
    ]


# ---------------------------------------------------------------------- the whole computation


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_equals_autograd_through_the_whole_computation(
    checkpoint: Checkpoint, name: str
) -> None:
    spec = run_spec(loss=LOSSES[name], accumulation=4)
    assert_step_equals_plain_one(make_back(checkpoint, spec), two_clients(spec.loss))


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_in_several_batches_equals_the_whole_computation(
    checkpoint: Checkpoint, name: str
) -> None:
    """Of 15 and 40 padded tokens: 12 is less than what the smaller one has on either path."""
    spec = run_spec(loss=LOSSES[name], accumulation=4)
    back = make_back(checkpoint, spec, most_tokens=12)
    assert_step_equals_plain_one(back, two_clients(spec.loss))


def test_the_losses_under_test_have_tokens_of_every_class(checkpoint: Checkpoint) -> None:
    for name in ("adaptive", "contiguous"):
        spec = run_spec(loss=LOSSES[name])
        results = make_back(checkpoint, spec).train_step(FIRST, two_clients(spec.loss))
        assert all(min(counts_of(result)) > 0 for result in results[:1]), name


lengths = st.integers(1, 30).flatmap(lambda t: st.tuples(st.integers(t + 1, t + 8), st.just(t)))


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    shapes=st.lists(st.lists(lengths, min_size=1, max_size=3), min_size=1, max_size=3),
    clustering=st.sampled_from(["global", "contiguous"]),
    base_nll_weight=st.sampled_from([0.0, 0.5, 1.0]),
    reference_nll_weight=st.sampled_from([0.0, 0.5, 1.0]),
    logits_slice=st.sampled_from([1, 7, 1024]),
)
def test_a_step_of_any_shape_equals_the_whole_computation(
    checkpoint: Checkpoint,
    shapes: list[list[tuple[int, int]]],
    clustering: Literal["global", "contiguous"],
    base_nll_weight: float,
    reference_nll_weight: float,
    logits_slice: int,
) -> None:
    loss = LossSpec(
        **MIXED,
        clustering=clustering,
        base_nll_weight=base_nll_weight,
        reference_nll_weight=reference_nll_weight,
    )
    spec = run_spec(loss=loss, accumulation=2, batch_size=3)
    parts = [random_part(f"c{i}", (i + 1) / 6, shape) for i, shape in enumerate(shapes)]
    assert_step_equals_plain_one(make_back(checkpoint, spec, logits_slice=logits_slice), parts)


def assert_step_equals_plain_one(back: Back, parts: Sequence[Part]) -> None:
    plain, plain_gradients = plain_step(back, parts)
    results = back.train_step(FIRST, parts)
    for result, expected, part in zip(results, plain, parts, strict=True):
        assert expected.margin > 1e-6, "this case is within rounding: choose another"
        assert result.key == FIRST
        assert result.loss == pytest.approx(expected.loss.item(), rel=1e-5)
        assert result.nll == pytest.approx(expected.nll, rel=1e-5)
        assert result.class_counts == expected.class_counts
        assert_near(result.base_gradient_ND, gradient_of(expected.base))
        if expected.reference is None:
            assert result.reference_gradient_ND is None
        else:
            assert result.reference_gradient_ND is not None
            assert_near(result.reference_gradient_ND, gradient_of(expected.reference))
        assert part.micro_batch.base.activations_ND.grad is None, "what came in is left alone"
    for parameter, gradient in zip(lora_parameters(back.model), plain_gradients, strict=True):
        assert_near(gradient_of(parameter), gradient)


def plain_step(back: Back, parts: Sequence[Part]) -> tuple[list[PlainPart], list[torch.Tensor]]:
    """Every client's part alone, and Φ's gradient of share_i / accumulation times its loss."""
    back.model.eval()
    plain = [plain_part(back.model, part.micro_batch, back.spec.loss) for part in parts]
    total = torch.zeros(())
    for result, part in zip(plain, parts, strict=True):
        total = total + part.share / back.spec.accumulation * result.loss
    total.backward()
    parameters = lora_parameters(back.model)
    gradients = [gradient_of(parameter) for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return plain, gradients


def gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    """The gradient; zeros where nothing depends on the tensor."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.clone()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, within: float = 1e-6) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=within)


def counts_of(result: StepResult) -> tuple[int, int, int]:
    assert result.class_counts is not None
    return result.class_counts


# ---------------------------------------------------------------------- a token's own probability


@pytest.mark.parametrize("base_nll_weight", [0.0, 0.5])
@pytest.mark.parametrize("logits_slice", [2, 1024])
def test_weights_that_are_the_tokens_own_probabilities_are_factors_without_gradient(
    checkpoint: Checkpoint, base_nll_weight: float, logits_slice: int
) -> None:
    """DFT: -(1/|y|) Σ sg(P_t) log P_t for each sample, by autograd on the whole computation."""
    loss = LossSpec(token_weights="probability", base_nll_weight=base_nll_weight)
    spec = run_spec(loss=loss)
    back = make_back(checkpoint, spec, logits_slice=logits_slice)
    part = random_part("ada", 1.0, [(12, 5)], with_reference=False)
    batch = part.micro_batch
    base = batch.base.activations_ND.clone().requires_grad_()
    back.model.eval()
    _, log_probs = plain_forward(back.model, base, batch.targets.ids_T)
    weights = [math.exp(log_p) + base_nll_weight for log_p in log_probs.tolist()]
    expected = torch.zeros(())
    for weight, log_p in zip(weights, log_probs, strict=True):
        expected = expected - weight * log_p / 5
    (expected / spec.accumulation).backward()  # type: ignore[no-untyped-call]
    gradients = [gradient_of(parameter) for parameter in lora_parameters(back.model)]
    for parameter in lora_parameters(back.model):
        parameter.grad = None

    [result] = back.train_step(FIRST, [part])
    assert result.loss == pytest.approx(expected.item(), rel=1e-5)
    assert result.nll == pytest.approx(-log_probs.mean().item(), rel=1e-5)
    assert result.class_counts is None
    assert result.reference_gradient_ND is None
    assert_near(result.base_gradient_ND, gradient_of(base), 1e-7)
    for parameter, gradient in zip(lora_parameters(back.model), gradients, strict=True):
        assert_near(gradient_of(parameter), gradient, 1e-7)
    assert any(gradient.abs().max() > 1e-5 for gradient in gradients)


def test_the_own_probability_is_that_of_the_path_that_trains_with_its_dropout(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward pass gives weight and loss: a token's term is -P log P of the same P."""
    spec = run_spec(loss=LossSpec(token_weights="probability"), **DROPOUT)
    back = make_back(checkpoint, spec)
    part = random_part("ada", 1.0, [(2, 1)], with_reference=False)
    [result] = back.train_step(FIRST, [part])
    assert result.loss == pytest.approx(math.exp(-result.nll) * result.nll, rel=1e-5)
    [plain] = back.score(part.micro_batch.base, part.micro_batch.targets)
    assert result.nll != pytest.approx(plain, rel=1e-3)


# ---------------------------------------------------------------------- clients that do not train


@pytest.mark.parametrize("name", ["adaptive", "both paths trained", "uniform"])
def test_where_clients_do_not_train_the_back_does_all_but_return_gradients(
    checkpoint: Checkpoint, name: str
) -> None:
    runs = []
    for train_front in (True, False):
        spec = run_spec(loss=LOSSES[name], train_front=train_front, accumulation=2)
        back = make_back(checkpoint, spec)
        results = back.train_step(FIRST, two_clients(spec.loss))
        gradients = [gradient_of(parameter) for parameter in lora_parameters(back.model)]
        runs.append((results, gradients))
    (trained, gradients), (frozen, same_gradients) = runs
    for result, other in zip(trained, frozen, strict=True):
        assert result.base_gradient_ND is not None
        assert (other.base_gradient_ND, other.reference_gradient_ND) == (None, None)
        numbers = (result.loss, result.nll, result.class_counts)
        assert (other.loss, other.nll, other.class_counts) == numbers
    assert any(gradient.any() for gradient in gradients)
    for one, another in zip(gradients, same_gradients, strict=True):
        assert torch.equal(one, another)


# ---------------------------------------------------------------------- slices of the logits


@pytest.mark.parametrize("name", ["adaptive", "both paths trained"])
def test_the_result_does_not_depend_on_the_slice_of_the_logits(
    checkpoint: Checkpoint, name: str
) -> None:
    spec = run_spec(loss=LOSSES[name])
    runs = []
    for logits_slice in (1024, 1, 3, 16):
        back = make_back(checkpoint, spec, logits_slice=logits_slice)
        results = back.train_step(FIRST, two_clients(spec.loss))
        gradients = [gradient_of(parameter) for parameter in lora_parameters(back.model)]
        gradients += [result.base_gradient_ND for result in results]
        numbers = [(result.loss, result.nll) for result in results]
        runs.append((numbers, [counts_of(result) for result in results], gradients))
    numbers, counts, gradients = runs[0]
    for other_numbers, other_counts, other_gradients in runs[1:]:
        assert torch.tensor(other_numbers) == pytest.approx(torch.tensor(numbers), abs=1e-6)
        assert other_counts == counts
        for gradient, other in zip(gradients, other_gradients, strict=True):
            torch.testing.assert_close(other, gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "passes"), [("adaptive", 2), ("uniform", 1)])
@pytest.mark.parametrize("logits_slice", [1, 3, 1024])
def test_the_head_never_sees_more_tokens_than_the_slice(
    checkpoint: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    passes: int,
    logits_slice: int,
) -> None:
    seen = []

    def spy(model: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden_ND))
        return head_logits(model, hidden_ND)

    monkeypatch.setattr(lesft.back, "head_logits", spy)
    spec = run_spec(loss=LOSSES[name])
    back = make_back(checkpoint, spec, logits_slice=logits_slice)
    parts = two_clients(spec.loss)
    back.train_step(FIRST, parts)
    assert sum(seen) == passes * 17  # target tokens; no other position has logits at all
    assert max(seen) == min(logits_slice, 17)

    seen.clear()
    back.score(parts[0].micro_batch.base, parts[0].micro_batch.targets)
    assert sum(seen) == 16
    assert max(seen) == min(logits_slice, 16)


# ---------------------------------------------------------------------- samples and clients


@pytest.mark.parametrize("clustering", ["global", "contiguous"])
def test_tokens_of_one_sample_never_make_those_of_another_sub_salient(
    checkpoint: Checkpoint, clustering: Literal["global", "contiguous"]
) -> None:
    """Two samples with the same base path, hence hidden states; only one has a salient token.

    Whoever looked beyond the sample would find a similarity of 1.
    """
    part = random_part("ada", 1.0, [(17, 11)])
    batch = part.micro_batch
    assert batch.reference is not None
    model = make_back(checkpoint, run_spec()).model
    other = random_part("eve", 1.0, [(17, 11)]).micro_batch.reference
    assert other is not None
    peaks = []
    for reference in (batch.reference, other):
        _, log_probs = plain_forward(model, reference.activations_ND, batch.targets.ids_T)
        peaks.append(log_probs.exp().max().item())
    assert peaks[0] != peaks[1]
    salient, dull = (batch.reference, other) if peaks[0] > peaks[1] else (other, batch.reference)
    spec = LossSpec(
        salient_threshold=sum(peaks) / 2, clustering=clustering, cluster_similarity=-1.0
    )

    one, two = (
        Part(name, MicroBatch(FIRST, batch.base, reference, batch.targets), 0.5)
        for name, reference in (("one", salient), ("two", dull))
    )
    back = make_back(checkpoint, run_spec(loss=spec))
    apart = [counts_of(result) for result in back.train_step(FIRST, [one, two])]
    assert apart[0][0] > 0
    assert apart[0][2] == 0, "every token is near the salient one"
    assert apart[1] == (0, 0, 11)

    joint = Part("both", join([one.micro_batch, two.micro_batch]), 1.0)
    back = make_back(checkpoint, run_spec(loss=spec, batch_size=2))
    [result] = back.train_step(FIRST, [joint])
    assert counts_of(result) == (apart[0][0], apart[0][1], 11)


def join(batches: Sequence[MicroBatch]) -> MicroBatch:
    """The batches' samples as one client's."""
    references = [batch.reference for batch in batches if batch.reference is not None]

    def join_paths(paths: Sequence[Path]) -> Path:
        lengths = tuple(length for path in paths for length in path.lengths)
        return Path(torch.cat([path.activations_ND for path in paths]), lengths)

    return MicroBatch(
        batches[0].key,
        join_paths([batch.base for batch in batches]),
        join_paths(references),
        Targets(
            torch.cat([batch.targets.ids_T for batch in batches]),
            tuple(length for batch in batches for length in batch.targets.lengths),
        ),
    )


def test_the_loss_is_a_mean_over_samples_not_over_tokens(checkpoint: Checkpoint) -> None:
    spec = run_spec(loss=LossSpec(token_weights="uniform"), batch_size=2)
    singles = [random_part(name, 1.0, [shape]) for name, shape in (("a", (5, 1)), ("b", (14, 9)))]
    losses = [make_back(checkpoint, spec).train_step(FIRST, [single])[0].loss for single in singles]
    pair = Part("pair", join([single.micro_batch for single in singles]), 1.0)
    [result] = make_back(checkpoint, spec).train_step(FIRST, [pair])
    assert abs(losses[0] - losses[1]) > 0.1
    assert result.loss == pytest.approx(sum(losses) / 2, rel=1e-6)
    assert result.nll == pytest.approx((losses[0] + 9 * losses[1]) / 10, rel=1e-6)


def test_a_client_weighs_as_much_as_its_share_of_the_data(checkpoint: Checkpoint) -> None:
    spec = run_spec(loss=LOSSES["adaptive"])
    alone = two_clients(spec.loss)
    [whole] = make_back(checkpoint, spec).train_step(FIRST, [Part("ada", alone[0].micro_batch, 1)])
    ada, ben = make_back(checkpoint, spec).train_step(FIRST, alone)
    assert_near(ada.base_gradient_ND, 0.3 * whole.base_gradient_ND, 1e-8)
    assert ada.loss == pytest.approx(whole.loss, rel=1e-6), "what is reported is unscaled"
    assert [len(r.base_gradient_ND) for r in (ada, ben)] == [12 + 17, 9]


# ---------------------------------------------------------------------- the reference path

DROPOUT: dict[str, Any] = {"lora": {"dropout": 0.5}}


def test_the_reference_path_has_no_dropout(checkpoint: Checkpoint) -> None:
    """Nor has its gradient, where the loss is the reference path's alone; the base path has."""
    spec = run_spec(loss=LOSSES["reference only"], **DROPOUT)
    back = make_back(checkpoint, spec)
    parts = two_clients(spec.loss)
    plain, plain_gradients = plain_step(back, parts)
    for result, without in zip(back.train_step(FIRST, parts), plain, strict=True):
        assert result.loss == pytest.approx(without.loss.item(), rel=1e-5)
        assert result.nll != pytest.approx(without.nll, rel=1e-3)
        assert not result.base_gradient_ND.any()
        assert result.reference_gradient_ND is not None
        assert without.reference is not None
        assert_near(result.reference_gradient_ND, gradient_of(without.reference))
    for parameter, gradient in zip(lora_parameters(back.model), plain_gradients, strict=True):
        assert_near(gradient_of(parameter), gradient)


def test_the_weights_are_those_of_a_reference_path_without_dropout(checkpoint: Checkpoint) -> None:
    spec = run_spec(loss=LOSSES["adaptive"], **DROPOUT)
    back = make_back(checkpoint, spec)
    parts = two_clients(spec.loss)
    plain, _ = plain_step(back, parts)
    for result, without in zip(back.train_step(FIRST, parts), plain, strict=True):
        assert without.class_counts is not None
        assert counts_of(result)[0] == without.class_counts[0]


def test_an_untrained_reference_path_builds_no_graph(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []

    def spy(*arguments: Any) -> torch.Tensor:
        hidden_BLD = back_hidden(*arguments)
        graphs.append(hidden_BLD.requires_grad)
        return hidden_BLD

    monkeypatch.setattr(lesft.back, "back_hidden", spy)
    for name, expected in (("adaptive", [False, True]), ("both paths trained", [True, True])):
        spec = run_spec(loss=LOSSES[name])
        make_back(checkpoint, spec).train_step(FIRST, two_clients(spec.loss))
        assert graphs == expected
        graphs.clear()


# ---------------------------------------------------------------------- accumulation


def test_the_optimizer_steps_only_after_the_last_micro_batch_of_the_window(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Next to a back that never steps, so that its gradients can be seen after the last one too."""
    spec = run_spec(loss=LOSSES["adaptive"], accumulation=3)
    back, stepless = make_back(checkpoint, spec), make_back(checkpoint, spec)
    monkeypatch.setattr(stepless.optimizer, "step", lambda round_index: 0.0)
    initial = lora_state(back.model, 0)
    expected = [torch.zeros_like(parameter) for parameter in lora_parameters(back.model)]
    for micro in range(3):
        parts = two_clients(spec.loss, StepKey(0, micro))
        _, gradients = plain_step(make_back(checkpoint, spec), parts)
        expected = [sum_ + gradient for sum_, gradient in zip(expected, gradients, strict=True)]
        assert same(lora_state(back.model, 0), initial)
        back.train_step(StepKey(0, micro), parts)
        stepless.train_step(StepKey(0, micro), parts)
        for parameter, gradient in zip(lora_parameters(stepless.model), expected, strict=True):
            assert_near(gradient_of(parameter), gradient)

    assert all(parameter.grad is None for parameter in lora_parameters(back.model))
    parameters = lora_parameters(stepless.model)
    torch.nn.utils.clip_grad_norm_(parameters, spec.optimizer.max_grad_norm)
    torch.optim.AdamW(parameters, lr=spec.optimizer.learning_rate, weight_decay=0.0).step()
    assert same(lora_state(back.model, 0), lora_state(stepless.model, 0))
    assert not same(lora_state(back.model, 0), initial)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------------- values that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("path", ["base", "reference"])
@pytest.mark.parametrize("position", [0, 6, -1])
def test_activations_that_are_not_finite_are_refused_and_change_nothing(
    checkpoint: Checkpoint, value: float, path: str, position: int
) -> None:
    spec = run_spec(loss=LOSSES["both paths trained"], accumulation=2)
    assert_bad_part_changes_nothing(checkpoint, spec, path, position, value, (9, 4))


def test_the_last_activation_is_looked_at_though_it_predicts_nothing(
    checkpoint: Checkpoint,
) -> None:
    """In a block of its own attention spares the tokens before it, but it spoils the gradient."""
    spec = run_spec(loss=LOSSES["adaptive"], accumulation=2)
    assert_bad_part_changes_nothing(checkpoint, spec, "base", -1, math.nan, (513, 4))


def test_what_is_refused_takes_back_what_a_batch_before_it_in_its_step_has_done(
    checkpoint: Checkpoint,
) -> None:
    spec = run_spec(loss=LOSSES["adaptive"], accumulation=3)
    assert_bad_part_changes_nothing(checkpoint, spec, "base", 6, math.nan, (9, 4), most_tokens=9)


def assert_bad_part_changes_nothing(
    checkpoint: Checkpoint,
    spec: RunSpec,
    path: str,
    position: int,
    value: float,
    shape: tuple[int, int],
    most_tokens: int = 0,
) -> None:
    """In the second micro-batch of a window; after it the window goes on as if nothing had been."""
    second = StepKey(0, 1)
    backs = [make_back(checkpoint, spec, most_tokens=most_tokens) for _ in range(2)]
    for back in backs:
        back.train_step(FIRST, two_clients(spec.loss))
    back, undisturbed = backs
    gradients = [gradient_of(parameter) for parameter in lora_parameters(back.model)]
    assert any(gradient.any() for gradient in gradients)

    bad = random_part("ben", 0.7, [shape], second)
    getattr(bad.micro_batch, path).activations_ND[position, 3] = value
    with pytest.raises(InvalidInput, match=r"client 'ben': .* round 0 micro-batch 1 .* NaN or inf"):
        # Of one length, so without a mask: a mask's zeros would spread what is not finite.
        back.train_step(second, [random_part("ada", 0.3, [shape], second), bad])

    assert same(lora_state(back.model, 0), lora_state(undisturbed.model, 0))
    for parameter, gradient in zip(lora_parameters(back.model), gradients, strict=True):
        assert torch.equal(gradient_of(parameter), gradient)

    for each in backs:
        each.train_step(second, two_clients(spec.loss, second))
    assert same(lora_state(back.model, 0), lora_state(undisturbed.model, 0))


def test_activations_that_overflow_in_the_back_are_refused(checkpoint: Checkpoint) -> None:
    spec = run_spec(loss=LOSSES["adaptive"])
    back = make_back(checkpoint, spec, "bf16")
    parts = two_clients(spec.loss)
    largest = torch.finfo(torch.float32).max  # bfloat16 rounds it to infinity
    parts[0].micro_batch.base.activations_ND[20] = largest
    with pytest.raises(InvalidInput, match="client 'ada'"):
        back.train_step(FIRST, parts)
    assert all(parameter.grad is None for parameter in lora_parameters(back.model))


# ---------------------------------------------------------------------- dropout and precision


def outcome(back: Back, key: StepKey) -> list[torch.Tensor]:
    """All that a step leaves behind; torch's own generator is somewhere else each time."""
    torch.seed()
    results = back.train_step(key, two_clients(back.spec.loss))
    gradients = [gradient_of(parameter) for parameter in lora_parameters(back.model)]
    numbers = torch.tensor([[result.loss, result.nll] for result in results])
    return [numbers, *gradients, *[result.base_gradient_ND for result in results]]


def test_dropout_is_a_function_of_seed_and_key(checkpoint: Checkpoint) -> None:
    spec = run_spec(loss=LOSSES["adaptive"], seed=7, **DROPOUT)
    first = outcome(make_back(checkpoint, spec), FIRST)
    again = outcome(make_back(checkpoint, spec), FIRST)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))

    other_seed = spec.model_copy(update={"seed": 8})
    draws = [(spec, FIRST), (spec, StepKey(0, 1)), (spec, StepKey(1, 0)), (other_seed, FIRST)]
    losses = [outcome(make_back(checkpoint, each), key)[0][0, 0].item() for each, key in draws]
    assert all(high - low > 1e-5 for low, high in pairwise(sorted(losses)))


def test_a_bfloat16_step_is_near_the_float32_one(checkpoint: Checkpoint) -> None:
    spec = run_spec(loss=LOSSES["uniform"])
    fine, coarse = (make_back(checkpoint, spec, precision) for precision in ("fp32", "bf16"))
    parts = two_clients(spec.loss)
    for expected, result in zip(
        fine.train_step(FIRST, parts), coarse.train_step(FIRST, parts), strict=True
    ):
        assert result.loss == pytest.approx(expected.loss, rel=0.02)
        assert result.loss != expected.loss
        assert result.base_gradient_ND.dtype == torch.float32
        similarity = torch.cosine_similarity(
            result.base_gradient_ND.flatten(), expected.base_gradient_ND.flatten(), dim=0
        )
        assert similarity > 0.99
    assert coarse.model.dtype == torch.bfloat16
    for parameter, expected_parameter in zip(
        lora_parameters(coarse.model), lora_parameters(fine.model), strict=True
    ):
        assert parameter.dtype == torch.float32
        assert gradient_of(parameter).dtype == torch.float32
        difference = gradient_of(parameter) - gradient_of(expected_parameter)
        assert difference.norm() < 0.1 * gradient_of(expected_parameter).norm()


def test_adapters_are_trained_and_kept_in_float32_under_bfloat16(checkpoint: Checkpoint) -> None:
    spec = run_spec(loss=LOSSES["adaptive"], accumulation=1, optimizer={"learning_rate": 1e-6})
    back = make_back(checkpoint, spec, "bf16")
    initial = lora_state(back.model, 0)
    back.train_step(FIRST, two_clients(spec.loss))
    state = lora_state(back.model, 0)
    assert {value.dtype for value in state.values()} == {torch.float32}
    # bfloat16 would round a change of 1e-6 away.
    assert all(not torch.equal(state[name], initial[name]) for name in state)


# ---------------------------------------------------------------------- held-out likelihood


def test_a_score_is_the_sum_of_minus_log_p_of_the_whole_model(checkpoint: Checkpoint) -> None:
    back = make_back(checkpoint, run_spec(**DROPOUT))
    initial = lora_state(back.model, 0)
    batch = random_part("ada", 1.0, [(12, 5), (17, 11), (4, 1)]).micro_batch
    scores = back.score(batch.base, batch.targets)

    back.model.eval()
    activations = torch.split(batch.base.activations_ND, list(batch.base.lengths))
    targets = torch.split(batch.targets.ids_T, list(batch.targets.lengths))
    expected = [
        -plain_forward(back.model, *sample)[1].sum().item()
        for sample in zip(activations, targets, strict=True)
    ]
    assert scores == pytest.approx(expected, rel=1e-6)
    assert same(lora_state(back.model, 0), initial)
    assert all(parameter.grad is None for parameter in lora_parameters(back.model))
