"""`lesft-client enroll`: from a token to a certificate of this device's own."""

import base64
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from lesft.channel import split_address
from lesft.commands import say
from lesft.errors import InvalidInput, NotAuthenticated, Unreachable
from lesft.identity.certificates import KeyPair, certificate_of, key_pem, pem, request_for
from lesft.identity.https import ControlClient, fetch_authority
from lesft.identity.ticket import ENROLMENT_PREFIX, Ticket, read_ticket
from lesft.settings import ServiceSettings
from lesft_client.connection_settings import IDENTITY_FOLDER
from lesft_client.identities import Facts, Identities, Identity, digest_of

log = logging.getLogger(__name__)


class EnrollSettings(ServiceSettings):
    """Become a client of the server or the aggregator that an enrolment token is of."""

    model_config = SettingsConfigDict(env_prefix="LESFT_CLIENT_")

    token: CliPositionalArg[str] = Field(
        description="The token that its operator has given you; - reads it from standard input, "
        "and a file's name from that file, so that no list of processes shows it.",
        repr=False,
    )
    replace: bool = Field(
        False, description="Give up what this device has for another service at that address."
    )
    identity: Path = Field(
        IDENTITY_FOLDER, description="Folder for the key and the certificate of this device."
    )


def enroll(settings: EnrollSettings) -> None:
    """Make a key, get a certificate for it, keep both. Raises LesftError when that cannot be."""
    ticket = read_ticket(_text(settings.token), ENROLMENT_PREFIX, "the enrolment token")
    facts = enrol_with(ticket, settings.identity, settings.replace)
    say(f"enrolled with the {facts.service} at {facts.address} as {facts.client_id!r}")
    say(f"use it:  lesft-client train --{facts.service} {facts.address} ...")


def enrol_with(ticket: Ticket, folder: Path, replace: bool = False) -> Facts:
    """Enrol for a ticket; a try whose answer got lost may be repeated.

    `replace` allows to give up an identity for another service at the same address. Raises
    NotAuthenticated when either side does not accept the other, InvalidInput for a ticket that
    cannot be meant.
    """
    split_address(ticket.address)
    known = Identities(folder).find(ticket.address)
    if known is not None and not replace and _is_of_another_service(known, ticket):
        raise InvalidInput(
            f"this device has enrolled with another {known.facts.service} at {ticket.address}: the "
            "token may be somebody else's attempt to take its place. If it is right, as after that "
            "service has lost its state folder, use lesft-client enroll --replace"
        )
    server_name = f"lesft-{ticket.service}"
    authority_pem = fetch_authority(ticket.control_address, ticket.authority_sha256)
    service = ControlClient(ticket.control_address, authority_pem, server_name)
    identities = Identities(folder)
    # The token is good for one key: the same one if the answer gets lost.
    key = identities.key_for(ticket.secret)
    public = key.public_key()
    body = {
        "secret": base64.b64encode(ticket.secret).decode(),
        "certificate_request": base64.b64encode(request_for(key)).decode(),
    }
    answer = service.post("/v1/enrolments", body)
    try:
        certificate = certificate_of(base64.b64decode(answer["certificate"]), public)
    except (ValueError, TypeError, KeyError):
        raise Unreachable(f"{ticket.control_address}: did not answer with a certificate") from None
    facts = Facts(
        ticket.service, ticket.address, server_name, ticket.client_id, digest_of(ticket.secret)
    )
    identities.add(facts, authority_pem, KeyPair(key_pem(key), pem(certificate)))
    return facts


def enrol_where_needed(files: Sequence[Path], folder: Path) -> None:
    """Enrol for the tokens in files, but for those that this device has enrolled with already.

    For installations that hand out tokens by themselves. A new token in a file makes the device
    enrol anew; one that is not good any more does no harm to an identity that is. Raises LesftError
    when there is none then.
    """
    for file in files:
        ticket = read_ticket(_text(str(file)), ENROLMENT_PREFIX, f"the token in {file}")
        known = Identities(folder).find(ticket.address)
        if known is not None and known.facts.token_sha256 == digest_of(ticket.secret):
            continue
        try:
            enrol_with(ticket, folder)
        except (NotAuthenticated, Unreachable) as error:
            if known is None:
                raise
            known.check_not_expired()
            log.warning("%s: the token in it is not used: %s", file, error)


def _is_of_another_service(known: Identity, ticket: Ticket) -> bool:
    return (
        known.facts.service != ticket.service or known.authority_sha256 != ticket.authority_sha256
    )


def _text(token: str) -> str:
    if token == "-":
        return sys.stdin.read()
    if token.startswith(ENROLMENT_PREFIX):
        return token
    try:
        return Path(token).expanduser().read_text()
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"the enrolment token begins with {ENROLMENT_PREFIX}, and what was given is no file "
            f"with one either ({getattr(error, 'strerror', None) or 'it is not text'})"
        ) from None
