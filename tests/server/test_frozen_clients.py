"""Runs whose clients do not train, over real gRPC: what travels, what is refused, coming back."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from lesft.errors import InvalidInput, LesftError, OutOfOrder
from lesft.micro_batch import StepKey
from lesft.step_messages import micro_batch_to_message
from lesft.v1 import training_pb2
from lesft.v1.training_pb2 import TrainRequest
from lesft_server.sample_store import SAMPLES_FOLDER
from tests.harness import (
    RunningServer,
    make_front,
    random_samples,
    running_server,
    server_settings,
    train_clients,
)
from tests.server import resumable_client
from tests.server.harness import (
    RawSession,
    assert_serving,
    bent,
    join,
    opening,
    raw_channel,
    refusal,
    snapshot,
    wait_until,
    with_chunks,
    without_pauses,
)
from tests.server.resumable_client import (
    adapters_of,
    assert_equal,
    base_tokens,
    live,
    reference_tokens,
    target_tokens,
)
from tests.server.test_sample_store import sent
from tests.tiny_models import HIDDEN_SIZE

FLOAT_BYTES = 4
UNIFORM: dict[str, Any] = {"loss": {"token_weights": "uniform"}}
RAW = {"activation_encoding": "raw"}
DUAL: dict[str, Any] = {"loss": {"salient_threshold": 0.012, "reference_nll_weight": 0.5}}

serving = partial(resumable_client.serving, train_front=False)
train_alone = partial(resumable_client.train_alone, train_front=False)


# ---------------------------------------------------------------------- what travels


def test_each_samples_activations_are_sent_once_in_three_epochs_and_nothing_comes_back(
    model: Path, tmp_path: Path
) -> None:
    samples = random_samples(4)
    options = {**UNIFORM, "rounds": 6}  # two micro-batches each: three epochs
    client, kept = train_alone(model, tmp_path / "kept", samples, **options)
    width = HIDDEN_SIZE * FLOAT_BYTES
    assert client.sent_bytes("activations_base") == base_tokens(samples) * width
    assert client.sent_bytes("activations_reference") == 0
    assert client.sent_bytes("labels") == target_tokens(samples) * 4
    assert client.sent_bytes("adapters") == 0
    assert client.wire.by_kind()["down"]["gradients"] == 0
    assert client.wire.total("down") < width * 32, "no tensor of activations' size comes back"
    initial = make_front(model, client.spec, "client-0").adapter()
    assert_equal(client.front.adapter(), initial)
    kept_files = (tmp_path / "kept/server" / SAMPLES_FOLDER).rglob("*.safetensors")
    assert list(kept_files) == [], "they go when their client has finished and left"

    nothing, again = train_alone(
        model, tmp_path / "not kept", samples, **options, kept_activations_mib=0
    )
    assert_equal(again, kept)
    assert nothing.sent_bytes("activations_base") == 3 * base_tokens(samples) * width
    assert nothing.sent_bytes("labels") == 3 * target_tokens(samples) * 4


def test_samples_that_meet_again_in_one_window_and_in_other_pairs_train_as_if_sent_anew(
    model: Path, tmp_path: Path
) -> None:
    """Three samples in windows of six: one is drawn again while it is on its way."""
    samples = random_samples(3)
    options: dict[str, Any] = {**DUAL, "accumulation": 3, "batch_size": 2}
    client, kept = train_alone(model, tmp_path / "kept", samples, **options)
    width = HIDDEN_SIZE * FLOAT_BYTES
    assert client.sent_bytes("activations_base") == base_tokens(samples) * width
    assert client.sent_bytes("activations_reference") == reference_tokens(samples) * width
    nothing, again = train_alone(
        model, tmp_path / "not kept", samples, **options, kept_activations_mib=0
    )
    assert nothing.sent_bytes("activations_base") > 5 * base_tokens(samples) * width
    assert_equal(again, kept)


@pytest.mark.parametrize("encoding", ["bf16", "int8", "int4"])
def test_samples_kept_as_they_travelled_train_as_if_sent_anew(
    encoding: str, model: Path, tmp_path: Path
) -> None:
    """Alone or in pairs, from the wire or from disk, the same values come out."""
    samples = random_samples(3)
    options: dict[str, Any] = {"activation_encoding": encoding, "accumulation": 3, "batch_size": 2}
    _, kept = train_alone(model, tmp_path / "kept", samples, **options)
    _, again = train_alone(model, tmp_path / "anew", samples, **options, kept_activations_mib=0)
    assert_equal(again, kept)
    _, raw = train_alone(model, tmp_path / "raw", samples, **{**options, **RAW})
    assert any(not torch.equal(raw[name], kept[name]) for name in kept)


def test_more_samples_in_a_batch_than_a_client_has_are_sent_once(
    model: Path, tmp_path: Path
) -> None:
    samples = random_samples(1)
    client, _ = train_alone(model, tmp_path, samples, batch_size=2, activation_encoding="bf16")
    bf16_bytes = base_tokens(samples) * HIDDEN_SIZE * 2
    assert client.sent_bytes("activations_base") == bf16_bytes


def test_the_back_trains_as_for_clients_whose_adapters_never_change(
    model: Path, tmp_path: Path
) -> None:
    """Sent anew each time, by a front whose optimizer does nothing."""
    samples = random_samples(3)
    _, frozen = train_alone(model, tmp_path / "frozen", samples)
    settings = server_settings(model, tmp_path / "server", rounds=3, accumulation=2, threads=1)
    with running_server(settings) as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr("lesft_client.front.Front.step", lambda front, round_index: 0.0)
        train_clients(server, model, [samples])
        assert_equal(adapters_of(server), frozen)


# ---------------------------------------------------------------------- what is refused


def held_run(server: RunningServer, channel: grpc.Channel) -> RawSession:
    """Client `a` has three samples; the server holds sample 0 and 1, and (0, 1) is due."""
    session = join(channel, server.spec, "a", num_samples=3, instance_id="phone")
    session.send(*messages(StepKey(0, 0), [0, 1], [0, 1]))
    assert list(session.receive().step.held) == [0, 1]
    return session


DUE = StepKey(0, 1)


def messages(key: StepKey, samples: Sequence[int], enclosed: Sequence[int]) -> list[TrainRequest]:
    header, data = micro_batch_to_message(sent(key, samples, enclosed), "raw")
    return with_chunks(TrainRequest(micro_batch=header), data) if data else [announced(header)]


def announced(header: training_pb2.MicroBatch) -> TrainRequest:
    return TrainRequest(micro_batch=header)


def fork() -> list[TrainRequest]:
    """Sample 2's content under the number of sample 1, which is held."""
    return bent(messages, DUE, [2], [2], samples=[1], enclosed=[1])


REFUSED: dict[str, tuple[Callable[[], list[TrainRequest]], type[LesftError], str]] = {
    "no samples": (
        partial(bent, messages, DUE, [2], [2], samples=[]),
        InvalidInput,
        "samples must have 1 to 2 entries (batch_size), got 0",
    ),
    "too many samples": (
        partial(bent, messages, DUE, [0, 1, 0], []),
        InvalidInput,
        "samples must have 1 to 2 entries (batch_size), got 3",
    ),
    "a number that the client has no sample of": (
        partial(bent, messages, DUE, [2], [2], samples=[3], enclosed=[3]),
        InvalidInput,
        "samples: the client has samples 0 to 2, got 3",
    ),
    "the largest number": (
        partial(bent, messages, DUE, [0, 2**32 - 1], []),
        InvalidInput,
        "samples: the client has samples 0 to 2, got 4294967295",
    ),
    "one enclosed that is not among them": (
        partial(bent, messages, DUE, [2], [2], samples=[0]),
        InvalidInput,
        "enclosed must be some of samples [0], each once, got [2]",
    ),
    "one enclosed twice": (
        partial(bent, messages, DUE, [2, 2], [2, 2]),
        InvalidInput,
        "enclosed must be some of samples [2, 2], each once, got [2, 2]",
    ),
    "lengths of more than is enclosed": (
        partial(bent, messages, DUE, [2], [2], target_lengths=[4, 4]),
        InvalidInput,
        "target_lengths must have one entry for each of the 1 samples enclosed, got 2",
    ),
    "lengths where nothing is enclosed": (
        partial(bent, messages, DUE, [2], [2], enclosed=[]),
        InvalidInput,
        "target_lengths must have one entry for each of the 0 samples enclosed, got 1",
    ),
    "other lengths of the paths": (
        partial(bent, messages, DUE, [2], [2], base_lengths=[7, 7]),
        InvalidInput,
        "base_lengths must have one entry per sample (1), got 2",
    ),
    "one that is neither held nor enclosed": (
        partial(bent, messages, DUE, [0, 2], []),
        OutOfOrder,
        "sample 2 of client 'a' is not held here: enclose its activations",
    ),
    "another content than is held": (
        fork,
        OutOfOrder,
        "client 'a' sent round 0 micro-batch 1 with other activations or labels before: a client "
        "must not fork; start it with the same data, --device, --precision and --threads as before",
    ),
}


@pytest.fixture(scope="module")
def refusing(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server in mid-run, which all that is refused must leave as it was."""
    state = tmp_path_factory.mktemp("refusing")
    with serving(model, state, batch_size=2) as server, without_pauses():
        with raw_channel(server.grpc) as channel:
            held_run(server, channel)
        yield server


@pytest.mark.parametrize("what", REFUSED)
def test_samples_that_break_a_rule_are_refused_and_nothing_of_them_is_kept(
    what: str, refusing: RunningServer
) -> None:
    make, kind, message = REFUSED[what]
    before = snapshot(refusing)
    kept = refusing.engine.samples.num_bytes
    with raw_channel(refusing.grpc) as channel:
        session = join(channel, refusing.spec, "a", DUE, num_samples=3, instance_id="phone")
        session.send(*make())
        assert session.refusal() == refusal(kind, message)
    after = snapshot(refusing)
    assert all(torch.equal(before[name][0], after[name][0]) for name in before)
    assert (refusing.engine.run.steps, refusing.engine.samples.num_bytes) == (1, kept)
    assert_serving(refusing)


def test_a_right_client_goes_on_after_all_that_was_refused(refusing: RunningServer) -> None:
    """The last of this fixture's tests."""
    wait_until(lambda: not refusing.engine.run.members["a"].connected)
    with raw_channel(refusing.grpc) as channel:
        session = RawSession(channel)
        position = training_pb2.Position(round=0, micro=1)
        fields: dict[str, Any] = {"position": position, "num_samples": 3, "instance_id": "phone"}
        session.send(opening(refusing.spec, "a", **fields))
        assert list(session.receive().opened.held) == [0, 1]
        session.send(*messages(DUE, [2, 0], [2]))
        answer = session.receive().step
    assert (answer.micro, list(answer.held), answer.HasField("bundle")) == (1, [0, 2], False)
    assert [record.round for record in refusing.engine.run.rounds] == [0]


def test_samples_where_clients_train_are_refused(model: Path, tmp_path: Path) -> None:
    with (
        serving(model, tmp_path, train_front=True, batch_size=2) as server,
        raw_channel(server.grpc) as channel,
    ):
        session = join(channel, server.spec, "a", num_samples=3)
        session.send(*messages(StepKey(0, 0), [0, 1], [0, 1]))
        message = "samples must be empty: in this run clients send all of each micro-batch anew"
        assert session.refusal() == refusal(InvalidInput, message)
        assert server.engine.run.steps == 0


def test_an_answer_from_the_ledger_tells_what_is_held_now_not_then(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that lost its state is another instance: there is no room for its samples."""
    with (
        serving(model, tmp_path, batch_size=2) as server,
        raw_channel(server.grpc) as channel,
    ):
        held_run(server, channel).call.cancel()
        wait_until(lambda: not server.engine.run.members["a"].connected)
        monkeypatch.setattr(server.engine.samples, "_max_bytes", 0)
        session = join(channel, server.spec, "a", num_samples=3, instance_id="tablet")
        session.send(*messages(StepKey(0, 0), [0, 1], [0, 1]))
        assert list(session.receive().step.held) == []
        assert server.engine.run.steps == 1, "it was answered from the ledger"


# ---------------------------------------------------------------------- coming back


SOME = 11_000
"""Bytes that have room for some of five samples."""

LONG: dict[str, Any] = {**DUAL, "rounds": 4, "batch_size": 2, "aggregation_interval": 2}


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    _, adapters = train_alone(model, tmp_path_factory.mktemp("run"), random_samples(5), **LONG)
    return adapters


def test_a_client_that_is_started_again_sends_nothing_again_and_leads_to_the_same_adapters(
    model: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    """It dies in the second window, and has the checkpoint of the first."""
    samples = random_samples(5)
    with serving(model, tmp_path / "server", **LONG) as server:
        first = live(server, model, samples, tmp_path / "client", dies_after=3)
        assert first.keeper.rounds() == [0, 2]
        second = live(server, model, samples, tmp_path / "client")
        assert_equal(adapters_of(server), undisturbed)
    width = HIDDEN_SIZE * FLOAT_BYTES
    assert first.sent_bytes("activations_base") == base_tokens(samples) * width
    assert second.sent_bytes("activations_base") == 0


def test_a_client_that_comes_back_where_some_samples_had_room_does_not_fork(
    model: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    """Those that it computes beside each other are not those that it computed before."""
    samples = random_samples(5)
    with (
        serving(model, tmp_path / "server", **LONG) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(server.engine.samples, "_max_bytes", SOME)
        for round_index in (1, 3):
            live(server, model, samples, tmp_path / "client", dies_after=round_index)
        held = live(server, model, samples, tmp_path / "client").link._held
        assert 0 < len(held) < 5
        assert_equal(adapters_of(server), undisturbed)


def test_a_server_that_is_started_again_still_holds_what_it_was_sent(
    model: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    samples = random_samples(5)
    client, adapters = resumable_client.restarted_in_mid_run(
        model, tmp_path, samples, lambda: None, **LONG, train_front=False
    )
    assert_equal(adapters, undisturbed)
    assert client.link.reconnects == 1
    width = HIDDEN_SIZE * FLOAT_BYTES
    assert client.sent_bytes("activations_base") == base_tokens(samples) * width


def test_a_server_that_has_lost_what_it_was_sent_gets_it_again(
    model: Path, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    """What the client has sent meanwhile, and sends again, counts on it."""
    samples = random_samples(5)

    def lose() -> None:
        for path in (tmp_path / "server" / SAMPLES_FOLDER).rglob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])

    client, adapters = resumable_client.restarted_in_mid_run(
        model, tmp_path, samples, lose, **LONG, train_front=False
    )
    assert_equal(adapters, undisturbed)
    width = HIDDEN_SIZE * FLOAT_BYTES
    assert client.sent_bytes("activations_base") == 2 * base_tokens(samples) * width
