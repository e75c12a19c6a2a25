"""`wire` and `overhead` for real, by processes, on a tiny model: what must come out exactly."""

import json
from pathlib import Path

import pytest

from lesft.errors import InternalError
from lesft_client.data import client_share, encode_samples, load_samples
from lesft_client.tokenizer import load_tokenizer
from lesft_testbed.bench.overhead import (
    Overhead,
    cached_options,
    check_same_loss,
    mean_of_epochs,
)
from lesft_testbed.bench.part import Bench
from lesft_testbed.bench.settings import BenchSettings
from lesft_testbed.bench.wire import Wire, paper_bytes
from tests.processes.harness import save_model_with_tokenizer
from tests.testbed.running import write_data
from tests.tiny_models import HIDDEN_SIZE

SAMPLES, CLIENTS, EPOCHS = 4, 1, 2


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
        parts=("wire",),
        model=str(model),
        data=str(data),
        samples=SAMPLES,
        threads=1,
        wire={"clients": CLIENTS, "epochs": EPOCHS},
        overhead={"rounds": 2, "skipped_rounds": 1},
    )


def lengths(model: Path, data: Path) -> dict[str, list[int]]:
    """Base, reference and target tokens of all samples of an epoch, of all clients."""
    drawn = load_samples(str(data), "train", CLIENTS * SAMPLES, 0)
    tokenizer = load_tokenizer(str(model))
    samples = []
    for index in range(CLIENTS):
        share = client_share(drawn, index, CLIENTS, SAMPLES, 0)
        samples += encode_samples(share, tokenizer, 1024)[0]
    return {
        "base": [len(s.base_ids) for s in samples],
        "reference": [len(s.reference_ids) for s in samples],
        "target": [len(s.target_ids) for s in samples],
    }


def test_wire_counts_what_arithmetic_says(tmp_path: Path, model: Path, data: Path) -> None:
    """At the leanest settings, where every kind has a size of its own."""
    (scratch := tmp_path / "scratch").mkdir()
    settings = settings_in(tmp_path, model, data)
    with Wire().alternatives(Bench(settings, str(model), tmp_path, scratch)) as alternatives:
        assert [each.name for each in alternatives] == ["default", "lean", "paper"]
        values, paper = (each.measure() for each in alternatives[1:])
    tokens = lengths(model, data)
    targets = sum(tokens["target"])
    base, reference = (sum(tokens[path]) + targets for path in ("base", "reference"))
    row = HIDDEN_SIZE // 2 + 2  # half a byte a value, and a scale
    assert values["activations_base_bytes_per_epoch"] == row * base
    assert values["gradients_bytes_per_epoch"] == row * base
    assert values["activations_reference_bytes_per_epoch"] == row * reference / EPOCHS
    assert values["labels_bytes_per_epoch"] == 4 * targets / EPOCHS
    assert values["bytes_per_epoch"] == pytest.approx(
        values["up_bytes_per_epoch"] + values["down_bytes_per_epoch"]
    )
    # Padded to the longest of a cohort: no less than what is sent, no more than all as the longest.
    adapters = paper["adapters_bytes_per_epoch"]
    assert adapters == values["adapters_bytes_per_epoch"] / 2 > 0
    sent = 2 * 2 * HIDDEN_SIZE * (base + reference)
    longest = max(tokens["base"]) + max(tokens["reference"]) + 2 * max(tokens["target"])
    most = 2 * 2 * HIDDEN_SIZE * longest * len(tokens["base"])
    assert sent <= paper["bytes_per_epoch"] - adapters <= most


def test_the_papers_bytes_are_of_padded_cohorts_in_both_directions() -> None:
    def sample(base: int, reference: int, target: int) -> dict[str, list[int]]:
        return {"base": [1] * base, "reference": [1] * reference, "target": [1] * target}

    cohort = [[sample(5, 9, 3)], [sample(7, 8, 4)]]
    alone = [[sample(2, 3, 1)], [sample(2, 3, 1)]]
    numbers = 2 * (7 + 4) + 2 * (8 + 4) + 2 * (2 + 1) + 2 * (3 + 1)
    assert paper_bytes([cohort, alone], hidden_size=10) == numbers * 10 * 2 * 2


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
