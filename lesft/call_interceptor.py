"""What interceptors of ours share: a handler of the same kind around another one."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc


class CallInterceptor(grpc.aio.ServerInterceptor, ABC):
    """Wraps each handler, whether it returns its response, writes to the context or yields."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """See grpc.aio."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        requests = "stream" if handler.request_streaming else "unary"
        responses = "stream" if handler.response_streaming else "unary"
        behaviour = getattr(handler, f"{requests}_{responses}")
        wrap = self._generating if inspect.isasyncgenfunction(behaviour) else self._awaiting
        make = getattr(grpc, f"{requests}_{responses}_rpc_method_handler")
        return make(wrap(behaviour), handler.request_deserializer, handler.response_serializer)

    @abstractmethod
    def _awaiting(self, behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        """For handlers that return their response, or write their responses to the context."""

    @abstractmethod
    def _generating(
        self, behaviour: Callable[..., AsyncIterator[Any]]
    ) -> Callable[..., AsyncIterator[Any]]:
        """For handlers that yield their responses."""
