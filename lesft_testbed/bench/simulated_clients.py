"""Clients of a server that send prepared activations over their own sockets: a program.

JSON in and JSON out. Each is the client's own link to the server, without a front; the testbed
imports no service but in processes of their own. Ends in mid-run, as nobody waits for the result.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from lesft.channel import open_channel
from lesft.commands import load
from lesft.micro_batch import MicroBatch, StepKey, Targets
from lesft.micro_batch import Path as TokenPath
from lesft.spec import PROTOCOL_VERSION, RunSpec
from lesft.spec_messages import encoding_to_message, lora_to_message, spec_from_message
from lesft.step_messages import Limits
from lesft.v1 import model_pb2, model_pb2_grpc, training_pb2
from lesft.wire import WireCounter
from lesft_testbed.bench.phases import phase_seconds

_SECONDS_EACH = 120
"""To wait for the server: for its first answer, and for each next word of it."""


@dataclass(frozen=True)
class Reading:
    """What has come together by one moment, in seconds."""

    wall: float
    server_cpu: float
    clients_cpu: float
    back_wall: float


def measured_steps(request: Mapping[str, Any]) -> dict[str, float]:
    """Microseconds for each token of both paths, over the steps after the first few.

    The request has `server`, `server_control` and `server_pid`, `tokens` of each path, `steps` and
    `seconds` that are measured at least, and `skipped_steps`.
    """
    torch.set_num_threads(1)
    server = psutil.Process(request["server_pid"])
    with open_channel(request["server"]) as channel:
        asked = model_pb2.DescribeRunRequest(protocol_version=PROTOCOL_VERSION)
        description = model_pb2_grpc.ModelServiceStub(channel).DescribeRun(asked)
    spec = spec_from_message(description.spec)
    config = json.loads(description.config_json)
    limits = Limits(spec, config["hidden_size"], config["vocab_size"])

    def reading() -> Reading:
        own = time.process_time()
        busy = server.cpu_times()
        phases = phase_seconds(request["server_control"], "lesft_server_step_seconds_sum")
        return Reading(time.monotonic(), busy.user + busy.system, own, phases["back"])

    with ExitStack() as stack:
        links = [
            stack.enter_context(_joined(request["server"], spec, limits, f"client-{index}"))
            for index in range(spec.clients)
        ]
        batches = [_micro_batch(limits, request["tokens"], seed) for seed in range(len(links))]
        taken = _steps(links, batches)
        for _ in range(request["skipped_steps"]):
            next(taken)
        first, steps = reading(), 0
        while steps < request["steps"] or time.monotonic() - first.wall < request["seconds"]:
            next(taken)
            steps += 1
        last = reading()  # once: metrics cost the server milliseconds
    tokens = steps * len(links) * 2 * request["tokens"]
    before, after = asdict(first), asdict(last)
    per_token = {
        f"{field.name}_us_per_token": (after[field.name] - before[field.name]) / tokens * 1e6
        for field in fields(Reading)
    }
    return {**per_token, "steps": steps}


@contextmanager
def _joined(address: str, spec: RunSpec, limits: Limits, name: str) -> Iterator[Any]:
    """A client's link to the server, its session open; closed after the block."""
    opening = training_pb2.OpenSession(
        protocol_version=PROTOCOL_VERSION,
        client_id=name,
        run_id=spec.run_id,
        front_fingerprint=spec.front_fingerprint,
        cut_layer=spec.cut_layer,
        lora=lora_to_message(spec.lora),
        activation_encoding=encoding_to_message(spec.activation_encoding),
        gradient_encoding=encoding_to_message(spec.gradient_encoding),
        num_samples=1,
        instance_id=name,
    )
    patience = load("lesft_client.link:Patience")(*[_SECONDS_EACH] * 3)
    link = load("lesft_client.link:ServerLink")(
        lambda: open_channel(address), opening, limits, "server", WireCounter(), patience
    )
    turn = link.open()
    link.resume(turn.round)
    try:
        yield link
    finally:
        link.close()


def _micro_batch(limits: Limits, tokens: int, seed: int) -> MicroBatch:
    """One sample, of which the last quarter is the target."""
    random = torch.Generator().manual_seed(seed)
    base, reference = (
        TokenPath(torch.randn(tokens, limits.hidden_size, generator=random), (tokens,))
        for _ in range(2)
    )
    target = tokens // 4
    ids = torch.randint(limits.vocab_size, (target,), generator=random)
    return MicroBatch(StepKey(0, 0), base, reference, Targets(ids, (target,)))


def _steps(links: Sequence[Any], batches: Sequence[MicroBatch]) -> Iterator[None]:
    """Yields whenever all clients have the answers of a step; the next one's is sent by then."""
    key = StepKey(0, 0)
    _send(links, batches, key)
    while True:
        key = StepKey(0, key.micro + 1)
        _send(links, batches, key)
        for link in links:
            link.receive()
        yield


def _send(links: Sequence[Any], batches: Sequence[MicroBatch], key: StepKey) -> None:
    for link, batch in zip(links, batches, strict=True):
        link.send(replace(batch, key=key))


if __name__ == "__main__":
    asked, answer = map(Path, sys.argv[1:])
    answer.write_text(json.dumps(measured_steps(json.loads(asked.read_bytes()))))
