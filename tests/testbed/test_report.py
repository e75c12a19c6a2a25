"""From the services' figures to report.json, report.md and the pictures."""

import json
from pathlib import Path
from typing import Any

import pytest

from lesft_testbed.page import page, summary, write_page
from lesft_testbed.picture import draw_loss
from lesft_testbed.questions import Question, Questions
from lesft_testbed.report import Report, make_report, write_report
from lesft_testbed.settings import RunSettings
from lesft_testbed.shares_picture import draw_shares

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
        "num_samples": 10 * factor,
        "samples_by_label": {"add": 7 * factor, "halve": 3 * factor},
        "skipped_samples": factor,
        "parameters": 1000 * factor,
        "trained_parameters": 100 * factor,
        "held_out_before": {"nll_sum": 30.0 * factor, "tokens": 10 * factor},
        "held_out_after": {"nll_sum": 10.0, "tokens": 10 * factor},
        "wire": {
            "up": {kind: factor * (i + 1) for i, kind in enumerate(KINDS)},
            "down": {kind: factor * 10 * (i + 1) for i, kind in enumerate(KINDS)},
        },
        "seconds": {"preparing": 2.0 * factor, "training": 5.0, "front_forward": 1.0 * factor},
    }


def answered(*right: bool | None, nll: float | None = None) -> list[Question]:
    return [
        Question(index=index, right=each, nll=nll, nll_tokens=0 if nll is None else 4)
        for index, each in enumerate(right)
    ]


def report_of(settings: RunSettings, results: list[dict[str, Any]], **questions: Any) -> Report:
    return make_report(
        settings,
        SPEC,
        ROUNDS,
        results,
        Questions(**questions),
        ["adapter"],
        {"starting": 1.0, "questions": 3.0, "total": 9.0},
        {"server": 5 << 20, "client-0": 3 << 19},
        "5e1f",
    )


@pytest.fixture
def report() -> Report:
    return report_of(
        RunSettings(clients=2, seed=5),
        [result(1), result(3)],
        before=answered(*[True] * 2, *[False] * 6),
        after=answered(*[True] * 4, *[False] * 4),
        digest="sha256:a5ed",
    )


def test_the_report_adds_up_what_the_services_measured(report: Report) -> None:
    assert (report.method, report.model, report.dataset) == ("lesft", "tiny", "wordproblems")
    assert (report.clients, report.cut_layer, report.rounds, report.seed) == (2, 1, 2, 5)
    assert (report.samples_per_client, report.skipped_samples) == (12, 4)
    assert report.samples_by_client == [10, 30]
    assert report.labels_by_client == [{"add": 7, "halve": 3}, {"add": 21, "halve": 9}]
    assert (report.client_parameters, report.client_trained_parameters) == (3000, 300)
    assert report.adapters == ["adapter"]
    assert report.settings["optimizer"]["learning_rate"] == 5e-4
    assert report.settings["samples"] == 12
    left_out = {"output", "config", "cache", "progress"}
    assert set(RunSettings.model_fields) - set(report.settings) == left_out
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
        "questions": 3.0,
        "total": 9.0,
    }
    assert report.peak_rss_mib == {"server": 5.0, "client-0": 1.5}
    assert report.versions["torch"]
    assert (report.data_sha256, report.questions_digest) == ("5e1f", "sha256:a5ed")
    assert (report.accuracy_before, report.accuracy_after) == (0.25, 0.5)
    assert report.accuracy_questions == 8
    assert report.accuracy_interval_after == pytest.approx((0.2152, 0.7848), abs=1e-4)
    assert (report.test_nll_before, report.test_nll_after) == (None, None)


def test_a_run_without_held_out_samples_and_questions_has_no_figures_of_them() -> None:
    results = [result(1)]
    for name in ("held_out_before", "held_out_after"):
        results[0][name] = {"nll_sum": 0.0, "tokens": 0}
    report = report_of(RunSettings(clients=1), results)
    assert report.heldout_nll_before is None
    assert report.heldout_nll_after is None
    assert (report.accuracy_before, report.accuracy_after) == (None, None)
    for text in (page(report), summary(report, Path("out"), "tiny")):
        assert "held-out" not in text
        assert "test questions" not in text


def test_likelihoods_of_the_test_questions_alone_stand_without_accuracy() -> None:
    report = report_of(
        RunSettings(clients=2, measure="likelihood"),
        [result(1), result(3)],
        after=answered(None, None, nll=6.0),
    )
    assert (report.test_nll_before, report.test_nll_after) == (None, 1.5)
    assert (report.accuracy_after, report.accuracy_questions) == (None, 2)
    text = summary(report, Path("out"), "tiny")
    assert "solutions' -log P per target token 1.5000" in text
    assert "accuracy" not in text
    assert "| -log P per target token, 2 test questions | - | 1.5000 |" in page(report)


def test_the_page_names_the_method_and_what_was_set_otherwise() -> None:
    results = [result(1), result(3)]
    lesft = page(report_of(RunSettings(clients=2), results))
    assert "Method `lesft` (LESFT: split, both paths, adaptive token weights). 2 rounds" in lesft
    assert "cut after layer 1" in lesft
    changed = RunSettings(method="fedavg", clients=2, aggregate=False, loss={"uniform_weight": 2})
    text = page(report_of(changed, results))
    assert "but with aggregate False, loss.uniform_weight 2.0. 2 rounds" in text
    assert "not split" in text
    assert "| held by a client | 3,000 |" in text
    use = "use it:  lesft-client serve --local --model tiny --adapter out/adapter"
    assert summary(report_of(changed, results), Path("out"), "tiny").endswith(use)


def test_shares_are_shown_only_where_they_were_made_to_differ(tmp_path: Path) -> None:
    results = [result(1), result(3)]
    assert "shares.png" not in page(report_of(RunSettings(clients=2), results))
    skewed = report_of(RunSettings(clients=2, skew="label", skew_alpha=0.1), results)
    assert "![Samples of each client](shares.png)" in page(skewed)
    assert "Shares differ by label (Dirichlet, alpha 0.1): 10, 30 samples." in page(skewed)
    pooled = report_of(RunSettings(method="centralized", skew="label"), [result(4)])
    assert "shares.png" not in page(pooled)
    assert (pooled.clients, pooled.samples_per_client) == (1, 48)


@pytest.mark.parametrize("kinds", [0, 2, 40])
def test_the_picture_of_shares_takes_any_number_of_kinds(kinds: int, tmp_path: Path) -> None:
    results = [result(1), result(3)]
    for each in results:
        each["samples_by_label"] = {f"kind {i}": i + 1 for i in range(kinds)}
    report = report_of(RunSettings(clients=2, skew="label"), results)
    draw_shares(report, tmp_path / "shares.png")
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_written_says_the_same_everywhere(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    write_page(report, tmp_path)
    assert Report(**json.loads((tmp_path / "report.json").read_text())) == report
    page = (tmp_path / "report.md").read_text()
    assert "| held-out -log P per target token | 3.0000 | 0.5000 |" in page
    assert (
        "| accuracy on 8 test questions, 95% interval | 25% (7% to 59%) | 50% (22% to 78%) |"
        in page
    )
    line = "accuracy, 8 test questions         25% -> 50%   (95%: 7% to 59% -> 22% to 78%)"
    assert line in summary(report, tmp_path, "tiny")
    assert "| activations base | 4 bytes | 40 bytes |" in page
    assert "| client-0 | 2 |" in page
    assert "![Loss by round](loss.png)" in page
    assert "3.0000 -> 0.5000" in summary(report, tmp_path, "tiny")


def test_the_picture_is_a_png_of_some_size(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    draw_loss(report, [[2.1, 1.6], [1.9, 1.4]], path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1200, 675)
