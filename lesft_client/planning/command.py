"""`lesft-client plan`: measure, judge every cut, write it down, and apply it where wanted."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from lesft.commands import say
from lesft.cpu_threads import compute_on_this_thread
from lesft.device import choose_device
from lesft.errors import Busy, InvalidInput, LesftError, Unreachable
from lesft.files import write_atomically
from lesft.interceptors import remote_errors
from lesft.spec import PROTOCOL_VERSION, RunSpec
from lesft.spec_messages import (
    adapter_encoding_to_message,
    encoding_to_message,
    spec_from_message,
)
from lesft.v1 import model_pb2, model_pb2_grpc
from lesft.weights import parse_config
from lesft.wire import WireCounter
from lesft_client.connector import Connector, own_client_id
from lesft_client.data import EncodedSample
from lesft_client.data_command import samples_of
from lesft_client.patience import Tries
from lesft_client.planning.device_speed import measure_device
from lesft_client.planning.link_speed import measure_link
from lesft_client.planning.memory import (
    MemoryModel,
    free_bytes,
    shares_memory,
    training_process_bytes,
)
from lesft_client.planning.options import Conditions, MeasuredBack, Option, shallowest_cut
from lesft_client.planning.report import Plan, make_plan, page, terminal
from lesft_client.planning.settings import PlanSettings
from lesft_client.planning.workload import micro_batches, tokens_of, workload
from lesft_client.run_front import describe_run
from lesft_client.run_samples import SERVERS_OPTION, check_vocabulary, encode_for_run
from lesft_client.tokenizer import load_tokenizer

T = TypeVar("T")


def plan(settings: PlanSettings) -> str:
    """Write the plan to --output and return what to print. Raises LesftError."""
    compute_on_this_thread(settings.threads)
    connector = Connector(settings.server, settings, "server")
    client_id = own_client_id("", [connector])
    made = PlanCommand(settings, connector, client_id).make()
    _write(made, settings.output)
    said = "\n".join([terminal(made), "", *(f"  {settings.output / name}" for name in _FILES)])
    if not settings.apply:
        return said
    say(said)  # before the server is asked, which may refuse
    return _apply(made, settings, connector)


_FILES = ("plan.md", "plan.json", "plan.png")


def _write(made: Plan, folder: Path) -> None:
    from lesft_client.planning.picture import draw_plan  # it takes a while to load

    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "plan.json", made.model_dump_json(indent=2).encode())
    write_atomically(folder / "plan.md", page(made).encode())
    draw_plan(made, folder / "plan.png")


class PlanCommand:
    """The measurements, one after another, so that none is in the way of another."""

    def __init__(self, settings: PlanSettings, connector: Connector, client_id: str) -> None:
        self._settings = settings
        self._connector = connector
        self._client_id = client_id
        self._party = f"server {settings.server}"

    def make(self) -> Plan:
        """Measure, and judge."""
        settings = self._settings
        with self._connector.open() as channel:
            stub = model_pb2_grpc.ModelServiceStub(channel)
            description = describe_run(stub, self._party, settings.patience_seconds, WireCounter())
            spec = spec_from_message(description.spec)
            config = parse_config(description.config_json)
            samples = self._samples(spec, config.vocab_size)
            batches = micro_batches(spec, samples, self._client_id)
            in_flight = min(settings.in_flight or spec.accumulation, spec.accumulation)
            work = workload(spec, batches, len(samples), in_flight)
            say("measuring the link")
            link = _patiently(lambda: measure_link(channel, self._party), settings)
            back = self._measure_back(stub, spec, _typical(batches, spec))
        process = training_process_bytes()
        speed, shape = measure_device(settings, spec, description.config_json, batches, say)
        device = choose_device(settings.device)
        conditions = Conditions(
            spec=spec,
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            in_flight=in_flight,
            workload=work,
            device=speed,
            memory=MemoryModel(
                process_bytes=process if shares_memory(device) else 0,
                front=shape,
                gradient_checkpointing=settings.gradient_checkpointing,
            ),
            link=link,
            back=back,
            memory_mib=settings.memory_mib or free_bytes(device) / (1 << 20),
            shallowest_cut=shallowest_cut(config.num_hidden_layers, settings.allow_shallower),
        )
        return make_plan(settings.server, conditions)

    def _samples(self, spec: RunSpec, vocab_size: int) -> list[EncodedSample]:
        """This client's training samples. Raises DataError, ModelError."""
        settings = self._settings
        samples = encode_for_run(
            samples_of(settings, "train"),
            "train",
            load_tokenizer(settings.model),
            spec,
            settings.max_length,
            SERVERS_OPTION,
            say,
        )
        check_vocabulary(samples, vocab_size, settings.model, spec)
        return samples

    def _measure_back(
        self, stub: model_pb2_grpc.ModelServiceStub, spec: RunSpec, batch: list[EncodedSample]
    ) -> MeasuredBack | None:
        """What such a micro-batch costs the server; None where it cannot tell."""
        say("the server measures itself")
        request = model_pb2.MeasureBackRequest(
            protocol_version=PROTOCOL_VERSION,
            base_lengths=[len(s.base_ids) + len(s.target_ids) for s in batch],
            reference_lengths=[len(s.reference_ids) + len(s.target_ids) for s in batch]
            if spec.loss.needs_reference
            else (),
            target_lengths=[len(s.target_ids) for s in batch],
        )

        def ask() -> model_pb2.MeasureBackResponse:
            with remote_errors(self._party):
                return stub.MeasureBack(request)

        try:
            answer = _patiently(ask, self._settings)
        except Unreachable:
            raise
        except LesftError as error:
            say(f"the server was not measured: {error}")
            return None
        return MeasuredBack(
            fixed_seconds=answer.fixed_seconds,
            layer_seconds=answer.layer_seconds,
            tokens=tokens_of(batch, spec),
        )


def _typical(batches: Sequence[list[EncodedSample]], spec: RunSpec) -> list[EncodedSample]:
    """The micro-batch whose tokens are nearest to the mean."""
    sizes = [tokens_of(batch, spec).base for batch in batches]
    mean = sum(sizes) / len(sizes)
    return min(batches, key=lambda batch: abs(tokens_of(batch, spec).base - mean))


def _patiently(call: Callable[[], T], settings: PlanSettings) -> T:
    """As `lesft_client.patience.patiently`, also with a server that is busy."""
    tries = Tries(settings.patience_seconds)
    while True:
        tries.begin()
        try:
            return call()
        except (Unreachable, Busy) as error:
            pause = tries.pause_after(error)
        time.sleep(pause)


# ---------------------------------------------------------------------- applying


def _apply(made: Plan, settings: PlanSettings, connector: Connector) -> str:
    """Have the server begin its run so, and wait until it is ready; returns what to say.

    Raises InvalidInput where nothing is recommended, and what the server refuses with.
    """
    best, spec = made.recommended, made.conditions.spec
    if best is None:
        raise InvalidInput(f"nothing to apply: {' '.join(made.explanation)}")
    if _is_of(best, spec):
        return "applied already: it is what the run is"
    party = f"server {settings.server}"
    request = model_pb2.ApplyPlanRequest(
        protocol_version=PROTOCOL_VERSION,
        spec_fingerprint=made.spec_fingerprint,
        cut_layer=best.cut_layer,
        activation_encoding=encoding_to_message(best.activation_encoding),
        gradient_encoding=encoding_to_message(best.gradient_encoding),
        adapter_encoding=adapter_encoding_to_message(best.adapter_encoding),
    )
    with connector.open() as channel, remote_errors(party):
        model_pb2_grpc.ModelServiceStub(channel).ApplyPlan(request)
    say("the server has taken the plan and loads its part anew")

    def loaded() -> None:
        with connector.open() as channel:
            stub = model_pb2_grpc.ModelServiceStub(channel)
            description = describe_run(stub, party, settings.patience_seconds, WireCounter())
        if not _is_of(best, spec_from_message(description.spec)):
            raise Busy(f"{party}: has taken the plan, but not loaded it yet")

    _patiently(loaded, settings)
    return f"applied: the run's cut layer is {best.cut_layer} now"


def _is_of(option: Option, spec: RunSpec) -> bool:
    names = ("cut_layer", "activation_encoding", "gradient_encoding", "adapter_encoding")
    return all(getattr(option, name) == getattr(spec, name) for name in names)
