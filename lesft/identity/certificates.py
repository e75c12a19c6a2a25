"""Keys, certificate requests and certificates: X.509 by the `cryptography` package."""

import os
import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lesft.errors import InvalidInput
from lesft.files import sync_folder

BACKDATED = timedelta(minutes=5)
"""A certificate begins so long before it was made: clocks differ."""

_MAX_REQUEST_BYTES = 8192


@dataclass(frozen=True)
class KeyPair:
    """A private key and the certificate of its public half, both PEM."""

    key_pem: bytes
    certificate_pem: bytes

    @property
    def expires(self) -> datetime:
        """When the certificate ends, in UTC."""
        return x509.load_pem_x509_certificate(self.certificate_pem).not_valid_after_utc


def now() -> datetime:
    """This moment, in UTC."""
    return datetime.now(timezone.utc)


def new_key() -> ec.EllipticCurvePrivateKey:
    """A private key on the curve P-256, which every TLS library knows."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS#8 without a password: the file's mode is what guards it."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    """The inverse of `key_pem`. Raises InvalidInput for anything else."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except ValueError as error:
        raise InvalidInput(f"it is no private key in PEM: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidInput("it is no private key on a curve")
    return key


def certificate_of(data: bytes, key: ec.EllipticCurvePublicKey) -> x509.Certificate:
    """The certificate (DER) of a public key. Raises ValueError when it is none of that key."""
    certificate = x509.load_der_x509_certificate(data)
    if certificate.public_key() != key:
        raise ValueError("the certificate is of another key")
    return certificate


def request_for(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A certificate request for a key, DER. It names nobody: the authority says who it is."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def requested_key(request: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a request, DER, whose sender holds the private one.

    Raises InvalidInput for anything else than a request signed with a P-256 key.
    """
    if len(request) > _MAX_REQUEST_BYTES:
        raise InvalidInput(
            f"a certificate request may have {_MAX_REQUEST_BYTES} bytes, got {len(request)}"
        )
    try:
        parsed = x509.load_der_x509_csr(request)
        key = parsed.public_key()
        ours = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
        if ours and parsed.is_signature_valid:
            assert isinstance(key, ec.EllipticCurvePublicKey)
            return key
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        pass
    raise InvalidInput(
        "the certificate request is not a PKCS#10 request in DER, signed with a P-256 key"
    )


def public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key as DER (SubjectPublicKeyInfo)."""
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def self_signed(key: ec.EllipticCurvePrivateKey, name: str, days: int) -> x509.Certificate:
    """The certificate of an authority that may sign others, but no further authority."""
    builder = (
        _builder(name, key.public_key(), name, now() + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
    )
    return builder.sign(key, hashes.SHA256())


def signed(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    name: str,
    alternative_names: list[x509.GeneralName],
    for_server: bool,
    expires: datetime,
) -> x509.Certificate:
    """A certificate for one end of a connection; it can be used for that end alone."""
    usage = ExtendedKeyUsageOID.SERVER_AUTH if for_server else ExtendedKeyUsageOID.CLIENT_AUTH
    issuer = authority.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    assert isinstance(issuer, str)
    builder = (
        _builder(name, public_key, issuer, expires)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternative_names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
    )
    return builder.sign(authority_key, hashes.SHA256())


def pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def der(certificate: x509.Certificate) -> bytes:
    """A certificate as DER."""
    return certificate.public_bytes(serialization.Encoding.DER)


def common_name(certificate: x509.Certificate) -> str:
    """The subject's common name; empty where there is none."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def write_private(path: Path, data: bytes) -> None:
    """Write a file that its owner alone may read, also while it is being written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def private_folder(folder: Path) -> None:
    """Make a folder that its owner alone may look into."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)


def _builder(
    name: str, key: ec.EllipticCurvePublicKey, issuer: str, expires: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now() - BACKDATED)
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _key_usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
