"""Receipts: the central server signs what a client has trained, the aggregator checks it."""

import base64
import binascii
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from google.protobuf.message import DecodeError

from lesft.errors import InvalidInput, NotAllowed
from lesft.identity.certificates import private_folder, write_private
from lesft.v1 import receipt_pb2

KEY_PREFIX = "lesft-key-"

_KEY_FILE = "receipts.key"


class Attester:
    """Signs with a key of the server's own: it says nothing about connections."""

    def __init__(self, folder: Path) -> None:
        """Opens the key in `folder`, or makes it. Raises InvalidInput when it cannot be used."""
        self._key = _open_or_make(folder / _KEY_FILE)

    @property
    def public_key(self) -> str:
        """For the aggregator's --server-key."""
        raw = self._key.public_key().public_bytes(
            serialization.Encoding.Raw, serialization.PublicFormat.Raw
        )
        return KEY_PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("=")

    def receipt(self, statement: receipt_pb2.Statement) -> receipt_pb2.Receipt:
        """The same statement always gets the same receipt."""
        data = statement.SerializeToString(deterministic=True)
        return receipt_pb2.Receipt(statement=data, signature=self._key.sign(data))


class Verifier:
    """Checks receipts by the server's public key."""

    def __init__(self, public_key: str) -> None:
        """Raises InvalidInput for what `lesft-server key` would not print."""
        text = public_key.strip()
        encoded = text.removeprefix(KEY_PREFIX)
        try:
            raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), b"-_", validate=True)
            self._key = ed25519.Ed25519PublicKey.from_public_bytes(raw)
        except (binascii.Error, ValueError):
            text = ""
        if not text.startswith(KEY_PREFIX):
            raise InvalidInput(
                f"--server-key is what lesft-server key prints, {KEY_PREFIX} and 43 characters, "
                f"got {public_key[:80]!r}"
            )

    def statement(self, receipt: receipt_pb2.Receipt) -> receipt_pb2.Statement:
        """What the server has signed. Raises NotAllowed for what it has not."""
        statement = receipt_pb2.Statement()
        try:
            self._key.verify(receipt.signature, receipt.statement)
            statement.ParseFromString(receipt.statement)
        except (InvalidSignature, DecodeError):
            raise NotAllowed(
                "receipt: it is not signed by the server that this aggregator trusts "
                "(--server-key): train with that server"
            ) from None
        return statement


def _open_or_make(file: Path) -> ed25519.Ed25519PrivateKey:
    private_folder(file.parent)
    if not file.exists():
        key = ed25519.Ed25519PrivateKey.generate()
        write_private(
            file,
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )
        return key
    try:
        loaded = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        loaded, reason = None, f" ({error})"
    else:
        reason = ""
    if not isinstance(loaded, ed25519.Ed25519PrivateKey):
        raise InvalidInput(
            f"{file} is no Ed25519 key in PEM{reason}: bring it back from a copy, or delete it and "
            "give the aggregator the new one's public key"
        )
    return loaded
