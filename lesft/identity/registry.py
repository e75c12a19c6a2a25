"""Who may do what at one service: invitations, certificates, revocations and access tokens.

One SQLite file in the service's state folder. The service reads it while commands in other
processes change it; every change is one transaction that would survive a power cut.
"""

import hashlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography import x509

from lesft.errors import Busy, InvalidInput, NotAllowed, NotAuthenticated, NotFound
from lesft.identity.certificates import private_folder

Certify = Callable[[str], x509.Certificate]
"""Makes a certificate for a client's id."""

_MAX_CERTIFICATES = 50
"""Of one client that are good at once; it needs two."""

Role = Literal["viewer", "operator"]
"""viewer may look at everything, operator may also give orders."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS invitations (
    secret_sha256 TEXT PRIMARY KEY,
    client_id TEXT NOT NULL,
    expires REAL NOT NULL,
    key_sha256 TEXT  -- of the public key that it was used for
);
CREATE TABLE IF NOT EXISTS certificates (
    serial TEXT PRIMARY KEY,
    client_id TEXT NOT NULL,
    expires REAL NOT NULL,
    revoked REAL
);
CREATE TABLE IF NOT EXISTS revoked_clients (
    client_id TEXT PRIMARY KEY,
    revoked REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS access_tokens (
    name TEXT PRIMARY KEY,
    role TEXT NOT NULL,
    secret_sha256 TEXT NOT NULL UNIQUE,
    expires REAL NOT NULL
);
"""


def _connect(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(file, isolation_level=None, timeout=10, check_same_thread=False)


@dataclass(frozen=True)
class EnrolledClient:
    """One client and its newest certificate. Times are seconds since 1970."""

    client_id: str
    expires: float
    revoked: bool


@dataclass(frozen=True)
class Invitation:
    """An invitation that was not used yet."""

    client_id: str
    expires: float


@dataclass(frozen=True)
class AccessToken:
    """Who a token of the REST API was made for, and what it allows."""

    name: str
    role: Role
    expires: float


class Registry:
    """Thread-safe. Secrets are kept as their SHA-256 alone: they are random, so that suffices."""

    def __init__(self, file: Path) -> None:
        """Opens the file, or makes it, for its owner's eyes only.

        Raises InvalidInput when it is not ours.
        """
        private_folder(file.parent)
        self._file = file
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._db, self._reader = _connect(file), _connect(file)
        try:
            file.chmod(0o600)
            # A reader holds nobody up, such as a copy that is being made to a slow disk.
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.OperationalError as error:
            self.close()
            raise Busy(f"{file} cannot be opened now ({error}): try again") from None
        except sqlite3.DatabaseError as error:
            self.close()
            raise InvalidInput(
                f"{file} cannot be used ({error}): bring it back from a copy, or delete it and "
                "enrol every client anew"
            ) from None

    def close(self) -> None:
        """Close the file."""
        with self._lock, self._reading:
            self._db.close()
            self._reader.close()

    # ------------------------------------------------------------------ clients

    def invite(self, client_id: str, secret: bytes, seconds: float) -> None:
        """Let whoever brings `secret` within so many seconds become a client, once."""
        expires = time.time() + seconds
        with self._transaction() as db:
            db.execute(
                "INSERT INTO invitations VALUES (?, ?, ?, NULL)",
                (_sha256(secret), client_id, expires),
            )

    def enrol(self, secret: bytes, public_key: bytes, certify: Certify) -> x509.Certificate:
        """Use an invitation for a public key (DER); returns the certificate.

        The same key may come again, since an answer can get lost; another one may not. A client
        that was revoked is welcome again. Raises NotAuthenticated.
        """
        key = hashlib.sha256(public_key).hexdigest()
        with self._transaction() as db:
            row = db.execute(
                "SELECT client_id, expires, key_sha256 FROM invitations WHERE secret_sha256 = ?",
                (_sha256(secret),),
            ).fetchone()
            client_id = _invited(row, key)
            db.execute(
                "UPDATE invitations SET key_sha256 = ? WHERE secret_sha256 = ?",
                (key, _sha256(secret)),
            )
            db.execute("DELETE FROM revoked_clients WHERE client_id = ?", (client_id,))
            return _hand_out(db, client_id, certify)

    def renew(self, serial: str, client_id: str, certify: Certify) -> x509.Certificate:
        """Another certificate for a client that has shown the one with this serial number.

        In one transaction: a client that is being revoked gets none. Raises NotAllowed, Busy.
        """
        with self._transaction() as db:
            row = db.execute(
                "SELECT 1 FROM certificates WHERE serial = ? AND revoked IS NULL AND NOT EXISTS "
                "(SELECT 1 FROM revoked_clients WHERE client_id = ?)",
                (serial, client_id),
            ).fetchone()
            if row is None:
                raise NotAllowed(f"client {client_id!r} was revoked")
            return _hand_out(db, client_id, certify)

    def refusal(self, serial: str | None, client_id: str) -> str | None:
        """Why a client is not let in, None when it is; `serial` of our own certificates only."""
        if self._one("SELECT 1 FROM revoked_clients WHERE client_id = ?", client_id):
            return f"client {client_id!r} was revoked"
        if serial is None:
            return None
        row = self._one("SELECT revoked FROM certificates WHERE serial = ?", serial)
        if row is None:
            return f"this certificate of client {client_id!r} is not known here"
        return f"this certificate of client {client_id!r} was revoked" if row[0] else None

    def revoke(self, client_id: str) -> None:
        """Refuse a client from now on, with all certificates and invitations it has.

        Raises NotFound for one that was never invited.
        """
        with self._transaction() as db:
            known = db.execute(
                "SELECT 1 FROM invitations WHERE client_id = ?1 UNION ALL "
                "SELECT 1 FROM certificates WHERE client_id = ?1",
                (client_id,),
            ).fetchone()
            if known is None:
                raise NotFound(f"client {client_id!r} was never invited here")
            self._refuse(db, client_id)

    def refuse(self, client_id: str) -> None:
        """As `revoke`, also for clients of a site's own certificates, which are not known here."""
        with self._transaction() as db:
            self._refuse(db, client_id)

    def readmit(self, client_id: str) -> None:
        """Take a client's refusal back; certificates that were revoked with it stay so."""
        with self._transaction() as db:
            db.execute("DELETE FROM revoked_clients WHERE client_id = ?", (client_id,))

    def _refuse(self, db: sqlite3.Connection, client_id: str) -> None:
        now = time.time()
        db.execute("INSERT OR REPLACE INTO revoked_clients VALUES (?, ?)", (client_id, now))
        db.execute(
            "UPDATE certificates SET revoked = ? WHERE client_id = ? AND revoked IS NULL",
            (now, client_id),
        )
        db.execute("DELETE FROM invitations WHERE client_id = ?", (client_id,))

    def clients(self) -> list[EnrolledClient]:
        """All clients that have had a certificate or were refused, by name."""
        rows = self._all(
            "SELECT client_id, max(expires), min(revoked IS NOT NULL) FROM ("
            "SELECT client_id, expires, revoked FROM certificates UNION ALL "
            "SELECT client_id, revoked, revoked FROM revoked_clients) GROUP BY client_id"
        )
        refused = {name for (name,) in self._all("SELECT client_id FROM revoked_clients")}
        return [
            EnrolledClient(name, expires, bool(revoked) or name in refused)
            for name, expires, revoked in rows
        ]

    def invitations(self) -> list[Invitation]:
        """Those that can still be used."""
        rows = self._all(
            "SELECT client_id, expires FROM invitations WHERE key_sha256 IS NULL AND expires > ? "
            "ORDER BY client_id, expires",
            time.time(),
        )
        return [Invitation(*row) for row in rows]

    # ------------------------------------------------------------------ access tokens

    def add_token(self, name: str, role: Role, secret: bytes, seconds: float) -> None:
        """Let whoever brings `secret` do what the role may. InvalidInput for a known name."""
        row = (name, role, _sha256(secret), time.time() + seconds)
        try:
            with self._transaction() as db:
                db.execute("INSERT INTO access_tokens VALUES (?, ?, ?, ?)", row)
        except sqlite3.IntegrityError:
            raise InvalidInput(
                f"there is an access token for {name!r} already: choose another name, or revoke "
                f"that one first"
            ) from None

    def find_token(self, secret: bytes) -> AccessToken | None:
        """The token with this secret, if it has not expired."""
        row = self._one(
            "SELECT name, role, expires FROM access_tokens WHERE secret_sha256 = ? AND expires > ?",
            _sha256(secret),
            time.time(),
        )
        return AccessToken(*row) if row else None

    def remove_token(self, name: str) -> None:
        """From now on it is refused. Raises NotFound for one that does not exist."""
        with self._transaction() as db:
            gone = db.execute("DELETE FROM access_tokens WHERE name = ?", (name,)).rowcount
        if not gone:
            raise NotFound(f"there is no access token for {name!r}")

    def tokens(self) -> list[AccessToken]:
        """All of them, by name."""
        rows = self._all("SELECT name, role, expires FROM access_tokens ORDER BY name")
        return [AccessToken(*row) for row in rows]

    # ------------------------------------------------------------------ the database

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                raise Busy(
                    f"the registry in {self._file.parent} cannot be written now ({error}): try "
                    "again; if that does not help, see whether the disk is full"
                ) from None
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _one(self, query: str, *values: Any) -> Any:
        with self._reading:
            return self._reader.execute(query, values).fetchone()

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._reading:
            return self._reader.execute(query, values).fetchall()


def _invited(row: Any, key: str) -> str:
    """The client of an invitation that can be used for a key. Raises NotAuthenticated."""
    if row is None:
        raise NotAuthenticated(
            "this enrolment token is not known here: ask the operator for another one"
        )
    client_id, expires, used_for = row
    if used_for not in (None, key):
        raise NotAuthenticated(
            f"the enrolment token of client {client_id!r} was used before: if that was not you, "
            "tell the operator at once to revoke the client; ask for another token"
        )
    if expires < time.time():
        raise NotAuthenticated(
            f"the enrolment token of client {client_id!r} has expired: ask the operator for "
            "another one"
        )
    return str(client_id)


def _hand_out(db: sqlite3.Connection, client_id: str, certify: Certify) -> x509.Certificate:
    """Make a certificate and note it before it is handed out."""
    db.execute(
        "DELETE FROM certificates WHERE client_id = ? AND expires < ?", (client_id, time.time())
    )
    (good,) = db.execute(
        "SELECT count(*) FROM certificates WHERE client_id = ? AND revoked IS NULL", (client_id,)
    ).fetchone()
    if good >= _MAX_CERTIFICATES:
        raise Busy(
            f"client {client_id!r} has {good} certificates that are good: it gets another one when "
            "the oldest has ended"
        )
    certificate = certify(client_id)
    expires = certificate.not_valid_after_utc.timestamp()
    serial = f"{certificate.serial_number:x}"
    db.execute("INSERT INTO certificates VALUES (?, ?, ?, NULL)", (serial, client_id, expires))
    return certificate


def _sha256(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()
