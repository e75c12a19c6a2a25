"""The teacher: a model behind an OpenAI-compatible chat endpoint."""

from collections.abc import Callable
from typing import Any

import httpx

from lesft.errors import InvalidInput, one_line
from lesft_client.distillation.address import KEY_VARIABLE, TeacherAddress
from lesft_client.distillation.pace import Backoff, Pace, Patience
from lesft_client.distillation.replies import (
    Completion,
    TryAgain,
    is_refused_question,
    may_pass,
    quoted,
    read_completion,
    retry_after_seconds,
)

_MOST_MODELS_NAMED = 10


def open_http(
    address: TeacherAddress, key: str, timeout_seconds: float, concurrency: int
) -> httpx.AsyncClient:
    """Connections to the teacher; a request on which nothing moves for the timeout fails."""
    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        auth=None if key else address.user,
        params=address.query,
        timeout=timeout_seconds,
        limits=httpx.Limits(max_connections=concurrency),
    )


class Teacher:
    """Answers questions; failures that may pass are kept from the asker."""

    def __init__(
        self,
        address: TeacherAddress,
        key: str,
        model: str,
        max_tokens: int,
        http: httpx.AsyncClient,
        pace: Pace,
        patience: Patience,
        backoff: Backoff,
        on_wait: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`on_wait` hears why a request is sent again."""
        self._address = address
        self._key = key
        self._model = model
        self._max_tokens = max_tokens
        self._http = http
        self._pace = pace
        self._patience = patience
        self._backoff = backoff
        self._on_wait = on_wait
        self.requests = 0

    async def ask(self, prompt: str, temperature: float, seed: int) -> Completion:
        """The answer to a user's message.

        Tries again after lost connections, timeouts and the statuses 408, 425, 429 and 5xx, as
        often as patience lasts and not before the teacher's Retry-After. Raises Unreachable when it
        has run out, and InvalidInput for every other status, which no repeating would change.
        """
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature,
            "seed": seed,
            "max_tokens": self._max_tokens,
        }
        failures = 0
        while True:
            await self._pace.turn()
            self.requests += 1
            try:
                completion = await self._post(body, prompt)
            except TryAgain as failure:
                failures += 1
                await self._wait(failure, failures)
            else:
                self._patience.succeeded()
                return completion

    async def _wait(self, failure: TryAgain, failures: int) -> None:
        reason = f"the teacher {self._address.shown} {failure}"
        self._on_wait(reason)
        if failure.after_seconds is not None:
            self._pace.hold(failure.after_seconds)
        pause = max(self._backoff.pause(failures), failure.after_seconds or 0.0)
        await self._patience.pause(pause, reason)

    async def _post(self, body: dict[str, Any], prompt: str) -> Completion:
        try:
            response = await self._http.post(f"{self._address.shown}/chat/completions", json=body)
        except httpx.TimeoutException:
            raise TryAgain("sends nothing within --timeout-seconds") from None
        except httpx.ConnectError as error:
            raise TryAgain(f"cannot be connected to ({one_line(str(error))})") from None
        except httpx.RequestError as error:
            raise TryAgain(f"broke the connection ({type(error).__name__})") from None
        if response.status_code == 200:
            return read_completion(response)
        said = quoted(response, [self._key, prompt])
        status = f"answers with status {response.status_code}{f' ({said})' if said else ''}"
        if may_pass(response.status_code):
            raise TryAgain(status, retry_after_seconds(response))
        if is_refused_question(response):
            return Completion("", None, refused=True)
        raise InvalidInput(
            f"the teacher {self._address.shown} {status}: {await self._way_out(response)}"
        )

    async def _way_out(self, response: httpx.Response) -> str:
        status = response.status_code
        if status in (401, 403):
            given = "the key that was given does not open it" if self._key else "it wants a key"
            return f"{given}; set {KEY_VARIABLE} or --teacher-key-file"
        if status == 404:
            return await self._models()
        if 300 <= status < 400:
            return "it has moved; give --teacher its new address"
        return "the request will not be taken; see its message and its documentation"

    async def _models(self) -> str:
        """Whether the address or the model's name is wrong, as far as the teacher's list tells."""
        try:
            response = await self._http.get(f"{self._address.shown}/models")
            names = [str(model["id"]) for model in response.json()["data"]]
        except (httpx.RequestError, ValueError, KeyError, TypeError):
            return (
                f"either there is no model {self._model!r}, or --teacher is not the whole address "
                "(most end in /v1)"
            )
        if self._model in names:
            return "the model is on its list, so --teacher is not the right address for it"
        listed = one_line(", ".join(names[:_MOST_MODELS_NAMED])) or "no model"
        more = f" and {len(names) - _MOST_MODELS_NAMED} more" * (len(names) > _MOST_MODELS_NAMED)
        return f"--teacher-model {self._model!r} is not there; it offers {listed}{more}"
