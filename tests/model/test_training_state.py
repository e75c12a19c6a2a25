"""One side's training state: going on from it is the same, bit for bit, as never having stopped."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from lesft.adapters import attach_lora, lora_parameters, lora_state
from lesft.checkpoints import Checkpoint as SavedState
from lesft.checkpoints import CheckpointStore
from lesft.errors import BundleError
from lesft.optimizer import Optimizer
from lesft.spec import LoraSpec, OptimizerSpec
from lesft.training_state import adapter_of, load_training_state, training_state
from lesft.weights import Checkpoint, load_back, load_front
from tests.tiny_models import save_tiny_model

CUT_LAYER = 1
SPEC = OptimizerSpec(
    learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5, schedule="cosine", warmup_rounds=2
)
ROUNDS = 8
State = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder, "llama")
    return folder


class Part:
    """A front or a back with its optimizer, trained by random gradients."""

    def __init__(self, folder: Path, side: str, seed: int = 0, rank: int = 2) -> None:
        load, self.offset = (load_front, 0) if side == "front" else (load_back, CUT_LAYER)
        self.model: PreTrainedModel = load(
            Checkpoint(folder), CUT_LAYER, torch.float32, torch.device("cpu")
        )
        attach_lora(self.model, LoraSpec(rank=rank), seed, self.offset)
        self.optimizer = Optimizer(lora_parameters(self.model), SPEC, ROUNDS)

    def accumulate(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in lora_parameters(self.model):
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    def step(self, *rounds: int) -> None:
        for index in rounds:
            self.accumulate(index)
            self.optimizer.step(index)

    def state(self) -> dict[str, torch.Tensor]:
        return training_state(self.model, self.offset, self.optimizer)

    def load(self, tensors: State) -> None:
        load_training_state(self.model, self.offset, self.optimizer, tensors)


def assert_identical(some: State, others: State) -> None:
    assert some.keys() == others.keys()
    assert [name for name in some if not torch.equal(some[name], others[name])] == []


@pytest.mark.parametrize("side", ["front", "back"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_going_on_from_a_checkpoint_is_the_same_as_never_having_stopped(
    folder: Path, tmp_path: Path, side: str, steps: int
) -> None:
    part, resumed = Part(folder, side), Part(folder, side, seed=1)
    part.step(*range(steps))
    CheckpointStore(tmp_path, "run").save(SavedState(steps, part.state(), {}))
    part.step(*range(steps, ROUNDS))

    # Nothing of what the other one did before may remain: steps, moments, half a window.
    resumed.step(90, 91)
    resumed.accumulate(92)
    resumed.load(CheckpointStore(tmp_path, "run").load(steps).tensors)
    assert resumed.optimizer.steps == steps
    assert all(parameter.grad is None for parameter in lora_parameters(resumed.model))
    resumed.step(*range(steps, ROUNDS))
    assert_identical(resumed.state(), part.state())
    assert_identical(lora_state(resumed.model, resumed.offset), lora_state(part.model, part.offset))


def test_the_first_step_after_a_checkpoint_has_the_learning_rate_of_its_round(
    folder: Path,
) -> None:
    part, resumed = Part(folder, "front"), Part(folder, "front")
    part.step(0, 1, 2, 3, 4, 5)
    resumed.load(part.state())
    before = resumed.state()["lora.model.layers.0.mlp.up_proj.lora_A.weight"]
    resumed.step(6)
    part.step(6)
    assert_identical(resumed.state(), part.state())
    after = resumed.state()["lora.model.layers.0.mlp.up_proj.lora_A.weight"]
    # The seventh of eight rounds, two of them warm-up: a cosine's last quarter.
    assert 0 < (after - before).abs().max() < SPEC.learning_rate * 0.3


@pytest.mark.parametrize("side", ["front", "back"])
def test_it_holds_adapters_and_optimizer_and_no_frozen_weight(folder: Path, side: str) -> None:
    part = Part(folder, side)
    adapters = lora_state(part.model, part.offset)
    assert part.state().keys() == {"optimizer.steps", *(f"lora.{name}" for name in adapters)}
    part.step(0)
    kinds = ("lora", "exp_avg", "exp_avg_sq")
    state = part.state()
    assert state.keys() == {
        "optimizer.steps",
        *(f"{kind}.{name}" for kind in kinds for name in adapters),
    }
    trainable = sum(parameter.numel() for parameter in lora_parameters(part.model))
    assert sum(tensor.numel() for tensor in state.values()) == 3 * trainable + 1
    assert_identical(adapter_of(state), lora_state(part.model, part.offset))
    layers = {int(name.split("layers.")[1].split(".")[0]) for name in adapters}
    assert layers == ({0} if side == "front" else {1, 2, 3})


def test_a_state_is_a_copy_and_does_not_change_with_the_part_in_either_direction(
    folder: Path,
) -> None:
    part, other = Part(folder, "front"), Part(folder, "front")
    part.step(0)
    state = part.state()
    copies = {name: tensor.clone() for name, tensor in state.items()}
    other.load(state)
    part.step(1)
    other.step(1, 2)
    assert_identical(state, copies)


A = "model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"lora.{A}": None}, A),
        ({f"exp_avg.{A}": None}, f"exp_avg.{A}"),
        ({f"exp_avg_sq.{A}": torch.zeros(3, 3)}, rf"exp_avg_sq.{A}' must have shape"),
        ({f"lora.{A}": torch.zeros(3, 3)}, rf"{A}' must have shape"),
        ({f"exp_avg.{A}": torch.zeros(1).double()}, rf"exp_avg.{A}'"),
        ({"optimizer.steps": None}, "lacks the tensor 'optimizer.steps'"),
        ({"optimizer.steps": torch.tensor([1, 2])}, r"optimizer.steps' must have shape \[1\]"),
        ({"optimizer.steps": torch.tensor([0])}, "exp_avg"),
        ({"exp_avg.more": torch.zeros(1)}, "exp_avg.more"),
        ({"lora.more": torch.zeros(1)}, "more"),
    ],
)
def test_another_state_is_refused_by_name_and_changes_nothing(
    folder: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    part, twin, other = (Part(folder, "front", seed) for seed in (0, 0, 1))
    for one in (part, twin):
        one.step(0, 1)
        one.accumulate(2)
    other.step(5)
    changed = {**other.state(), **change}
    with pytest.raises(BundleError, match=message):
        part.load({name: tensor for name, tensor in changed.items() if tensor is not None})
    assert_identical(part.state(), twin.state())
    for one in (part, twin):
        one.optimizer.step(6)  # with the gradients accumulated before
    assert_identical(part.state(), twin.state())


def test_the_state_of_the_other_side_or_of_another_rank_is_refused(folder: Path) -> None:
    front = Part(folder, "front")
    for other in (Part(folder, "back"), Part(folder, "front", rank=3)):
        other.step(0)
        with pytest.raises(BundleError):
            front.load(other.state())
