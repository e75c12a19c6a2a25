"""`overhead` for real, by processes, on a tiny model: what must come out exactly."""

import json
from pathlib import Path

import pytest

from lesft.errors import InternalError
from lesft_testbed.bench.overhead import (
    Overhead,
    cached_options,
    check_same_loss,
    mean_of_epochs,
)
from lesft_testbed.bench.part import Bench
from lesft_testbed.bench.settings import BenchSettings
from tests.processes.harness import save_model_with_tokenizer
from tests.testbed.running import write_data

SAMPLES = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_with_tokenizer(tmp_path_factory.mktemp("model"))


def settings_in(folder: Path, model: Path, data: Path) -> BenchSettings:
    return BenchSettings(
        output=folder,
        cache=folder / "cache",
        model=str(model),
        data=str(data),
        samples=SAMPLES,
        threads=1,
        overhead={"rounds": 2, "skipped_rounds": 1},
    )


def test_overhead_trains_the_same_split_and_whole(tmp_path: Path, model: Path, data: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    settings = settings_in(tmp_path, model, data)
    with Overhead().alternatives(Bench(settings, str(model), tmp_path, scratch)) as alternatives:
        split, whole = (each.measure() for each in alternatives[:2])
    assert [each.name for each in alternatives] == ["splitlora", "whole", "lesft", "lesft-once"]
    assert whole["first_loss"] == pytest.approx(split["first_loss"], abs=1e-5)
    report = json.loads((scratch / "split-0" / "report.json").read_bytes())
    assert (report["clients"], report["method"]) == (1, "splitlora")
    assert len(report["seconds_by_round"]) == 3
    assert split["step_seconds"] == pytest.approx(sum(report["seconds_by_round"][1:]) / 2)
    request = json.loads((scratch / "whole" / "request.json").read_bytes())
    assert request["threads"] == 1
    assert [len(window) for window in request["windows"]] == [4, 4, 4]
    assert (request["lora"], request["optimizer"]) == tuple(
        report["settings"][name] for name in ("lora", "optimizer")
    )
    assert whole["step_seconds"] > 0


def test_a_remembered_path_costs_its_first_epoch_once_in_all_epochs(
    tmp_path: Path, model: Path, data: Path
) -> None:
    """The first round of all is skipped: it is not settled."""
    settings = settings_in(tmp_path, model, data)
    bench_of = Bench(settings, str(model), tmp_path, tmp_path)
    options = cached_options(bench_of)
    assert (options["method"], options["samples"], options["rounds"]) == ("lesft-once", 8, 10)
    seconds = [9.0, 3.0, *[1.0, 2.0] * 4]
    assert mean_of_epochs(seconds, skipped_rounds=1, epochs=5) == {
        "step_seconds": pytest.approx((3 + 4 * 1.5) / 5),
        "first_epoch_step_seconds": 3.0,
        "later_step_seconds": 1.5,
    }


def test_what_does_not_begin_with_the_same_loss_is_no_comparison() -> None:
    check_same_loss(2.0, 2.001)
    with pytest.raises(InternalError, match="do not train on the same"):
        check_same_loss(2.0, 2.1)
