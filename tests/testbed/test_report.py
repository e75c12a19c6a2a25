"""From the services' figures to report.json, report.md and loss.png."""

import json
from pathlib import Path
from typing import Any

import pytest

from lesft_testbed.picture import draw_loss
from lesft_testbed.report import Accuracy, Report, make_report, summary, write_report

SPEC = {"model_name": "tiny", "clients": 2, "cut_layer": 1, "seed": 5}
ROUNDS: list[dict[str, Any]] = [
    {"round": 0, "loss": 2.0, "nll": 3.0, "class_counts": [1, 2, 3], "seconds": 0.5},
    {"round": 1, "loss": 1.5, "nll": 2.5, "class_counts": None, "seconds": 0.25},
]
KINDS = (
    *("activations_base", "activations_reference", "gradients", "labels", "adapters", "other"),
)


def result(factor: int) -> dict[str, Any]:
    """A client's result.json."""
    return {
        "skipped_samples": factor,
        "held_out_before": {"nll_sum": 30.0 * factor, "tokens": 10 * factor},
        "held_out_after": {"nll_sum": 10.0, "tokens": 10 * factor},
        "wire": {
            "up": {kind: factor * (i + 1) for i, kind in enumerate(KINDS)},
            "down": {kind: factor * 10 * (i + 1) for i, kind in enumerate(KINDS)},
        },
        "seconds": {"preparing": 2.0 * factor, "training": 5.0, "front_forward": 1.0 * factor},
    }


@pytest.fixture
def report() -> Report:
    return make_report(
        SPEC,
        "wordproblems",
        12,
        ROUNDS,
        [result(1), result(3)],
        {
            "before": Accuracy(questions=8, accuracy=0.25, interval=(0.07, 0.59)),
            "after": Accuracy(questions=8, accuracy=0.5, interval=(0.22, 0.78)),
        },
        {"starting": 1.0, "total": 9.0},
        {"server": 5 << 20, "client-0": 3 << 19},
    )


def test_the_report_adds_up_what_the_services_measured(report: Report) -> None:
    assert (report.method, report.model, report.dataset) == ("lesft", "tiny", "wordproblems")
    assert (report.clients, report.cut_layer, report.rounds, report.seed) == (2, 1, 2, 5)
    assert (report.samples_per_client, report.skipped_samples) == (12, 4)
    assert report.loss_by_round == [2.0, 1.5]
    assert report.nll_by_round == [3.0, 2.5]
    assert report.class_counts_by_round == [(1, 2, 3), None]
    assert report.heldout_nll_before == pytest.approx((30 + 90) / (10 + 30))
    assert report.heldout_nll_after == pytest.approx((10 + 10) / (10 + 30))
    assert report.wire["activations_base"] == {"up": 4, "down": 40}
    assert report.wire["other"] == {"up": 24, "down": 240}
    assert set(report.wire) == set(KINDS)
    assert report.seconds == {
        "preparing": 6.0,  # the slowest
        "training": 5.0,
        "training_front_forward": 2.0,  # the mean
        "starting": 1.0,
        "total": 9.0,
    }
    assert report.peak_rss_mib == {"server": 5.0, "client-0": 1.5}
    assert report.versions["torch"]
    assert (report.accuracy_before, report.accuracy_after) == (0.25, 0.5)
    assert report.accuracy_questions == 8
    assert report.accuracy_interval_after == (0.22, 0.78)


def test_a_run_without_held_out_samples_has_no_held_out_figures() -> None:
    results = [result(1)]
    for name in ("held_out_before", "held_out_after"):
        results[0][name] = {"nll_sum": 0.0, "tokens": 0}
    report = make_report(SPEC, "d", 1, ROUNDS, results, {}, {"starting": 0.5, "total": 1.0}, {})
    assert report.heldout_nll_before is None
    assert report.heldout_nll_after is None
    assert "held-out" not in summary(report, Path("out"))
    assert "accuracy" not in summary(report, Path("out"))
    assert (report.accuracy_before, report.accuracy_after) == (None, None)


def test_what_is_written_says_the_same_everywhere(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    assert Report(**json.loads((tmp_path / "report.json").read_text())) == report
    page = (tmp_path / "report.md").read_text()
    assert "| held-out -log P per target token | 3.0000 | 0.5000 |" in page
    assert (
        "| accuracy on 8 test questions, 95% interval | 25% (7% to 59%) | 50% (22% to 78%) |"
        in page
    )
    line = "accuracy, 8 test questions         25% -> 50%   (95%: 7% to 59% -> 22% to 78%)"
    assert line in summary(report, tmp_path)
    assert "| activations base | 4 bytes | 40 bytes |" in page
    assert "| client-0 | 2 |" in page
    assert "![Loss by round](loss.png)" in page
    assert "3.0000 -> 0.5000" in summary(report, tmp_path)


def test_the_picture_is_a_png_of_some_size(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    draw_loss(report, [[2.1, 1.6], [1.9, 1.4]], path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1200, 675)
