"""What a service remembers of who may do what, and what it never writes down."""

import sqlite3
import time
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509

from lesft.errors import Busy, InvalidInput, NotAllowed, NotAuthenticated, NotFound
from lesft.identity.authority import Authority, new_secret, serial_of
from lesft.identity.certificates import common_name, new_key, request_for
from lesft.identity.registry import Certify, Registry

HOUR = 3600.0


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "identity" / "registry.sqlite")


@pytest.fixture
def certify(tmp_path: Path) -> Certify:
    authority = Authority(tmp_path / "authority", "server")
    request = request_for(new_key())
    return lambda client_id: authority.certify(request, client_id, timedelta(hours=1))


def enrolled(registry: Registry, certify: Certify, client_id: str = "a") -> str:
    """Enrol a client; returns its certificate's serial number."""
    secret = new_secret()
    registry.invite(client_id, secret, HOUR)
    return serial_of(registry.enrol(secret, secret, certify))


def test_an_invitation_is_good_for_one_key_and_for_that_again(
    registry: Registry, certify: Certify
) -> None:
    secret = new_secret()
    registry.invite("a", secret, HOUR)
    assert common_name(registry.enrol(secret, b"key", certify)) == "a"
    assert common_name(registry.enrol(secret, b"key", certify)) == "a"  # the answer may be lost
    with pytest.raises(NotAuthenticated, match="used before"):
        registry.enrol(secret, b"another key", certify)
    assert registry.invitations() == []


def test_a_request_that_is_none_leaves_the_invitation_as_it_was(
    registry: Registry, certify: Certify
) -> None:
    secret = new_secret()
    registry.invite("a", secret, HOUR)

    def fail(client_id: str) -> x509.Certificate:
        raise InvalidInput("no request")

    with pytest.raises(InvalidInput, match="no request"):
        registry.enrol(secret, b"key", fail)
    assert [invitation.client_id for invitation in registry.invitations()] == ["a"]
    assert common_name(registry.enrol(secret, b"another key", certify)) == "a"


def test_a_renewal_that_a_revocation_has_overtaken_gets_nothing(
    registry: Registry, certify: Certify
) -> None:
    serial = enrolled(registry, certify)
    assert registry.refusal(serial, "a") is None  # the guard has let the call in
    registry.revoke("a")
    with pytest.raises(NotAllowed, match="client 'a' was revoked"):
        registry.renew(serial, "a", certify)
    again = enrolled(registry, certify)
    with pytest.raises(NotAllowed, match="client 'a' was revoked"):
        registry.renew(serial, "a", certify)
    assert registry.refusal(serial_of(registry.renew(again, "a", certify)), "a") is None


def test_a_client_cannot_pile_certificates_up(registry: Registry, certify: Certify) -> None:
    serial = enrolled(registry, certify)
    for _ in range(49):
        serial = serial_of(registry.renew(serial, "a", certify))
    with pytest.raises(Busy, match="has 50 certificates that are good"):
        registry.renew(serial, "a", certify)
    registry.revoke("a")
    enrolled(registry, certify)  # those do not count any more


def test_a_copy_that_is_being_made_holds_nobody_up(
    registry: Registry, certify: Certify, tmp_path: Path
) -> None:
    serial = enrolled(registry, certify)
    copying = sqlite3.connect(tmp_path / "identity" / "registry.sqlite", isolation_level=None)
    copying.execute("BEGIN")
    assert copying.execute("SELECT count(*) FROM certificates").fetchone() == (1,)
    started = time.monotonic()
    registry.renew(serial, "a", certify)
    registry.revoke("a")
    assert time.monotonic() - started < 2
    assert copying.execute("SELECT count(*) FROM certificates").fetchone() == (1,)
    copying.close()


def test_a_registry_that_somebody_else_writes_to_is_not_given_up(
    registry: Registry, certify: Certify, tmp_path: Path
) -> None:
    serial = enrolled(registry, certify)
    registry._db.execute("PRAGMA busy_timeout = 10")
    other = sqlite3.connect(tmp_path / "identity" / "registry.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(Busy, match="cannot be written now"):
        registry.renew(serial, "a", certify)
    other.execute("COMMIT")
    other.close()
    assert registry.refusal(serial_of(registry.renew(serial, "a", certify)), "a") is None


def test_secrets_are_nowhere_in_the_file_and_only_the_owner_may_read_it(
    registry: Registry, tmp_path: Path
) -> None:
    invitation, token = new_secret(), new_secret()
    registry.invite("a", invitation, HOUR)
    registry.add_token("me", "viewer", token, HOUR)
    registry.close()
    file = tmp_path / "identity" / "registry.sqlite"
    stored = file.read_bytes()
    for secret in (invitation, token):
        assert secret not in stored
        assert secret.hex().encode() not in stored
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


def test_what_one_process_writes_another_one_sees_at_once(
    registry: Registry, certify: Certify, tmp_path: Path
) -> None:
    command = Registry(tmp_path / "identity" / "registry.sqlite")
    serial = enrolled(registry, certify)
    assert command.refusal(serial, "a") is None
    command.revoke("a")
    assert registry.refusal(serial, "a") == "client 'a' was revoked"
    command.close()


def test_a_client_that_enrols_again_comes_in_with_the_new_certificate_only(
    registry: Registry, certify: Certify
) -> None:
    old = enrolled(registry, certify)
    registry.revoke("a")
    assert [(client.client_id, client.revoked) for client in registry.clients()] == [("a", True)]
    new = enrolled(registry, certify)
    assert registry.refusal(old, "a") == "this certificate of client 'a' was revoked"
    assert registry.refusal(new, "a") is None
    assert registry.refusal("3", "a") == "this certificate of client 'a' is not known here"
    assert [(client.client_id, client.revoked) for client in registry.clients()] == [("a", False)]


def test_only_who_was_invited_can_be_revoked_but_anybody_refused(registry: Registry) -> None:
    with pytest.raises(NotFound, match="'nobody' was never invited here"):
        registry.revoke("nobody")
    registry.refuse("of the site's own authority")
    assert registry.refusal(None, "of the site's own authority") is not None
    assert registry.refusal(None, "another") is None
    assert [client.client_id for client in registry.clients()] == ["of the site's own authority"]


def test_access_tokens_have_a_name_a_role_and_an_end(registry: Registry) -> None:
    secret, late = new_secret(), new_secret()
    registry.add_token("me", "operator", secret, HOUR)
    registry.add_token("late", "viewer", late, -1)
    found = registry.find_token(secret)
    assert found is not None
    assert (found.name, found.role) == ("me", "operator")
    assert registry.find_token(late) is None
    assert registry.find_token(new_secret()) is None
    with pytest.raises(InvalidInput, match="an access token for 'me' already"):
        registry.add_token("me", "viewer", new_secret(), HOUR)
    registry.remove_token("me")
    assert registry.find_token(secret) is None
    with pytest.raises(NotFound, match="no access token for 'me'"):
        registry.remove_token("me")


def test_a_file_that_is_no_registry_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "registry.sqlite"
    file.write_bytes(b"not a database, and longer than a header of one would be" * 9)
    with pytest.raises(InvalidInput, match="bring it back from a copy"):
        Registry(file)
