"""docs/monitoring.md, the alert rules and the dashboard name what /metrics has, and no more."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
import yaml
from prometheus_client import generate_latest

from lesft.errors import Busy
from lesft.wire import WireCounter
from lesft_client.metrics import Metrics as ClientMetrics
from lesft_client.status import Status
from lesft_server.step_clock import Phase
from tests.aggregator.harness import Caller, make_adapter, run_aggregator, settings_for
from tests.harness import random_samples, running_server, server_settings
from tests.monitoring.scraped import Scraped, parse, scrape
from tests.server.harness import Crew

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "docker" / "monitoring"
CERTIFICATES = {
    f"lesft_{service}_certificate_expiry_seconds" for service in ("server", "aggregator", "client")
}
"""Only where connections are encrypted."""

Row = tuple[str, str, frozenset[str]]


def rows_of(scraped: Scraped) -> set[Row]:
    """Name, kind and labels of our own families."""
    rows = set()
    for family in scraped.families.values():
        if not family.name.startswith("lesft_") or family.name.endswith("_created"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert family.samples, f"{name} has no samples: what would its labels be?"
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        rows.add((name, family.type, frozenset(labels)))
    return rows


def server_rows(model: Path, state: Path) -> set[Row]:
    with running_server(server_settings(model, state, accumulation=2, threads=1)) as server:
        metrics = server.server._metrics
        metrics.limits.inc("calls per second")
        metrics.refused_calls.count("lesft.v1.TrainingService/Train", Busy("full"))
        refuse_a_request(server.control)
        with Crew(server, model, [random_samples(1)]) as crew:
            crew.train_round(0)
            return rows_of(scrape(server.control))


def refuse_a_request(address: str) -> None:
    assert httpx.get(f"http://{address}/v1/nothing").status_code == 404


def aggregator_rows(state: Path) -> set[Row]:
    found: set[Row] = set()

    async def scenario(aggregator: Any, caller: Caller, addresses: Any) -> None:
        aggregator._metrics.limits.inc("calls per second")
        aggregator._metrics.refused_calls.count("lesft.v1.AggregationService/Join", Busy("full"))
        await asyncio.to_thread(refuse_a_request, addresses["control"])
        await caller.submit("a", make_adapter(1))
        await caller.fetch(1)
        found.update(rows_of(await asyncio.to_thread(scrape, addresses["control"])))

    run_aggregator(settings_for(state, clients=1), scenario)
    return found


def client_rows() -> set[Row]:
    status = Status("client-0", WireCounter(), loss_by_round=[1.0], nll_by_round=[1.0])
    status.seconds_by_phase["front_forward"] = 1.0
    metrics = ClientMetrics(status)
    metrics.refused._requests.labels("404").inc()
    return rows_of(parse(generate_latest(metrics.registry).decode()))


def documented() -> set[Row]:
    pattern = re.compile(r"^\| `(lesft_\w+)` \| (\w+) \| ([\w, ]*) ?\| .+ \|$", re.MULTILINE)
    text = (ROOT / "docs" / "monitoring.md").read_text()
    return {
        (name, kind, frozenset(label.strip() for label in labels.split(",") if label.strip()))
        for name, kind, labels in pattern.findall(text)
    }


def test_the_tables_have_every_metric_with_its_kind_and_labels(model: Path, tmp_path: Path) -> None:
    exposed = server_rows(model, tmp_path / "s") | aggregator_rows(tmp_path / "a") | client_rows()
    rows = {row for row in documented() if row[0] not in CERTIFICATES}
    assert rows - exposed == set()
    assert exposed - rows == set()
    assert {name for name, _, _ in documented()} >= CERTIFICATES


def test_every_phase_of_the_server_is_explained() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    explained = re.findall(r"^\| `(\w+)` \| each ", text, re.MULTILINE)
    assert explained == list(get_args(Phase))


# ---------------------------------------------------------------------- rules and dashboard


def names_in(expression: str) -> set[str]:
    """Our metrics in PromQL, a regular expression of names taken as what it stands for."""
    names = set(
        re.findall(r"\b(?:lesft|process)_\w+", re.sub(r"__name__=~\"[^\"]*\"", "", expression))
    )
    known = {name for name, _, _ in documented()}
    for pattern in re.findall(r"__name__=~\"([^\"]*)\"", expression):
        matching = {name for name in known if re.fullmatch(pattern, name)}
        assert matching, f"{pattern} matches no metric"
        names |= matching
    return names


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    text = (MONITORING / "grafana" / "dashboards" / "lesft.json").read_text()
    board: dict[str, Any] = json.loads(text)
    return board


def expressions() -> Iterator[tuple[str, str]]:
    for rule in rules():
        yield rule["alert"], rule["expr"]
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def test_rules_and_dashboard_use_metrics_that_there_are() -> None:
    families = {name for name, _, _ in documented()}
    for name, kind, _ in documented():
        parts = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("_sum", "_count")}
        families |= {name + part for part in parts.get(kind, ())}
    families |= {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"}
    for where, expression in expressions():
        assert names_in(expression) <= families, where


def test_every_metric_of_a_run_is_on_the_dashboard_or_in_a_rule_or_an_info() -> None:
    used = {name for _, expression in expressions() for name in names_in(expression)}
    unused = {
        name
        for name, kind, _ in documented()
        if not {name, f"{name}_sum", f"{name}_bucket"} & used and not name.endswith("_info")
    }
    assert unused == LEFT_OUT


LEFT_OUT = {
    "lesft_aggregator_clients",
    "lesft_aggregator_clients_required",
    "lesft_aggregator_receiving_waiting",
    "lesft_client_adapter_version",
    "lesft_client_nll",
    "lesft_client_rounds_planned",
    "lesft_client_rounds_total",
    "lesft_client_samples",
    "lesft_client_waiting",
    "lesft_server_client_resumptions_total",
    "lesft_server_decode_batches_total",
    "lesft_server_decode_steps_total",
    "lesft_server_front_sent_bytes_total",
}
"""For those who ask for them."""


def test_every_rule_has_its_section_in_the_runbook_and_no_section_is_left_over() -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    names = [section.split("\n", 1)[0] for section in sections]
    assert names == [rule["alert"] for rule in rules()]
    for section in sections:
        for part in ("**Means**", "**Look**", "**Do**", "**Wake somebody**"):
            assert section.count(part) == 1, section
    for rule in rules():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]
        address = f"docs/runbook.md#{rule['alert'].lower()}"
        assert rule["annotations"]["runbook_url"] == address


def test_the_dashboard_is_whole() -> None:
    board = dashboard()
    rows = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    assert rows == ["Run", "Clients", "Wire", "Step phases", "Aggregator", "Health"]
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    sources = yaml.safe_load(
        (MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text()
    )["datasources"]
    uids = {source["uid"] for source in sources}
    for panel in board["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] in uids
            grid = panel["gridPos"]
            assert grid["x"] + grid["w"] <= 24
    places = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places), "panels overlap"


# ---------------------------------------------------------------------- compose


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def test_the_monitoring_profile_asks_every_service_where_it_listens(
    compose: dict[str, Any],
) -> None:
    services = compose["services"]
    assert services["prometheus"]["profiles"] == services["grafana"]["profiles"] == ["monitoring"]
    jobs = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"]
    targets = [
        target for job in jobs for static in job["static_configs"] for target in static["targets"]
    ]
    asked = {target.split(":")[0] for target in targets}
    long_lived = {name for name in services if not name.startswith("enrol")}
    assert asked == long_lived - {"prometheus", "grafana"}
    for name in (*asked, "prometheus", "grafana"):
        service = services[name]
        assert "monitoring" in service["networks"], name
        assert service["read_only"] is True
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is open by accident"
    for job in jobs:
        assert job["scheme"] == "https"
        assert job["authorization"]["credentials_file"].startswith("/etc/lesft/monitoring/")
        if job["job_name"] != "lesft-client":  # theirs are made on the devices
            assert job["tls_config"]["ca_file"].startswith("/etc/lesft/monitoring/")


def test_images_are_pinned_and_what_is_mounted_is_there(compose: dict[str, Any]) -> None:
    for name in ("prometheus", "grafana"):
        service = compose["services"][name]
        assert re.search(r":v?\d+\.\d+\.\d+\}$", service["image"]), service["image"]
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source[0] == "." else source in compose["volumes"]
