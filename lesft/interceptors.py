"""Errors across gRPC: our tree to status on the serving side, status to our tree on the calling.

The error's class name travels as google.rpc.ErrorInfo in the standard status details, its message
as the status message.
"""

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from lesft.errors import (
    InternalError,
    InvalidInput,
    LesftError,
    NotFound,
    error_for,
    one_line,
    status_of,
)

log = logging.getLogger(__name__)

DOMAIN = "lesft"
_DETAILS_KEY = "grpc-status-details-bin"

NO_METHOD = "none"
"""Stands for the methods that strangers make up."""

OnRefused = Callable[[str, LesftError], None]
"""Hears of refused calls: the method, such as lesft.v1.TrainingService/Train, and the error."""


def status_details(error: LesftError, message: str) -> bytes:
    """The google.rpc.Status of an error, serialized; `message` is the call's status message."""
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN)
    detail = any_pb2.Any()
    detail.Pack(info)
    code = status_of(error).grpc.value[0]
    status = status_pb2.Status(code=code, message=message, details=[detail])
    return bytes(status.SerializeToString())


def error_from(call: grpc.RpcError, party: str) -> LesftError:
    """The error of our tree that a failed call stands for.

    `party` says who was called, such as "server 10.0.0.5:50051"; it opens the message.
    """
    code, message = call.code(), call.details()
    if code is grpc.StatusCode.UNIMPLEMENTED:
        message = "is not the LESFT service that was asked for; check the address"
    return error_for(_reason(call), code)(f"{party}: {one_line(message or code.name.lower())}")


def _reason(call: grpc.RpcError) -> str | None:
    """The class name in a call's status details; None where there is none of ours."""
    info = error_details_pb2.ErrorInfo()
    try:
        status = rpc_status.from_call(call)
        for detail in status.details if status else ():
            if detail.Unpack(info) and info.domain == DOMAIN:
                return str(info.reason)
    except (DecodeError, ValueError):
        return None  # the details are not what google.rpc.Status says, so they are not ours
    return None


@contextmanager
def remote_errors(party: str) -> Iterator[None]:
    """Turns a failed call inside the block, unary or streaming, into an error of our tree."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from(error, party) from None


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call with the status of the error that its handler raised.

    A message that is not the method's protobuf message counts as InvalidInput. Anything outside our
    tree is a bug: it is logged with its traceback and told as INTERNAL without details.
    """

    def __init__(self, on_refused: OnRefused = lambda method, error: None) -> None:
        """`on_refused` hears of every call that ends so, and of those to no method of ours."""
        self._on_refused = on_refused

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            self._on_refused(NO_METHOD, NotFound("the service has no such method"))
            return None
        requests = "stream" if handler.request_streaming else "unary"
        responses = "stream" if handler.response_streaming else "unary"
        behaviour = getattr(handler, f"{requests}_{responses}")
        read = _reader(handler.request_deserializer)
        # gRPC reads a single request before it calls the handler, out of our reach: so it leaves
        # that one to us. A streaming handler reads its requests itself, and the error is its own.
        read_single, read_each = (None, read) if requests == "stream" else (read, None)
        wrap = _generating if inspect.isasyncgenfunction(behaviour) else _awaiting
        make = getattr(grpc, f"{requests}_{responses}_rpc_method_handler")
        method = handler_call_details.method.removeprefix("/")

        async def refuse(context: _Context, error: Exception) -> None:
            await _abort(context, error, lambda known: self._on_refused(method, known))

        return make(wrap(behaviour, read_single, refuse), read_each, handler.response_serializer)


_Read = Callable[[bytes], Any]
_Context = grpc.aio.ServicerContext[Any, Any]
_Refuse = Callable[[_Context, Exception], Awaitable[None]]


def _reader(deserialize: _Read | None) -> _Read:
    def read(data: bytes) -> Any:
        try:
            return deserialize(data) if deserialize else data
        except DecodeError:
            raise InvalidInput(
                f"a message of {len(data)} bytes is not of this method's type: build the client "
                "from the same .proto files as this service"
            ) from None

    return read


def _awaiting(
    behaviour: Callable[..., Awaitable[Any]], read: _Read | None, refuse: _Refuse
) -> Callable[..., Awaitable[Any]]:
    """For handlers that return their response, or write their responses to the context."""

    async def call(request: Any, context: _Context) -> Any:
        try:
            return await behaviour(read(request) if read else request, context)
        except Exception as error:
            await refuse(context, error)

    return call


def _generating(
    behaviour: Callable[..., AsyncIterator[Any]], read: _Read | None, refuse: _Refuse
) -> Callable[..., AsyncIterator[Any]]:
    """For handlers that yield their responses."""

    async def call(request: Any, context: _Context) -> AsyncIterator[Any]:
        try:
            async for response in behaviour(read(request) if read else request, context):
                yield response
        except Exception as error:
            await refuse(context, error)

    return call


async def _abort(context: _Context, error: Exception, tell: Callable[[LesftError], None]) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, LesftError):
        log.error("a handler failed", exc_info=error)
        error = InternalError("internal error; the service's log has the details")
    tell(error)
    message = one_line(str(error))
    details = ((_DETAILS_KEY, status_details(error, message)),)
    await context.abort(status_of(error).grpc, message, trailing_metadata=details)
