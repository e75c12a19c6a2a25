"""From settings to the language model that they mean."""

import json
import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lesft.adapter_halves import AdapterHalf, load_half
from lesft.adapters import attach_lora, load_lora_state
from lesft.device_thread import DeviceThread
from lesft.errors import HandshakeMismatch, InvalidInput
from lesft.hub import model_folder
from lesft.spec_messages import spec_from_message
from lesft.v1 import model_pb2_grpc
from lesft.wire import WireCounter
from lesft_client.connector import Connector
from lesft_client.data import end_token_id
from lesft_client.front_decoder import FrontDecoder
from lesft_client.language_model import LanguageModel
from lesft_client.local_model import LocalModel, load_local_model
from lesft_client.progress import ProgressDisplay
from lesft_client.recovery import INSTANCE_FILE
from lesft_client.renewal import renewing
from lesft_client.run_front import describe_run, load_run_front
from lesft_client.sequence_stream import Connection
from lesft_client.settings import LanguageModelSettings
from lesft_client.split_model import SplitModel
from lesft_client.split_sequence import SplitContext
from lesft_client.status import Status
from lesft_client.tokenizer import load_tokenizer


@asynccontextmanager
async def open_model(settings: LanguageModelSettings) -> AsyncGenerator[LanguageModel, None]:
    """The model, on the running event loop, while the block runs.

    Raises InvalidInput for settings that do not go together, ModelError, HandshakeMismatch or
    Unreachable when there is no such model.
    """
    _check(settings)
    device = DeviceThread(settings.threads)
    connectors = [] if settings.local else [Connector(settings.server, settings, "server")]
    model: LocalModel | SplitModel = (
        _local(settings, device) if settings.local else _split(settings, connectors[0], device)
    )
    try:
        with renewing(connectors):
            yield model
    finally:
        await model.close()


def _check(settings: LanguageModelSettings) -> None:
    if settings.local:
        if settings.server or settings.state:
            raise InvalidInput(
                "--local runs the whole model here, without --server and --state; the adapter of "
                "both halves, which lesft-client export makes, is given by --adapter"
            )
        if settings.precision in ("int8", "int4"):
            raise InvalidInput(
                f"--precision {settings.precision} is for the front of a split model: with "
                "--local, take bf16"
            )
        if settings.untuned and settings.adapter:
            raise InvalidInput("--untuned and --adapter contradict each other: leave one out")
        return
    if settings.adapter:
        raise InvalidInput("--adapter is for --local; with a server, --state has the front's half")
    if not settings.server:
        raise InvalidInput("--server HOST:PORT is needed, or --local for a model that is here")
    if settings.untuned == bool(settings.state):
        raise InvalidInput(
            "give the --state of lesft-client train for the fine-tuned model, or --untuned for the "
            "model as it was before"
        )


def _trained_by(half: AdapterHalf, state: Path) -> str:
    """The front's adapter and the name that its client had in the run.

    Of a front that does not train, only the name tells on which samples the back was.
    """
    name = state / INSTANCE_FILE
    return half.sha256() + (name.read_text() if name.is_file() else "")


def _local(settings: LanguageModelSettings, device: DeviceThread) -> LocalModel:
    folder = model_folder(settings.model)
    tokenizer = load_tokenizer(settings.model)
    model, fingerprint = load_local_model(
        folder, settings.adapter, settings.precision, settings.device
    )
    name = settings.model.rstrip(os.sep).rpartition(os.sep)[2]
    return LocalModel(
        model,
        name if settings.adapter is None else f"{name}+{settings.adapter.name}",
        fingerprint,
        tokenizer,
        _end_ids(tokenizer, model.config.to_dict()),
        _max_length(model.config),
        device,
    )


def _split(
    settings: LanguageModelSettings, connector: Connector, device: DeviceThread
) -> SplitModel:
    party, wire = f"server {settings.server}", WireCounter()
    display = ProgressDisplay(Status("", wire), bar=False)
    half = load_half(settings.state) if settings.state else None
    tokenizer = load_tokenizer(settings.model)
    with connector.open() as channel:
        models = model_pb2_grpc.ModelServiceStub(channel)
        description = describe_run(models, party, settings.patience_seconds, wire)
        spec = spec_from_message(description.spec)
        if half is not None and half.info.spec_fingerprint != spec.fingerprint():
            raise HandshakeMismatch(
                f"spec_fingerprint: server {spec.fingerprint()}, client "
                f"{half.info.spec_fingerprint}; the adapter in {settings.state} is of run "
                f"{half.info.run_id!r}, and not of this server's run {spec.run_id!r}"
            )
        front, fingerprint = load_run_front(models, description, settings, party, wire, display)
    if half is not None:
        attach_lora(front, spec.lora, spec.seed, 0)
        load_lora_state(front, 0, half.tensors)
    end_ids = _end_ids(tokenizer, json.loads(description.config_json))
    context = SplitContext(
        FrontDecoder(front, device, settings.precision),
        Connection(connector),
        spec,
        fingerprint,
        half.info if half else None,
        _trained_by(half, settings.state) if half and settings.state else "",
        settings.patience_seconds,
        settings.stall_seconds,
        wire,
    )
    return SplitModel(
        context,
        tokenizer,
        end_ids,
        min(_max_length(front.config), description.max_context),
        settings.speculate,
    )


def _end_ids(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, the chat template's and the model's own."""
    own = config.get("eos_token_id")
    ids = {end_token_id(tokenizer), tokenizer.eos_token_id}
    ids.update(own if isinstance(own, list) else [own])
    return frozenset(token_id for token_id in ids if isinstance(token_id, int))


def _max_length(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", 1 << 20))
