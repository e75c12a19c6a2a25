"""Looking at a service from the terminal: the connection, and what every such command has."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lesft.channel import is_loopback
from lesft.errors import InvalidInput
from lesft.identity.command_settings import StatusSettings
from lesft.identity.https import ControlClient, fetch_authority
from lesft.identity.ticket import ACCESS_PREFIX, read_ticket

EXIT_WAITING = 4
"""The service lives, and cannot go on at the moment."""

Table = Sequence[Sequence[object]]


def connect(settings: StatusSettings) -> ControlClient:
    """The control API that a token or an address means. Raises LesftError."""
    service = settings.service
    if not settings.token:
        if not settings.control:
            raise InvalidInput(
                "--token FILE is needed, or --control HOST:PORT for a service on this machine that "
                f"asks for none; lesft-{service} token NAME makes one"
            )
        if not is_loopback(settings.control):
            raise InvalidInput(
                f"{settings.control} is beyond this machine, where nobody looks without a token: "
                f"give --token FILE with one that lesft-{service} token NAME has made there"
            )
        return ControlClient(settings.control, None)
    text = sys.stdin.read() if settings.token == "-" else _read(Path(settings.token))
    ticket = read_ticket(text, ACCESS_PREFIX, "the access token")
    if ticket.service != service:
        raise InvalidInput(f"this access token is for the {ticket.service}, not for the {service}")
    address = settings.control or ticket.control_address
    bearer = "".join(text.split())
    if settings.authority is not None:
        return ControlClient(address, settings.authority.read_bytes(), "", bearer)
    if not ticket.authority_sha256:
        return ControlClient(address, None, address.rpartition(":")[0].strip("[]"), bearer)
    authority = fetch_authority(address, ticket.authority_sha256)
    return ControlClient(address, authority, f"lesft-{service}", bearer)


def show(
    settings: StatusSettings,
    service: ControlClient,
    facts: dict[str, Any],
    as_text: Callable[[dict[str, Any]], str],
) -> None:
    """Print what the service says of itself; leaves with EXIT_WAITING when it cannot go on."""
    obstacle = service.obstacle()
    if settings.output == "json":
        text = json.dumps({**facts, "obstacle": obstacle}, indent=2)
    else:
        text = "\n".join([as_text(facts), *([f"cannot go on: {obstacle}"] if obstacle else [])])
    sys.stdout.write(f"{text}\n")
    if obstacle:
        raise SystemExit(EXIT_WAITING)


def table(rows: Table) -> str:
    """Columns side by side; the first row is the head."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(len(texts[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in texts
    )


def _read(path: Path) -> str:
    if path.name.startswith(ACCESS_PREFIX):
        raise InvalidInput("--token is a file with the token, or - for standard input, not itself")
    try:
        return path.expanduser().read_text()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise InvalidInput(f"--token {path} cannot be read: {reason}") from None
