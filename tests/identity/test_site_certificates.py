"""A site that has an authority already brings its own certificates, to services and devices."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest

from lesft.errors import InvalidInput, NotAllowed, NotAuthenticated
from lesft.identity.authority import Authority
from lesft.identity.certificates import KeyPair
from lesft.identity.commands import enroll, revoke
from lesft_aggregator.command_settings import EnrollSettings, RevokeSettings
from lesft_client.connection_settings import ConnectionSettings
from lesft_client.connector import Connector
from tests.identity.harness import RunningAggregator, certified, secure_aggregator
from tests.identity.test_refusals import answer, join


@dataclass
class Site:
    """A site's own authority, and what it has given out, as files."""

    folder: Path
    authority: Authority

    def write(self, name: str, pair: KeyPair) -> tuple[Path, Path]:
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        certificate.write_bytes(pair.certificate_pem)
        key.write_bytes(pair.key_pem)
        return certificate, key

    def connection(self, client_id: str) -> ConnectionSettings:
        pair = certified(self.authority, client_id, timedelta(hours=1))
        certificate, key = self.write(client_id, pair)
        return ConnectionSettings(
            certificate=certificate, certificate_key=key, authority=self.authority_file
        )

    @property
    def authority_file(self) -> Path:
        file = self.folder / "site.pem"
        file.write_bytes(self.authority.certificate_pem)
        return file


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    return Site(folder, Authority(folder / "authority", "aggregator"))


@pytest.fixture(scope="module")
def service(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAggregator]:
    certificate, key = site.write("service", site.authority.server_pair(["127.0.0.1", "localhost"]))
    with secure_aggregator(
        tmp_path_factory.mktemp("aggregator"),
        clients=9,
        certificate=certificate,
        certificate_key=key,
        client_authority=site.authority_file,
    ) as running:
        yield running


def test_the_common_name_is_the_clients_id(site: Site, service: RunningAggregator) -> None:
    connector = Connector(service.grpc, site.connection("ward-3"), "aggregator")
    assert connector.client_id == "ward-3"
    assert join(connector.open(), "ward-3").clients == 9
    with pytest.raises(NotAllowed, match="the certificate says 'ward-3', the message 'ward-4'"):
        join(connector.open(), "ward-4")


def test_a_name_that_no_client_can_have_is_refused(site: Site, service: RunningAggregator) -> None:
    settings = site.connection("Ward 3")
    with pytest.raises(NotAuthenticated, match="common name is the client's id and must be"):
        join(Connector(service.grpc, settings, "aggregator").open(), "Ward 3")


def test_a_client_of_the_site_can_be_shut_out(site: Site, service: RunningAggregator) -> None:
    connector = Connector(service.grpc, site.connection("gone"), "aggregator")
    assert join(connector.open(), "gone").clients == 9
    revoke(RevokeSettings(client="gone", state=service.state))
    with pytest.raises(NotAllowed, match="client 'gone' was revoked"):
        join(connector.open(), "gone")
    revoke(RevokeSettings(client="gone", state=service.state, undo=True))
    assert join(connector.open(), "gone").clients == 9


def test_nobody_enrols_where_the_site_gives_certificates(service: RunningAggregator) -> None:
    with pytest.raises(InvalidInput, match="uses its site's own certificates"):
        enroll(EnrollSettings(client="a", state=service.state))


def test_the_control_api_shows_the_sites_certificate_too(
    site: Site, service: RunningAggregator
) -> None:
    authority = site.authority.certificate_pem
    bearer = {"Authorization": f"Bearer {service.token('me', 'viewer')}"}
    assert answer(service, "GET", "/v1/run", authority, **bearer) == (200, "")
    assert answer(service, "GET", "/v1/run", authority) == (401, "NotAuthenticated")


@pytest.mark.parametrize("wrong", ["certificate", "certificate_key", "client_authority"])
def test_files_that_do_not_fit_are_refused_at_the_start(
    site: Site, tmp_path: Path, wrong: str
) -> None:
    certificate, key = site.write("fine", site.authority.server_pair(["127.0.0.1"]))
    files = {
        "certificate": certificate,
        "certificate_key": key,
        "client_authority": site.authority_file,
    }
    files[wrong] = tmp_path / "not.pem"
    files[wrong].write_text("no PEM")
    with (
        pytest.raises(InvalidInput, match="must be PEM files"),
        secure_aggregator(tmp_path / "state", **files),
    ):
        pass
