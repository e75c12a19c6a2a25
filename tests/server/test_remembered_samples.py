"""Runs whose server remembers samples, over real gRPC: what travels, is refused, comes back."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from lesft.adapters import lora_state
from lesft.errors import InvalidInput, LesftError, OutOfOrder, TooLarge
from lesft.micro_batch import StepKey
from lesft.spec import LossSpec
from lesft.step_messages import micro_batch_to_message
from lesft.v1.training_pb2 import TrainRequest
from lesft.wire import WireCounter
from lesft_client.back import LocalBack
from lesft_client.status import Status
from lesft_client.trainer import Trainer
from tests.client.test_trainer import make_back
from tests.harness import RunningServer, make_front, random_samples, server_settings
from tests.server import resumable_client
from tests.server.harness import (
    assert_serving,
    bent,
    join,
    raw_channel,
    refusal,
    snapshot,
    with_chunks,
    without_pauses,
)
from tests.server.resumable_client import (
    ResumableClient,
    adapters_of,
    assert_equal,
    base_tokens,
    live,
    reference_tokens,
    serving,
    target_tokens,
)
from tests.server.test_sample_store import sent as sample_sent
from tests.tiny_models import HIDDEN_SIZE

FLOAT_BYTES = 4

Refresh = int | str
WIDTH = HIDDEN_SIZE * FLOAT_BYTES


def remembering(refresh: Refresh) -> dict[str, Any]:
    return {"loss": {"salient_threshold": 0.012, "reference_refresh": refresh}}


ONCE = remembering("once")
train_alone = partial(resumable_client.train_alone, **ONCE)


# ---------------------------------------------------------------------- what travels


@pytest.mark.parametrize(
    ("refresh", "times"), [("every_step", 6), ("every_epoch", 6), ("once", 1), (2, 3), (5, 2)]
)
def test_reference_paths_and_labels_travel_when_they_are_due(
    refresh: Refresh, times: int, model: Path, tmp_path: Path
) -> None:
    """Six epochs of four samples, two a micro-batch."""
    samples = random_samples(4)
    client, _ = train_alone(
        model, tmp_path, samples, **remembering(refresh), rounds=6, batch_size=2
    )
    assert client.sent_bytes("activations_base") == 6 * base_tokens(samples) * WIDTH
    assert client.sent_bytes("activations_reference") == times * reference_tokens(samples) * WIDTH
    assert client.sent_bytes("labels") == times * target_tokens(samples) * 4
    assert client.wire.by_kind()["down"]["gradients"] == 6 * base_tokens(samples) * WIDTH


def test_samples_that_meet_again_in_one_window_are_sent_once(model: Path, tmp_path: Path) -> None:
    """Three samples in windows of six: one is drawn again while it is on its way."""
    samples = random_samples(3)
    client, _ = train_alone(model, tmp_path, samples, accumulation=3, batch_size=2)
    assert client.sent_bytes("activations_reference") == reference_tokens(samples) * WIDTH


def test_what_has_no_room_is_sent_each_time_to_the_adapters_of_every_step(
    model: Path, tmp_path: Path
) -> None:
    samples = random_samples(3)
    nothing, adapters = train_alone(model, tmp_path / "no room", samples, remembered_mib=0)
    assert nothing.sent_bytes("activations_reference") == 2 * reference_tokens(samples) * WIDTH
    _, every_step = train_alone(model, tmp_path / "each", samples, **remembering("every_step"))
    assert_equal(adapters, every_step)
    _, once = train_alone(model, tmp_path / "once", samples)
    assert any(not torch.equal(once[name], every_step[name]) for name in once)


@pytest.mark.parametrize("refresh", ["once", 2])
def test_the_back_in_this_process_remembers_the_same(
    refresh: Refresh, model: Path, tmp_path: Path
) -> None:
    samples = random_samples(3)
    options = {**remembering(refresh), "rounds": 6}
    with serving(model, tmp_path / "server", **options) as server:
        client = ResumableClient(model, server.spec, server.grpc, samples, tmp_path / "client")
        client.run()
        split = adapters_of(server)
    back, front = make_back(model, client.spec), make_front(model, client.spec, client.name)
    status = Status(client.name, WireCounter())
    Trainer(front, LocalBack(back, client.name), None, samples, status).train()
    assert_equal(lora_state(back.model, client.spec.cut_layer), split)
    assert_equal(front.adapter(), client.front.adapter())
    assert status.loss_by_round == client.status.loss_by_round


# ---------------------------------------------------------------------- what is refused


DUE = StepKey(0, 1)


def messages(key: StepKey, samples: Sequence[int], enclosed: Sequence[int]) -> list[TrainRequest]:
    """A micro-batch whose samples' contents depend on their numbers alone."""
    batch = sample_sent(key, samples, enclosed)
    batch = replace(batch, base=sample_sent(key, samples, samples).base)
    header, data = micro_batch_to_message(batch, "raw")
    return with_chunks(TrainRequest(micro_batch=header), data)


REFUSED: dict[str, tuple[Callable[[], list[TrainRequest]], type[LesftError], str]] = {
    "no samples": (
        partial(bent, messages, DUE, [2], [2], samples=[]),
        InvalidInput,
        "samples must have 1 to 2 entries (batch_size), got 0",
    ),
    "a number that the client has no sample of": (
        partial(bent, messages, DUE, [2], [2], samples=[3], enclosed=[3]),
        InvalidInput,
        "samples: the client has samples 0 to 2, got 3",
    ),
    "one enclosed that is not among them": (
        partial(bent, messages, DUE, [2], [2], samples=[0]),
        InvalidInput,
        "enclosed must be some of samples [0], each once, got [2]",
    ),
    "targets of one that is not enclosed": (
        partial(bent, messages, DUE, [2], [2], enclosed=[]),
        InvalidInput,
        "target_lengths must have one entry for each of the 0 samples enclosed, got 1",
    ),
    "a base path of one that is not named": (
        partial(bent, messages, DUE, [2, 0], [2], samples=[2]),
        InvalidInput,
        "base_lengths must have one entry per sample (1), got 2",
    ),
    "a base path that is too long": (
        partial(bent, messages, DUE, [2, 0], [2], base_lengths=[7, 65]),
        TooLarge,
        "base_lengths: a sequence of 65 tokens, but the run's max_length is 64: skip the sample or "
        "raise --max-length on the server",
    ),
    "a base path of one token": (
        partial(bent, messages, DUE, [2, 0], [2], base_lengths=[7, 1]),
        InvalidInput,
        "base_lengths: a sequence must have at least 2 tokens, prompt and target, got 1",
    ),
    "no reference path of what is enclosed": (
        partial(bent, messages, DUE, [2], [2], reference_lengths=[]),
        InvalidInput,
        "reference_lengths must have one entry per sample (1), got 0",
    ),
    "a target as long as its base path": (
        partial(bent, messages, DUE, [2], [2], target_lengths=[7]),
        InvalidInput,
        "target_lengths: a target must have 1 to 6 of its sequence's 7 tokens, got 7",
    ),
    "a base path shorter than the target that is remembered": (
        partial(bent, messages, DUE, [2, 1], [2], base_lengths=[10, 3]),
        InvalidInput,
        "base_lengths: sample 1 has 3 tokens, but its target alone has 3",
    ),
    "one that is neither remembered nor enclosed": (
        partial(bent, messages, DUE, [0, 2], []),
        OutOfOrder,
        "sample 2 is not remembered here: enclose its targets and reference path",
    ),
}


@pytest.fixture(scope="module")
def refusing(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server in mid-run, which all that is refused must leave as it was."""
    state = tmp_path_factory.mktemp("refusing")
    with serving(model, state, **ONCE, batch_size=2) as server, without_pauses():
        with raw_channel(server.grpc) as channel:
            session = join(channel, server.spec, "a", num_samples=3, instance_id="phone")
            session.send(*messages(StepKey(0, 0), [0, 1], [0, 1]))
            assert list(session.receive().step.held) == [0, 1]
        yield server


@pytest.mark.parametrize("what", REFUSED)
def test_samples_that_break_a_rule_are_refused_and_nothing_of_them_is_remembered(
    what: str, refusing: RunningServer
) -> None:
    make, kind, message = REFUSED[what]
    before, used = snapshot(refusing), refusing.engine.back.memory.num_bytes
    with raw_channel(refusing.grpc) as channel:
        session = join(channel, refusing.spec, "a", DUE, num_samples=3, instance_id="phone")
        session.send(*make())
        assert session.refusal() == refusal(kind, message)
    after = snapshot(refusing)
    assert all(torch.equal(before[name][0], after[name][0]) for name in before)
    assert (refusing.engine.run.steps, refusing.engine.back.memory.num_bytes) == (1, used)
    assert_serving(refusing)


def test_a_run_whose_reference_path_is_trained_or_whose_clients_do_not_train_remembers_nothing(
    model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match="leave reference_refresh at every_step, got 0"):
        LossSpec(reference_nll_weight=0.5, reference_refresh="once")
    with pytest.raises(ValidationError, match="leave it at every_step, got 2"):
        server_settings(model, tmp_path, train_front=False, **remembering(2))


# ---------------------------------------------------------------------- coming back

LONG: dict[str, Any] = {"rounds": 6, "batch_size": 2, "aggregation_interval": 2}
"""Five samples in windows of four: epochs begin in the midst of windows, and of intervals."""

SAMPLES = random_samples(5)
Undisturbed = dict[Refresh, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Adapters by `reference_refresh`."""
    return {
        refresh: resumable_client.train_alone(
            model, tmp_path_factory.mktemp("run"), SAMPLES, **LONG, **remembering(refresh)
        )[1]
        for refresh in ("once", 2)
    }


@pytest.mark.parametrize(("refresh", "dies_after"), [("once", 1), ("once", 3), (2, 3), (2, 5)])
def test_a_client_that_is_started_again_asks_for_the_same_and_leads_to_the_same_adapters(
    refresh: Refresh, dies_after: int, model: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """Whatever the server remembers since is not yet remembered where the client goes on."""
    with serving(model, tmp_path / "server", **LONG, **remembering(refresh)) as server:
        live(server, model, SAMPLES, tmp_path / "client", dies_after=dies_after)
        live(server, model, SAMPLES, tmp_path / "client")
        assert_equal(adapters_of(server), undisturbed[refresh])


@pytest.mark.parametrize("refresh", ["once", 2])
def test_a_server_that_is_started_again_remembers_what_its_checkpoint_does(
    refresh: Refresh, model: Path, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    client, adapters = resumable_client.restarted_in_mid_run(
        model, tmp_path, SAMPLES, lambda: None, **LONG, **remembering(refresh)
    )
    assert_equal(adapters, undisturbed[refresh])
    assert client.link.reconnects == 1


def test_a_client_with_other_samples_is_not_taken_for_the_one_before(
    model: Path, tmp_path: Path
) -> None:
    """It has lost its state, and with it its instance, before the first window was closed."""
    with serving(model, tmp_path / "server", **ONCE, batch_size=2) as server:
        with raw_channel(server.grpc) as channel:
            session = join(channel, server.spec, "a", num_samples=3, instance_id="phone")
            session.send(*messages(StepKey(0, 0), [0, 1], [0, 1]))
            assert list(session.receive().step.held) == [0, 1]
        with raw_channel(server.grpc) as channel:
            session = join(channel, server.spec, "a", num_samples=3, instance_id="tablet")
            session.send(*messages(StepKey(0, 0), [0, 1], []))
            assert session.refusal() == refusal(
                OutOfOrder,
                "sample 0 is not remembered here: enclose its targets and reference path",
            )
