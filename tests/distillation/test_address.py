import logging
from pathlib import Path

import pytest

from lesft.errors import InvalidInput
from lesft_client.distillation.address import KEY_VARIABLE, read_address, read_key


def test_user_password_and_query_are_no_part_of_what_is_shown() -> None:
    address = read_address("https://anna:s%40cret@host:8443/v1/?api-version=2&x=")
    assert address.shown == "https://host:8443/v1"
    assert address.user == ("anna", "s@cret")
    assert address.query == (("api-version", "2"), ("x", ""))
    assert "cret" not in repr(address)
    assert "version" not in repr(address)


def test_the_whole_address_of_the_endpoint_works_too() -> None:
    assert read_address("http://[::1]:80/v1/chat/completions").shown == "http://[::1]:80/v1"


@pytest.mark.parametrize("address", ["host:8000", "ftp://a:secret@h/v1", "http://", "http://h:x/"])
def test_anything_else_is_refused_without_quoting_it(address: str) -> None:
    with pytest.raises(InvalidInput, match="--teacher must be an http") as caught:
        read_address(address)
    assert "secret" not in str(caught.value)


def test_a_teacher_elsewhere_without_encryption_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        read_address("http://127.0.0.1:8000/v1")
        read_address("https://teacher.example/v1")
        assert caplog.messages == []
        read_address("http://u:secret@teacher.example/v1")
    assert caplog.messages == [
        "traffic to the teacher teacher.example is not encrypted: anyone may read it"
    ]


def test_a_key_file_goes_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_key(None) == ""
    monkeypatch.setenv(KEY_VARIABLE, "from-environment\n")
    assert read_key(None) == "from-environment"
    (tmp_path / "key").write_text("from-file\n")
    assert read_key(tmp_path / "key") == "from-file"


def test_a_key_that_cannot_be_one_is_refused_without_quoting_it(tmp_path: Path) -> None:
    file = tmp_path / "key"
    with pytest.raises(InvalidInput, match="cannot be read: No such file"):
        read_key(file)
    file.write_text("\n")
    with pytest.raises(InvalidInput, match="is empty"):
        read_key(file)
    file.write_text("se-cret\nse-cret2")
    with pytest.raises(InvalidInput, match="must hold the key and nothing else") as caught:
        read_key(file)
    assert "se-cret" not in str(caught.value)
