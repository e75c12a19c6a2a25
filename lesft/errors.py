"""Every error that crosses a service boundary, and the one table of its statuses."""

from typing import NamedTuple

from grpc import StatusCode


class LesftError(Exception):
    """Base of all errors that users, operators or other services are meant to read."""


class InvalidInput(LesftError, ValueError):
    """A setting, a file or a message breaks a rule."""


class DataError(InvalidInput):
    """A data set cannot be read or used."""


class ModelError(InvalidInput):
    """A model folder, its weights or its family cannot be used."""


class BundleError(InvalidInput):
    """A bundle's chunks or tensors are not what was announced or agreed."""


class HandshakeMismatch(LesftError):
    """Two parties do not mean the same run; the message names the field and both values."""


class AlreadyJoined(LesftError):
    """A client of this name is in the run already."""


class OutOfOrder(LesftError):
    """A message or micro-batch is not the one whose turn it is."""


class StaleVersion(LesftError):
    """A submission was trained from a version that is no longer open."""


class NotFound(LesftError):
    """What was asked for does not exist."""


class TooLarge(LesftError):
    """A message or request is over its limit."""


class Busy(LesftError):
    """A service has no room for more work now; it will have some later."""


class NotAuthenticated(LesftError):
    """Who asks has not shown who it is: no certificate or token, or one that is not good here."""


class NotAllowed(LesftError):
    """What was asked for is there, but its owner does not give it away."""


class RunStopped(LesftError):
    """The run has ended early; the message names who or what ended it."""


class Unreachable(LesftError):
    """A service does not answer."""


class LeftBehind(Unreachable):
    """The others went on without this client, which may rejoin at the next round."""


class InternalError(LesftError):
    """A bug or a broken machine on the other side; its log has the details."""


class Status(NamedTuple):
    """How one error crosses a boundary."""

    grpc: StatusCode
    http: int


STATUS: dict[type[LesftError], Status] = {
    InvalidInput: Status(StatusCode.INVALID_ARGUMENT, 422),
    DataError: Status(StatusCode.INVALID_ARGUMENT, 422),
    ModelError: Status(StatusCode.INVALID_ARGUMENT, 422),
    BundleError: Status(StatusCode.INVALID_ARGUMENT, 422),
    HandshakeMismatch: Status(StatusCode.FAILED_PRECONDITION, 412),
    AlreadyJoined: Status(StatusCode.ALREADY_EXISTS, 409),
    OutOfOrder: Status(StatusCode.FAILED_PRECONDITION, 409),
    StaleVersion: Status(StatusCode.FAILED_PRECONDITION, 409),
    NotFound: Status(StatusCode.NOT_FOUND, 404),
    TooLarge: Status(StatusCode.RESOURCE_EXHAUSTED, 413),
    Busy: Status(StatusCode.RESOURCE_EXHAUSTED, 503),
    NotAuthenticated: Status(StatusCode.UNAUTHENTICATED, 401),
    NotAllowed: Status(StatusCode.PERMISSION_DENIED, 403),
    RunStopped: Status(StatusCode.ABORTED, 410),
    Unreachable: Status(StatusCode.UNAVAILABLE, 503),
    LeftBehind: Status(StatusCode.UNAVAILABLE, 503),
    InternalError: Status(StatusCode.INTERNAL, 500),
}

MAX_MESSAGE_BYTES = 1000
"""What a message may have at most: with its percent-encoding and its copy in the status details it
must fit into HTTP/2 trailers, which gRPC cuts off at 8 KiB."""

_MAX_CHARACTERS_READ = 8 * MAX_MESSAGE_BYTES
"""How far into a message `one_line` looks: one that quotes megabytes must cost no time."""

_BY_NAME = {error.__name__: error for error in STATUS}

_BY_CODE: dict[StatusCode, type[LesftError]] = {
    StatusCode.INVALID_ARGUMENT: InvalidInput,
    StatusCode.FAILED_PRECONDITION: HandshakeMismatch,
    StatusCode.ALREADY_EXISTS: AlreadyJoined,
    StatusCode.NOT_FOUND: NotFound,
    StatusCode.RESOURCE_EXHAUSTED: TooLarge,
    StatusCode.UNAUTHENTICATED: NotAuthenticated,
    StatusCode.PERMISSION_DENIED: NotAllowed,
    StatusCode.ABORTED: RunStopped,
    StatusCode.UNAVAILABLE: Unreachable,
    StatusCode.DEADLINE_EXCEEDED: Unreachable,
    StatusCode.CANCELLED: Unreachable,
}


def status_of(error: LesftError) -> Status:
    """The status of an error, or of its nearest base that has one."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return STATUS[InternalError]


def error_for(name: str | None, code: StatusCode) -> type[LesftError]:
    """The error class for a class name as it crossed the wire, or else for the bare status.

    Our own services name their internal errors: one without a name comes from a connection that
    was cut or a proxy on the way.
    """
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name is None and code in (StatusCode.UNKNOWN, StatusCode.INTERNAL):
        return Unreachable
    return _BY_CODE.get(code, InternalError)


def error_for_http(name: str, status: int) -> type[LesftError]:
    """The error class for a class name in an answer over HTTP, or else for the bare status."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    if status >= 500:
        return Unreachable
    return next((kind for kind, known in STATUS.items() if known.http == status), InvalidInput)


def one_line(message: str) -> str:
    """A message that may quote what a stranger sent, fit for logs, terminals and trailers.

    Printable characters on one line, at most MAX_MESSAGE_BYTES of UTF-8; a longer one ends in "…".
    """
    read = message[:_MAX_CHARACTERS_READ]
    printable = "".join(char if char.isprintable() else " " for char in read)
    text = " ".join(printable.split()) + "…" * (len(read) < len(message))
    if len(text.encode()) <= MAX_MESSAGE_BYTES:
        return text
    cut = text.encode()[: MAX_MESSAGE_BYTES - len("…".encode())]
    return cut.decode(errors="ignore") + "…"
