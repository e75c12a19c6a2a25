"""The part `wire`: what is run, what is counted, and the paper's bytes beside it."""

from pathlib import Path
from typing import Any

import pytest

from lesft_testbed.bench import wire
from lesft_testbed.bench.part import Bench
from lesft_testbed.bench.settings import BenchSettings
from lesft_testbed.bench.wire import Wire, paper_bytes
from lesft_testbed.report import Report

EPOCHS = 2
BYTES = {
    "activations_base": {"up": 800, "down": 0},
    "activations_reference": {"up": 500, "down": 0},
    "gradients": {"up": 0, "down": 800},
    "labels": {"up": 40, "down": 0},
    "adapters": {"up": 200, "down": 100},
    "other": {"up": 6, "down": 4},
}


def sample(base: int, reference: int, target: int) -> dict[str, list[int]]:
    return {"base": [1] * base, "reference": [1] * reference, "target": [1] * target}


COHORT = [[sample(5, 9, 3)], [sample(7, 8, 4)]]
ALONE = [[sample(2, 3, 1)], [sample(2, 3, 1)]]
PAPER_ADAPTERS = 2 * 2 * 2 * 10 * 2
"""Two clients, two averages of three rounds, both ways, ten numbers of two bytes."""
PAPER_NUMBERS = 2 * (7 + 4) + 2 * (8 + 4) + 2 * (2 + 1) + 2 * (3 + 1)


def test_the_papers_bytes_are_of_padded_cohorts_in_both_directions() -> None:
    assert paper_bytes([COHORT, ALONE], hidden_size=10) == PAPER_NUMBERS * 10 * 2 * 2


def test_runs_at_default_and_at_leanest_settings_are_set_against_the_paper(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[dict[str, Any]] = []

    def run_training(bench: Bench, name: str, run: dict[str, Any]) -> Report:
        runs.append(run)
        return Report.model_construct(
            rounds=3,
            clients=2,
            samples_by_client=[6, 6],
            client_trained_parameters=10,
            settings={"accumulation": 4, "batch_size": 1, "aggregation_interval": 2},
            wire=BYTES,
        )

    def drawn_samples(bench: Bench, report: Report) -> dict[str, Any]:
        return {"micro_batches": [[COHORT, ALONE]], "hidden_size": 10}

    monkeypatch.setattr(wire, "run_training", run_training)
    monkeypatch.setattr(wire, "drawn_samples", drawn_samples)
    settings = BenchSettings(output=tmp_path, wire={"clients": 2, "epochs": EPOCHS})
    with Wire().alternatives(Bench(settings, "model", tmp_path, tmp_path)) as alternatives:
        values = {each.name: each.measure() for each in alternatives}

    assert runs == [
        {"clients": 2, "epochs": 2},
        {
            "clients": 2,
            "epochs": 2,
            "activation_encoding": "int4",
            "gradient_encoding": "int4",
            "adapter_encoding": "int4",
            "loss": {"reference_refresh": "once"},
        },
    ]
    # 3 rounds of 4 micro-batches of 2 clients are 24 samples, two epochs of 12.
    assert values["default"] == values["lean"]
    assert values["default"]["bytes_per_epoch"] == (1546 + 904) / 2
    assert values["default"]["up_bytes_per_epoch"] == 1546 / 2
    assert values["default"]["adapters_bytes_per_epoch"] == 300 / 2
    assert values["paper"] == {
        "bytes_per_epoch": (PAPER_NUMBERS * 40 + PAPER_ADAPTERS) / 2,
        "adapters_bytes_per_epoch": PAPER_ADAPTERS / 2,
    }
    default, lean = (figure.compute(values) for figure in Wire.figures)
    assert default == lean == (1546 + 904) / (PAPER_NUMBERS * 40 + PAPER_ADAPTERS)
