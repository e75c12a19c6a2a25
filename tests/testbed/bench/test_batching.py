"""Steps of a cohort, whole and client by client: the same work, and what of it is padding."""

from pathlib import Path
from typing import Any

import pytest

from lesft.errors import InternalError
from lesft_testbed.bench import batching
from lesft_testbed.bench.batching import Batching, same_length
from lesft_testbed.bench.cohort_steps import check_same_losses, measured_steps
from lesft_testbed.bench.part import Bench
from lesft_testbed.bench.settings import BenchSettings
from tests.tiny_models import save_tiny_model

COHORT = [
    {"base": [5, 6, 7], "reference": [8, 9, 10, 11, 12], "target": [13, 14, 15]},
    {"base": [21], "reference": [22, 23, 24], "target": [25]},
]
TOKENS = [(6, 8), (2, 4)]
"""Of each client, base and reference path with the target."""


def steps_of(model: Path, cohorts: dict[str, Any], skipped_steps: int = 0) -> Any:
    request = {"model": str(model), "threads": 1, "skipped_steps": skipped_steps}
    return measured_steps({**request, "cohorts": cohorts})


def test_a_batch_is_padded_to_its_longest_and_a_client_alone_is_not(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    answer = steps_of(tmp_path, {"": [COHORT], ", even": [same_length(COHORT)]})
    assert answer.keys() == {"batched", "one by one", "batched, even", "one by one, even"}
    tokens = sum(map(sum, TOKENS))
    assert answer["batched"]["tokens"] == answer["one by one"]["tokens"] == tokens
    assert answer["batched"]["padding_share"] == pytest.approx(1 - tokens / (2 * 6 + 2 * 8))
    for unpadded in ("one by one", "batched, even", "one by one, even"):
        assert answer[unpadded]["padding_share"] == 0
    assert all(values["step_seconds"] > 0 for values in answer.values())


def test_steps_before_those_that_are_measured_do_not_count(tmp_path: Path) -> None:
    save_tiny_model(tmp_path, "llama")
    longer = [COHORT[0], COHORT[0]]
    answer = steps_of(tmp_path, {"": [longer, COHORT, COHORT]}, skipped_steps=1)
    assert answer["batched"]["tokens"] == answer["one by one"]["tokens"] == sum(map(sum, TOKENS))


def test_samples_of_one_length_have_the_mean_of_what_they_are_made_of() -> None:
    assert same_length(COHORT) == [
        {"base": [5, 6], "reference": [8, 9, 10, 11], "target": [13, 14]},
        {"base": [21, 21], "reference": [22, 23, 24, 22], "target": [25, 25]},
    ]


def test_what_does_not_come_to_the_same_losses_is_no_comparison() -> None:
    check_same_losses([2.0, 1.0], [2.001, 1.0])
    with pytest.raises(InternalError, match="not the same steps"):
        check_same_losses([2.0, 1.0], [2.0, 1.1])


def test_each_repeat_is_one_process_for_all_alternatives_on_the_samples_of_all_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def run_program(bench: Bench, name: str, module: str, request: Any) -> dict[str, Any]:
        if module == "drawn":
            assert (request["clients"], request["rounds"], request["samples"]) == (2, 3, 7)
            return {"micro_batches": [[[[sample] for sample in COHORT]]] * 3}
        asked.append(request)
        ways = ("batched", "one by one", "batched, same length", "one by one, same length")
        return {way: {"step_seconds": len(asked) * 10 + i} for i, way in enumerate(ways)}

    monkeypatch.setattr(batching, "run_program", run_program)
    own = {"clients": 2, "steps": 2, "skipped_steps": 1}
    settings = BenchSettings(output=tmp_path, samples=7, threads=1, batching=own)
    with Batching().alternatives(Bench(settings, "model", tmp_path, tmp_path)) as alternatives:
        seconds = [each.measure()["step_seconds"] for each in (*alternatives, *alternatives)]
    assert seconds == [10, 11, 12, 13, 20, 21, 22, 23]
    assert asked[0]["cohorts"] == {"": [COHORT] * 3, ", same length": [same_length(COHORT)] * 3}
    assert (asked[0]["skipped_steps"], asked[0]["threads"]) == (1, 1)
