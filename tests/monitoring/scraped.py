"""What /metrics answers, read by Prometheus' own parser."""

from dataclasses import dataclass

import httpx
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Scraped:
    """One answer."""

    text: str
    families: dict[str, Metric]
    samples: dict[tuple[str, Labels], float]

    def value(self, name: str, **labels: str) -> float:
        """The sample of this name with exactly these labels, which must be there."""
        return self.samples[name, frozenset(labels.items())]

    def series(self, name: str, label: str) -> dict[str, float]:
        """All samples of a name by one of their labels, which must tell them apart."""
        found = [(dict(labels), value) for (n, labels), value in self.samples.items() if n == name]
        by_label = {labels[label]: value for labels, value in found}
        assert len(by_label) == len(found), f"{label} does not tell the samples of {name} apart"
        return by_label


def parse(text: str) -> Scraped:
    """An answer's samples."""
    families = list(text_string_to_metric_families(text))
    samples: dict[tuple[str, Labels], float] = {}
    for family in families:
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in samples, f"{key} is there twice"
            samples[key] = sample.value
    return Scraped(text, {family.name: family for family in families}, samples)


def scrape(address: str) -> Scraped:
    """What the service with this control API answers."""
    response = httpx.get(f"http://{address}/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return parse(response.text)
