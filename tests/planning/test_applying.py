"""`--apply`: a plan changes a run that has not begun, and no other."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from lesft.errors import HandshakeMismatch, InvalidInput, LesftError, NotAllowed, OutOfOrder
from lesft.micro_batch import StepKey
from lesft.spec import PROTOCOL_VERSION, RunSpec
from lesft.v1 import model_pb2, model_pb2_grpc, tensor_pb2
from lesft_server.planning import AcceptedPlan, as_planned, keep_plan
from lesft_server.run import RunState
from tests.harness import RunningServer, running_server, server_settings
from tests.planning.harness import serving, spec_at
from tests.server.harness import join, make_batch, raw_channel, refusal_of, step_messages


def request_for(spec: RunSpec, **changes: Any) -> model_pb2.ApplyPlanRequest:
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "spec_fingerprint": spec.fingerprint(),
        "cut_layer": 3,
        "activation_encoding": tensor_pb2.ENCODING_INT8,
        "gradient_encoding": tensor_pb2.ENCODING_BF16,
        "adapter_encoding": tensor_pb2.ADAPTER_ENCODING_INT4,
    }
    return model_pb2.ApplyPlanRequest(**{**fields, **changes})


def refused(address: str, spec: RunSpec, **changes: Any) -> tuple[type[LesftError], str]:
    request = request_for(spec, **changes)
    with raw_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        model_pb2_grpc.ModelServiceStub(channel).ApplyPlan(request, timeout=20)
    refusal = refusal_of(caught.value)
    return refusal.kind, refusal.message


def test_the_cut_and_the_encodings_of_a_plan_are_taken(model: Path, tmp_path: Path) -> None:
    with serving(server_settings(model, tmp_path, accept_plans=True)) as address:
        before = spec_at(address)
        with raw_channel(address) as channel:
            model_pb2_grpc.ModelServiceStub(channel).ApplyPlan(request_for(before))
        while (now := spec_at(address)) == before:
            time.sleep(0.05)
    assert now.cut_layer == 3
    encodings = (now.activation_encoding, now.gradient_encoding, now.adapter_encoding)
    assert encodings == ("int8", "bf16", "int4")
    names = {*AcceptedPlan.model_fields, "front_fingerprint"}
    assert now.model_dump(exclude=names) == before.model_dump(exclude=names)
    assert now.front_fingerprint != before.front_fingerprint


@contextmanager
def accepting(model: Path, state: Path, **more: Any) -> Iterator[RunningServer]:
    options = {"cut_layer": 2, "accept_plans": True, "clients": 2, **more}
    with running_server(server_settings(model, state, **options)) as server:
        yield server


def test_a_plan_is_taken_only_where_the_operator_allows_it(model: Path, tmp_path: Path) -> None:
    with accepting(model, tmp_path, accept_plans=False) as server:
        kind, message = refused(server.grpc, server.spec)
    assert kind is NotAllowed
    assert message.startswith("this server takes no plans: ask its operator")


def test_a_plan_comes_too_late_once_a_client_has_joined(model: Path, tmp_path: Path) -> None:
    with accepting(model, tmp_path) as server, raw_channel(server.grpc) as channel:
        session = join(channel, server.spec, "client-1")
        joined = refused(server.grpc, server.spec)
        server.engine.run.state = RunState.TRAINING
        training = refused(server.grpc, server.spec)
        session.close_requests()
    assert joined[0] is training[0] is OutOfOrder
    assert joined[1].startswith("clients have joined already (client-1)")
    assert training[1].startswith("the run has begun (training)")


def test_a_plan_comes_too_late_for_a_run_that_began_before_its_server_was_started_again(
    model: Path, tmp_path: Path
) -> None:
    """There is no checkpoint yet, and no client is back: but they hold parts of that cut."""
    options: dict[str, Any] = {
        "clients": 1,
        "batch_size": 2,
        "aggregation_interval": 2,
        "rounds": 2,
    }
    with accepting(model, tmp_path, **options) as server, raw_channel(server.grpc) as channel:
        session = join(channel, server.spec, "client-1")
        session.send(*step_messages(make_batch(StepKey(0, 0))))
        session.receive_step()
    with accepting(model, tmp_path, **options) as server:
        kind, message = refused(server.grpc, server.spec)
    assert kind is OutOfOrder
    assert message.startswith("the run has begun (waiting for clients)")
    with accepting(model, tmp_path, fresh=True, **options) as server:
        kind, message = refused(server.grpc, server.spec, cut_layer=0)
    assert kind is InvalidInput


def test_what_the_servers_own_options_could_not_be_a_plan_cannot_either(
    model: Path, tmp_path: Path
) -> None:
    with accepting(model, tmp_path, personal_layers=(1,)) as server:
        for changes, kind, message in (
            ({"protocol_version": 1}, HandshakeMismatch, "protocol_version: server"),
            ({"spec_fingerprint": "sha256:1"}, HandshakeMismatch, "spec_fingerprint: server"),
            ({"cut_layer": 0}, InvalidInput, "cut_layer must lie between 1 and 3"),
            ({"cut_layer": 4}, InvalidInput, "cut_layer must lie between 1 and 3"),
            ({"cut_layer": 1}, InvalidInput, "personal_layers must lie between 0 and 0"),
            ({"activation_encoding": 0}, InvalidInput, "activation_encoding is none"),
            ({"gradient_encoding": 9}, InvalidInput, "gradient_encoding is none"),
            ({"adapter_encoding": 9}, InvalidInput, "encoding: an adapter is raw or int8 or int4"),
        ):
            found = refused(server.grpc, server.spec, **changes)
            assert found[0] is kind
            assert found[1].startswith(message)
        assert not (tmp_path / "accepted-plan.json").exists()


def test_clients_cannot_have_less_of_the_model_left_with_them_than_a_quarter(
    eight_layers: Path, tmp_path: Path
) -> None:
    with accepting(eight_layers, tmp_path, cut_layer=3) as server:
        kind, message = refused(server.grpc, server.spec, cut_layer=1)
    assert kind is NotAllowed
    assert message.startswith("cut_layer must be at least 2 in a plan, got 1")


def test_a_kept_plan_goes_before_the_options_until_a_fresh_start(
    model: Path, tmp_path: Path
) -> None:
    settings = server_settings(model, tmp_path)
    assert as_planned(settings) == settings
    taken = AcceptedPlan(
        cut_layer=3,
        activation_encoding="int4",
        gradient_encoding="bf16",
        adapter_encoding="int4",
    )
    keep_plan(tmp_path, taken)
    planned = as_planned(settings)
    assert AcceptedPlan(**planned.model_dump(include=set(AcceptedPlan.model_fields))) == taken
    assert as_planned(settings.model_copy(update={"fresh": True})).cut_layer == 1
    assert as_planned(settings) == settings
    (tmp_path / "accepted-plan.json").write_text("{}")
    with pytest.raises(
        InvalidInput, match=r"accepted-plan\.json holds no plan .*: start with --fresh"
    ):
        as_planned(settings)
