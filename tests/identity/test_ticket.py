"""Tokens as people carry them: whole or refused, and never shown by accident."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesft.errors import InvalidInput
from lesft.identity.ticket import ACCESS_PREFIX, ENROLMENT_PREFIX, Ticket, read_ticket

INVITATION = Ticket(
    "server",
    "gpu.example:8051",
    bytes(range(32)),
    bytes(range(16)),
    "gpu.example:50051",
    "a",
)
ACCESS = Ticket("aggregator", "[2001:db8::1]:8052", b"", bytes(range(16)))


@pytest.mark.parametrize(
    ("ticket", "prefix"), [(INVITATION, ENROLMENT_PREFIX), (ACCESS, ACCESS_PREFIX)]
)
def test_a_token_comes_back_as_it_went(ticket: Ticket, prefix: str) -> None:
    text = ticket.text()
    assert text.startswith(prefix)
    assert text.isascii()
    assert len(text) < 250
    assert read_ticket(text, prefix, "it") == ticket
    wrapped = f"  {text[:60]}\n{text[60:]}\r\n"  # as a mail may bring it
    assert read_ticket(wrapped, prefix, "it") == ticket


def test_a_token_is_not_shown_with_its_secret() -> None:
    shown = repr(INVITATION)
    assert shown == "Ticket(server gpu.example:8051 a)"
    assert repr(INVITATION.secret) not in shown


@given(st.data())
def test_a_token_that_lost_or_changed_a_character_is_refused(data: st.DataObject) -> None:
    text = INVITATION.text()
    at = data.draw(st.integers(len(ENROLMENT_PREFIX), len(text) - 1))
    char = data.draw(st.sampled_from("ABCabc012-_"))
    damaged = data.draw(st.sampled_from([text[:at], text[:at] + char + text[at + 1 :]]))
    if damaged == text:
        return
    with pytest.raises(InvalidInput) as caught:
        read_ticket(damaged, ENROLMENT_PREFIX, "the enrolment token")
    assert str(caught.value) == "the enrolment token is damaged: copy all of it, in one piece"


def test_another_kind_of_text_is_named_without_being_repeated() -> None:
    for text in ("", "hunter2", ACCESS.text()):
        with pytest.raises(InvalidInput) as caught:
            read_ticket(text, ENROLMENT_PREFIX, "the enrolment token")
        assert str(caught.value) == (
            "the enrolment token begins with lesft-enrol-, and what was given does not"
        )
