"""The commands enroll, revoke, token and access, which work on a service's state folder."""

import json
import time
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path

from lesft.channel import is_any, is_loopback, split_address
from lesft.commands import say
from lesft.control import ENDPOINTS_FILE
from lesft.errors import InvalidInput
from lesft.identity.attestation import Attester
from lesft.identity.authority import new_secret
from lesft.identity.certificates import write_private
from lesft.identity.command_settings import (
    AccessSettings,
    EnrollSettings,
    KeySettings,
    RevokeSettings,
    TokenSettings,
)
from lesft.identity.registry import Role
from lesft.identity.security import IDENTITY_FOLDER, open_authority, open_registry
from lesft.identity.settings import Service
from lesft.identity.status_command import table
from lesft.identity.ticket import Ticket


def enroll(settings: EnrollSettings) -> str | None:
    """A token for one client; None when it went to a file."""
    ticket = invite(
        settings.state, settings.service, settings.client, settings.hours, settings.host
    )
    word = settings.output.name if settings.output else "TOKEN"
    say(
        f"for {settings.client}, once, within {settings.hours:g} h:  lesft-client enroll {word}\n"
        "whoever has the token can become that client: hand it over as you would a password"
    )
    return _hand_out(ticket, settings.output)


def invite(
    state: Path, service: Service, client_id: str, hours: float = 24, host: str = ""
) -> Ticket:
    """An invitation for a client, noted in a service's state folder.

    `host` is how the client reaches this machine. Raises InvalidInput where nobody can enrol.
    """
    endpoints = _Endpoints(state, service, host)
    if not endpoints.own_authority:
        raise InvalidInput(
            f"this {service} uses its site's own certificates: clients get theirs from whoever "
            "runs that authority"
        )
    endpoints.check_reachable()
    ticket = Ticket(
        service,
        endpoints.address("control"),
        open_authority(state, service).sha256,
        new_secret(),
        endpoints.address("grpc"),
        client_id,
    )
    with closing(open_registry(state)) as registry:
        registry.invite(client_id, ticket.secret, hours * 3600)
    return ticket


def revoke(settings: RevokeSettings) -> str:
    """Shut a client out."""
    own = _Endpoints(settings.state, settings.service, "").own_authority
    name, service = settings.client, settings.service
    with closing(open_registry(settings.state)) as registry:
        if settings.undo:
            registry.readmit(name)
            return f"client {name} may come back"
        (registry.revoke if own else registry.refuse)(name)
    return f"client {name} is shut out; a {service} that runs ends its calls within seconds"


def token(settings: TokenSettings) -> str | None:
    """An access token, or the end of one."""
    if settings.revoke:
        _endpoints_of(settings.state, settings.service)
        with closing(open_registry(settings.state)) as registry:
            registry.remove_token(settings.name)
        return f"the access token of {settings.name} is revoked"
    ticket = give_access(
        settings.state,
        settings.service,
        settings.name,
        settings.role,
        settings.days,
        settings.host,
    )
    say(f"for {settings.name}, as {settings.role}, for {settings.days:g} days")
    return _hand_out(ticket, settings.output)


def give_access(
    state: Path, service: Service, name: str, role: Role, days: float = 90, host: str = ""
) -> Ticket:
    """An access token, noted in a service's state folder. Raises InvalidInput as `invite`."""
    endpoints = _Endpoints(state, service, host)
    ticket = Ticket(
        service,
        endpoints.address("control"),
        open_authority(state, service).sha256 if endpoints.own_authority else b"",
        new_secret(),
    )
    with closing(open_registry(state)) as registry:
        registry.add_token(name, role, ticket.secret, days * 86400)
    return ticket


def access(settings: AccessSettings) -> str:
    """Who may do what, as a table."""
    _endpoints_of(settings.state, settings.service)
    rows = [("what", "name", "state", "until")]
    now = time.time()
    with closing(open_registry(settings.state)) as registry:
        clients, invitations = registry.clients(), registry.invitations()
        tokens = registry.tokens()
    for client in clients:
        state = "expired" if client.expires < now else "enrolled"
        state = "revoked" if client.revoked else state
        rows.append(("client", client.client_id, state, _day(client.expires)))
    for invitation in invitations:
        rows.append(("invitation", invitation.client_id, "open", _day(invitation.expires)))
    for entry in tokens:
        state = "expired" if entry.expires < now else entry.role
        rows.append(("token", entry.name, state, _day(entry.expires)))
    return table(rows)


def key(settings: KeySettings) -> str:
    """The public key of the server's receipts."""
    _endpoints_of(settings.state, settings.service)
    return Attester(settings.state / IDENTITY_FOLDER).public_key


def _day(expires: float) -> str:
    return datetime.fromtimestamp(expires, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _hand_out(ticket: Ticket, output: Path | None) -> str | None:
    if output is None:
        return ticket.text()
    write_private(output, f"{ticket.text()}\n".encode())
    return None


def _endpoints_of(state: Path, service: Service) -> dict[str, str]:
    try:
        written: dict[str, str] = json.loads((state / ENDPOINTS_FILE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        written = {}
    if written.get("service") != service:
        raise InvalidInput(
            f"--state {state} is of no {service} that was started: give the one that it was "
            "started with"
        )
    return written


class _Endpoints:
    """Where a service on this machine listens, as it has written down itself."""

    def __init__(self, state: Path, service: Service, host: str) -> None:
        self._written = _endpoints_of(state, service)
        if self._written.get("tls", "off") == "off":
            raise InvalidInput(
                f"this {service} does not encrypt, so that nobody needs to enrol or to bring a "
                "token: start it with --listen beyond this machine, or with --tls on"
            )
        self._service = service
        self._host = host or self._written.get("public_host", "")

    @property
    def own_authority(self) -> bool:
        """Whether the service certifies its clients itself."""
        return bool(self._written["tls"] == "own")

    def check_reachable(self) -> None:
        """Raises InvalidInput where devices reach the service, but not where they would enrol."""
        control = self._written["control"]
        if is_loopback(control) and not is_loopback(self._written["grpc"]):
            raise InvalidInput(
                f"devices enrol at the control API, and this {self._service}'s is on {control}, "
                "which no other machine reaches: start it with --control 0.0.0.0:PORT"
            )

    def address(self, kind: str) -> str:
        """HOST:PORT of "grpc" or "control" as others reach it."""
        listen, port = split_address(self._written[kind])
        host = self._host or listen
        if is_any(host):
            raise InvalidInput(
                f"the {self._service} listens on every address of this machine: say by which name "
                "or address others reach it, with --host here or --public-host there"
            )
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
