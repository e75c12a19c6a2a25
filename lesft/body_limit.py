"""How large the body of an HTTP request may be, whether it says so or not."""

from starlette.types import Message, Receive


def says_too_much(headers: dict[bytes, bytes], most_bytes: int) -> bool:
    """Whether a request announces a longer body, or no number; names are in lower case."""
    length = headers.get(b"content-length", b"0")
    return not length.isdigit() or int(length) > most_bytes


def bounded(receive: Receive, most_bytes: int) -> Receive:
    """A body without a length is cut off by its sender's connection where it is too long."""
    size = 0

    async def receive_bounded() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        return {"type": "http.disconnect"} if size > most_bytes else message

    return receive_bounded
