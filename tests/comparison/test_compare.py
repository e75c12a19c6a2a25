"""The command: what it runs, skips, redoes and survives, with a program that makes results up."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lesft.errors import InvalidInput, RunStopped
from lesft_testbed.comparison import compare as command
from lesft_testbed.comparison import pictures, schedule
from lesft_testbed.comparison.compare import compare
from lesft_testbed.comparison.schedule import end_leftovers
from lesft_testbed.output import locked_output
from tests.comparison import fake_run
from tests.comparison.harness import settings_of

ZERO, FEW = "zero-shot_tiny_wordproblems_seed-0", "few-shot_tiny_wordproblems_seed-0"
LESFT = "lesft_tiny_wordproblems_cut-1-4_samples-40_clients-4_seed-0"
SL = "sl_tiny_wordproblems_cut-1-4_samples-40_clients-4_seed-0"


@pytest.fixture
def wishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The file that says which made-up runs fail or dawdle; runs happen below `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    path = tmp_path / "wishes"
    path.touch()
    monkeypatch.setenv("FAKE_RUNS", str(path))
    fake = [sys.executable, str(Path(fake_run.__file__))]
    monkeypatch.setattr(command, "installed", lambda words: [*fake, *words[1:]])
    if "files" not in request.node.name:  # drawing takes seconds
        monkeypatch.setattr(pictures, "draw_pictures", lambda comparison, folder: [])
    return path


def run(*more: str, methods: str = "lesft,sl", seeds: str = "0", jobs: int = 2) -> str:
    words = ["--models=models/tiny", "--output=out", "--questions=20"]
    words += [f"--methods={methods}", f"--seeds={seeds}", f"--jobs={jobs}"]
    return compare(settings_of(*words, *more))


def started(wishes: Path) -> list[str]:
    """Names of the runs that were started so far, and forgets them."""
    file = wishes.with_name("started")
    names = [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    return sorted(names)


def all_but_measured() -> dict[str, Any]:
    comparison: dict[str, Any] = json.loads(Path("out/comparison.json").read_bytes())
    for figures in comparison["runs"]:
        del figures["measured"]
    return comparison


def collected(*more: str) -> dict[str, Any]:
    """What --collect finds."""
    run("--collect", *more)
    return all_but_measured()


def page_but_measured() -> str:
    return Path("out/comparison.md").read_text().partition("## Time and memory")[0]


def drawn() -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path("out").glob("*.png") if p.name != "time.png"}


def test_everything_is_run_once_and_what_is_finished_is_not_run_again(
    wishes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "zero-shot" in run()
    assert started(wishes) == sorted([ZERO, FEW, LESFT, SL])
    said = capsys.readouterr().err
    assert "4 runs to do, 2 at once" in said
    assert f"[1/4] {ZERO}" in said
    run()
    assert started(wishes) == []
    assert "4 of 4 runs are finished already" in capsys.readouterr().err


def test_only_what_a_larger_plan_adds_is_run(wishes: Path) -> None:
    run()
    started(wishes)
    run(seeds="0,1", methods="lesft")
    assert started(wishes) == sorted(n.replace("seed-0", "seed-1") for n in (ZERO, FEW, LESFT))


def test_finished_runs_of_other_settings_are_not_overwritten_unless_asked_to(
    wishes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    started(wishes)
    manifest = Path("out/manifest.txt").read_text()
    refusal = (
        rf"out/runs/{LESFT} has other settings: epochs 3, planned 2 \(and so 1 more run\)\. What "
        r"is finished is not overwritten: give another --output than out, or --replace to run it"
    )
    for more in ((), ("--manifest-only",)):
        with pytest.raises(InvalidInput, match=refusal):
            run("--epochs=2", *more)
    assert started(wishes) == []
    assert Path("out/manifest.txt").read_text() == manifest
    run("--epochs=2", "--replace")
    assert started(wishes) == sorted([LESFT, SL])  # the untuned model has no epochs
    assert f"out/runs/{SL} has other settings: epochs 3, planned 2: it is run again" in (
        capsys.readouterr().err
    )


def test_what_was_made_with_other_data_of_the_same_name_is_not_of_the_plan(wishes: Path) -> None:
    Path("notes.jsonl").write_text("one\n")
    run("--data=notes.jsonl")
    names = [name.replace("wordproblems", "notes") for name in (FEW, LESFT, SL, ZERO)]
    assert started(wishes) == names
    run("--data=notes.jsonl")
    assert started(wishes) == []
    Path("notes.jsonl").write_text("two\n")
    with pytest.raises(InvalidInput, match=r"trained on other data: notes.jsonl has changed since"):
        run("--data=notes.jsonl")
    reasons = {each["name"]: each["reason"] for each in collected("--data=notes.jsonl")["missing"]}
    assert sorted(reasons) == names
    assert "has answered questions of other data" in reasons[names[0]]
    run("--data=notes.jsonl", "--replace")
    assert started(wishes) == names
    assert all_but_measured()["missing"] == []


def test_an_untuned_model_that_was_asked_other_questions_is_not_beside_the_trained_ones(
    wishes: Path,
) -> None:
    run()
    path = Path(f"out/runs/{ZERO}/evaluation.json")
    path.write_text(path.read_text().replace("sha256:wordproblems", "sha256:earlier problems"))
    names = {each["name"] for each in collected()["missing"]}
    assert names == {ZERO, FEW}  # the examples' digest says nothing of the questions
    for file in Path("out").glob("runs/*/report.json"):
        report = json.loads(file.read_bytes())
        del report["questions_digest"], report["data_sha256"]
        file.write_text(json.dumps(report))
    assert collected()["missing"] == []  # of before there were digests


def test_examples_before_other_questions_are_found_by_their_answers(wishes: Path) -> None:
    run()
    path = Path(f"out/runs/{FEW}/evaluation.json")
    path.write_text(path.read_text().replace('"expected": "7"', '"expected": "8"'))
    assert [each["name"] for each in collected()["missing"]] == [FEW]


def test_a_failed_run_is_reported_and_the_others_go_on(
    wishes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wishes.write_text(f"fail {ZERO}\n")
    with pytest.raises(RunStopped, match=rf"1 of 4 runs failed[\s\S]*{ZERO}"):
        run()
    assert started(wishes) == sorted([ZERO, FEW, LESFT, SL])
    assert "ended with status 1" in (said := capsys.readouterr().err)
    assert "the model melted" in said
    assert all_but_measured()["missing"] == [{"name": ZERO, "reason": "has no results yet"}]
    wishes.write_text("")
    run()
    assert started(wishes) == [ZERO]
    assert all_but_measured()["missing"] == []


def test_a_run_that_answered_nothing_has_failed_and_is_run_again(
    wishes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wishes.write_text(f"mute {SL}\n")
    with pytest.raises(RunStopped, match="1 of 4 runs failed"):
        run()
    assert f"{SL} failed: ended well, but has not measured accuracy and likelihood" in (
        capsys.readouterr().err
    )
    started(wishes)
    wishes.write_text("")
    run()
    assert started(wishes) == [SL]


def test_a_comparison_that_was_stopped_and_resumed_leaves_the_same_files(
    wishes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(methods="lesft", seeds="0,1")
    whole = all_but_measured(), page_but_measured(), drawn()
    subprocess.run(["rm", "-r", "out"], check=True)
    started(wishes)
    wishes.write_text(f"slow {LESFT}\n")
    real_sleep = time.sleep

    def interrupt_once_it_dawdles(seconds: float) -> None:
        real_sleep(0.05)
        if (
            wishes.with_name("started").exists()
            and LESFT in wishes.with_name("started").read_text()
        ):
            raise KeyboardInterrupt

    monkeypatch.setattr(schedule.time, "sleep", interrupt_once_it_dawdles)
    with pytest.raises(KeyboardInterrupt):
        run(methods="lesft", seeds="0,1", jobs=1)
    monkeypatch.setattr(schedule.time, "sleep", real_sleep)
    lines = wishes.with_name("started").read_text().splitlines()
    assert "2 of 6 runs are finished; the same command goes on from there" in (
        capsys.readouterr().err
    )
    assert not psutil.pid_exists(int(lines[-1].split()[1]))
    started(wishes)
    wishes.write_text("")
    run(methods="lesft", seeds="0,1")
    assert len(started(wishes)) == 4
    assert (all_but_measured(), page_but_measured(), drawn()) == whole
    assert {"bytes.png", "methods.png"} <= whole[2].keys()


def test_a_process_that_a_killed_comparison_left_is_ended_and_no_other(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    left, other = subprocess.Popen(sleep), subprocess.Popen(sleep)
    try:
        records = [
            {"pid": left.pid, "started": psutil.Process(left.pid).create_time()},
            {"pid": other.pid, "started": 1.0},  # the number of an earlier process
        ]
        (tmp_path / "running.json").write_text(json.dumps(records))
        assert end_leftovers(tmp_path) == 1
        assert not psutil.pid_exists(left.pid)
        assert other.poll() is None
    finally:
        left.kill()
        other.kill()
        other.wait()


def test_the_variables_of_the_comparison_are_not_those_of_its_runs(
    wishes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LESFT_TESTBED_LOSS__UNIFORM_WEIGHT", "7")
    run(seeds="3", methods="sl")
    report = json.loads(Path(f"out/runs/{SL[:-1]}3/report.json").read_bytes())
    assert report["settings"]["loss"]["uniform_weight"] == 1.0


def test_two_comparisons_cannot_share_a_folder_and_the_second_leaves_the_first_s_manifest(
    wishes: Path,
) -> None:
    run("--manifest-only")
    manifest = Path("out/manifest.txt").read_text()
    with locked_output(Path("out"), "lesft-testbed compare"):
        for more in ((), ("--manifest-only",)):
            with pytest.raises(InvalidInput, match="is in use by another"):
                run(*more, methods="lesft")
        run("--collect", methods="lesft")
    assert Path("out/manifest.txt").read_text() == manifest


def test_a_manifest_alone_starts_nothing(wishes: Path) -> None:
    assert run("--manifest-only") == "4 runs: out/manifest.txt"
    assert started(wishes) == []
    assert len(Path("out/manifest.txt").read_text().splitlines()) == 4


def test_collect_makes_the_results_of_what_a_queue_has_run_so_far(wishes: Path) -> None:
    run("--manifest-only")
    line = json.loads(Path("out/manifest.jsonl").read_text().splitlines()[2])
    fake_run.write_results(line["command"])
    assert "3 runs not finished" in run("--collect")
    assert started(wishes) == []
    found = all_but_measured()
    assert [figures["name"] for figures in found["runs"]] == [LESFT]
    assert [each["name"] for each in found["missing"]] == [ZERO, FEW, SL]
    assert f"- `{SL}`: has no results yet" in Path("out/comparison.md").read_text()
