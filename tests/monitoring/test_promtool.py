"""Prometheus' own tool on its configuration, the alert rules and their tests."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.monitoring.test_docs import MONITORING, rules

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed (Debian: apt-get install prometheus)"
)


def promtool(*arguments: str, cwd: Path = MONITORING) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run(
        [PROMTOOL, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )


@needs_promtool
def test_the_rules_are_valid_and_pass_their_tests() -> None:
    checked = promtool("check", "rules", "alerts.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules())} rules found" in checked.stdout
    tested = promtool("test", "rules", "alerts_test.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


@needs_promtool
@pytest.mark.parametrize("name", [rule["alert"] for rule in rules()])
def test_without_a_rule_its_test_fails(name: str, tmp_path: Path) -> None:
    text = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    for group in text["groups"]:
        for rule in group["rules"]:
            if rule["alert"] == name:
                rule["expr"] = "vector(0) == 1"
    (tmp_path / "alerts.yml").write_text(yaml.safe_dump(text))
    shutil.copy(MONITORING / "alerts_test.yml", tmp_path)
    assert promtool("test", "rules", "alerts_test.yml", cwd=tmp_path).returncode != 0


@needs_promtool
def test_prometheus_takes_its_configuration(tmp_path: Path) -> None:
    text = (MONITORING / "prometheus.yml").read_text()
    text = text.replace("/etc/lesft/monitoring", str(tmp_path))
    text = text.replace("/etc/prometheus", str(tmp_path))
    (tmp_path / "prometheus.yml").write_text(text)
    shutil.copy(MONITORING / "alerts.yml", tmp_path)
    for service in ("server", "aggregator", "client"):
        (tmp_path / f"{service}.token").write_text("token")
        (tmp_path / f"{service}-ca.pem").write_text("")
    checked = promtool("check", "config", "prometheus.yml", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
