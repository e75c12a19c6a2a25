"""Errors in the shape that OpenAI's API gives them, and its clients expect.

https://platform.openai.com/docs/guides/error-codes
"""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from lesft.errors import Busy, InternalError, InvalidInput, LesftError, status_of

_RETRY_LATER = {"Retry-After": "1"}
_NO_INTERNALS = "internal error; the endpoint's log has the details"
_CODES = {"missing": "missing_required_parameter", "value_error": "invalid_value"}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


class Refused(Exception):
    """A request that is not answered, as its client is to see it."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = ErrorBody(
            error=ErrorDetail(message=message, type=kind, param=param, code=code)
        ).model_dump()

    def response(self) -> JSONResponse:
        """The HTTP answer."""
        return JSONResponse(self.body, self.status, self.headers)


def refusal(error: Exception) -> Refused:
    """What a client sees of an error: no internals of those that nobody foresaw."""
    if isinstance(error, Refused):
        return error
    if not isinstance(error, LesftError) or isinstance(error, InternalError):
        return Refused(500, _NO_INTERNALS)
    if isinstance(error, InvalidInput):
        return Refused(400, str(error), code="invalid_value")
    status = status_of(error).http
    code = "overloaded" if isinstance(error, Busy) else None
    return Refused(status, str(error), code=code, headers=_RETRY_LATER if status == 503 else None)


def add_error_bodies(app: FastAPI) -> None:
    """Have the whole app answer errors in this shape."""
    # For /openapi.json: routes added from now on document these bodies.
    app.router.responses = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}

    @app.exception_handler(Refused)
    @app.exception_handler(LesftError)
    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        # The web server logs those that nobody foresaw, with their traceback.
        return refusal(error).response()

    @app.exception_handler(RequestValidationError)
    async def wrong_body(request: Request, error: RequestValidationError) -> JSONResponse:
        return _wrong_body(error.errors()[0]).response()

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> JSONResponse:
        asked = f"{request.method} {request.url.path}"
        message = f"{asked}: {error.detail}; /openapi.json lists every path"
        return Refused(error.status_code, message, headers=error.headers).response()


def _wrong_body(detail: Mapping[str, Any]) -> Refused:
    """One rule that a body breaks. What was given is not repeated: it may be long."""
    kind = str(detail["type"])
    param = ".".join(str(part) for part in detail["loc"][1:])
    if kind == "json_invalid":
        reason = detail.get("ctx", {}).get("error", "")
        return Refused(400, f"the body of the request is not JSON: {reason}", code="invalid_json")
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not param:
        message = (
            f"the body of the request must be a JSON object, sent as application/json: {message}"
        )
        return Refused(400, message, code="invalid_type")
    default = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    return Refused(400, f"{param}: {message}", param, _CODES.get(kind, default))
