"""What must be true of the containers and of the finished run. Each check raises Failed."""

import functools
import hashlib
import json
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

from lesft.errors import LesftError, NotAuthenticated
from lesft.identity.https import ControlClient
from tests.compose.engine import Compose, Container, Failed, docker

CLIENTS = ["client-0", "client-1", "client-2", "client-3"]

CONTROL_PORTS = {"server": 8051, "aggregator": 8052}

FOREIGN_MODULES = {
    "lesft-server": ["lesft_client", "lesft_aggregator", "sqlalchemy"],
    "lesft-client": ["lesft_server", "lesft_aggregator", "sqlalchemy"],
    "lesft-aggregator": ["lesft_client", "lesft_server", "torch", "transformers", "peft"],
}
"""What each image must not hold: the other services, and what only their extras bring."""


def require(holds: bool, message: str) -> None:
    """Raise Failed with the message unless it holds."""
    if not holds:
        raise Failed(message)


@functools.cache
def control_of(compose: Compose, service: str) -> ControlClient:
    """A service's control API on this machine, over TLS, with a token of our own."""
    inside = ("exec", "--no-TTY", service)
    token = compose(*inside, f"lesft-{service}", "token", f"test-{time.time_ns()}").strip()
    authority = compose(*inside, "cat", "/var/lib/lesft/state/identity/authority.pem")
    address = compose.address(service, CONTROL_PORTS[service])
    return ControlClient(address, authority.encode(), f"lesft-{service}", token)


def get(compose: Compose, service: str, path: str) -> bytes:
    """An answer of a service's control API. Raises Failed when it gives none."""
    try:
        return control_of(compose, service).file(path)
    except LesftError as error:
        raise Failed(f"{service} does not answer {path}: {error}") from None


def get_json(compose: Compose, service: str, path: str) -> Any:
    """As `get`, decoded."""
    return json.loads(get(compose, service, path))


def check_encryption(compose: Compose) -> None:
    """Nobody gets anything without TLS, without a token, or without a certificate."""
    for service, port in CONTROL_PORTS.items():
        address = compose.address(service, port)
        try:
            plain = HTTPConnection(address, timeout=10)
            plain.request("GET", "/v1/run")
            answered = plain.getresponse().status
        except (OSError, HTTPException):
            answered = None
        require(answered is None, f"{service} answers plain HTTP with {answered}")
        try:
            control_of(compose, service).as_stranger().get("/v1/run")
        except NotAuthenticated:
            continue
        raise Failed(f"{service} tells strangers about the run")


def check_images() -> None:
    """Each image holds its own service and no other's."""
    for image, modules in FOREIGN_MODULES.items():
        script = f"import importlib.util as u; print(*[m for m in {modules} if u.find_spec(m)])"
        found = docker("run", "--rm", "--entrypoint", "python", image, "-c", script).split()
        require(not found, f"image {image} holds {', '.join(found)}")


def check_isolation(containers: dict[str, Container]) -> None:
    """Nobody is root, clients are on the internal network only, just control ports are published.

    `containers` have to be running: the engine forgets the ports of those that have ended.
    """
    for name in ("enrol-server", "enrol-aggregator"):
        enrolment = containers.pop(name)
        require(enrolment.networks == ("none",), f"{name} is on {enrolment.networks}")
    for name, container in containers.items():
        require(container.user == "10001:10001", f"{name} runs as user {container.user!r}")
        port = CONTROL_PORTS.get(name)
        expected = ((f"{port}/tcp", "127.0.0.1"),) if port else ()
        require(container.published == expected, f"{name} publishes {container.published}")
    for name in CLIENTS:
        for network in containers[name].networks:
            internal = docker("network", "inspect", "--format", "{{.Internal}}", network).strip()
            require(internal == "true", f"{name} is on {network}, which is not internal")


def check_server(compose: Compose, rounds: int, samples: int) -> list[float]:
    """The server has trained all rounds with all four clients, and the loss fell; returns it."""
    run = get_json(compose, "server", "/v1/run")
    require(run["state"] == "finished", f"the run is {run['state']}: {run['reason']}")
    require(run["rounds_done"] == rounds, f"{run['rounds_done']} rounds done, not {rounds}")
    members = get_json(compose, "server", "/v1/clients")
    found = {member["client_id"]: (member["num_samples"], member["share"]) for member in members}
    expected = dict.fromkeys(CLIENTS, (samples, 0.25))
    require(found == expected, f"clients with samples and shares: {found}, expected {expected}")
    losses = [record["loss"] for record in get_json(compose, "server", "/v1/rounds")]
    require(len(losses) == rounds, f"losses of {len(losses)} rounds, not {rounds}")
    require(losses[-1] < losses[0], f"the loss did not fall: {losses}")
    return losses


def check_aggregator(compose: Compose, versions: int) -> str:
    """Each version is the mean of all four clients; returns the newest one's SHA-256."""
    found = get_json(compose, "aggregator", "/v1/run")["version"]
    require(found == versions, f"the newest version is {found}, not {versions}")
    for version in range(1, versions + 1):
        adapter = get_json(compose, "aggregator", f"/v1/adapters/{version}")
        require(adapter["client_ids"] == CLIENTS, f"version {version}: {adapter['client_ids']}")
    served = get(compose, "aggregator", f"/v1/adapters/{versions}/file")
    digest = hashlib.sha256(served).hexdigest()
    require(digest == adapter["sha256"], f"sha256 of the served file {digest}, said: {adapter}")
    return digest


def check_clients(
    compose: Compose, digest: str, model_dir: Path, scratch: Path
) -> tuple[float, float]:
    """All clients hold the newest averaged adapter, fetched their front from the server, and do
    better on held-out samples; returns the mean -log P per held-out token before and after.
    """
    weights_bytes = sum(file.stat().st_size for file in model_dir.glob("*.safetensors"))
    scores = {"held_out_before": [0.0, 0], "held_out_after": [0.0, 0]}
    for name in CLIENTS:
        compose("cp", f"{name}:/var/lib/lesft/state/result.json", str(scratch))
        result = json.loads((scratch / "result.json").read_text())
        held = result["adapter_sha256"]
        require(held == digest, f"{name} holds the adapter {held}, the aggregator {digest}")
        fetched = result["wire"]["down"]["other"]
        require(fetched > weights_bytes / 10, f"{name} fetched only {fetched} bytes of its front")
        for when, score in scores.items():
            score[0] += result[when]["nll_sum"]
            score[1] += result[when]["tokens"]
    before, after = (nll_sum / tokens for nll_sum, tokens in scores.values())
    require(after < before, f"held-out -log P per token went from {before} to {after}")
    return before, after
