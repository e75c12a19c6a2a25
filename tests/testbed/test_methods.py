"""Methods are presets over independent settings: named, overridden one by one, refused by rule."""

from pathlib import Path
from typing import Any

import pytest

from lesft.settings import load_settings
from lesft.spec import LossSpec
from lesft_testbed.methods import METHODS
from lesft_testbed.settings import RunSettings


def run_settings(*argv: str) -> RunSettings:
    return load_settings(RunSettings, "lesft-testbed run", list(argv))


def uniform(weight: float, **more: Any) -> LossSpec:
    return LossSpec(token_weights="uniform", uniform_weight=weight, **more)


@pytest.mark.parametrize(
    ("method", "split", "pooled", "train_front", "aggregate", "loss"),
    [
        ("lesft", True, False, True, True, LossSpec()),
        ("splitlora", True, False, True, True, uniform(1)),
        ("sl", True, False, True, False, uniform(1)),
        ("splitfrozen", True, False, False, True, uniform(1)),
        ("fedavg", False, False, True, True, uniform(1)),
        ("centralized", False, True, True, False, uniform(1)),
        ("lesft-sl", True, False, True, False, LossSpec()),
        ("lesft-fl", False, False, True, True, LossSpec()),
        ("base-only", True, False, True, True, uniform(1)),
        ("reference-only", True, False, True, True, uniform(0, reference_nll_weight=1)),
        ("uniform-0", True, False, True, True, uniform(0)),
        ("uniform-0.25", True, False, True, True, uniform(0.25)),
        ("uniform-0.5", True, False, True, True, uniform(0.5)),
        ("uniform-0.75", True, False, True, True, uniform(0.75)),
        ("uniform-1", True, False, True, True, uniform(1)),
        ("uniform-1.5", True, False, True, True, uniform(1.5)),
        ("uniform-2", True, False, True, True, uniform(2)),
        ("lesft-contiguous", True, False, True, True, LossSpec(clustering="contiguous")),
        ("lesft-once", True, False, True, True, LossSpec(reference_refresh=0)),
        ("dft", True, False, True, True, LossSpec(token_weights="probability")),
    ],
)
def test_a_method_is_the_settings_of_its_row(
    method: str, split: bool, pooled: bool, train_front: bool, aggregate: bool, loss: LossSpec
) -> None:
    settings = run_settings(f"--method={method}")
    assert (settings.split, settings.pooled) == (split, pooled)
    assert (settings.train_front, settings.aggregate) == (train_front, aggregate)
    assert settings.loss == loss


def test_every_row_of_the_table_is_named_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_settings("--help")
    shown = capsys.readouterr().out.replace("\n", "").replace(" ", "")
    assert f"Whatisrun:{','.join(METHODS)}." in shown
    assert [name for name, method in METHODS.items() if method.name != name] == []


def test_only_the_method_that_trains_nothing_says_so() -> None:
    nothing = {name for name in METHODS if RunSettings(method=name).trains_nothing}
    assert nothing == {"uniform-0"}
    assert "trains nothing" in METHODS["uniform-0"].title
    assert not run_settings("--method=uniform-0", "--loss.base-nll-weight=1").trains_nothing


def test_what_is_given_goes_before_the_method_and_leaves_the_rest_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = run_settings("--method=sl", "--aggregate", "--loss.clustering=contiguous")
    assert settings.aggregate
    assert settings.loss == uniform(1, clustering="contiguous")

    file = tmp_path / "run.toml"
    file.write_text('method = "fedavg"\nsplit = true\n[loss]\nuniform_weight = 0.5\n')
    settings = run_settings(f"--config={file}")
    assert (settings.method, settings.split, settings.loss) == ("fedavg", True, uniform(0.5))
    assert run_settings(f"--config={file}", "--no-split").split is False

    monkeypatch.setenv("LESFT_TESTBED_METHOD", "splitlora")
    monkeypatch.setenv("LESFT_TESTBED_LOSS__UNIFORM_WEIGHT", "2")
    assert run_settings().loss == uniform(2)
    assert run_settings("--method=lesft").loss == LossSpec(uniform_weight=2)


def message(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        run_settings(*argv)
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[0].removeprefix("lesft-testbed run: ")


def test_a_method_that_is_none_is_refused_with_the_nearest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = message(capsys, "--method=splitfroze")
    assert said.startswith("--method: must be one of lesft, splitlora, sl, splitfrozen, ")
    assert said.endswith(" dft (did you mean splitfrozen?), got 'splitfroze'")
    assert "did you mean" not in message(capsys, "--method=xyz")


def test_what_contradicts_itself_is_refused_with_the_way_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message(capsys, "--method=splitfrozen", "--no-split") == (
        "--no-train-front leaves the training to the server, and with --no-split there is none: "
        "leave out one of the two"
    )
    personal = "--personal-layers=0,2"
    assert message(capsys, "--method=sl", personal).startswith(
        "--personal-layers 0,2 says what stays out of the average, but nothing is averaged with "
        "--no-aggregate, --no-train-front or --pooled, as --method sl may set them"
    )
    assert message(capsys, "--pooled", personal).startswith("--personal-layers 0,2 says")
    assert run_settings("--method=splitlora", personal).personal_layers == (0, 2)


def test_one_node_with_all_data_takes_as_many_steps_of_as_many_samples() -> None:
    asked = RunSettings(
        method="centralized",
        clients=3,
        samples=10,
        held_out=2,
        batch_size=2,
        accumulation=4,
        epochs=5,
        skew="size",
    )
    trained = asked.as_trained()
    assert (trained.clients, trained.samples, trained.held_out) == (1, 30, 6)
    assert (trained.batch_size, trained.accumulation, trained.skew) == (6, 4, "none")
    assert trained.num_rounds == asked.num_rounds == 6
    assert (trained.split, trained.loss) == (False, asked.loss)
    split = RunSettings(method="splitlora", clients=3)
    assert split.as_trained() is split


@pytest.mark.parametrize(
    ("options", "aggregator", "one_adapter"),
    [
        (["--method=lesft"], True, True),
        (["--method=lesft", "--clients=1"], True, True),
        (["--method=lesft", "--personal-layers=0"], True, False),
        (["--method=sl"], False, False),
        (["--method=sl", "--clients=1"], False, True),
        (["--method=splitfrozen"], False, True),
        (["--method=fedavg"], True, True),
        (["--method=fedavg", "--clients=1"], False, True),
        (["--method=fedavg", "--no-aggregate"], False, False),
        (["--method=centralized"], False, True),
        (["--method=centralized", "--aggregate"], False, True),
    ],
)
def test_who_needs_an_aggregator_and_who_ends_with_one_adapter(
    options: list[str], aggregator: bool, one_adapter: bool
) -> None:
    settings = run_settings(*options).as_trained()
    assert settings.needs_aggregator is aggregator
    assert settings.one_adapter is one_adapter
