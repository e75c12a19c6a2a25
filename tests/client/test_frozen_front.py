"""A front that does not train: what it computes and hands in, and when the loop waits."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from lesft.adapters import lora_parameters
from lesft.micro_batch import MicroBatch, StepKey, StepResult, Targets
from lesft.micro_batch import Path as BatchPath
from lesft.spec import LossSpec, RunSpec
from lesft.wire import WireCounter
from lesft_client.back import GoBack, Turn
from lesft_client.data import EncodedSample, sample_index
from lesft_client.front import Front
from lesft_client.status import Status
from lesft_client.trainer import Trainer
from tests.harness import make_front, random_samples, save_tiny_model
from tests.tiny_models import HIDDEN_SIZE
from tests.training.by_hand import run_spec

KEY = StepKey(1, 0)
SAMPLES = random_samples(4)
UNIFORM = LossSpec(token_weights="uniform")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def frozen_spec(**options: Any) -> RunSpec:
    """With dropout, which a front that does not train must not have."""
    return run_spec(train_front=False, **{"lora": {"dropout": 0.5}, **options})


def handed_in(front: Front, numbers: Sequence[int], enclosed: Sequence[int]) -> MicroBatch:
    return front.forward_frozen(KEY, numbers, {n: SAMPLES[n] for n in enclosed}).micro_batch


def activations(path: BatchPath | None) -> list[torch.Tensor]:
    """Sample by sample."""
    assert path is not None
    return list(torch.split(path.activations_ND, list(path.lengths)))


# ---------------------------------------------------------------------- the front


def test_only_what_is_new_is_computed_and_all_samples_are_named(model: Path) -> None:
    front = make_front(model, frozen_spec(), "ada")
    batch = handed_in(front, [3, 0, 1, 0], [3, 1])
    assert (batch.key, batch.samples, batch.enclosed) == (KEY, (3, 0, 1, 0), (3, 1))
    new = [SAMPLES[3], SAMPLES[1]]
    assert batch.base.lengths == tuple(len(s.base_ids + s.target_ids) for s in new)
    assert batch.reference is not None
    assert batch.reference.lengths == tuple(len(s.reference_ids + s.target_ids) for s in new)
    assert batch.targets.ids_T.tolist() == new[0].target_ids + new[1].target_ids
    assert batch.targets.lengths == tuple(len(s.target_ids) for s in new)


def test_it_goes_forward_as_the_model_without_adapters_and_without_dropout(model: Path) -> None:
    front = make_front(model, frozen_spec(), "ada")
    batch = handed_in(front, [0, 1], [0, 1])
    trained = make_front(model, run_spec(loss=UNIFORM), "ada").forward(KEY, SAMPLES[:1])
    assert torch.equal(activations(batch.base)[0], trained.micro_batch.base.activations_ND)
    assert not batch.base.activations_ND.requires_grad
    assert all(parameter.grad is None for parameter in lora_parameters(front.model))


def test_a_samples_activations_do_not_depend_on_what_is_computed_beside_it(model: Path) -> None:
    """Padding would change their last bits, and what comes twice must be the same."""
    front = make_front(model, frozen_spec(), "ada")
    alone = [handed_in(front, [n], [n]) for n in range(4)]
    for numbers in ([0, 1, 2, 3], [3, 1], [2, 0, 1]):
        together = handed_in(front, numbers, numbers)
        for place, n in enumerate(numbers):
            for path, single in (
                (together.base, alone[n].base),
                (together.reference, alone[n].reference),
            ):
                assert torch.equal(activations(path)[place], activations(single)[0])


@pytest.mark.parametrize("loss", [LossSpec(), UNIFORM])
def test_nothing_is_computed_where_all_is_held(model: Path, loss: LossSpec) -> None:
    batch = handed_in(make_front(model, frozen_spec(loss=loss), "ada"), [2, 1], [])
    assert (batch.samples, batch.enclosed, batch.reference) == ((2, 1), (), None)
    assert batch.base.lengths == batch.targets.lengths == ()
    assert batch.base.activations_ND.shape == (0, HIDDEN_SIZE)
    assert batch.targets.ids_T.tolist() == []


def test_no_reference_path_is_computed_where_the_loss_needs_none(model: Path) -> None:
    batch = handed_in(make_front(model, frozen_spec(loss=UNIFORM), "ada"), [2], [2])
    assert batch.reference is None
    assert len(activations(batch.base)) == 1


def test_its_parameters_are_counted_as_not_trained(model: Path) -> None:
    frozen, trained = (make_front(model, spec, "ada") for spec in (frozen_spec(), run_spec()))
    lora = sum(parameter.numel() for parameter in lora_parameters(trained.model))
    assert lora > 0
    assert trained.num_parameters()[1] == lora
    assert frozen.num_parameters() == (trained.num_parameters()[0], 0)


# ---------------------------------------------------------------------- the loop


@dataclass
class KeepingBack:
    """A back that holds `room` samples and answers in order; notes what comes and when."""

    room: int = 100
    held: set[int] = field(default_factory=set)
    events: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    _unanswered: deque[MicroBatch] = field(default_factory=deque)

    def open(self) -> Turn:
        return GoBack(0)

    def resume(self, round_index: int) -> None:
        pass

    def holds(self, sample: int) -> bool:
        return sample in self.held

    def send(self, batch: MicroBatch) -> None:
        missing = set(batch.samples) - set(batch.enclosed) - self.held
        assert not missing, "it is neither enclosed nor held"
        self.events.append(("send", batch.samples, batch.enclosed))
        self._unanswered.append(batch)

    def receive(self) -> StepResult:
        batch = self._unanswered.popleft()
        self.events.append(("receive", batch.samples, batch.enclosed))
        for number in batch.enclosed:
            if len(self.held) < self.room:
                self.held.add(number)
        return StepResult(batch.key, None, None, 1.0, 1.0, None)

    def waited_for(self, seconds: float) -> Mapping[str, float]:
        return {}

    def score(self, base: BatchPath, targets: Targets) -> list[float]:
        return []

    def check(self) -> None:
        pass

    def leave(self, reason: str) -> None:
        pass


def train(model: Path, back: KeepingBack, samples: list[EncodedSample], **options: Any) -> Front:
    spec = frozen_spec(seed=3, **{"loss": UNIFORM, **options})
    front = make_front(model, spec, "ada")
    Trainer(front, back, None, samples, Status("ada", WireCounter())).train()
    return front


def drawn(positions: range, num_samples: int) -> list[int]:
    return [sample_index(3, "ada", position, num_samples) for position in positions]


def test_each_sample_is_enclosed_until_it_is_held_and_then_only_named(model: Path) -> None:
    back = KeepingBack()
    train(model, back, SAMPLES, rounds=3, accumulation=4)  # three epochs
    sent = [(samples, enclosed) for kind, samples, enclosed in back.events if kind == "send"]
    assert [samples for samples, _ in sent] == [(n,) for n in drawn(range(12), 4)]
    assert [enclosed for samples, enclosed in sent[:4]] == [samples for samples, _ in sent[:4]]
    assert [enclosed for _, enclosed in sent[4:]] == [()] * 8


def test_the_loop_sends_ahead_but_waits_for_a_sample_that_is_on_its_way(model: Path) -> None:
    back = KeepingBack()
    train(model, back, SAMPLES[:2], rounds=2, accumulation=3)
    first, second, third, *_ = drawn(range(6), 2)
    other = 1 - third
    assert {first, second} == {0, 1}
    kinds = [kind for kind, _, _ in back.events[:6]]
    if third == first:
        assert kinds == ["send", "send", "receive", "send", "receive", "receive"]
    else:
        assert kinds == ["send", "send", "receive", "receive", "send", "receive"]
    assert ("send", (third,), ()) in back.events
    assert ("send", (other,), (other,)) in back.events
    # With all held there is nothing to wait for within a window.
    assert [kind for kind, _, _ in back.events[6:]] == ["send"] * 3 + ["receive"] * 3


def test_a_sample_that_comes_twice_in_a_batch_is_enclosed_once(model: Path) -> None:
    back = KeepingBack()
    train(model, back, SAMPLES[:1], rounds=2, accumulation=1, batch_size=2)
    sent = [event for event in back.events if event[0] == "send"]
    assert sent == [("send", (0, 0), (0,)), ("send", (0, 0), ())]


def test_what_the_back_has_no_room_for_is_enclosed_each_time(model: Path) -> None:
    back = KeepingBack(room=1)
    train(model, back, SAMPLES[:2], rounds=3, accumulation=2)
    enclosed = [enclosed for kind, _, enclosed in back.events if kind == "send"]
    kept = drawn(range(1), 2)[0]
    assert enclosed.count((kept,)) == 1
    assert enclosed.count((1 - kept,)) == 3


def test_its_adapters_stay_as_they_began(model: Path) -> None:
    front = train(model, KeepingBack(), SAMPLES, rounds=2, accumulation=2)
    fresh = make_front(model, front.spec, "ada").adapter()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in front.adapter().items())
