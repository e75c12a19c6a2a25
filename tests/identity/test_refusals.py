"""Who is not let in, and how that is said: one test for each way of being nobody here."""

import contextlib
import http.client
import json
import re
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from lesft.errors import InvalidInput, NotAllowed, NotAuthenticated
from lesft.identity import https
from lesft.identity.authority import SERVER_LIFETIME, Authority
from lesft.identity.certificates import KeyPair
from lesft.identity.commands import token
from lesft.interceptors import error_from, remote_errors
from lesft.spec import PROTOCOL_VERSION
from lesft.v1 import aggregation_pb2 as pb
from lesft.v1.aggregation_pb2_grpc import AggregationServiceStub
from lesft_aggregator.command_settings import TokenSettings
from lesft_client.connection_settings import ConnectionSettings
from lesft_client.connector import Connector
from lesft_client.enrol import enrol_with
from lesft_client.identities import Facts, Identities
from tests.identity.harness import RunningAggregator, certified, raw_channel, secure_aggregator


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAggregator]:
    with secure_aggregator(tmp_path_factory.mktemp("aggregator"), clients=40) as running:
        yield running


def join(channel: grpc.Channel, client_id: str = "a") -> pb.JoinResponse:
    request = pb.JoinRequest(
        protocol_version=PROTOCOL_VERSION, client_id=client_id, run_id="lesft", num_samples=10
    )
    with channel, remote_errors("aggregator"):
        return AggregationServiceStub(channel).Join(request, timeout=20)


def status_of_join(channel: grpc.Channel) -> grpc.StatusCode:
    """What a client that is not ours gets."""
    with channel, pytest.raises(grpc.RpcError) as caught:
        AggregationServiceStub(channel).Join(pb.JoinRequest(), timeout=20)
    code: grpc.StatusCode = caught.value.code()
    return code


def with_identity(service: RunningAggregator, folder: Path, pair: KeyPair) -> Connector:
    """A device whose folder holds what some authority gave it for this service."""
    facts = Facts("aggregator", service.grpc, "lesft-aggregator", "a")
    Identities(folder).add(facts, service.authority.certificate_pem, pair)
    return Connector(service.grpc, ConnectionSettings(identity=folder), "aggregator")


# ---------------------------------------------------------------------- connections


def test_a_device_that_has_enrolled_is_let_in_under_its_name(
    service: RunningAggregator, tmp_path: Path
) -> None:
    connector = service.enrol(tmp_path, "ward-3")
    assert connector.client_id == "ward-3"
    assert join(connector.open(), "ward-3").clients == 40


def test_without_a_certificate_the_handshake_fails(service: RunningAggregator) -> None:
    channel = raw_channel(service.grpc, service.authority.certificate_pem, None)
    assert status_of_join(channel) is grpc.StatusCode.UNAVAILABLE


def test_a_device_that_has_not_enrolled_is_told_how_to(
    service: RunningAggregator, tmp_path: Path
) -> None:
    with pytest.raises(NotAuthenticated, match="lets in only devices that have enrolled"):
        Connector(service.grpc, ConnectionSettings(identity=tmp_path), "aggregator").open()


def test_a_certificate_of_another_authority_is_refused(
    service: RunningAggregator, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "stranger", "aggregator")
    pair = certified(stranger, "a", timedelta(hours=1))
    channel = raw_channel(service.grpc, service.authority.certificate_pem, pair)
    assert status_of_join(channel) is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(NotAuthenticated, match="does not accept this device's certificate"):
        with_identity(service, tmp_path / "identity", pair).open()


def test_the_services_own_certificate_lets_nobody_in(service: RunningAggregator) -> None:
    pair = service.authority.server_pair(["localhost"])
    channel = raw_channel(service.grpc, service.authority.certificate_pem, pair)
    assert status_of_join(channel) is grpc.StatusCode.UNAVAILABLE


def test_a_certificate_that_was_never_handed_out_is_refused(
    service: RunningAggregator, tmp_path: Path
) -> None:
    pair = certified(service.authority, "a", timedelta(hours=1))
    with pytest.raises(NotAllowed, match="this certificate of client 'a' is not known here"):
        join(with_identity(service, tmp_path, pair).open())


def test_an_expired_certificate_is_refused(service: RunningAggregator, tmp_path: Path) -> None:
    pair = certified(service.authority, "a", -timedelta(seconds=1))
    channel = raw_channel(service.grpc, service.authority.certificate_pem, pair)
    assert status_of_join(channel) is grpc.StatusCode.UNAVAILABLE
    with pytest.raises(InvalidInput, match=r"ended on .* ask the operator for a new enrolment"):
        with_identity(service, tmp_path, pair).open()


def test_a_service_of_another_authority_is_not_trusted(
    service: RunningAggregator, tmp_path: Path
) -> None:
    pair = certified(service.authority, "a", timedelta(hours=1))
    connector = with_identity(service, tmp_path / "identity", pair)
    another = Authority(tmp_path / "another", "aggregator")
    facts = Facts("aggregator", service.grpc, "lesft-aggregator", "a")
    Identities(tmp_path / "identity").add(facts, another.certificate_pem, pair)
    connector = Connector(
        service.grpc, ConnectionSettings(identity=tmp_path / "identity"), "aggregator"
    )
    with pytest.raises(NotAuthenticated, match="is not the service that this device has enrolled"):
        connector.open()


def test_a_client_does_not_get_in_as_the_service(service: RunningAggregator) -> None:
    """A client's certificate cannot be used to pretend to be the service: it is for clients."""
    pair = certified(service.authority, "lesft-aggregator", timedelta(hours=1))
    context = ssl.create_default_context(cadata=service.authority.certificate_pem.decode())
    listening = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours, theirs = ssl.MemoryBIO(), ssl.MemoryBIO()
    file = service.state / "pretender.pem"
    file.write_bytes(pair.key_pem + pair.certificate_pem)
    listening.load_cert_chain(file)
    client = context.wrap_bio(theirs, ours, server_hostname="lesft-aggregator")
    server = listening.wrap_bio(ours, theirs, server_side=True)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(client, server)


def shake_hands(*ends: ssl.SSLObject) -> None:
    """As far as both get in memory."""
    for end in ends * 4:
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()


def test_plain_text_on_an_encrypted_port_gets_nowhere(service: RunningAggregator) -> None:
    assert status_of_join(grpc.insecure_channel(service.grpc)) is grpc.StatusCode.UNAVAILABLE
    host, _, port = service.control.rpartition(":")
    plain = http.client.HTTPConnection(host, int(port), timeout=5)
    plain.request("GET", "/healthz")
    with pytest.raises((http.client.HTTPException, OSError)):
        plain.getresponse()
    plain.close()


# ---------------------------------------------------------------------- names


def as_alice(stub: AggregationServiceStub, call: str) -> object:
    """A call in alice's name."""
    if call == "Join":
        return stub.Join(pb.JoinRequest(client_id="alice", protocol_version=PROTOCOL_VERSION))
    if call == "Fetch":
        return list(stub.Fetch(pb.FetchRequest(client_id="alice", run_id="lesft", version=1)))
    header = pb.Submission(client_id="alice", run_id="lesft", num_samples=1)
    return stub.Submit(iter([pb.SubmitRequest(submission=header)]))


@pytest.mark.parametrize("call", ["Join", "Submit", "Fetch"])
def test_a_client_acts_for_itself_only(
    service: RunningAggregator, tmp_path: Path, call: str
) -> None:
    channel = service.enrol(tmp_path, "mallory").open()
    with channel, pytest.raises(grpc.RpcError) as caught:
        as_alice(AggregationServiceStub(channel), call)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert str(error_from(caught.value, "aggregator")) == (
        "aggregator: client_id: the certificate says 'mallory', the message 'alice'; a client acts "
        "for itself only"
    )


# ---------------------------------------------------------------------- revocation


def test_a_revoked_client_is_refused_until_it_enrols_again(
    service: RunningAggregator, tmp_path: Path
) -> None:
    connector = service.enrol(tmp_path, "lost-laptop")
    assert join(connector.open(), "lost-laptop").clients == 40
    service.revoke("lost-laptop")
    with pytest.raises(NotAllowed, match="client 'lost-laptop' was revoked"):
        join(connector.open(), "lost-laptop")
    before = service.identity(tmp_path)
    pair = KeyPair(
        before.pair_file.read_bytes().partition(b"-----BEGIN CERT")[0],
        b"-----BEGIN CERT" + before.pair_file.read_bytes().partition(b"-----BEGIN CERT")[2],
    )
    assert join(service.enrol(tmp_path, "lost-laptop").open(), "lost-laptop").clients == 40
    # What the finder of the laptop has is still worth nothing.
    found = with_identity(service, tmp_path / "found", pair)
    with pytest.raises(NotAllowed, match="this certificate of client 'lost-laptop' was revoked"):
        join(found.open(), "lost-laptop")


def test_a_revocation_ends_a_call_under_way_within_seconds(
    service: RunningAggregator, tmp_path: Path
) -> None:
    connector = service.enrol(tmp_path, "in-mid-call")
    channel = connector.open()
    join(connector.open(), "in-mid-call")
    request = pb.FetchRequest(client_id="in-mid-call", run_id="lesft", version=1)
    ended: list[tuple[float, grpc.StatusCode, str]] = []
    heard = threading.Event()

    def wait_for_a_version_that_never_comes() -> None:
        try:
            for _ in AggregationServiceStub(channel).Fetch(request, timeout=30):
                heard.set()
        except grpc.RpcError as error:
            ended.append((time.monotonic(), error.code(), str(error.details())))

    waiting = threading.Thread(target=wait_for_a_version_that_never_comes)
    waiting.start()
    assert heard.wait(10)
    revoked = time.monotonic()
    service.revoke("in-mid-call")
    waiting.join(20)
    channel.close()
    [(when, code, message)] = ended
    assert code is grpc.StatusCode.PERMISSION_DENIED
    assert message == "client 'in-mid-call' was revoked: ask the operator for a new enrolment token"
    assert when - revoked < 3


# ---------------------------------------------------------------------- enrolment tokens


def test_an_enrolment_token_works_once(service: RunningAggregator, tmp_path: Path) -> None:
    ticket = service.invite("once")
    enrol_with(ticket, tmp_path / "first")
    with pytest.raises(NotAuthenticated, match="of client 'once' was used before: if that was not"):
        enrol_with(ticket, tmp_path / "second")
    assert Identities(tmp_path / "second").known() == []


def test_an_expired_enrolment_token_is_refused(service: RunningAggregator, tmp_path: Path) -> None:
    ticket = service.invite("late", hours=1e-9)
    time.sleep(0.01)
    with pytest.raises(NotAuthenticated, match="of client 'late' has expired"):
        enrol_with(ticket, tmp_path)


def test_a_token_of_a_revoked_client_is_gone(service: RunningAggregator, tmp_path: Path) -> None:
    ticket = service.invite("uninvited")
    service.revoke("uninvited")
    with pytest.raises(NotAuthenticated, match="not known here"):
        enrol_with(ticket, tmp_path)


def test_the_secret_is_not_sent_to_a_service_of_another_authority(
    service: RunningAggregator, tmp_path: Path
) -> None:
    ticket = service.invite("victim")
    with secure_aggregator(tmp_path / "pretender") as pretender:
        lured = type(ticket)(
            ticket.service,
            pretender.control,
            ticket.authority_sha256,
            ticket.secret,
            pretender.grpc,
            ticket.client_id,
        )
        with pytest.raises(NotAuthenticated, match="is not the service that the token is of"):
            enrol_with(lured, tmp_path / "identity")
    enrol_with(ticket, tmp_path / "identity")  # nobody has used it


def test_what_comes_along_with_the_right_authority_is_not_trusted(
    service: RunningAggregator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Someone on the way answers with the service's own certificate and one more."""
    ticket = service.invite("victim")
    real, exchange = service.authority.certificate_pem, https._exchange

    with secure_aggregator(tmp_path / "pretender") as pretender:

        def on_the_way(address: str, *args: Any) -> tuple[int, bytes]:
            if args[3] == "/v1/authority":
                return 200, real + pretender.authority.certificate_pem
            return exchange(pretender.control, *args)

        with monkeypatch.context() as patch:
            patch.setattr(https, "_exchange", on_the_way)
            with pytest.raises(NotAuthenticated, match="its certificate is not of the authority"):
                enrol_with(ticket, tmp_path / "identity")
    enrol_with(ticket, tmp_path / "identity")
    identity = Identities(tmp_path / "identity").find(ticket.address)
    assert identity is not None
    assert identity.authority_pem == real
    (file,) = (tmp_path / "identity").rglob("authority.pem")
    file.write_bytes(real + pretender.authority.certificate_pem)  # of before this was mended
    again = Identities(tmp_path / "identity").find(ticket.address)
    assert again is not None
    assert again.authority_pem == real


# ---------------------------------------------------------------------- the control API

GUARDED = ["/v1/run", "/v1/clients", "/v1/rounds", "/v1/adapters/1", "/metrics", "/v1/events"]


def answer(
    service: RunningAggregator,
    method: str,
    path: str,
    authority_pem: bytes = b"",
    **headers: str,
) -> tuple[int, str]:
    """Status and the error's name; `authority_pem` where it is not the service's own."""
    port = service.control.rpartition(":")[2]
    trusted = authority_pem or service.authority.certificate_pem
    context = ssl.create_default_context(cadata=trusted.decode())
    connection = http.client.HTTPSConnection("localhost", int(port), context=context, timeout=5)
    try:
        connection.request(method, path, headers={"Host": service.control, **headers})
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    try:
        return response.status, json.loads(body).get("error", "")
    except (ValueError, AttributeError):
        return response.status, ""


@pytest.mark.parametrize("path", GUARDED)
def test_without_a_token_the_control_api_says_nothing(
    service: RunningAggregator, path: str
) -> None:
    assert answer(service, "GET", path) == (401, "NotAuthenticated")
    stranger = {"Authorization": "Bearer lesft-access-AAAA"}
    assert answer(service, "GET", path, **stranger) == (401, "NotAuthenticated")


def test_a_viewer_may_look_and_give_no_orders(service: RunningAggregator) -> None:
    bearer = {"Authorization": f"Bearer {service.token('viewer', 'viewer')}"}
    assert answer(service, "GET", "/v1/run", **bearer) == (200, "")
    for method in ("POST", "DELETE", "PUT", "PATCH"):
        assert answer(service, method, "/v1/run", **bearer) == (403, "NotAllowed")


def test_an_operator_gets_past_the_door(service: RunningAggregator) -> None:
    bearer = {"Authorization": f"Bearer {service.token('operator', 'operator')}"}
    assert answer(service, "POST", "/v1/run", **bearer)[0] == 405  # no such order here


def test_a_viewer_sees_when_the_certificate_ends(service: RunningAggregator) -> None:
    metrics = service.rest(service.token("prometheus", "viewer")).file("/metrics").decode()
    [line] = re.findall(r"^lesft_aggregator_certificate_expiry_seconds (.+)$", metrics, re.M)
    assert float(line) - time.time() == pytest.approx(SERVER_LIFETIME.total_seconds(), abs=600)


def test_a_revoked_access_token_is_refused_at_once(service: RunningAggregator) -> None:
    bearer = {"Authorization": f"Bearer {service.token('gone', 'viewer')}"}
    assert answer(service, "GET", "/v1/run", **bearer)[0] == 200
    token(TokenSettings(name="gone", state=service.state, revoke=True))
    assert answer(service, "GET", "/v1/run", **bearer) == (401, "NotAuthenticated")


def test_an_enrolment_token_opens_no_control_api(service: RunningAggregator) -> None:
    bearer = {"Authorization": f"Bearer {service.invite('curious').text()}"}
    assert answer(service, "GET", "/v1/run", **bearer) == (401, "NotAuthenticated")


def test_a_page_from_elsewhere_may_not_use_a_readers_browser(service: RunningAggregator) -> None:
    bearer = {"Authorization": f"Bearer {service.token('browser', 'viewer')}"}
    origin = {"Origin": "https://evil.example"}
    assert answer(service, "GET", "/v1/run", **bearer, **origin) == (403, "NotAllowed")
    own = {"Origin": f"https://{service.control}"}
    assert answer(service, "GET", "/v1/run", **bearer, **own) == (200, "")


def test_who_has_no_token_learns_only_whether_a_service_is_ready(
    service: RunningAggregator, monkeypatch: pytest.MonkeyPatch
) -> None:
    bearer = "".join(service.token("anna", "viewer").split())
    assert service.rest().obstacle() == ""
    monkeypatch.setattr(service.aggregator.rounds, "obstacle", "no room on disk for /var/lib/lesft")
    assert service.rest().obstacle() == "not ready; with an access token this says why"
    assert service.rest("lesft-access-AAAA").obstacle().startswith("not ready;")
    assert service.rest(bearer).obstacle() == "no room on disk for /var/lib/lesft"
