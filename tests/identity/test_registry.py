"""What a service remembers of who may do what, and what it never writes down."""

from pathlib import Path

import pytest

from lesft.errors import InvalidInput, NotAuthenticated, NotFound
from lesft.identity.authority import new_secret
from lesft.identity.registry import Registry

HOUR = 3600.0


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "identity" / "registry.sqlite")


def test_an_invitation_is_good_for_one_key_and_for_that_again(registry: Registry) -> None:
    secret = new_secret()
    registry.invite("a", secret, HOUR)
    assert registry.redeem(secret, b"key") == "a"
    assert registry.redeem(secret, b"key") == "a"  # the answer may have been lost
    with pytest.raises(NotAuthenticated, match="used before"):
        registry.redeem(secret, b"another key")
    assert registry.invitations() == []


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
    registry: Registry, tmp_path: Path
) -> None:
    command = Registry(tmp_path / "identity" / "registry.sqlite")
    registry.add_certificate("1f", "a", 2e9)
    assert command.refusal("1f", "a") is None
    command.revoke("a")
    assert registry.refusal("1f", "a") == "client 'a' was revoked"
    command.close()


def test_a_client_that_enrols_again_comes_in_with_the_new_certificate_only(
    registry: Registry,
) -> None:
    secret = new_secret()
    registry.add_certificate("1", "a", 2e9)
    registry.revoke("a")
    registry.invite("a", secret, HOUR)
    registry.redeem(secret, b"key")
    registry.add_certificate("2", "a", 2e9)
    assert registry.refusal("1", "a") == "this certificate of client 'a' was revoked"
    assert registry.refusal("2", "a") is None
    assert registry.refusal("3", "a") == "this certificate of client 'a' is not known here"
    [client] = registry.clients()
    assert (client.client_id, client.revoked) == ("a", False)


def test_only_who_was_invited_can_be_revoked_but_anybody_refused(registry: Registry) -> None:
    with pytest.raises(NotFound, match="'nobody' was never invited here"):
        registry.revoke("nobody")
    registry.refuse("of the site's own authority")
    assert registry.refusal(None, "of the site's own authority") is not None
    assert registry.refusal(None, "another") is None


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
