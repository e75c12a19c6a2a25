"""Certificates that end, and clients that are shut out, while a run goes on."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from lesft.errors import NotAllowed
from lesft.identity.attestation import Attester
from lesft.identity.authority import Authority
from lesft.identity.commands import enroll, revoke, token
from lesft.identity.https import ControlClient
from lesft.identity.ticket import ENROLMENT_PREFIX, read_ticket
from lesft_client.enrol import enrol_with
from lesft_client.train import TrainCommand
from lesft_server import command_settings as of_server
from tests.client.harness import running_aggregator, train_settings
from tests.harness import RunningServer, running_server, server_settings
from tests.identity.harness import RunningAggregator, secure_aggregator
from tests.processes.harness import make_samples, save_model_with_tokenizer, write_samples

ROUNDS = 60
HALVES = ("server/adapter.safetensors", "client/state/adapter.safetensors")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_samples(folder / "data.jsonl", make_samples(12))
    return save_model_with_tokenizer(folder)


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Both halves of the adapter after a run without encryption."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = server_settings(model, folder / "server", rounds=ROUNDS, aggregation_interval=10)
    with (
        running_server(settings) as server,
        running_aggregator(folder / "aggregator") as aggregator,
    ):
        TrainCommand(
            train_settings(
                server,
                aggregator,
                folder / "client",
                model=str(model),
                data=str(model / "data.jsonl"),
                identity=folder / "identity",
            )
        ).run()
    return {name: (folder / name).read_bytes() for name in HALVES}


@dataclass
class Organisations:
    """A server and an aggregator that know nothing of each other but the server's public key."""

    folder: Path
    model: Path
    server: RunningServer
    aggregator: RunningAggregator

    def enrol_with_server(self) -> None:
        text = enroll(of_server.EnrollSettings(client="client-0", state=self.folder / "server"))
        assert text is not None
        ticket = read_ticket(text, ENROLMENT_PREFIX, "the enrolment token")
        enrol_with(ticket, self.folder / "identity")

    def command(self) -> TrainCommand:
        return TrainCommand(
            train_settings(
                self.server,
                self.aggregator.grpc,
                self.folder / "client",
                model=str(self.model),
                data=str(self.model / "data.jsonl"),
                identity=self.folder / "identity",
                client_id="",
            )
        )

    def order(self, path: str) -> None:
        """As an operator, over the server's control API."""
        name = f"operator{time.monotonic_ns()}"
        text = token(
            of_server.TokenSettings(name=name, role="operator", state=self.folder / "server")
        )
        authority = Authority(self.folder / "server" / "identity", "server").certificate_pem
        ControlClient(self.server.control, authority, "lesft-server", text or "").post(path, None)

    def halves(self) -> dict[str, bytes]:
        return {name: (self.folder / name).read_bytes() for name in HALVES}


@contextmanager
def organisations(
    model: Path, folder: Path, certificate_seconds: float = 3600
) -> Iterator[Organisations]:
    hours = certificate_seconds / 3600
    settings = server_settings(
        model,
        folder / "server",
        rounds=ROUNDS,
        aggregation_interval=10,
        tls="on",
        certificate_hours=hours,
    )
    server_key = Attester(folder / "server" / "identity").public_key
    with (
        running_server(settings) as server,
        secure_aggregator(
            folder / "aggregator", clients=1, certificate_hours=hours, server_key=server_key
        ) as aggregator,
    ):
        both = Organisations(folder, model, server, aggregator)
        both.enrol_with_server()
        enrol_with(aggregator.invite("client-0"), folder / "identity")
        yield both


def test_certificates_renew_in_mid_run_and_the_adapters_are_those_of_an_undisturbed_run(
    model: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with organisations(model, tmp_path, certificate_seconds=4) as both:
        command = both.command()
        with ThreadPoolExecutor(1) as pool:
            training = pool.submit(command.run)
            wait_for_round(both.server, training, 5)
            both.order("/v1/pause")
            time.sleep(9)  # two certificates end meanwhile
            both.order("/v1/resume")
            training.result(60)
        assert command._status.reconnects >= 1
        renewed = [r.getMessage() for r in caplog.records if "was renewed" in r.getMessage()]
        for address in (both.server.grpc, both.aggregator.grpc):
            assert sum(address in line for line in renewed) >= 3, address
        assert both.halves() == undisturbed


def test_a_client_that_is_revoked_in_mid_run_stops_and_goes_on_once_it_has_enrolled_again(
    model: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    with organisations(model, tmp_path) as both:
        with ThreadPoolExecutor(1) as pool:
            training = pool.submit(both.command().run)
            wait_for_round(both.server, training, 5)
            both.order("/v1/pause")
            revoked = time.monotonic()
            revoke(of_server.RevokeSettings(client="client-0", state=tmp_path / "server"))
            with pytest.raises(NotAllowed, match="client 'client-0' was revoked"):
                training.result(30)
            assert time.monotonic() - revoked < 5
        member = both.server.engine.run.members["client-0"]
        assert not member.connected
        assert "client 'client-0' was revoked" in member.away_because
        with pytest.raises(NotAllowed, match="client 'client-0' was revoked"):
            both.command().run()
        both.enrol_with_server()
        both.order("/v1/resume")
        both.command().run()
        assert both.halves() == undisturbed


def wait_for_round(server: RunningServer, training: "Future[None]", count: int) -> None:
    deadline = time.monotonic() + 60
    while len(server.engine.run.rounds) < count:
        assert time.monotonic() < deadline
        if training.done():
            training.result()
        time.sleep(0.01)
