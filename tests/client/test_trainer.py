"""The training loop: the same over gRPC and with the back in this process, and its order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lesft.adapters import attach_lora, lora_state
from lesft.back import Back
from lesft.micro_batch import MicroBatch, StepKey, StepResult, Targets
from lesft.micro_batch import Path as BatchPath
from lesft.spec import LoraSpec, LossSpec, RunSpec
from lesft.weights import Checkpoint, front_fingerprint, load_back
from lesft.wire import WireCounter
from lesft_client.back import BackLink, GoBack, LocalBack
from lesft_client.data import EncodedSample, sample_index
from lesft_client.front import Front
from lesft_client.status import Status
from lesft_client.trainer import Average, HeldOut, Trainer
from tests.harness import (
    CPU,
    MeanAggregator,
    limits_of,
    make_front,
    open_session,
    random_samples,
    running_server,
    save_tiny_model,
    server_settings,
)

NAME = "client-0"
State = Mapping[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def make_spec(model: Path, tmp_path: Path, **options: Any) -> RunSpec:
    """The spec of `server_settings`, without a server."""
    settings = server_settings(model, tmp_path, **options)
    return settings.run_spec("tiny", 1, front_fingerprint(Checkpoint(model), 1))


def make_back(model: Path, spec: RunSpec) -> Back:
    """A back with fresh adapters."""
    back = load_back(Checkpoint(model), spec.cut_layer, torch.float32, CPU)
    attach_lora(back, spec.lora, spec.seed, spec.cut_layer)
    return Back(back, spec)


@dataclass
class RecordingBack:
    """The back in this process; notes what the loop does in which order."""

    link: BackLink
    events: list[str] = field(default_factory=list)
    targets: list[list[int]] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)
    num_tokens: int = 0

    def send(self, batch: MicroBatch) -> None:
        self.events.append(f"send {batch.key.round}.{batch.key.micro}")
        self.targets += [ids.tolist() for ids in batch.targets.ids_T.split(batch.targets.lengths)]
        self.num_tokens += len(batch.base.activations_ND)
        self.num_tokens += len(batch.reference.activations_ND) if batch.reference else 0
        self.link.send(batch)

    def receive(self) -> StepResult:
        result = self.link.receive()
        self.events.append(f"receive {result.key.round}.{result.key.micro}")
        self.results.append(result)
        return result

    def waited_for(self, seconds: float) -> Mapping[str, float]:
        return self.link.waited_for(seconds)

    def resume(self, round_index: int) -> None:
        self.events.append(f"resume {round_index}")
        self.link.resume(round_index)

    def score(self, base: BatchPath, targets: Targets) -> list[float]:
        self.events.append(f"score {len(targets.lengths)}")
        return self.link.score(base, targets)

    def leave(self, reason: str) -> None:
        self.link.leave(reason)


@dataclass
class HalvingAggregator:
    """Gives every client half of what it handed in."""

    events: list[str]
    submitted: list[State] = field(default_factory=list)
    given: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def submit(self, base: Average, state: State, receipt: bytes = b"") -> None:
        self.events.append(f"submit from {base.version}")
        self.submitted.append(state)

    def fetch(self, version: int, like: State, base: Average) -> dict[str, torch.Tensor]:
        self.events.append(f"fetch {version}")
        self.given.append({name: like[name] / 2 for name in like})
        return self.given[-1]


@dataclass
class LocalRun:
    """A trainer with everything in this process."""

    spec: RunSpec
    front: Front
    back: RecordingBack
    aggregator: HalvingAggregator
    status: Status
    trainer: Trainer

    def train(self) -> None:
        """All rounds; notes each round's end among the events."""
        self.trainer.train(lambda: self.back.events.append("round"))


MakeRun = Callable[..., LocalRun]


@pytest.fixture
def make_run(model: Path, tmp_path: Path) -> MakeRun:
    def make(
        samples: list[EncodedSample] | None = None,
        in_flight: int = 0,
        client_id: str = NAME,
        **options: Any,
    ) -> LocalRun:
        spec = make_spec(model, tmp_path, **options)
        front = make_front(model, spec, client_id)
        back = RecordingBack(LocalBack(make_back(model, spec), client_id))
        aggregator = HalvingAggregator(back.events)
        status = Status(client_id, WireCounter(), rounds=spec.rounds)
        samples = samples or random_samples(5)
        trainer = Trainer(front, back, aggregator, samples, status, in_flight)
        return LocalRun(spec, front, back, aggregator, status, trainer)

    return make


# ---------------------------------------------------------------------- over gRPC and here


@dataclass
class Outcome:
    """What must be the same."""

    losses: list[float]
    front: dict[str, torch.Tensor]
    back: dict[str, torch.Tensor]
    before: HeldOut
    after: HeldOut
    tokens: int


def outcome(front: Front, link: BackLink, back: Callable[[], State], in_flight: int) -> Outcome:
    """Score, train and score again."""
    status = Status(NAME, WireCounter())
    trainer = Trainer(front, link, MeanAggregator(1), random_samples(6), status, in_flight)
    held_out = random_samples(3, seed=9)
    before = trainer.score(held_out, lambda: None)
    trainer.train()
    after = trainer.score(held_out, lambda: None)
    link.leave("")
    return Outcome(
        status.loss_by_round, front.adapter(), dict(back()), before, after, status.tokens
    )


@pytest.mark.parametrize(
    ("in_flight", "options"),
    [
        (0, {"batch_size": 2, "loss": LossSpec(reference_nll_weight=0.1)}),
        # One after the other, so that both sides may draw their dropout from one generator.
        (1, {"lora": LoraSpec(dropout=0.3)}),
    ],
)
def test_over_grpc_and_with_the_back_in_this_process_are_the_same_bit_for_bit(
    model: Path, tmp_path: Path, in_flight: int, options: dict[str, Any]
) -> None:
    with running_server(server_settings(model, tmp_path, rounds=4, **options)) as server:
        spec = server.spec
        stream, close = open_session(server.grpc, limits_of(spec))
        try:
            back = server.engine.back.model
            remote = outcome(
                make_front(model, spec, NAME),
                stream,
                lambda: lora_state(back, spec.cut_layer),
                in_flight,
            )
        finally:
            close()

    local_back = make_back(model, spec)
    local = outcome(
        make_front(model, spec, NAME),
        LocalBack(local_back, NAME),
        lambda: lora_state(local_back.model, spec.cut_layer),
        in_flight,
    )
    assert remote.losses == local.losses
    assert len(set(local.losses)) == 4
    assert_identical(remote.front, local.front)
    assert_identical(remote.back, local.back)
    assert (remote.before, remote.after, remote.tokens) == (local.before, local.after, local.tokens)
    assert local.before.tokens == sum(len(s.target_ids) for s in random_samples(3, seed=9))
    assert local.before.nll_sum > local.after.nll_sum > 0


def assert_identical(some: State, others: State) -> None:
    assert some.keys() == others.keys()
    assert [name for name in some if not torch.equal(some[name], others[name])] == []


# ---------------------------------------------------------------------- the order of things


@pytest.mark.parametrize(
    ("in_flight", "window"),
    [
        (0, ["send 0", "send 1", "send 2", "receive 0", "receive 1", "receive 2"]),
        (1, ["send 0", "receive 0", "send 1", "receive 1", "send 2", "receive 2"]),
        (2, ["send 0", "send 1", "receive 0", "send 2", "receive 1", "receive 2"]),
        (9, ["send 0", "send 1", "send 2", "receive 0", "receive 1", "receive 2"]),
    ],
)
def test_as_many_micro_batches_are_in_flight_as_allowed_and_none_across_an_optimizer_step(
    make_run: MakeRun, in_flight: int, window: list[str]
) -> None:
    run = make_run(in_flight=in_flight, rounds=2, accumulation=3, aggregation_interval=2)
    run.train()
    rounds = [[event.replace(" ", f" {index}.") for event in window] for index in range(2)]
    assert run.back.events == [*rounds[0], "round", *rounds[1], "submit from 0", "fetch 1", "round"]


def test_the_number_in_flight_changes_no_number(make_run: MakeRun) -> None:
    runs = [make_run(in_flight=in_flight, rounds=3) for in_flight in (0, 1, 3)]
    for run in runs:
        run.train()
        assert run.status.loss_by_round == runs[0].status.loss_by_round
        assert_identical(run.front.adapter(), runs[0].front.adapter())


def test_adapters_are_averaged_after_every_interval_and_after_the_last_round(
    make_run: MakeRun,
) -> None:
    run = make_run(rounds=5, accumulation=1, aggregation_interval=2)
    run.status.adapter_version = 7
    run.train()
    aggregations = [event for event in run.back.events if event[:4] not in ("send", "rece")]
    assert aggregations == [
        "round",
        *("submit from 7", "fetch 8", "round"),
        "round",
        *("submit from 8", "fetch 9", "round"),
        *("submit from 9", "fetch 10", "round"),
    ]
    assert run.status.adapter_version == 10


def test_training_goes_on_from_the_averaged_adapter(make_run: MakeRun) -> None:
    run = make_run(rounds=2, aggregation_interval=1)
    run.train()
    (given, last), (_, submitted) = run.aggregator.given, run.aggregator.submitted
    # One step of AdamW moves no number by much more than the learning rate, here 0.01.
    changes = [(submitted[name] - given[name]).abs().max().item() for name in given]
    assert 0 < max(changes) < 0.02
    assert max((submitted[n] - 2 * given[n]).abs().max().item() for n in given) > 0.05
    assert_identical(run.front.adapter(), last)


# ---------------------------------------------------------------------- checkpoints


@dataclass
class MemoryKeeper:
    """Checkpoints in memory."""

    events: list[str] = field(default_factory=list)
    saved: dict[int, State] = field(default_factory=dict)

    def save(self, round_index: int, tensors: State) -> None:
        self.events.append(f"save {round_index}")
        self.saved[round_index] = tensors

    def load(self, round_index: int) -> State:
        self.events.append(f"load {round_index}")
        return self.saved[round_index]


class RestartingBack:
    """A back that wants checkpoints after some rounds, and at some steps goes back to one."""

    def __init__(self, back: Back, checkpoints: set[int], breaks: dict[StepKey, int]) -> None:
        self._back = back
        self._link = LocalBack(back, NAME)
        self._checkpoints = checkpoints
        self._breaks = breaks
        self._saved = {0: back.state()}

    def resume(self, round_index: int) -> None:
        self._back.load_state(self._saved[round_index])
        self._link = LocalBack(self._back, NAME)

    def send(self, batch: MicroBatch) -> None:
        self._link.send(batch)
        self._saved[self._back.optimizer.steps] = self._back.state()

    def receive(self) -> StepResult:
        result = self._link.receive()
        if result.key in self._breaks:
            raise GoBack(self._breaks.pop(result.key))
        return replace(result, checkpoint=result.key.round + 1 in self._checkpoints)

    def waited_for(self, seconds: float) -> Mapping[str, float]:
        return {}

    def score(self, base: BatchPath, targets: Targets) -> list[float]:
        return self._link.score(base, targets)

    def leave(self, reason: str) -> None:
        self._link.leave(reason)


def train_with_checkpoints(
    model: Path, spec: RunSpec, checkpoints: set[int], breaks: dict[StepKey, int]
) -> tuple[Outcome, list[str]]:
    """Train, going back when the back says so; also returns what the keeper saw."""
    front, back, keeper = make_front(model, spec, NAME), make_back(model, spec), MemoryKeeper()
    status = Status(NAME, WireCounter(), rounds=spec.rounds)
    link = RestartingBack(back, checkpoints, breaks)
    aggregator = HalvingAggregator([])
    # One in flight, so that both sides may draw their dropout from one generator.
    trainer = Trainer(front, link, aggregator, random_samples(6), status, 1, keeper)
    trainer.save()
    while True:
        try:
            trainer.train()
            break
        except GoBack as go_back:
            status.adapter_version = go_back.round // spec.aggregation_interval
            trainer.go_back(go_back.round)
    nothing = HeldOut(0.0, 0)
    adapter = lora_state(back.model, spec.cut_layer)
    return (
        Outcome(status.loss_by_round, front.adapter(), adapter, nothing, nothing, 0),
        keeper.events,
    )


def test_a_run_that_went_back_ends_as_one_that_never_stopped(model: Path, tmp_path: Path) -> None:
    spec = make_spec(
        model,
        tmp_path,
        rounds=6,
        accumulation=2,
        aggregation_interval=2,
        lora=LoraSpec(dropout=0.3),
        optimizer={"learning_rate": 1e-2, "schedule": "cosine", "max_grad_norm": 0.1},
    )
    plain, events = train_with_checkpoints(model, spec, set(), {})
    assert events == ["save 0"]
    # In mid-window, at a round's first step, and after the last aggregation but one.
    breaks = {StepKey(1, 1): 0, StepKey(3, 0): 2, StepKey(5, 1): 4}
    broken, events = train_with_checkpoints(model, spec, {2, 4}, breaks)
    assert events == ["save 0", "load 0", "save 2", "load 2", "save 4", "load 4"]
    assert breaks == {}
    assert broken.losses == plain.losses
    assert len(set(plain.losses)) == 6
    assert_identical(broken.front, plain.front)
    assert_identical(broken.back, plain.back)


def test_a_checkpoint_is_taken_after_the_rounds_aggregation_and_before_it_counts_as_done(
    make_run: MakeRun,
) -> None:
    run = make_run(rounds=3, accumulation=1, aggregation_interval=1)
    receive = run.back.receive
    run.back.receive = lambda: replace(receive(), checkpoint=True)  # type: ignore[method-assign]
    keeper = MemoryKeeper(run.back.events)
    trainer = Trainer(
        run.front, run.back, run.aggregator, random_samples(5), run.status, keeper=keeper
    )
    trainer.train(lambda: run.back.events.append("round"))
    assert run.back.events == [
        *("send 0.0", "receive 0.0", "submit from 0", "fetch 1", "save 1", "round"),
        *("send 1.0", "receive 1.0", "submit from 1", "fetch 2", "save 2", "round"),
        *("send 2.0", "receive 2.0", "submit from 2", "fetch 3", "save 3", "round"),
    ]
    names = {f"lora.{name}" for name in run.front.adapter()}
    assert {name for name in keeper.saved[1] if name.startswith("lora.")} == names
    for name in names:
        averaged = run.aggregator.given[0][name.removeprefix("lora.")]
        assert torch.equal(keeper.saved[1][name], averaged)
    assert trainer.timer.seconds["checkpoints"] > 0


def test_going_back_loads_first_and_forgets_the_losses_since(make_run: MakeRun) -> None:
    run = make_run(rounds=3)
    keeper = MemoryKeeper(run.back.events)
    trainer = Trainer(
        run.front, run.back, run.aggregator, random_samples(5), run.status, keeper=keeper
    )
    trainer.save()
    trainer.train()
    losses, tokens = list(run.status.loss_by_round), run.status.tokens
    assert (trainer.round, len(losses)) == (3, 3)
    keeper.saved[1] = keeper.saved[0]
    run.back.events.clear()
    trainer.go_back(1)
    assert run.back.events == ["load 1", "resume 1"]
    assert trainer.round == 1
    assert run.status.loss_by_round == losses[:1]
    assert run.status.tokens == tokens, "what was computed was computed"
    seconds = run.status.training_seconds()
    trainer.train()
    assert run.back.events[2] == "send 1.0"
    assert run.status.training_seconds() > seconds


# ---------------------------------------------------------------------- figures


def test_the_loss_of_a_round_is_the_mean_of_its_micro_batches(make_run: MakeRun) -> None:
    run = make_run(random_samples(6), rounds=3, accumulation=2)
    run.train()
    losses = [result.loss for result in run.back.results]
    assert len(set(losses)) == 6
    assert run.status.loss_by_round == [
        (losses[0] + losses[1]) / 2,
        (losses[2] + losses[3]) / 2,
        (losses[4] + losses[5]) / 2,
    ]


@pytest.mark.parametrize("token_weights", ["adaptive", "uniform"])
def test_tokens_count_what_went_through_the_front_on_the_paths_that_the_loss_needs(
    make_run: MakeRun, token_weights: Any
) -> None:
    run = make_run(rounds=2, loss=LossSpec(token_weights=token_weights))
    run.train()
    samples = random_samples(5)
    drawn = [samples[sample_index(run.spec.seed, NAME, p, 5)] for p in range(2 * 4)]
    base = sum(len(s.base_ids) + len(s.target_ids) for s in drawn)
    reference = sum(len(s.reference_ids) + len(s.target_ids) for s in drawn)
    expected = base + (reference if token_weights == "adaptive" else 0)
    assert run.status.tokens == run.back.num_tokens == expected


def test_the_time_of_every_phase_is_taken(make_run: MakeRun) -> None:
    run = make_run()
    run.train()
    seconds = run.trainer.timer.seconds
    assert seconds.keys() == {
        *("front_forward", "send", "waiting_for_gradient", "front_backward", "optimizer"),
        "aggregation",
    }
    assert all(value > 0 for value in seconds.values())
    training = run.status.training_seconds()
    assert 0.9 * training < sum(seconds.values()) < training
    assert run.status.training_seconds() == run.status.training_seconds()
    assert run.status.seconds_left() == 0


def test_held_out_samples_are_scored_in_batches_and_train_nothing(make_run: MakeRun) -> None:
    run = make_run(batch_size=2)
    before = run.front.adapter()
    held_out = random_samples(5, seed=3)
    done: list[None] = []
    score = run.trainer.score(held_out, lambda: done.append(None))
    assert run.back.events == ["score 2", "score 2", "score 1"]
    assert len(done) == 3
    assert score.tokens == sum(len(sample.target_ids) for sample in held_out)
    one_by_one = [run.trainer.score([sample], lambda: None).nll_sum for sample in held_out]
    assert score.nll_sum == pytest.approx(sum(one_by_one), rel=1e-5)
    assert_identical(run.front.adapter(), before)
    assert run.status.tokens == 0
    assert run.trainer.score([], lambda: None) == HeldOut(0.0, 0)


# ---------------------------------------------------------------------- which samples


def distinct_samples(count: int) -> list[EncodedSample]:
    """Samples that their target tells apart."""
    return [EncodedSample([5, 6], [7, 8, 9], [10 + index, 2]) for index in range(count)]


def test_each_epoch_draws_every_sample_once_in_an_order_of_its_own(make_run: MakeRun) -> None:
    # 3 rounds of 2 micro-batches of 2 samples: two epochs of 6.
    run = make_run(distinct_samples(6), rounds=3, accumulation=2, batch_size=2)
    run.train()
    drawn = [target[0] - 10 for target in run.back.targets]
    first, second = drawn[:6], drawn[6:]
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4, 5]
    assert first != second
    assert drawn == [sample_index(run.spec.seed, NAME, position, 6) for position in range(12)]


def test_another_client_draws_in_another_order_and_the_same_one_in_the_same(
    make_run: MakeRun,
) -> None:
    names = [NAME, NAME, "client-1"]
    runs = [make_run(distinct_samples(6), client_id=name, rounds=2) for name in names]
    for run in runs:
        run.train()
    assert runs[0].back.targets == runs[1].back.targets
    assert runs[0].back.targets != runs[2].back.targets


def test_an_error_of_the_back_ends_the_training_as_it_is(make_run: MakeRun) -> None:
    run = make_run(rounds=3)
    error = RuntimeError("the back is gone")

    def broken() -> StepResult:
        raise error

    run.back.receive = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the back is gone"):
        run.train()
    assert run.status.loss_by_round == []
    assert run.aggregator.submitted == []
