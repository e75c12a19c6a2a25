"""Errors across service boundaries: one table, both ways, over real gRPC and HTTP."""

import asyncio
import inspect
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc import StatusCode
from prometheus_client import CollectorRegistry

from lesft import errors
from lesft.control import make_control_app
from lesft.errors import (
    MAX_MESSAGE_BYTES,
    STATUS,
    AlreadyJoined,
    DataError,
    HandshakeMismatch,
    InternalError,
    InvalidInput,
    LesftError,
    NotAllowed,
    NotFound,
    OutOfOrder,
    RunStopped,
    TooLarge,
    Unreachable,
    error_for,
    one_line,
    status_of,
)
from lesft.interceptors import ErrorInterceptor, error_from, remote_errors

KINDS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, LesftError) and kind is not LesftError
]
NO_DETAILS = "internal error; the service's log has the details"


class Unlisted(DataError):
    """An error of our tree that the table does not have."""


# ---------------------------------------------------------------------- the table


def test_the_table_has_every_error_and_nothing_else() -> None:
    assert set(STATUS) == set(KINDS)
    assert len(KINDS) == 17


def test_both_statuses_say_the_same() -> None:
    """A gRPC status and the HTTP status that its documentation pairs it with, or one as near."""
    near = {
        StatusCode.INVALID_ARGUMENT: {422},
        StatusCode.FAILED_PRECONDITION: {409, 412},
        StatusCode.ALREADY_EXISTS: {409},
        StatusCode.NOT_FOUND: {404},
        StatusCode.RESOURCE_EXHAUSTED: {413, 503},
        StatusCode.UNAUTHENTICATED: {401},
        StatusCode.PERMISSION_DENIED: {403},
        StatusCode.ABORTED: {410},
        StatusCode.UNAVAILABLE: {503},
        StatusCode.INTERNAL: {500},
    }
    assert [kind for kind, status in STATUS.items() if status.http not in near[status.grpc]] == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_comes_back_by_its_name_whatever_the_status(kind: type[LesftError]) -> None:
    assert error_for(kind.__name__, StatusCode.UNKNOWN) is kind


BY_CODE = {
    StatusCode.INVALID_ARGUMENT: InvalidInput,
    StatusCode.FAILED_PRECONDITION: HandshakeMismatch,
    StatusCode.ALREADY_EXISTS: AlreadyJoined,
    StatusCode.NOT_FOUND: NotFound,
    StatusCode.RESOURCE_EXHAUSTED: TooLarge,
    StatusCode.PERMISSION_DENIED: NotAllowed,
    StatusCode.ABORTED: RunStopped,
    StatusCode.UNAVAILABLE: Unreachable,
    StatusCode.DEADLINE_EXCEEDED: Unreachable,
    StatusCode.CANCELLED: Unreachable,
    StatusCode.INTERNAL: InternalError,
    StatusCode.UNKNOWN: InternalError,
    StatusCode.UNIMPLEMENTED: InternalError,
}


@pytest.mark.parametrize("code", BY_CODE)
@pytest.mark.parametrize("name", [None, "NoErrorOfOurs", "Exception"])
def test_a_status_without_a_name_of_ours_has_an_error_too(
    name: str | None, code: StatusCode
) -> None:
    on_the_way = name is None and BY_CODE[code] is InternalError
    on_the_way = on_the_way and code is not StatusCode.UNIMPLEMENTED
    assert error_for(name, code) is (Unreachable if on_the_way else BY_CODE[code])


def test_every_error_has_a_status_that_leads_back_to_it_or_to_one_of_the_same_status() -> None:
    for kind in KINDS:
        # An internal error without its name is taken for one of the connection.
        name = kind.__name__ if kind is InternalError else None
        back = error_for(name, STATUS[kind].grpc)
        assert STATUS[back].grpc is STATUS[kind].grpc


def test_an_error_that_the_table_does_not_have_counts_as_its_base() -> None:
    assert status_of(Unlisted("x")) == STATUS[DataError]
    assert status_of(LesftError("x")) == STATUS[InternalError]


# ---------------------------------------------------------------------- messages


def test_a_message_becomes_one_printable_line() -> None:
    assert one_line("all is well") == "all is well"
    assert one_line(" a\r\n\tb\x1b[2J\x00c\u2028d  e ") == "a b [2J c d e"
    assert one_line("grün \N{GRINNING FACE}") == "grün \N{GRINNING FACE}"
    assert one_line("\ud800 is half a character") == "is half a character"
    assert one_line("\n") == ""


@pytest.mark.parametrize("char", ["x", "ä", "\N{EURO SIGN}", "\N{GRINNING FACE}"])
def test_a_long_message_is_cut_between_characters(char: str) -> None:
    size = len(char.encode())
    fits = char * (MAX_MESSAGE_BYTES // size)
    assert one_line(fits) == fits
    cut = one_line(fits + char)
    assert cut == char * ((MAX_MESSAGE_BYTES - 3) // size) + "…"
    assert len(cut.encode()) <= MAX_MESSAGE_BYTES


# ---------------------------------------------------------------------- over real gRPC


def raised(request: bytes) -> Exception:
    """The exception that a request names, as `Name:message`."""
    name, _, message = request.decode().partition(":")
    known: dict[str, type[Exception]] = {kind.__name__: kind for kind in (*KINDS, Unlisted)}
    return {**known, "RuntimeError": RuntimeError, "KeyError": KeyError}[name](message)


Context = grpc.aio.ServicerContext[bytes, bytes]


async def unary_unary(request: bytes, context: Context) -> bytes:
    if request == b"fine":
        return b"done"
    raise raised(request)


async def unary_stream(request: bytes, context: Context) -> AsyncIterator[bytes]:
    yield b"one"
    yield b"two"
    if request != b"fine":
        raise raised(request)


async def stream_unary(requests: AsyncIterator[bytes], context: Context) -> bytes:
    count = 0
    async for request in requests:
        if request != b"fine":
            raise raised(request)
        count += 1
    return str(count).encode()


async def stream_stream(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
    async for request in requests:
        if request != b"fine":
            raise raised(request)
        yield request


async def written(request: bytes, context: Context) -> None:
    """The other way to answer with a stream, as the standard health service does."""
    await context.write(b"one")
    if request != b"fine":
        raise raised(request)
    await context.write(b"two")


async def abort(request: bytes, context: Context) -> bytes:
    """Ends its call by itself, with the status details that the request has."""
    metadata = (("grpc-status-details-bin", request),) if request else ()
    await context.abort(StatusCode.NOT_FOUND, "what was asked for", metadata)
    raise AssertionError("abort raises")


def as_text(data: bytes) -> bytes:
    """A deserializer that, as protobuf's, raises DecodeError."""
    if data == b"garbage":
        raise DecodeError("Error parsing message")
    return data


METHODS = {
    "UnaryUnary": grpc.unary_unary_rpc_method_handler(unary_unary, as_text),
    "UnaryStream": grpc.unary_stream_rpc_method_handler(unary_stream, as_text),
    "StreamUnary": grpc.stream_unary_rpc_method_handler(stream_unary, as_text),
    "StreamStream": grpc.stream_stream_rpc_method_handler(stream_stream, as_text),
    "Written": grpc.unary_stream_rpc_method_handler(written),
    "Abort": grpc.unary_unary_rpc_method_handler(abort),
}
CALLS = ["UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream", "Written"]


@pytest.fixture(scope="module")
def channel() -> Iterator[grpc.Channel]:
    """A channel to a real server whose methods fail as they are told."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(interceptors=[ErrorInterceptor()])
        handler = grpc.method_handlers_generic_handler("test.Service", METHODS)
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as opened:
            yield opened
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def call(channel: grpc.Channel, method: str, request: bytes) -> list[bytes]:
    """All responses of a call; a streaming request says `fine` before it says `request`."""
    path = f"/test.Service/{method}"
    stream = iter([b"fine", request])
    kinds: dict[str, Any] = {
        "UnaryUnary": lambda: [channel.unary_unary(path)(request, timeout=20)],
        "UnaryStream": lambda: list(channel.unary_stream(path)(request, timeout=20)),
        "StreamUnary": lambda: [channel.stream_unary(path)(stream, timeout=20)],
        "StreamStream": lambda: list(channel.stream_stream(path)(stream, timeout=20)),
        "Written": lambda: list(channel.unary_stream(path)(request, timeout=20)),
        "Abort": lambda: [channel.unary_unary(path)(request, timeout=20)],
    }
    responses: list[bytes] = kinds[method]()
    return responses


def failure(channel: grpc.Channel, method: str, request: bytes) -> tuple[StatusCode, LesftError]:
    """The status of a call and the error of our tree that its caller gets."""
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method, request)
    with pytest.raises(LesftError) as translated, remote_errors("server x"):
        raise caught.value
    return caught.value.code(), translated.value


def test_a_call_without_error_is_left_alone(channel: grpc.Channel) -> None:
    answers = {method: call(channel, method, b"fine") for method in CALLS}
    assert answers == {
        "UnaryUnary": [b"done"],
        "UnaryStream": [b"one", b"two"],
        "StreamUnary": [b"2"],
        "StreamStream": [b"fine", b"fine"],
        "Written": [b"one", b"two"],
    }


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_error_crosses_every_kind_of_call_with_class_message_and_status(
    kind: type[LesftError], method: str, channel: grpc.Channel
) -> None:
    message = "lora.rank: server 8, client 4; naïve \N{GRINNING FACE} 100 %"
    code, error = failure(channel, method, f"{kind.__name__}:{message}".encode())
    assert code is STATUS[kind].grpc
    assert type(error) is kind
    assert str(error) == f"server x: {message}"


@pytest.mark.parametrize("method", CALLS)
def test_a_foreign_exception_is_internal_without_details_and_logged(
    method: str, channel: grpc.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    code, error = failure(channel, method, b"RuntimeError:the secret")
    assert code is StatusCode.INTERNAL
    assert type(error) is InternalError
    assert str(error) == f"server x: {NO_DETAILS}"
    [record] = [record for record in caplog.records if record.name == "lesft.interceptors"]
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "the secret"
    assert "RuntimeError: the secret" in caplog.text


@pytest.mark.parametrize("method", CALLS)
def test_an_error_of_our_tree_is_no_bug_and_not_logged(
    method: str, channel: grpc.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        failure(channel, method, b"OutOfOrder:not now")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_an_error_in_mid_stream_comes_after_what_was_sent_before(channel: grpc.Channel) -> None:
    responses = channel.unary_stream("/test.Service/UnaryStream")(b"TooLarge:enough", timeout=20)
    received: list[bytes] = []
    with pytest.raises(TooLarge, match=r"^server x: enough$"), remote_errors("server x"):
        received.extend(responses)
    assert received == [b"one", b"two"]


@pytest.mark.parametrize("method", ["UnaryUnary", "UnaryStream", "StreamUnary", "StreamStream"])
def test_a_request_that_cannot_be_read_is_the_callers_fault(
    method: str, channel: grpc.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    code, error = failure(channel, method, b"garbage")
    assert code is StatusCode.INVALID_ARGUMENT
    assert type(error) is InvalidInput
    assert str(error) == (
        "server x: a message of 7 bytes is not of this method's type: build the client from the "
        "same .proto files as this service"
    )
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_an_error_without_message_says_its_status(channel: grpc.Channel) -> None:
    _, error = failure(channel, "UnaryUnary", b"NotFound:")
    assert (type(error), str(error)) == (NotFound, "server x: not_found")


def test_a_long_hostile_message_arrives_with_its_class(channel: grpc.Channel) -> None:
    hostile = "a\nb" + "\N{GRINNING FACE}" * 100_000
    _, error = failure(channel, "UnaryStream", f"OutOfOrder:{hostile}".encode())
    assert type(error) is OutOfOrder
    assert str(error) == f"server x: {one_line(hostile)}"


def test_an_error_that_the_table_does_not_have_arrives_as_one_of_its_status(
    channel: grpc.Channel,
) -> None:
    code, error = failure(channel, "UnaryUnary", b"Unlisted:what it says")
    assert code is StatusCode.INVALID_ARGUMENT
    assert (type(error), str(error)) == (InvalidInput, "server x: what it says")


def details(code: int, message: str, *parts: any_pb2.Any) -> bytes:
    status = status_pb2.Status(code=code, message=message, details=parts)
    data: bytes = status.SerializeToString()
    return data


def packed(reason: str, domain: str) -> any_pb2.Any:
    part = any_pb2.Any()
    part.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
    return part


BROKEN_PART = any_pb2.Any(
    type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff\xff\xff"
)
FOREIGN_DETAILS = {
    "none": b"",
    "bytes that are no status": b"\xff\xff\xff\xff",
    "a status of another code": details(3, "what was asked for", packed("TooLarge", "lesft")),
    "a status of another message": details(5, "something else", packed("TooLarge", "lesft")),
    "no parts": details(5, "what was asked for"),
    "another project's part": details(5, "what was asked for", packed("TooLarge", "other.org")),
    "a part that is broken": details(5, "what was asked for", BROKEN_PART),
    "a class that is not ours": details(5, "what was asked for", packed("SystemExit", "lesft")),
}


@pytest.mark.parametrize("what", FOREIGN_DETAILS)
def test_details_that_are_not_ours_leave_the_bare_status(
    what: str, channel: grpc.Channel, caplog: pytest.LogCaptureFixture
) -> None:
    code, error = failure(channel, "Abort", FOREIGN_DETAILS[what])
    assert code is StatusCode.NOT_FOUND
    assert (type(error), str(error)) == (NotFound, "server x: what was asked for")
    # A handler that ends its call by itself has not failed.
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_our_part_is_found_among_others(channel: grpc.Channel) -> None:
    parts = [packed("TooLarge", "other.org"), packed("OutOfOrder", "lesft")]
    _, error = failure(channel, "Abort", details(5, "what was asked for", *parts))
    assert (type(error), str(error)) == (OutOfOrder, "server x: what was asked for")


def test_a_method_that_is_not_there_is_an_error_of_our_tree(channel: grpc.Channel) -> None:
    with (
        pytest.raises(
            InternalError,
            match=r"^server x: is not the LESFT service that was asked for; check the address$",
        ),
        remote_errors("server x"),
    ):
        channel.unary_unary("/test.Service/Nothing")(b"")


def test_other_exceptions_pass_through_the_translation() -> None:
    with pytest.raises(KeyError), remote_errors("server x"):
        raise KeyError("not a call")


def test_the_caller_may_ask_for_the_error_without_raising_it(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, "UnaryUnary", b"RunStopped:it is over")
    error = error_from(caught.value, "aggregator y")
    assert (type(error), str(error)) == (RunStopped, "aggregator y: it is over")


# ---------------------------------------------------------------------- over HTTP


def get(path: str) -> httpx.Response:
    """The answer of a control API whose routes raise what their path names."""
    app = make_control_app("test", CollectorRegistry(), lambda: None)

    @app.get("/raise/{name}")
    async def fail(name: str) -> None:
        raise raised(f"{name}:what went wrong".encode())

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get(path)

    return asyncio.run(ask())


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_its_http_status_and_body(kind: type[LesftError]) -> None:
    response = get(f"/raise/{kind.__name__}")
    assert response.status_code == STATUS[kind].http
    assert response.json() == {"error": kind.__name__, "message": "what went wrong"}


def test_a_foreign_exception_is_told_without_details_over_http_too() -> None:
    response = get("/raise/RuntimeError")
    assert response.status_code == 500
    assert response.json() == {"error": "InternalError", "message": NO_DETAILS}
