"""Seconds that a service has spent by phase, as its metrics have them."""

import httpx
from prometheus_client.parser import text_string_to_metric_families

_SECONDS = 10


def phase_seconds(control: str | None, metric: str) -> dict[str, float]:
    """By phase, of the service whose control API listens at `control`."""
    answer = httpx.get(f"http://{control}/metrics", timeout=_SECONDS, trust_env=False)
    families = text_string_to_metric_families(answer.raise_for_status().text)
    samples = [sample for family in families for sample in family.samples if sample.name == metric]
    return {sample.labels["phase"]: sample.value for sample in samples}
