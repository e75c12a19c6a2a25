"""Lets calls in by the client's certificate, and ends those whose certificate stops being good."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from lesft.call_interceptor import CallInterceptor
from lesft.errors import LesftError, NotAllowed, Unreachable
from lesft.identity.caller import Caller, Context, caller_of
from lesft.identity.certificates import now
from lesft.identity.registry import Registry

log = logging.getLogger(__name__)

CHECK_SECONDS = 1.0
"""How often calls under way are looked at: a revocation takes effect within so long."""

_CHECKS_WHILE_SENDING = 5
"""A client that reads nothing learns nothing: its call is cut off after so many looks."""


_current: ContextVar["_Call"] = ContextVar("call")


def why_ended() -> LesftError | None:
    """Why the call that is being handled was ended by the guard; None where it was not."""
    call = _current.get(None)
    return call.error if call else None


@dataclass(eq=False)
class _Call:
    caller: Caller
    task: "asyncio.Task[Any]"
    error: LesftError | None = None
    """Why it is to end."""
    sending: bool = False
    """Whether gRPC has the task: cancelled there, the call would end without a status."""
    checks_left: int = _CHECKS_WHILE_SENDING


class CallGuard(CallInterceptor):
    """Every call of every service on an encrypted listener goes through here."""

    def __init__(self, registry: Registry, own_authority: bool) -> None:
        """With a site's own certificates serial numbers are not known here, only names."""
        self._registry = registry
        self._own_authority = own_authority
        self._calls: set[_Call] = set()

    async def watch(self) -> None:
        """End calls whose client is revoked or whose certificate has expired; runs for ever."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            try:
                self.check_now()
            except Exception:
                log.exception("calls under way could not be checked, trying again")

    def check_now(self) -> None:
        """Look at all calls under way."""
        for call in self._calls:
            if call.error is None and (error := self._error(call.caller)) is not None:
                call.error = error
                log.info("a call of %s is ended: %s", call.caller.client_id, error)
            if call.error is not None:
                call.checks_left -= 1
                if not call.sending or call.checks_left < 0:
                    call.task.cancel()

    def _error(self, caller: Caller) -> LesftError | None:
        # This first: certificates that have ended are not kept.
        if caller.expires <= now():
            # To be tried again: a client that has renewed its certificate goes on with that.
            return Unreachable(
                f"the certificate of client {caller.client_id!r} has expired: connect with the "
                "renewed one"
            )
        serial = caller.serial if self._own_authority else None
        refusal = self._registry.refusal(serial, caller.client_id)
        if refusal is None:
            return None
        way_out = " for a new enrolment token" * self._own_authority
        return NotAllowed(f"{refusal}: ask the operator{way_out}")

    @contextmanager
    def _let_in(self, context: Context) -> Iterator[_Call]:
        caller = caller_of(context)
        task = asyncio.current_task()
        assert caller is not None, "the listener asks every client for its certificate"
        assert task is not None
        if (error := self._error(caller)) is not None:
            raise error
        call = _Call(caller, task)
        _current.set(call)
        self._calls.add(call)
        try:
            yield call
        except asyncio.CancelledError:
            if call.error is None:
                raise
            raise call.error from None
        finally:
            self._calls.discard(call)

    def _awaiting(self, behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(request: Any, context: Context) -> Any:
            with self._let_in(context):
                return await behaviour(request, context)

        return call

    def _generating(
        self, behaviour: Callable[..., AsyncIterator[Any]]
    ) -> Callable[..., AsyncIterator[Any]]:
        async def call(request: Any, context: Context) -> AsyncIterator[Any]:
            with self._let_in(context) as let_in:
                async for response in behaviour(request, context):
                    let_in.sending = True
                    yield response
                    let_in.sending = False
                    if let_in.error is not None:
                        raise let_in.error

        return call
