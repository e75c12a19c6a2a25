"""docker and docker compose as the test needs them."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROJECT = "lesft-test-compose"


class Failed(Exception):
    """A step or a check of the test failed; the message says which and how."""


@dataclass(frozen=True)
class Container:
    """One container of the project as `docker inspect` tells it."""

    service: str
    status: str
    exit_code: int
    finished_at: str
    health: str
    user: str
    networks: tuple[str, ...]
    published: tuple[tuple[str, str], ...]
    """Pairs of the container's port and the host's address, such as ("8051/tcp", "127.0.0.1")."""

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return self.status == "exited" and self.exit_code != 0


def docker(*arguments: str, environment: dict[str, str] | None = None) -> str:
    """What a docker command prints. Raises Failed with its complaint."""
    done = subprocess.run(
        ["docker", *arguments],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise Failed(f"docker {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


class Compose:
    """The project's docker-compose.yml under a name of its own: a user's run is left alone."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment

    def __call__(self, *arguments: str) -> str:
        """What a compose command prints. Raises Failed with its complaint."""
        return docker("compose", "-p", PROJECT, *arguments, environment=self._environment)

    def containers(self) -> dict[str, Container]:
        """All containers by service."""
        ids = self("ps", "--all", "--quiet").split()
        inspected = json.loads(docker("inspect", *ids)) if ids else []
        return {found.service: found for found in map(_container, inspected)}

    def address(self, service: str, port: int) -> str:
        """HOST:PORT on this machine of a published port."""
        return self("port", service, str(port)).strip()

    def logs(self, service: str, lines: int) -> str:
        """The end of a service's log."""
        return self("logs", "--no-color", "--no-log-prefix", "--tail", str(lines), service)


def image_bytes(image: str) -> int:
    """Size of an image with all its layers."""
    return int(docker("image", "inspect", "--format", "{{.Size}}", image))


def _container(inspected: dict[str, Any]) -> Container:
    state, network = inspected["State"], inspected["NetworkSettings"]
    return Container(
        service=inspected["Config"]["Labels"]["com.docker.compose.service"],
        status=state["Status"],
        exit_code=state["ExitCode"],
        finished_at=state["FinishedAt"],
        health=state.get("Health", {}).get("Status", ""),
        user=inspected["Config"]["User"],
        networks=tuple(network["Networks"]),
        published=tuple(
            (port, binding["HostIp"])
            for port, bindings in network["Ports"].items()
            for binding in bindings or ()
        ),
    )
