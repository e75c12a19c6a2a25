"""The command on made-up parts: order, figures, files, what is skipped, redone, refused, lost."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from lesft.errors import InvalidInput, RunStopped
from lesft.settings import load_settings
from lesft_testbed.bench import picture
from lesft_testbed.bench.bench import bench
from lesft_testbed.bench.part import Alternative, Bench, Figure, ratio
from lesft_testbed.bench.parts import PARTS
from lesft_testbed.bench.results import BenchReport, read_report
from lesft_testbed.bench.settings import BenchSettings
from lesft_testbed.output import locked_output

SLOW, QUICK = [3.0, 9.0, 4.0], [2.0, 4.0, 1.0]
MEDIANS, RATIOS = 4.0 / 2.0, [1.5, 2.25, 4.0]


class FakePart:
    """Two alternatives whose seconds are written above."""

    depends_on: Sequence[str] = ("samples",)
    is_exact = False
    about = "Slow against quick."
    figures: Sequence[Figure] = (
        Figure("slowness", "slow / quick", ratio("slow", "quick", "seconds"), 2.0),
        Figure("at_least", "slow / quick", ratio("slow", "quick", "seconds"), 2.1, at_least=True),
        Figure("alone", "quick by itself", lambda v: v["quick"]["seconds"], 1.9),
    )
    measured: ClassVar[list[str]] = []

    def __init__(self, name: str = "first") -> None:
        self.name = name

    @contextmanager
    def alternatives(self, bench: Bench) -> Iterator[Sequence[Alternative]]:
        assert list(bench.scratch.iterdir()) == []
        (bench.scratch / "file").touch()
        slow, quick = iter(SLOW), iter(QUICK)

        def measure(name: str, values: Iterator[float]) -> dict[str, float]:
            self.measured.append(f"{self.name} {name}")
            return {"seconds": next(values)}

        yield (
            Alternative("slow", lambda: measure("slow", slow)),
            Alternative("quick", lambda: measure("quick", quick)),
        )


class Second(FakePart):
    def __init__(self) -> None:
        super().__init__("second")


class Exact(FakePart):
    is_exact = True

    def __init__(self) -> None:
        super().__init__("exact")


class Failing(FakePart):
    def __init__(self) -> None:
        super().__init__("failing")

    @contextmanager
    def alternatives(self, bench: Bench) -> Iterator[Sequence[Alternative]]:
        raise InvalidInput("it cannot be done here")
        yield ()


class Interrupted(FakePart):
    def __init__(self) -> None:
        super().__init__("interrupted")

    @contextmanager
    def alternatives(self, bench: Bench) -> Iterator[Sequence[Alternative]]:
        raise KeyboardInterrupt
        yield ()


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[str]:
    """The table has the made-up parts, too; returns what is measured, as it is."""
    for kind, name in (
        (FakePart, "first"),
        (Second, "second"),
        (Exact, "exact"),
        (Failing, "failing"),
        (Interrupted, "interrupted"),
    ):
        monkeypatch.setitem(PARTS, name, f"{__name__}:{kind.__name__}")  # type: ignore[arg-type]
    if "picture" not in request.node.name:  # drawing takes a second
        monkeypatch.setattr(picture, "draw_figures", lambda report, path: None)
    FakePart.measured = []
    return FakePart.measured


def settings_of(output: Path, *argv: str) -> BenchSettings:
    return load_settings(BenchSettings, "bench", [f"--output={output}", *argv])


def run(output: Path, parts: str, *more: str) -> str:
    return bench(settings_of(output, f"--parts={parts}", *more))


def test_alternatives_are_measured_by_turns_and_parts_in_the_order_asked_for(
    tmp_path: Path, parts: list[str]
) -> None:
    run(tmp_path, "second,first", "--repeats=2")
    turn = ["slow", "quick", "slow", "quick"]
    assert parts == [f"{part} {name}" for part in ("second", "first") for name in turn]
    assert not (tmp_path / ".measuring").exists()


def test_what_comes_out_the_same_each_time_is_measured_once(
    tmp_path: Path, parts: list[str]
) -> None:
    run(tmp_path, "exact")
    assert parts == ["exact slow", "exact quick"]
    assert read_report(tmp_path).parts[0].figures[0].by_repeat == [RATIOS[0]]


def test_a_figure_is_of_medians_with_its_repeats_and_whether_the_target_is_met(
    tmp_path: Path,
) -> None:
    table = run(tmp_path, "first")
    [part] = read_report(tmp_path).parts
    slowness, at_least, alone = part.figures
    assert (slowness.value, slowness.by_repeat) == (MEDIANS, RATIOS)
    assert (slowness.low, slowness.high) == (1.5, 4.0)
    assert [figure.met for figure in part.figures] == [True, False, False]
    assert (at_least.target, at_least.at_least) == (2.1, True)
    assert (alone.value, alone.by_repeat) == (2.0, QUICK)
    assert part.values("slow", "seconds") == SLOW
    lines = [line.split() for line in table.splitlines()]
    assert ["slowness", "2.000", "1.500", "to", "4.000", "≤", "2.000", "met"] in lines
    assert ["at_least", "2.000", "1.500", "to", "4.000", "≥", "2.100", "missed"] in lines


def test_the_file_has_the_machine_and_the_settings_that_the_part_depends_on(
    tmp_path: Path,
) -> None:
    run(tmp_path, "first", "--threads=3", "--samples=7")
    [part] = json.loads((tmp_path / "bench.json").read_bytes())["parts"]
    assert part["settings"] == {"repeats": 3, "samples": 7}
    machine = part["machine"]
    assert machine["torch_threads"] == 3
    assert machine["cores"] >= 1
    assert len(machine["load_average"]) == 3
    assert {"python", "torch", "peft", "lesft"} <= machine["versions"].keys()
    assert [(m["alternative"], m["repeat"], m["values"]) for m in part["measurements"]][:3] == [
        ("slow", 0, {"seconds": 3.0}),
        ("quick", 0, {"seconds": 2.0}),
        ("slow", 1, {"seconds": 9.0}),
    ]


def test_what_is_finished_is_not_measured_again_unless_asked_to(
    tmp_path: Path, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "first")
    parts.clear()
    table = run(tmp_path, "first,second", "--repeats=3")
    assert {line.split()[0] for line in parts} == {"second"}
    assert "finished already: first" in capsys.readouterr().err
    assert table.count("slowness") == 2
    parts.clear()
    run(tmp_path, "first", "--replace")
    assert len(parts) == 6
    assert [part.name for part in read_report(tmp_path).parts] == ["second", "first"]


def test_results_of_other_settings_are_not_overwritten_unless_asked_to(
    tmp_path: Path, parts: list[str]
) -> None:
    run(tmp_path, "first", "--samples=7")
    parts.clear()
    refusal = r"bench\.json has first with other settings: samples 7, wanted 8\. .* or --replace"
    with pytest.raises(InvalidInput, match=refusal):
        run(tmp_path, "second,first", "--samples=8")
    assert parts == []
    run(tmp_path, "first", "--samples=7", "--seed=5")  # it has no seed
    assert parts == []
    run(tmp_path, "first", "--samples=8", "--replace")
    assert read_report(tmp_path).parts[0].settings["samples"] == 8


def test_a_part_that_fails_does_not_lose_the_others_and_is_tried_again(
    tmp_path: Path, parts: list[str]
) -> None:
    with pytest.raises(RunStopped, match="1 of 3 parts failed:\nfailing: it cannot be done here"):
        run(tmp_path, "first,failing,second")
    report = read_report(tmp_path)
    assert [part.name for part in report.parts] == ["first", "second"]
    assert [(f.name, f.reason) for f in report.failed] == [("failing", "it cannot be done here")]
    assert "- `failing`: it cannot be done here" in (tmp_path / "bench.md").read_text()
    parts.clear()
    with pytest.raises(RunStopped, match="1 of 1 parts failed"):
        run(tmp_path, "first,failing,second")
    assert parts == []


def test_what_was_finished_before_an_interruption_is_kept(
    tmp_path: Path, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "first,interrupted,second")
    assert [part.name for part in read_report(tmp_path).parts] == ["first"]
    assert "the same command goes on from there" in capsys.readouterr().err
    assert "second slow" not in parts
    assert not (tmp_path / ".measuring").exists()


def test_a_folder_is_for_one_bench_at_a_time(tmp_path: Path) -> None:
    with (
        locked_output(tmp_path, "lesft-testbed bench"),
        pytest.raises(InvalidInput, match="in use by another lesft-testbed bench"),
    ):
        run(tmp_path, "first")


def test_a_file_that_is_no_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text('{"parts": [1]}')
    with pytest.raises(InvalidInput, match=r"bench\.json cannot be read as this release's"):
        run(tmp_path, "first")


def test_page_and_picture_show_misses_too(tmp_path: Path) -> None:
    run(tmp_path, "first")
    page = (tmp_path / "bench.md").read_text()
    assert "| `slowness` | slow / quick | 2.000 | 1.500 to 4.000 | ≤ 2.000 | met |" in page
    assert "| `at_least` | slow / quick | 2.000 | 1.500 to 4.000 | ≥ 2.100 | missed |" in page
    assert "| slow | seconds | 3.000 | 9.000 | 4.000 |" in page
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_can_be_read_back(tmp_path: Path) -> None:
    run(tmp_path, "first,exact")
    report = read_report(tmp_path)
    assert BenchReport.model_validate_json(report.model_dump_json()) == report
    assert report.part("exact") is not None
    assert report.part("second") is None
