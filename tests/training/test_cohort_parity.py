"""Four clients batched are the same mathematics as each of them alone, and can be replayed."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import tests.harness
from lesft.adapters import attach_lora, load_lora_state, lora_parameters, lora_state
from lesft.back import Back
from lesft.cohort_batch import Part
from lesft.micro_batch import MicroBatch, StepKey, StepResult, Targets
from lesft.micro_batch import Path as SamplePath
from lesft.spec import LossSpec, RunSpec
from lesft.weights import Checkpoint, load_back, load_front
from lesft_client.data import EncodedSample, sample_index
from lesft_client.front import Front
from lesft_server.settings import ServerSettings
from tests.harness import (
    back_model,
    make_front,
    random_samples,
    running_server,
    save_tiny_model,
    server_settings,
    train_clients,
)
from tests.training.by_hand import plain_part, run_spec

CPU = torch.device("cpu")
ROUNDS = 5
ACCUMULATION = 4
LEARNING_RATE = 2e-3  # AdamW blows up rounding where a gradient is near zero, by up to this
WITHIN = 1e-5

# Random tokens have probabilities around 0.01: classes of every kind.
LOSS = LossSpec(salient_threshold=0.012, cluster_similarity=0.2)

DATA = [random_samples(size, seed) for seed, size in enumerate((3, 5, 8, 6))]
SHARES = [len(samples) / 22 for samples in DATA]

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@dataclass
class Training:
    """What came of a training: by micro-batch and client, and at the end."""

    losses: list[list[float]] = field(default_factory=list)
    class_counts: list[list[tuple[int, int, int] | None]] = field(default_factory=list)
    cut_gradients: list[list[torch.Tensor]] = field(default_factory=list)
    fronts: list[State] = field(default_factory=list)
    back: State = field(default_factory=dict)

    def loss_by_round(self, client: int) -> list[float]:
        windows = range(0, len(self.losses), ACCUMULATION)
        return [
            sum(losses[client] for losses in self.losses[start : start + ACCUMULATION])
            / ACCUMULATION
            for start in windows
        ]


def keys(spec: RunSpec) -> list[StepKey]:
    return [StepKey(r, m) for r in range(spec.rounds) for m in range(spec.accumulation)]


def draw(spec: RunSpec, client: int, key: StepKey) -> list[EncodedSample]:
    """The samples that the trainer draws."""
    first = (key.round * spec.accumulation + key.micro) * spec.batch_size
    samples = DATA[client]
    return [
        samples[sample_index(spec.seed, name_of(client), position, len(samples))]
        for position in range(first, first + spec.batch_size)
    ]


def name_of(client: int) -> str:
    return f"client-{client}"


# ---------------------------------------------------------------------- batched


def train_batched(model: Path, spec: RunSpec) -> Training:
    """Fronts and back as the services run them, without the services."""
    training = Training()
    fronts = [make_front(model, spec, name_of(client)) for client in range(len(DATA))]
    back = Back(fresh_back(model, spec), spec)
    for key in keys(spec):
        sent = [front.forward(key, draw(spec, i, key)) for i, front in enumerate(fronts)]
        parts = [
            Part(name_of(i), forward.micro_batch, share)
            for i, (forward, share) in enumerate(zip(sent, SHARES, strict=True))
        ]
        results = back.train_step(key, parts)
        for front, forward, result in zip(fronts, sent, results, strict=True):
            front.backward(forward, result)
            if key.micro == spec.accumulation - 1:
                front.step(key.round)
        training.losses.append([result.loss for result in results])
        training.class_counts.append([result.class_counts for result in results])
        training.cut_gradients.append([cut_gradient(result) for result in results])
    training.fronts = [front.adapter() for front in fronts]
    training.back = lora_state(back.model, spec.cut_layer)
    return training


def cut_gradient(result: StepResult) -> torch.Tensor:
    """Of all activations that get one, base path first."""
    gradients = [result.base_gradient_ND, result.reference_gradient_ND]
    return torch.cat([gradient for gradient in gradients if gradient is not None])


def fresh_front(model: Path, spec: RunSpec) -> PreTrainedModel:
    front = load_front(Checkpoint(model), spec.cut_layer, torch.float32, CPU)
    attach_lora(front, spec.lora, spec.seed, 0)
    return front


def fresh_back(model: Path, spec: RunSpec) -> PreTrainedModel:
    back = load_back(Checkpoint(model), spec.cut_layer, torch.float32, CPU)
    attach_lora(back, spec.lora, spec.seed, spec.cut_layer)
    return back


# ---------------------------------------------------------------------- each client alone


class PlainSide:
    """One side's adapters: gradients summed by hand, clipped, and a plain AdamW."""

    def __init__(self, model: PreTrainedModel, spec: RunSpec) -> None:
        self.model = model
        self._spec = spec
        self._parameters = lora_parameters(model)
        self._adamw = torch.optim.AdamW(
            self._parameters, lr=spec.optimizer.learning_rate, weight_decay=0.0
        )
        self._sums = [torch.zeros_like(parameter) for parameter in self._parameters]

    def add_gradient(
        self,
        outputs: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor] | None = None,
        cut: Sequence[torch.Tensor] = (),
    ) -> list[torch.Tensor]:
        """Add one part's gradient to the sums; return those of the activations at the cut."""
        inputs = [*self._parameters, *cut]
        found = torch.autograd.grad(outputs, inputs, gradients)
        for sum_, gradient in zip(self._sums, found[: len(self._sums)], strict=True):
            sum_ += gradient
        return list(found[len(self._sums) :])

    def step(self) -> None:
        for parameter, sum_ in zip(self._parameters, self._sums, strict=True):
            parameter.grad = sum_.clone()
            sum_.zero_()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._spec.optimizer.max_grad_norm)
        self._adamw.step()


def train_alone(model: Path, spec: RunSpec, averaged: bool = False) -> Training:
    """Every client's part in a forward and backward pass of its own, sample by sample."""
    training = Training()
    fronts = [PlainSide(fresh_front(model, spec), spec) for _ in DATA]
    back = PlainSide(fresh_back(model, spec), spec)
    for key in keys(spec):
        losses, counts, cut_gradients = [], [], []
        for client, (front, share) in enumerate(zip(fronts, SHARES, strict=True)):
            samples = draw(spec, client, key)
            base, reference = plain_paths(front.model, samples)
            batch = MicroBatch(key, detached(base), detached(reference), plain_targets(samples))
            part = plain_part(back.model, batch, spec.loss)
            assert part.margin > WITHIN, "this case is within rounding: choose another"
            cut = [part.base] if part.reference is None else [part.base, part.reference]
            gradients = back.add_gradient([share / spec.accumulation * part.loss], cut=cut)
            paths = [path.activations_ND for path in (base, reference)]
            front.add_gradient(paths[: len(cut)], gradients)
            losses.append(part.loss.item())
            counts.append(part.class_counts)
            cut_gradients.append(torch.cat(gradients))
        training.losses.append(losses)
        training.class_counts.append(counts)
        training.cut_gradients.append(cut_gradients)
        if key.micro == spec.accumulation - 1:
            for side in (*fronts, back):
                side.step()
            if averaged and spec.aggregates_after(key.round):
                average([front.model for front in fronts])
    training.fronts = [lora_state(front.model, 0) for front in fronts]
    training.back = lora_state(back.model, spec.cut_layer)
    return training


def plain_paths(
    front: PreTrainedModel, samples: Sequence[EncodedSample]
) -> tuple[SamplePath, SamplePath]:
    """Base and reference path with their graphs."""

    def path(sequences: Sequence[list[int]]) -> SamplePath:
        activations = [
            front(input_ids=torch.tensor([ids])).last_hidden_state[0] for ids in sequences
        ]
        return SamplePath(torch.cat(activations), tuple(len(ids) for ids in sequences))

    return (
        path([sample.base_ids + sample.target_ids for sample in samples]),
        path([sample.reference_ids + sample.target_ids for sample in samples]),
    )


def plain_targets(samples: Sequence[EncodedSample]) -> Targets:
    return Targets(
        torch.tensor([token for sample in samples for token in sample.target_ids]),
        tuple(len(sample.target_ids) for sample in samples),
    )


def detached(path: SamplePath) -> SamplePath:
    return SamplePath(path.activations_ND.detach(), path.lengths)


def average(fronts: Sequence[PreTrainedModel]) -> None:
    """The plain mean, as the harness' aggregator forms it."""
    states = [lora_state(front, 0) for front in fronts]
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    for front in fronts:
        load_lora_state(front, 0, mean)


def largest_difference(one: State, other: State) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


# ---------------------------------------------------------------------- parity


@pytest.mark.parametrize(
    ("batch_size", "reference_nll_weight"),
    [
        pytest.param(1, 0.0, id="one sample each"),
        pytest.param(2, 0.0, id="two samples each"),
        pytest.param(2, 0.5, id="both paths trained"),
    ],
)
def test_a_batched_cohort_equals_its_clients_one_by_one(
    model: Path, batch_size: int, reference_nll_weight: float
) -> None:
    spec = run_spec(
        loss=LOSS.model_copy(update={"reference_nll_weight": reference_nll_weight}),
        rounds=ROUNDS,
        accumulation=ACCUMULATION,
        batch_size=batch_size,
        optimizer={"learning_rate": LEARNING_RATE},
    )
    batched, alone = train_batched(model, spec), train_alone(model, spec)

    assert batched.losses == [pytest.approx(losses, abs=WITHIN) for losses in alone.losses]
    assert batched.class_counts == alone.class_counts
    for gradients, expected in zip(batched.cut_gradients, alone.cut_gradients, strict=True):
        for one, other in zip(gradients, expected, strict=True):
            assert other.abs().max() > 1e-4
            torch.testing.assert_close(one, other, rtol=0, atol=1e-7)
    for state, expected_state in zip(batched.fronts, alone.fronts, strict=True):
        assert largest_difference(state, expected_state) < WITHIN
    assert largest_difference(batched.back, alone.back) < WITHIN

    counts = [counts for row in alone.class_counts for counts in row if counts is not None]
    assert min(map(sum, zip(*counts, strict=True))) > 20, "tokens of every class took part"
    initial = fresh_back(model, spec)
    assert largest_difference(batched.back, lora_state(initial, spec.cut_layer)) > 100 * WITHIN
    for state, next_state in pairwise(batched.fronts):
        assert largest_difference(state, next_state) > 100 * WITHIN


@pytest.fixture
def _one_party_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each party has in its own process and the threads here share: the building of a model,
    which patches torch's modules, and torch's one random generator.
    """
    lock = threading.Lock()

    def alone(owner: Any, name: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def locked(*arguments: Any) -> Any:
            with lock:
                return function(*arguments)

        monkeypatch.setattr(owner, name, locked)

    alone(Front, "forward")
    alone(Back, "train_step")
    alone(tests.harness, "make_front")


@pytest.mark.usefixtures("_one_party_at_a_time")
def test_four_clients_over_grpc_equal_each_of_them_alone(model: Path, tmp_path: Path) -> None:
    with running_server(cohort_settings(model, tmp_path)) as server:
        spec = server.spec
        trained = train_clients(server, model, DATA)
        back = lora_state(back_model(server), spec.cut_layer)
    alone = train_alone(model, spec, averaged=True)

    for client, (front, status) in enumerate(trained):
        assert status.loss_by_round == pytest.approx(alone.loss_by_round(client), abs=WITHIN)
        assert largest_difference(front.adapter(), alone.fronts[client]) < WITHIN
    assert largest_difference(back, alone.back) < WITHIN


def cohort_settings(model: Path, state: Path, dropout: float = 0.0) -> ServerSettings:
    return server_settings(
        model,
        state,
        clients=len(DATA),
        rounds=ROUNDS,
        accumulation=ACCUMULATION,
        aggregation_interval=2,
        loss=LOSS,
        lora={"dropout": dropout},
        optimizer={"learning_rate": LEARNING_RATE},
    )


# ---------------------------------------------------------------------- replay


@pytest.mark.usefixtures("_one_party_at_a_time")
def test_a_run_with_dropout_can_be_replayed_bit_for_bit(model: Path, tmp_path: Path) -> None:
    """Whatever order the clients' messages come in, and however many are under way."""

    def train(name: str, in_flight: int, dropout: float = 0.2) -> State:
        settings = cohort_settings(model, tmp_path / name, dropout)
        with running_server(settings) as server:
            [(front, _), *_] = train_clients(server, model, DATA, in_flight)
            return {**front.adapter(), **lora_state(back_model(server), server.spec.cut_layer)}

    first = train("first", in_flight=0)
    assert largest_difference(first, train("again", in_flight=0)) == 0
    assert largest_difference(first, train("one at a time", in_flight=1)) == 0
    assert largest_difference(first, train("without dropout", in_flight=0, dropout=0.0)) > 1e-3
