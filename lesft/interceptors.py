"""Errors across gRPC: our tree to status on the serving side, status to our tree on the calling.

The error's class name travels as google.rpc.ErrorInfo in the standard status details, its message
as the status message.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from lesft.errors import InternalError, LesftError, error_for, status_of

log = logging.getLogger(__name__)

DOMAIN = "lesft"
_DETAILS_KEY = "grpc-status-details-bin"


def status_details(error: LesftError) -> bytes:
    """The google.rpc.Status of an error, serialized."""
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=DOMAIN)
    detail = any_pb2.Any()
    detail.Pack(info)
    code = status_of(error).grpc.value[0]
    status = status_pb2.Status(code=code, message=str(error), details=[detail])
    return bytes(status.SerializeToString())


def error_from(call: grpc.RpcError, party: str) -> LesftError:
    """The error of our tree that a failed call stands for.

    `party` says who was called, such as "server 10.0.0.5:50051"; it opens the message.
    """
    code, message, reason = call.code(), call.details() or "", None
    status = rpc_status.from_call(call)
    for detail in status.details if status else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason = info.reason
    return error_for(reason, code)(f"{party}: {message or code.name.lower()}")


@contextmanager
def remote_errors(party: str) -> Iterator[None]:
    """Turns a failed call inside the block, unary or streaming, into an error of our tree."""
    try:
        yield
    except grpc.RpcError as error:
        raise error_from(error, party) from None


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call with the status of the error that its handler raised.

    Anything outside our tree is a bug: it is logged with its traceback and told as INTERNAL
    without details.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        if handler.response_streaming:
            kind = "stream_stream" if handler.request_streaming else "unary_stream"
            wrapped: Any = _streaming(getattr(handler, kind))
        else:
            kind = "stream_unary" if handler.request_streaming else "unary_unary"
            wrapped = _unary(getattr(handler, kind))
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(wrapped, handler.request_deserializer, handler.response_serializer)


def _unary(behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(request, context)
        except Exception as error:
            await _abort(context, error)

    return call


def _streaming(behaviour: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            async for response in behaviour(request, context):
                yield response
        except Exception as error:
            await _abort(context, error)

    return call


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> None:
    if isinstance(error, (grpc.aio.AbortError, asyncio.CancelledError)):
        raise error
    if not isinstance(error, LesftError):
        log.error("a handler failed", exc_info=error)
        error = InternalError("internal error; the service's log has the details")
    details = ((_DETAILS_KEY, status_details(error)),)
    await context.abort(status_of(error).grpc, str(error), trailing_metadata=details)
