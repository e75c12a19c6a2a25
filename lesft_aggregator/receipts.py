"""What a submission must bring where the aggregator knows the central server's public key."""

from lesft.errors import NotAllowed
from lesft.identity.attestation import Verifier
from lesft.v1 import aggregation_pb2 as pb
from lesft.v1.receipt_pb2 import Statement

_WAY_OUT = "a receipt is good for one client and one version: hand in what the server gave for it"


def check_receipt(verifier: Verifier, submission: pb.Submission, run_fingerprint: str) -> Statement:
    """Refuse a submission that the server does not vouch for, in every figure that counts.

    `run_fingerprint` is that of submissions before, empty while there was none since the start.
    Returns what the server has signed. Raises NotAllowed.
    """
    if not submission.HasField("receipt"):
        raise NotAllowed(
            "receipt: missing; this aggregator weights by the central server's word alone "
            "(--server-key), so train with that server, and with this version of the client"
        )
    statement = verifier.statement(submission.receipt)
    compared = {
        "run_id": (statement.run_id, submission.run_id),
        "client_id": (statement.client_id, submission.client_id),
        "base_version": (statement.base_version, submission.base_version),
        "num_samples": (statement.num_samples, submission.num_samples),
        "run_fingerprint": (
            statement.run_fingerprint,
            run_fingerprint or statement.run_fingerprint,
        ),
    }
    for name, (vouched, said) in compared.items():
        if vouched != said:
            raise NotAllowed(
                f"receipt: {name} is {vouched!r} by the server's receipt, and {said!r} by the "
                f"submission; {_WAY_OUT}"
            )
    return statement


def check_run_instance(ours: str, theirs: str) -> None:
    """Refuse a receipt of another run than that of the first submission, though of its settings.

    Raises NotAllowed.
    """
    if ours and ours != theirs:
        raise NotAllowed(
            f"receipt: run_instance is {theirs!r} by the server's receipt, and {ours!r} of the "
            "submissions before: it is of an earlier run, or the server was begun anew with "
            "--fresh; then do so here, too"
        )
