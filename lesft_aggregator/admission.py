"""Who may take part in the run."""

from collections.abc import Collection
from typing import NamedTuple

from lesft.errors import HandshakeMismatch, InvalidInput
from lesft.spec import CLIENT_ID, MAX_NUM_SAMPLES, PROTOCOL_VERSION
from lesft_aggregator.adapters import shown


class Introduction(NamedTuple):
    """Who a client says it is."""

    client_id: str
    run_id: str
    num_samples: int


def check_protocol(protocol_version: int) -> None:
    """Raises HandshakeMismatch unless the client speaks our protocol."""
    if protocol_version != PROTOCOL_VERSION:
        raise HandshakeMismatch(
            f"protocol_version: aggregator {PROTOCOL_VERSION}, client {protocol_version}"
        )


def check_name(client_id: str, client_run: str, our_run: str) -> None:
    """Raises HandshakeMismatch for another run, InvalidInput for a malformed client id."""
    if client_run != our_run:
        raise HandshakeMismatch(f"run_id: aggregator {our_run!r}, client {shown(client_run)}")
    if not CLIENT_ID.fullmatch(client_id):
        raise InvalidInput(
            "client_id must be 1 to 64 of letters, digits, '.', '_' and '-', got "
            f"{shown(client_id)}"
        )


def check_fingerprint(ours: str, theirs: str) -> None:
    """Raises HandshakeMismatch for a client of a run with other settings than the first one's."""
    if ours and ours != theirs:
        raise HandshakeMismatch(
            f"run_fingerprint: aggregator {ours[:19]}, client {shown(theirs[:19])}: clients whose "
            "adapters are averaged must train the same model with the same server, or without one "
            "with the same --run options and --cut-layer"
        )


def check_introduction(
    client: Introduction, run_id: str, clients: int, known: Collection[str]
) -> None:
    """Refuse a client that cannot take part.

    `known` are the clients so far, of which there may be `clients`. Raises HandshakeMismatch for
    another run or one client too many, InvalidInput for a malformed id or sample count.
    """
    check_name(client.client_id, client.run_id, run_id)
    if not 1 <= client.num_samples <= MAX_NUM_SAMPLES:
        raise InvalidInput(
            f"num_samples must lie between 1 and {MAX_NUM_SAMPLES}, got {client.num_samples}"
        )
    if client.client_id not in known and len(known) >= clients:
        raise HandshakeMismatch(
            f"clients: aggregator {clients} ({', '.join(known)}), {client.client_id!r} is one "
            "more: use one of those names, or restart the aggregator with more --clients"
        )
