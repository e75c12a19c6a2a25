"""The page in a real browser: what people see, hear and can do with it."""

import json
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from lesft.identity.access import AccessControl
from lesft.identity.registry import AccessToken
from lesft.live import stream
from tests.live import chromium
from tests.live.chromium import Tab
from tests.live.harness import Service, serving

pytestmark = pytest.mark.skipif(chromium.CHROMIUM is None, reason=chromium.WHY_NOT)

MINUS, NOTHING = "\N{MINUS SIGN}", "\N{EN DASH}"

ATTACK = '<img src=x onerror="window.hurt=1;alert(1)"><script>window.hurt=1</script>'


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with chromium.browser(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def tab(shared: Tab) -> Iterator[Tab]:
    shared.emulate(1200, 800)
    shared.problems.clear()
    yield shared
    shared.open("about:blank")


def a_run(**changes: Any) -> dict[str, Any]:
    return {
        "state": "training",
        "reason": "",
        "waiting_for": "",
        "paused": False,
        "rounds_done": 12,
        "seconds_left": 125.0,
        "steps_applied": 48,
        "spec_fingerprint": "sha256:0123456789abcdef",
        "spec": {
            "run_id": "lesft",
            "clients": 2,
            "rounds": 120,
            "model_name": "tiny",
            "cut_layer": 1,
            "aggregate": True,
            "aggregation_interval": 3,
        },
        **changes,
    }


def a_client(**changes: Any) -> dict[str, Any]:
    return {
        "client_id": "client-0",
        "num_samples": 10,
        "share": 0.5,
        "connected": True,
        "next_round": 12,
        "next_micro": 0,
        "last_seen": time.time(),
        "resumed": 0,
        "away_because": "",
        "bytes_received": 1_234_567,
        "bytes_sent": 999,
        **changes,
    }


def a_service(**run: Any) -> Service:
    service = Service(run=a_run(**run), clients=[a_client()])
    service.curve = {
        "rounds": [1, 2, 4],
        "loss": [2.0, 1.5, 1.0],
        "nll": [1.0, None, 0.25],
        "total": 4,
    }
    return service


def seen(tab: Tab) -> str:
    """What the page says, on one line."""
    return " ".join(str(tab.evaluate("document.body.innerText")).split())


def test_the_page_shows_the_run_and_keeps_up_with_it(tab: Tab) -> None:
    with serving(a_service()) as service:
        tab.open(service.url)
        tab.wait_for("document.title === 'round 12/120 · LESFT <test>'")
        text = seen(tab)
        assert "Training, round 12/120" in text
        assert (
            f"Rounds done 12 of 120 Time left 2 min Loss 1.0000 {MINUS}log P per token 0.2500"
            in text
        )
        assert "client-0 connected 50.0% 10 13, 1 now 1.2 MB 999 B" in text
        assert "3 of 4 rounds are shown." in text
        service.run = a_run(rounds_done=13, waiting_for="client 'client-0' to come back")
        service.clients = [a_client(connected=False, away_because="its battery", resumed=2)]
        tab.wait_for("document.title === 'round 13/120 · LESFT <test>'", 3)
        assert "Waits for client 'client-0' to come back" in seen(tab)
        assert "away: its battery" in seen(tab)
    assert tab.problems == []


def test_what_strangers_send_is_text_and_never_markup(tab: Tab) -> None:
    service = a_service(waiting_for=f"client {ATTACK}", reason=ATTACK)
    service.clients = [a_client(client_id=ATTACK, connected=False, away_because=ATTACK)]
    with serving(service):
        service.page.events.note(ATTACK)
        tab.open(service.url)
        tab.wait_for("document.title.startsWith('round 12/120')")
        assert seen(tab).count(ATTACK) == 5  # head and what is spoken of it, id, reason, event
        assert tab.evaluate("document.querySelectorAll('main img, main script').length") == 0
        assert tab.evaluate("window.hurt === undefined")
    assert tab.problems == []


def test_a_lost_connection_is_said_and_heals_by_itself(tab: Tab) -> None:
    with serving(a_service()) as service:
        tab.open(service.url)
        tab.wait_for("document.title.startsWith('round 12/120')")
        port = int(service.address.rpartition(":")[2])
    tab.wait_for("document.title.startsWith('connection lost')", 5)
    tab.wait_for("document.getElementById('age').innerText.startsWith('Figures from')")
    status = "document.getElementById('connection')"
    assert tab.evaluate(f"{status}.role") == "status"
    assert tab.evaluate(f"{status}.getAttribute('aria-live')") == "polite"
    assert str(tab.evaluate(f"{status}.textContent")).startswith("Connection lost: the service")
    assert "Rounds done 12 of 120" in seen(tab)
    assert tab.evaluate("getComputedStyle(document.querySelector('main')).filter") != "none"
    with serving(a_service(rounds_done=14), port=port):
        tab.wait_for("document.title.startsWith('round 14/120')", 10)
        assert tab.evaluate(f"{status}.textContent") == "Live"
        assert tab.evaluate("getComputedStyle(document.querySelector('main')).filter") == "none"


def test_the_page_goes_from_one_stream_to_the_next_unnoticed(
    tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "STREAM_SECONDS", 1.1)
    with serving(a_service()) as service:
        tab.open(service.url)
        tab.wait_for("document.title.startsWith('round 12/120')")
        tab.evaluate(
            "window.titles = []; new MutationObserver(() => window.titles.push(document.title))"
            ".observe(document.querySelector('title'), {childList: true})"
        )
        time.sleep(1.3)
        service.run = a_run(rounds_done=15)
        tab.wait_for("document.title.startsWith('round 15/120')", 3)
        assert "lost" not in str(tab.evaluate("window.titles.join()"))
    assert tab.problems == []


def guarded(app: ASGIApp) -> ASGIApp:
    """Asks for a token, as services with TLS do; there is one whose role is not enough."""

    def find(token: str) -> AccessToken | None:
        return AccessToken("owner", "viewer", math.inf) if token == "good" else None

    access = AccessControl(app, find, loopback=True)

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if dict(scope["headers"]).get(b"authorization") == b"Bearer weak":
            body = {"error": "NotAllowed", "message": "the role 'metrics' may not read events"}
            await JSONResponse(body, 403)(scope, receive, send)
        else:
            await access(scope, receive, send)

    return guard


def test_a_service_that_asks_for_a_token_gets_it_from_a_field(tab: Tab) -> None:
    def enter(token: str) -> None:
        tab.evaluate(f"document.getElementById('token').value = {json.dumps(token)}")
        tab.evaluate("document.querySelector('#access button').click()")

    service = a_service()
    with serving(service, guarded(service.app())):
        tab.open(service.url)
        tab.wait_for("!!document.querySelector('#access:not([hidden])')")
        assert (
            tab.evaluate("document.getElementById('token').labels[0].innerText") == "Access token"
        )
        assert tab.evaluate("document.getElementById('token').type") == "password"
        assert tab.evaluate("document.activeElement.id") == "token"
        assert "The service asks for an access token" in seen(tab)
        assert service.snapshots == 0
        enter("wrong")
        tab.wait_for("document.body.innerText.includes('does not know this token')")
        enter("weak")
        tab.wait_for("document.body.innerText.includes('The role of this token is not enough')")
        assert "the role 'metrics' may not read events" in seen(tab)
        tab.evaluate("sessionStorage.setItem('lesft.token', 'wrong')")
        tab.reload()
        tab.wait_for("document.body.innerText.includes('does not know this token')")
        enter("good")
        tab.wait_for("document.title.startsWith('round 12/120')")
        assert tab.evaluate("document.querySelector('#access').hidden")
        assert tab.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [
            1,
            0,
            "",
        ]
        tab.reload()
        tab.wait_for("document.title.startsWith('round 12/120')")
        tab.evaluate("document.getElementById('forget').click()")
        tab.wait_for("document.title.startsWith('no access')")
        assert tab.evaluate("sessionStorage.length") == 0
        assert "Rounds done" not in seen(tab)


def test_the_curve_can_be_read_by_keyboard_and_as_a_table(tab: Tab) -> None:
    plot = "document.querySelector('[role=slider]')"

    def press(key: str) -> Any:
        for kind in ("keyDown", "keyUp"):
            tab.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)
        return tab.evaluate(f"{plot}.getAttribute('aria-valuetext')")

    with serving(a_service()) as service:
        tab.open(service.url)
        tab.wait_for(f"{plot}?.hasAttribute('aria-valuetext')")
        tab.evaluate(f"{plot}.focus()")
        assert press("End") == f"Round 4: loss 1.0000, {MINUS}log P 0.2500"
        assert press("ArrowLeft") == f"Round 2: loss 1.5000, {MINUS}log P {NOTHING}"
        assert press("Home") == f"Round 1: loss 2.0000, {MINUS}log P 1.0000"
        assert press("ArrowLeft") == f"Round 1: loss 2.0000, {MINUS}log P 1.0000"
        assert tab.evaluate(f"{plot}.getAttribute('aria-valuemax')") == "4"
        assert tab.evaluate(f"{plot}.querySelectorAll('path').length") == 2
        tab.evaluate("document.querySelector('#curve summary').click()")
        tab.wait_for("document.querySelectorAll('#curve-table tbody tr').length === 3")
        rows = tab.evaluate(
            "[...document.querySelectorAll('#curve-table tbody tr')]"
            ".map((row) => [...row.cells].map((cell) => cell.innerText))"
        )
        assert rows == [
            ["4", "1.0000", "0.2500"],
            ["2", "1.5000", NOTHING],
            ["1", "2.0000", "1.0000"],
        ]
    assert tab.problems == []


def test_it_fits_a_phone_and_follows_the_taste_for_dark(tab: Tab) -> None:
    service = a_service()
    service.clients = [a_client(client_id="x" * 64, connected=False, away_because="y" * 300)]
    with serving(service):
        ground = "getComputedStyle(document.body).backgroundColor"
        for dark, colour in ((False, "rgb(251, 250, 248)"), (True, "rgb(20, 23, 26)")):
            tab.emulate(360, 740, dark)
            tab.open(service.url)
            tab.wait_for("document.title.startsWith('round 12/120')")
            assert tab.evaluate("document.documentElement.scrollWidth") == 360
            assert tab.evaluate(ground) == colour
        assert tab.evaluate("getComputedStyle(document.querySelector('#clients td')).display") == (
            "flex"
        )
        roles = "[...document.querySelectorAll('#clients [role]')].map((n) => n.role)"
        assert {"table", "row", "columnheader", "rowheader", "cell"} <= set(tab.evaluate(roles))
