"""What the back remembers of samples: what a step makes of it, what is kept, and for how long."""

from dataclasses import replace
from pathlib import Path as FilePath

import pytest
import torch

from lesft.back import Back
from lesft.cohort_batch import Part
from lesft.errors import BundleError, InvalidInput, OutOfOrder
from lesft.micro_batch import MicroBatch, Path, StepKey, Targets
from lesft.sample_memory import ClientMemory, SampleMemory
from lesft.spec import LossSpec
from lesft.weights import Checkpoint
from tests.harness import save_tiny_model
from tests.training.by_hand import make_back, plain_forward, random_part, run_spec, weigh

LOSS = LossSpec(salient_threshold=0.012, cluster_similarity=0.2, reference_refresh=0)
SHAPES = {4: (12, 5), 9: (17, 11), 0: (9, 1)}
"""Number of a sample: lengths of its base path and of its target."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(save_tiny_model(tmp_path_factory.mktemp("model")))


def whole(numbers: list[int], key: StepKey) -> MicroBatch:
    """All samples with both paths; what they hold depends on their numbers alone."""
    singles = [
        random_part(f"sample {number}", 1.0, [SHAPES[number]]).micro_batch for number in numbers
    ]
    references = [single.reference for single in singles]
    assert None not in references
    return MicroBatch(
        key,
        joined([single.base for single in singles]),
        joined([path for path in references if path is not None]),
        Targets(
            torch.cat([single.targets.ids_T for single in singles]),
            tuple(single.targets.lengths[0] for single in singles),
        ),
    )


def joined(paths: list[Path]) -> Path:
    return Path(
        torch.cat([path.activations_ND for path in paths]), tuple(p.lengths[0] for p in paths)
    )


def sent(numbers: list[int], enclosed: list[int], key: StepKey) -> MicroBatch:
    """As it comes to the server."""
    base = whole(numbers, key).base
    if not enclosed:
        nothing = Targets(torch.empty(0, dtype=torch.long), ())
        return MicroBatch(key, base, None, nothing, tuple(numbers), ())
    rest = whole(enclosed, key)
    return MicroBatch(key, base, rest.reference, rest.targets, tuple(numbers), tuple(enclosed))


def memory_of(back: Back) -> ClientMemory:
    return back.memory.of("ada", "phone")


def step(back: Back, numbers: list[int], enclosed: list[int], key: StepKey) -> float:
    """The loss of a step of what has come."""
    memory = memory_of(back)
    batch = memory.complete(sent(numbers, enclosed, key))
    [result] = back.train_step(key, [Part("ada", batch, 1.0, memory)])
    return result.loss


def reference_probs(back: Back, number: int) -> list[float]:
    batch = whole([number], StepKey(0, 0))
    assert batch.reference is not None
    back.model.eval()
    with torch.no_grad():
        _, log_p_T = plain_forward(back.model, batch.reference.activations_ND, batch.targets.ids_T)
    return [float(p) for p in log_p_T.exp()]


def loss_by_hand(back: Back, number: int, probs: list[float]) -> float:
    """-(1/|y|) Σ S_t log P_t of one sample, S_t of given reference probabilities."""
    batch = whole([number], StepKey(0, 0))
    back.model.eval()
    with torch.no_grad():
        hidden, log_p_T = plain_forward(back.model, batch.base.activations_ND, batch.targets.ids_T)
    tokens = weigh(probs, hidden.tolist(), LOSS)
    terms = [w * float(log_p) for w, log_p in zip(tokens.weights, log_p_T, strict=True)]
    return -sum(terms) / len(terms)


# ---------------------------------------------------------------------- the step


def test_a_step_weighs_tokens_by_the_probabilities_that_their_sample_came_with(
    checkpoint: Checkpoint,
) -> None:
    back = make_back(checkpoint, run_spec(loss=LOSS, accumulation=1))
    then = reference_probs(back, 9)
    step(back, [9], [9], StepKey(0, 0))
    step(back, [4], [4], StepKey(1, 0))
    expected = loss_by_hand(back, 9, then)
    assert expected != pytest.approx(loss_by_hand(back, 9, reference_probs(back, 9)), rel=1e-3)
    assert step(back, [9], [], StepKey(2, 0)) == pytest.approx(expected, rel=1e-5)


def test_a_sample_that_is_enclosed_again_is_weighed_anew_and_remembered_so(
    checkpoint: Checkpoint,
) -> None:
    back = make_back(checkpoint, run_spec(loss=LOSS, accumulation=1))
    step(back, [9], [9], StepKey(0, 0))
    now = reference_probs(back, 9)
    expected = loss_by_hand(back, 9, now)
    assert step(back, [9], [9], StepKey(1, 0)) == pytest.approx(expected, rel=1e-5)
    expected = loss_by_hand(back, 9, now)
    assert step(back, [9], [], StepKey(2, 0)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("enclosed", [[], [9], [0, 4], [4, 9, 0]])
def test_what_is_remembered_and_what_is_enclosed_train_as_if_all_had_come(
    checkpoint: Checkpoint, enclosed: list[int]
) -> None:
    """Within one window, where no weight changes between a sample's two steps."""
    numbers = [4, 9, 0, 9]
    spec = run_spec(loss=LOSS, accumulation=4, batch_size=4)
    back, plain = make_back(checkpoint, spec), make_back(checkpoint, spec)
    step(back, [9, 0, 4], [9, 0, 4], StepKey(0, 0))
    memory = memory_of(back)
    batch = memory.complete(sent(numbers, enclosed, StepKey(0, 1)))
    assert batch.targets.lengths == whole(numbers, StepKey(0, 1)).targets.lengths
    [result] = back.train_step(StepKey(0, 1), [Part("ada", batch, 1.0, memory)])
    [expected] = plain.train_step(StepKey(0, 1), [Part("ada", whole(numbers, StepKey(0, 1)), 1.0)])
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    assert result.class_counts == expected.class_counts
    assert result.base_gradient_ND is not None
    torch.testing.assert_close(result.base_gradient_ND, expected.base_gradient_ND)


def test_clients_of_one_cohort_are_told_apart(checkpoint: Checkpoint) -> None:
    """One has sent everything, one a part of it, one nothing."""
    spec = run_spec(loss=LOSS, accumulation=4, batch_size=2)
    back, plain = make_back(checkpoint, spec), make_back(checkpoint, spec)
    key = StepKey(0, 1)
    numbers = {"ada": [4, 9], "ben": [9, 0], "cleo": [0, 4]}
    enclosed = {"ada": [4, 9], "ben": [0], "cleo": []}
    parts = []
    for name in numbers:
        memory = back.memory.of(name, "phone")
        first = memory.complete(sent([9, 0, 4], [9, 0, 4], StepKey(0, 0)))
        back.train_step(StepKey(0, 0), [Part(name, first, 0.3, memory)])
        batch = memory.complete(sent(numbers[name], enclosed[name], key))
        parts.append(Part(name, batch, 0.3, memory))
    results = back.train_step(key, parts)
    expected = plain.train_step(key, [Part(n, whole(numbers[n], key), 0.3) for n in numbers])
    for ours, theirs in zip(results, expected, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert ours.class_counts == theirs.class_counts
        assert ours.base_gradient_ND is not None
        torch.testing.assert_close(ours.base_gradient_ND, theirs.base_gradient_ND)


def test_a_step_that_fails_remembers_nothing(checkpoint: Checkpoint) -> None:
    back = make_back(checkpoint, run_spec(loss=LOSS))
    memory = memory_of(back)
    batch = memory.complete(sent([9], [9], StepKey(0, 0)))
    broken = replace(batch, base=Path(torch.full_like(batch.base.activations_ND, torch.nan), (17,)))
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        back.train_step(StepKey(0, 0), [Part("ada", broken, 1.0, memory)])
    assert 9 not in memory


# ---------------------------------------------------------------------- what is kept


def kept(memory: ClientMemory, number: int, key: StepKey, value: float = -1.0) -> None:
    """As after a step of one sample with the same log P~ for each of its tokens."""
    batch = memory.complete(sent([number], [number], key))
    memory.keep(batch, [torch.full((SHAPES[number][1],), value)])


def log_probs(memory: ClientMemory, number: int) -> list[float]:
    [known] = memory.complete(sent([number], [], StepKey(9, 0))).known_log_probs
    assert known is not None
    return [float(value) for value in known]


def test_a_client_is_told_what_was_remembered_where_it_goes_on_whatever_has_come_since() -> None:
    memory = SampleMemory().of("ada", "phone")
    kept(memory, 4, StepKey(0, 0))
    kept(memory, 9, StepKey(0, 3))
    kept(memory, 0, StepKey(1, 0))
    kept(memory, 4, StepKey(2, 0), value=-2.0)  # taken anew; it was there before all the same
    assert memory.numbers_before(StepKey(0, 0)) == []
    assert memory.numbers_before(StepKey(0, 3)) == [4]
    assert memory.numbers_before(StepKey(1, 0)) == [4, 9]
    assert memory.numbers_before(StepKey(5, 0)) == [0, 4, 9]
    assert memory.among([9, 4, 0], StepKey(0, 3)) == [4, 9]
    assert log_probs(memory, 4) == [-2.0] * 5
    memory.check_complete([4, 9], [])
    with pytest.raises(OutOfOrder) as caught:
        memory.check_complete([4, 7], [])
    assert str(caught.value) == (
        "sample 7 is not remembered here: enclose its targets and reference path"
    )


def test_another_instance_of_a_client_is_not_taken_for_it() -> None:
    every = SampleMemory()
    memory = every.of("ada", "phone")
    kept(memory, 4, StepKey(0, 0))
    kept(every.of("ben", "phone"), 9, StepKey(0, 0))
    assert every.of("ada", "phone") is memory
    used = every.num_bytes
    assert 4 not in every.of("ada", "tablet")
    assert every.num_bytes < used
    kept(memory, 9, StepKey(0, 1))  # a step of the earlier one that ends late
    assert 9 not in every.of("ada", "tablet")
    assert 9 in every.of("ben", "phone")


def test_what_has_no_room_is_not_remembered_and_what_is_dropped_makes_room() -> None:
    every = SampleMemory(max_bytes=1200)  # of two short ones
    ada, ben = every.of("ada", ""), every.of("ben", "")
    for number in (4, 9, 0):
        kept(ada, number, StepKey(0, 0))
    assert [number in ada for number in (4, 9, 0)] == [True, True, False]
    kept(ada, 4, StepKey(1, 0), value=-3.0)  # in its own place
    assert log_probs(ada, 4) == [-3.0] * 5
    kept(ben, 0, StepKey(0, 0))
    assert 0 not in ben
    ada.drop()
    assert every.num_bytes == 0
    kept(ben, 0, StepKey(0, 0))
    assert 0 in ben


def test_a_sample_shorter_than_its_target_was_is_refused() -> None:
    memory = SampleMemory().of("ada", "phone")
    kept(memory, 9, StepKey(0, 0))
    base = Path(torch.zeros(11, 32), (11,))
    with pytest.raises(InvalidInput) as caught:
        memory.complete(replace(sent([9], [], StepKey(1, 0)), base=base))
    assert str(caught.value) == "base_lengths: sample 9 has 11 tokens, but its target alone has 11"


# ---------------------------------------------------------------------- checkpoints


def test_a_checkpoint_brings_back_what_was_remembered_and_nothing_that_came_later(
    checkpoint: Checkpoint, tmp_path: FilePath
) -> None:
    spec = run_spec(loss=LOSS, accumulation=1)
    back = make_back(checkpoint, spec)
    step(back, [9], [9], StepKey(0, 0))
    back.memory.of("a.b", "")
    kept(back.memory.of("c.d", "laptop"), 4, StepKey(0, 0))
    state = back.state()
    undisturbed = step(back, [9], [], StepKey(1, 0))
    step(back, [4], [4], StepKey(2, 0))
    used = back.memory.num_bytes

    back.load_state(state)
    assert back.memory.num_bytes < used
    assert memory_of(back).numbers_before(StepKey(1, 0)) == [9]
    assert 4 not in memory_of(back)
    assert 4 in back.memory.of("c.d", "laptop")
    assert step(back, [9], [], StepKey(1, 0)) == undisturbed

    plain = make_back(checkpoint, run_spec(loss=LossSpec()))
    plain.memory.of("ada", "phone")  # as each session asks for it
    assert [name for name in plain.state() if name.startswith("remembered")] == []
    with pytest.raises(BundleError, match=r"optimizer\.steps"):
        plain.load_state({name: t for name, t in state.items() if name.startswith("remembered")})
