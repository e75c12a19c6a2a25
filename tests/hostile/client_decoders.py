"""What a client decodes of what a hostile server or aggregator sends, and the files it reads."""

import contextlib
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import torch

from lesft.adapter_codec import encode
from lesft.adapter_halves import AdapterHalf, HalfInfo, encode_half, load_half
from lesft.bundle import bundle_chunks, bundle_info
from lesft.errors import InvalidInput
from lesft.inference_messages import (
    Question,
    Reply,
    TokenAt,
    TokenScore,
    TopLogits,
    reply_from_message,
    reply_to_message,
    result_bytes,
)
from lesft.micro_batch import StepKey, StepResult
from lesft.settings import load_settings
from lesft.spec import AdapterEncoding
from lesft.spec_messages import (
    adapter_encoding_to_message,
    spec_from_message,
    spec_to_message,
)
from lesft.step_messages import result_from_message, result_to_message
from lesft.tensors import encode_tensors
from lesft.v1 import aggregation_pb2, inference_pb2, model_pb2, run_pb2, training_pb2
from lesft.weights import parse_config
from lesft.wire import WireCounter
from lesft_aggregator.settings import AggregatorSettings
from lesft_client.adapter_fetch import read_back
from lesft_client.aggregation import Aggregator
from lesft_client.data.jsonl import samples
from lesft_client.data.rows import read_rows
from lesft_client.front_weights import _Download
from lesft_client.link import Patience
from lesft_client.trainer import Average
from lesft_server.settings import ServerSettings
from tests.aggregator.harness import SHAPES, make_adapter, make_tensors
from tests.hostile.lying_safetensors import lying_safetensors
from tests.hostile.mutate import mutate_bytes, odd_json
from tests.hostile.served_decoders import (
    LIMITS,
    SPEC,
    Decoder,
    _announced,
    received,
    transferred,
)
from tests.server.harness import make_batch
from tests.tiny_models import VOCAB_SIZE, tiny_config

# ---------------------------------------------------------------------- from the server


def run_spec(random: Random) -> None:
    """The run's settings."""
    parsed = received(random, spec_to_message(SPEC))
    assert isinstance(parsed, run_pb2.RunSpec)
    spec = spec_from_message(parsed)
    json.loads(json.dumps(spec.model_dump(mode="json"), allow_nan=False))
    assert spec.lora.alpha > 0


def model_config(random: Random) -> None:
    """The model's config.json."""
    values = tiny_config("llama").to_dict()
    if random.random() < 0.5:
        name = random.choice(list(values))
        text = json.dumps({**values, name: "@"}).replace('"@"', odd_json(random))
    else:
        text = mutate_bytes(random, json.dumps(values).encode()).decode(errors="replace")
    parse_config(text)


def step_result(random: Random) -> None:
    """A step's result."""
    batch = make_batch(StepKey(0, 0))
    result = StepResult(
        batch.key, torch.randn_like(batch.base.activations_ND), None, 1.0, 1.5, (1, 2, 2)
    )
    message, data = result_to_message(result, "raw")
    data = lying_safetensors(random, data)
    if random.random() < 0.5:
        parsed = received(random, message)
        assert isinstance(parsed, training_pb2.StepResult)
        message = parsed
    message.bundle.CopyFrom(_announced(random, data))
    data = transferred(random, message.bundle, data, LIMITS.result_bytes(batch))
    decoded = result_from_message(message, data, batch, LIMITS)
    assert decoded.base_gradient_ND is not None
    assert bool(torch.isfinite(decoded.base_gradient_ND).all())


def decode_result(random: Random) -> None:
    """What comes next in a text."""
    question, top_logits = Question(2, (TokenAt(0, 3),)), random.choice((0, 4))
    top = TopLogits(torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, 4)) if top_logits else None
    reply = Reply(() if top else (3, 4), top, (TokenScore(-1.0, False),))
    message, _ = reply_to_message(0, reply)
    data = b""
    if top:
        data = lying_safetensors(random, message.chunk.data)
    if random.random() < 0.6:
        parsed = received(random, message)
        assert isinstance(parsed, inference_pb2.DecodeResult)
        message = parsed
    if top:
        info = _announced(random, data)
        data = transferred(random, info, data, result_bytes(question, top_logits))
    decoded = reply_from_message(message, data, question, top_logits, VOCAB_SIZE)
    assert all(0 <= token < VOCAB_SIZE for token in decoded.token_ids)


class FrontPieces:
    """The front's weights, piece by piece."""

    def __init__(self, folder: Path) -> None:
        self._part = folder / "front.part"

    def __call__(self, random: Random) -> None:
        self._part.unlink(missing_ok=True)
        data = random.randbytes(3_000)
        pieces = [
            model_pb2.FetchFrontResponse(
                offset_bytes=at, data=data[at : at + 1000], crc32=zlib.crc32(data[at : at + 1000])
            )
            for at in range(0, 3_000, 1000)
        ]
        _disturb(random, pieces)

        class Stub:
            @staticmethod
            def FetchFront(request: model_pb2.FetchFrontRequest) -> Iterator[Any]:
                return iter(pieces)

        stub: Any = Stub()
        download = _Download(stub, "f", self._part, 3_000, "server s", WireCounter())
        download.resume(lambda done, total: None)
        assert self._part.stat().st_size == 3_000


def _disturb(random: Random, messages: list[Any]) -> None:
    """One message of a stream is mutated, missing, there twice or in another's place."""
    at = random.randrange(len(messages))
    match random.randrange(5):
        case 0:
            del messages[at]
        case 1:
            messages.insert(at, messages[at])
        case 2:
            random.shuffle(messages)
        case _:
            messages[at] = received(random, messages[at])


_FRONT = AdapterHalf(
    HalfInfo.of(SPEC, "front", 6),
    {
        f"model.layers.0.mlp.gate_proj.lora_{side}.weight": torch.randn(shape)
        for side, shape in (("A", (2, 5)), ("B", (7, 2)))
    },
)
_BACK = {
    name.replace("layers.0", f"layers.{layer}"): tensor.clone()
    for name, tensor in _FRONT.tensors.items()
    for layer in (1, 2)
}


def fetched_adapter(random: Random) -> None:
    """The server's half of the adapter."""
    data = lying_safetensors(random, encode_tensors(_BACK, "raw"))
    info = _FRONT.info
    header = model_pb2.AdapterHeader(
        bundle=bundle_info(data),
        run_id=info.run_id,
        spec_fingerprint=info.spec_fingerprint,
        cut_layer=info.cut_layer,
        rounds=info.rounds,
        num_layers=3,
    )
    messages = [
        model_pb2.FetchAdapterResponse(header=header),
        *(model_pb2.FetchAdapterResponse(chunk=chunk) for chunk in bundle_chunks(data)),
    ]
    if random.random() < 0.5:
        _disturb(random, messages)
    back = read_back(iter(messages), _FRONT)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in back.tensors.values())


# ---------------------------------------------------------------------- from the aggregator


class FetchedAggregate:
    """An averaged adapter."""

    def __init__(self, encoding: AdapterEncoding = "raw") -> None:
        self._encoding: AdapterEncoding = encoding
        patience = Patience(first_contact=1, reconnect=0, stall=60)
        self._base = {name: torch.from_numpy(array) for name, array in make_tensors(1).items()}
        self._responses: list[Any] = []
        self._aggregator = Aggregator(
            lambda: Any, "aggregator a", "a", "lesft", "", 1, encoding, patience, WireCounter()
        )
        stub: Any = SimpleNamespace(Fetch=lambda request: _Responses(self._responses))
        self._aggregator._stub = lambda: stub  # type: ignore[method-assign]

    def __call__(self, random: Random) -> None:
        if self._encoding == "raw":
            valid = make_adapter(0)
        else:
            valid = encode(make_tensors(0), self._encoding, make_tensors(1))
        data = lying_safetensors(random, valid)
        encoding = adapter_encoding_to_message(self._encoding)
        aggregate = aggregation_pb2.Aggregate(
            version=2, bundle=bundle_info(data), encoding=encoding
        )
        self._responses = [
            aggregation_pb2.FetchResponse(aggregate=aggregate),
            *(aggregation_pb2.FetchResponse(chunk=chunk) for chunk in bundle_chunks(data)),
        ]
        if random.random() < 0.5:
            _disturb(random, self._responses)
        fetched = self._aggregator.fetch(2, self._base, Average(1, self._base))
        assert {name: tuple(tensor.shape) for name, tensor in fetched.items()} == SHAPES
        assert all(bool(torch.isfinite(tensor).all()) for tensor in fetched.values())


class _Responses:
    """Of a call: they come, and it may be cancelled."""

    def __init__(self, responses: list[Any]) -> None:
        self._responses = iter(responses)

    def __iter__(self) -> Iterator[Any]:
        return self._responses

    def cancel(self) -> None:
        """Nothing is left to cancel."""


# ---------------------------------------------------------------------- files


class AdapterFile:
    """A half of an adapter as a file that somebody was given."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "half.safetensors"
        self._valid = encode_half(_FRONT)

    def __call__(self, random: Random) -> None:
        self._file.write_bytes(lying_safetensors(random, self._valid))
        half = load_half(self._file)
        assert half.info.cut_layer >= 1


_LINE = '{"prompt": "What is 12 + 9?", "target": "12 + 9 = 21\\n#### 21", "answer": "21"}'


class DataFile:
    """A JSONL file of samples."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "data.jsonl"

    def __call__(self, random: Random) -> None:
        lines = [_LINE.encode()] * 3
        which = random.randrange(3)
        if random.random() < 0.5:
            lines[which] = mutate_bytes(random, lines[which])
        else:
            odd = odd_json(random)
            text = odd if random.random() < 0.5 else _LINE.replace('"21"', odd)
            lines[which] = text.encode("utf-8", "surrogatepass")
        self._file.write_bytes(b"\n".join(lines))
        for sample in samples(read_rows(self._file)):
            assert sample.prompt.encode()
            assert sample.target.strip()


_TOML = """
clients = 4
rounds = 9
model = "tiny"
state = "state"
heartbeat_seconds = 5.0
[lora]
rank = 8
target_modules = ["up_proj"]
[optimizer]
learning_rate = 1e-4
"""
_ODD_TOML = (
    *("[" * 5_000, "a = " + "[" * 20_000, "9" * 5000, "a = " + "9" * 5000, "nan", "[lora.rank]"),
    *("lora = 3", "rounds = nan", "rounds = inf", "clients = -1", "seed = 1e400", "state = 7"),
    *("deadline_seconds = inf", "stall_seconds = nan", "x = 1979-05-27T07:32:00Z", "\x00"),
)


class ConfigFile:
    """A TOML file of settings. The command prints what is wrong and exits with status 2."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "config.toml"

    def __call__(self, random: Random) -> None:
        text = _TOML.encode()
        if random.random() < 0.6:
            text = mutate_bytes(random, text)
        else:
            text = f"{random.choice(_ODD_TOML)}\n{_TOML}".encode()
        self._file.write_bytes(text)
        kind = random.choice((ServerSettings, AggregatorSettings))
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                settings = load_settings(kind, "lesft", [f"--config={self._file}"])
        except SystemExit as end:
            if end.code != 2:
                raise
            raise InvalidInput(complaint.getvalue()) from None
        assert settings.clients >= 1


def client_decoders(folder: Path) -> dict[str, Decoder]:
    """All of them, by name; `folder` is for their files."""
    return {
        "DescribeRun: spec": run_spec,
        "DescribeRun: config_json": model_config,
        "FetchFront": FrontPieces(folder),
        "Train: step": step_result,
        "Generate: result": decode_result,
        "FetchAdapter": fetched_adapter,
        "Fetch: aggregate": FetchedAggregate(),
        "Fetch: aggregate, int8": FetchedAggregate("int8"),
        "Fetch: aggregate, int4": FetchedAggregate("int4"),
        "adapter file": AdapterFile(folder),
        "JSONL": DataFile(folder),
        "TOML": ConfigFile(folder),
    }
