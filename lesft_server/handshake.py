"""The opening handshake: every field that client and server must agree on, refused by name."""

import re

from lesft.errors import HandshakeMismatch, InvalidInput
from lesft.spec import PROTOCOL_VERSION, RunSpec
from lesft.spec_messages import encoding_name
from lesft.v1 import training_pb2

_CLIENT_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def check_protocol_version(version: int) -> None:
    """Raises HandshakeMismatch for any version but ours."""
    _check("protocol_version", PROTOCOL_VERSION, version, "install the same LESFT on both sides")


def check_opening(opening: training_pb2.OpenSession, spec: RunSpec) -> None:
    """Compare what a client has built with the run. Raises HandshakeMismatch or InvalidInput."""
    check_protocol_version(opening.protocol_version)
    if not _CLIENT_ID.fullmatch(opening.client_id):
        raise InvalidInput(
            "client_id must be 1 to 64 letters, digits, '.', '_' or '-', got "
            f"{opening.client_id[:80]!r}"
        )
    if opening.num_samples < 1:
        raise InvalidInput("num_samples must be at least 1, got 0: the client has no data")
    _check("run_id", spec.run_id, opening.run_id, "join the run that the server names")
    _check("cut_layer", spec.cut_layer, opening.cut_layer, "leave the client's --cut-layer out")
    for name, ours in spec.lora:
        theirs = getattr(opening.lora, name)
        theirs = tuple(theirs) if isinstance(ours, tuple) else theirs
        _check(f"lora.{name}", ours, theirs, "leave the client's LoRA options out")
    _check(
        "front_fingerprint",
        spec.front_fingerprint,
        opening.front_fingerprint,
        "the client's weights or config are not the server's; let it fetch them with "
        "--weights server",
    )
    for name in ("activation_encoding", "gradient_encoding"):
        theirs = encoding_name(getattr(opening, name))
        _check(name, getattr(spec, name), theirs, f"leave the client's {name} out")
    _check(
        "rounds_completed",
        0,
        opening.rounds_completed,
        "this server starts the run from its first round; start the client with an empty --state",
    )


def _check(name: str, server: object, client: object, way_out: str) -> None:
    if server != client:
        raise HandshakeMismatch(
            f"{name}: server {_text(server)}, client {_text(client)}; {way_out}"
        )


def _text(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return text or "none"
