"""schemathesis against the OpenAPI description of every service."""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lesft.control import ControlServer
from lesft.live import LivePage
from lesft.wire import WireCounter
from lesft_client.control_api import make_app
from lesft_client.metrics import Metrics
from lesft_client.status import Status
from lesft_client.tokenizer import load_tokenizer
from tests.client.fake_language_model import FakeLanguageModel
from tests.endpoint.harness import served
from tests.harness import running_server, save_tiny_model, server_settings
from tests.processes.harness import ANY_PORT, Service, save_model_with_tokenizer

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
"""Whether what was generated as wrong was refused is left out: much of it is read leniently."""


@contextmanager
def server_api(folder: Path) -> Iterator[str]:
    model = save_tiny_model(folder / "model")
    with running_server(server_settings(model, folder / "state", clients=2)) as server:
        yield f"http://{server.control}"


@contextmanager
def aggregator_api(folder: Path) -> Iterator[str]:
    state = folder / "state"
    options = (f"--listen={ANY_PORT}", f"--control={ANY_PORT}", "--clients=2")
    service = Service("lesft-aggregator", *options, state=state, cwd=folder)
    try:
        service.wait_for_line("ready")
        yield f"http://{service.address('control')}"
        assert "Traceback" not in service.output
    finally:
        service.end()


@contextmanager
def client_api(folder: Path) -> Iterator[str]:
    status = Status("client-0", WireCounter())
    app = make_app(status, LivePage(), Metrics(status).registry)
    server = ControlServer(app, insecure=False)
    address = server.start_in_thread(ANY_PORT)
    try:
        yield f"http://{address}"
    finally:
        server.stop_thread()


@contextmanager
def endpoint_api(folder: Path) -> Iterator[str]:
    tokenizer = load_tokenizer(str(save_model_with_tokenizer(folder / "model")))
    model = FakeLanguageModel(tokenizer, lambda prompt: "12 + 9 = 21")
    with served(model) as endpoint:
        yield endpoint.url


APIS = {
    "server": server_api,
    "aggregator": aggregator_api,
    "client": client_api,
    "endpoint": endpoint_api,
}


def try_operation(operation: Any, examples: int) -> int:
    """So many generated requests to one operation; how many were sent."""
    sent, checks = 0, list(CHECKS)
    if operation.path == "/readyz":
        checks.remove(not_a_server_error)  # 503 is its way of saying no

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def send(case: Any) -> None:
        nonlocal sent
        sent += 1
        case.validate_response(case.call(timeout=10), checks=checks)

    send()
    return sent


def _alike(schema: dict[str, Any]) -> dict[str, Any]:
    """A tuple of numbers as an array of them: schemathesis 4.32 stumbles over prefixItems."""
    if "prefixItems" in schema:
        schema["items"] = {"type": "number"}
        assert {item["type"] for item in schema.pop("prefixItems")} <= {"integer", "number"}
    return schema


def try_api(url: str, examples: int) -> int:
    """So many generated requests to every operation of an API; how many were sent."""
    description = json.loads(httpx.get(f"{url}/openapi.json").text, object_hook=_alike)
    assert description["paths"]
    schema = schemathesis.openapi.from_dict(description)
    schema.config.update(base_url=url)
    return sum(try_operation(operation.ok(), examples) for operation in schema.get_all_operations())


def report_rest(examples: int) -> bool:
    """So many generated requests to every operation of every API, on standard output."""
    withstood = True
    for name, api in APIS.items():
        with tempfile.TemporaryDirectory() as folder, api(Path(folder)) as url:
            try:
                sent = try_api(url, examples)
                sys.stdout.write(f"{name}: {sent} generated requests, all answered as described\n")
            except FailureGroup as group:
                withstood = False
                sys.stdout.write(f"{name}: {group!r}\n")
    return withstood
