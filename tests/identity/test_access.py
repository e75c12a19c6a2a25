"""What stands before a control API, token or not: whose page asks, and how much it sends."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from lesft.identity.access import MAX_BODY_BYTES, AccessControl
from lesft.identity.registry import AccessToken


def app() -> FastAPI:
    made = FastAPI()

    @made.get("/v1/run")
    async def run() -> str:
        return "the run"

    @made.post("/v1/stop")
    async def stop(request: Request) -> int:
        return len(await request.body())

    return made


def ask(
    method: str,
    path: str,
    host: str = "127.0.0.1:8051",
    find_token: Callable[[str], AccessToken | None] | None = None,
    loopback: bool = True,
    content: Any = None,
    **headers: str,
) -> httpx.Response:
    async def answer() -> httpx.Response:
        transport = httpx.ASGITransport(AccessControl(app(), find_token, loopback))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            return await client.request(method, path, headers=headers, content=content)

    return asyncio.run(answer())


@pytest.mark.parametrize("host", ["127.0.0.1:8051", "localhost:8051", "[::1]:8051", "localhost"])
def test_this_machine_is_asked_for_nothing(host: str) -> None:
    assert ask("GET", "/v1/run", host).status_code == 200
    assert ask("POST", "/v1/stop", host, Origin=f"http://{host}").status_code == 200


@pytest.mark.parametrize("host", ["evil.example:8051", "127.evil.example", "localhost.evil:8051"])
def test_a_name_that_leads_here_by_a_strangers_wish_is_refused(host: str) -> None:
    """DNS rebinding: the reader's browser takes the page of evil.example for one of ours."""
    refused = ask("GET", "/v1/run", host)
    assert refused.status_code == 403
    assert refused.json()["message"].startswith("host: without tokens this API is asked for at")
    assert ask("GET", "/v1/run", host, loopback=False).status_code == 403  # as with --insecure
    assert ask("GET", "/v1/run", "10.0.0.1:8051", loopback=False).status_code == 200
    with_tokens = ask("GET", "/v1/run", host, lambda text: None, loopback=False)
    assert with_tokens.status_code == 401


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:9999"])
def test_a_page_from_elsewhere_gives_no_orders(origin: str) -> None:
    refused = ask("POST", "/v1/stop", Origin=origin)
    assert (refused.status_code, refused.json()["error"]) == (403, "NotAllowed")


def test_a_body_has_its_limit_with_a_length_and_without(caplog: pytest.LogCaptureFixture) -> None:
    assert ask("POST", "/v1/stop", content=b"x" * MAX_BODY_BYTES).text == str(MAX_BODY_BYTES)
    refused = ask("POST", "/v1/stop", content=b"x" * (MAX_BODY_BYTES + 1))
    assert (refused.status_code, refused.json()["error"]) == (413, "TooLarge")
    assert ask("POST", "/v1/stop", **{"Content-Length": "-1"}).status_code == 413


def test_an_order_is_logged_with_who_gave_it_and_no_token(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "lesft.identity.access")
    operator = AccessToken("anna", "operator", 2e9)

    def find(text: str) -> AccessToken | None:
        return operator if text == "secret" else None

    assert ask("POST", "/v1/stop", find_token=find, Authorization="Bearer secret").text == "0"
    assert ask("POST", "/v1/stop", find_token=find, Authorization="bearer secret").text == "0"
    for wrong in ("Bearer other", "Basic secret", "secret", ""):
        refused = ask("POST", "/v1/stop", find_token=find, Authorization=wrong)
        assert refused.status_code == 401
        assert refused.headers["WWW-Authenticate"] == "Bearer"
    assert [record.message for record in caplog.records] == ["POST /v1/stop, by anna"] * 2
