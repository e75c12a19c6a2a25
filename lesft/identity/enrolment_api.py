"""How a client gets its first certificate: over HTTPS, for the secret of its invitation."""

import asyncio
import base64
import binascii

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel

from lesft.errors import InvalidInput, NotFound
from lesft.identity.certificates import der
from lesft.identity.security import Security


class EnrolmentRequest(BaseModel):
    """Body of POST /v1/enrolments. Both are base64 (RFC 4648) of what they are."""

    secret: str
    certificate_request: str


class EnrolmentBody(BaseModel):
    """Answer of POST /v1/enrolments: the certificate, base64 of its DER."""

    certificate: str


def add_enrolment_routes(app: FastAPI, security: Security) -> None:
    """GET /v1/authority and POST /v1/enrolments; neither needs a token."""

    @app.get("/v1/authority", response_class=PlainTextResponse)
    async def get_authority() -> str:
        """The certificate of the service's own authority, PEM: what its clients trust."""
        if security.authority is None:
            raise NotFound("this service uses its site's own certificates")
        return security.authority.certificate_pem.decode()

    @app.post("/v1/enrolments")
    async def enrol(request: EnrolmentRequest) -> EnrolmentBody:
        """A client's first certificate. Safe to repeat with the same key."""
        secret = _decoded("secret", request.secret)
        certificate_request = _decoded("certificate_request", request.certificate_request)
        # In a thread: the registry waits for the disk.
        certificate = await asyncio.to_thread(security.enrol, secret, certificate_request)
        return EnrolmentBody(certificate=base64.b64encode(der(certificate)).decode())


def _decoded(name: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidInput(f"{name} is not base64") from None
